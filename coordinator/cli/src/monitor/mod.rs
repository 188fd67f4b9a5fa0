//! The live view of a run: the log, the progress, `metrics.jsonl`, `curves.png`, `summary.json`, files for TensorBoard, what its page
//! and Prometheus are told, and the final table.

pub mod curves;
pub mod feed;
#[cfg(test)]
mod fixtures;
mod kubeflow;
pub mod log;
pub mod metrics;
mod mlflow;
pub mod number;
pub mod progress;
pub mod prometheus;
mod scalars;
pub mod screen;
pub mod summary;
mod tensorboard;
mod unix_time;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use potstill_core::observation::{Observation, Outcome};
use potstill_proto::{message::Source, scores::Subject};
use potstill_spec::RunSpec;
use potstill_storage::{
    Run,
    layout::{SAMPLES, manifest_iteration, manifest_key},
};
use tokio::sync::mpsc::UnboundedReceiver;
use tracing::warn;

use curves::Curves;
use feed::Feed;
use kubeflow::Teller;
use metrics::{Metrics, Row};
use mlflow::Tracker;
use progress::Progress;
use prometheus::Prometheus;
use screen::Screen;
use summary::Summary;
use tensorboard::Tensorboard;

/// How often metrics are saved that no checkpoint or evaluation has saved.
const SAVE: Duration = Duration::from_secs(30);

/// Metrics, one JSON object a line.
pub const METRICS: &str = "metrics.jsonl";
/// FID and losses as a picture.
pub const CURVES: &str = "curves.png";
/// The result of a run.
pub const SUMMARY: &str = "summary.json";

/// Observes a run and shows its progress. Failures to write its own files are logged and never end the run.
pub struct Monitor {
    run: Run,
    name: String,
    metrics: Metrics,
    tensorboard: Tensorboard,
    feed: Arc<Feed>,
    prometheus: Arc<Prometheus>,
    /// Where Kubeflow runs this.
    kubeflow: Option<Teller>,
    /// Where the environment names a server of MLflow.
    mlflow: Option<Tracker>,
    iterations: u64,
    /// Whether there are metrics that are not saved.
    unsaved: bool,
    progress: Progress,
    started: Instant,
    ended: Option<Instant>,
    /// Wall time of earlier attempts.
    earlier_seconds: f64,
    world_size: Option<u32>,
    /// Iterations that were computed again.
    repeated: u64,
    /// The name of this process's coordinator, once it owns the run.
    coordinator: Option<String>,
}

/// The result of a run, for printing.
pub struct Ending {
    /// The table of teacher and student, and where the run's files are.
    pub text: String,
    /// Whether there is a checkpoint from which the run could be resumed.
    pub resumable: bool,
}

impl Monitor {
    /// Starts the view, or on `resume` continues the one in the run's folder. Writes nothing yet.
    ///
    /// # Errors
    /// An earlier view's files cannot be read.
    pub async fn open(run: Run, spec: &RunSpec, resume: bool, screen: &Screen) -> anyhow::Result<Self> {
        let path = run.describe(METRICS);
        let earlier = if resume {
            run.get(METRICS).await.with_context(|| format!("cannot read {path}"))?
        } else {
            None
        };
        let metrics = match earlier {
            Some(bytes) => Metrics::resume(spec, &String::from_utf8_lossy(&bytes)).context(path)?,
            None => Metrics::new(spec),
        };
        let specification = spec.to_toml()?;
        Ok(Self {
            mlflow: Tracker::start(&run.id().to_string(), &run.describe(""), &specification),
            name: run.id().to_string(),
            tensorboard: Tensorboard::new(
                run.clone(),
                specification,
                metrics.wall_seconds(),
                metrics.reached(),
            ),
            feed: Arc::new(Feed::new(spec, metrics.rows().cloned().collect(), metrics.wall_seconds())),
            prometheus: Arc::new(Prometheus::new(&run.id().to_string(), spec.distillation.iterations)),
            kubeflow: Teller::start(),
            iterations: spec.distillation.iterations,
            unsaved: false,
            earlier_seconds: metrics.wall_seconds(),
            run,
            metrics,
            progress: Progress::new(screen, spec.distillation.iterations),
            started: Instant::now(),
            ended: None,
            world_size: None,
            repeated: 0,
            coordinator: None,
        })
    }

    /// What the run's page shows.
    #[must_use]
    pub fn feed(&self) -> Arc<Feed> {
        Arc::clone(&self.feed)
    }

    /// The run's numbers for Prometheus.
    #[must_use]
    pub fn prometheus(&self) -> Arc<Prometheus> {
        Arc::clone(&self.prometheus)
    }

    /// Processes all observations until the run has ended.
    pub async fn follow(mut self, mut observations: UnboundedReceiver<Observation>) -> Self {
        let mut interval = tokio::time::interval(SAVE);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                observation = observations.recv() => match observation {
                    Some(observation) => self.observe(observation).await,
                    None => return self,
                },
                _ = interval.tick(), if self.unsaved => {
                    self.save_lines().await;
                    // In an object store each save is a file of its own.
                    if self.run.local(tensorboard::FOLDER).is_some() {
                        self.save_events().await;
                    }
                }
            }
        }
    }

    async fn observe(&mut self, observation: Observation) {
        log::observation(&observation);
        self.progress.observe(&observation, Instant::now());
        self.prometheus.observe(&observation);
        self.feed.observe(&observation);
        let wall_seconds = self.wall_seconds();
        match observation {
            Observation::Started { coordinator, repeated, .. } => {
                (self.coordinator, self.repeated) = (Some(coordinator), repeated);
            }
            Observation::GenerationOpened { world_size, source, repeated, .. } => {
                self.world_size = Some(world_size);
                self.repeated = repeated;
                match source {
                    Source::Fresh => self.rewind(0),
                    Source::Checkpoint { manifest_key } => match manifest_iteration(&manifest_key) {
                        Some(iteration) => self.rewind(iteration),
                        None => warn!(manifest_key, "no iteration in the manifest's key: metrics may repeat"),
                    },
                    Source::Peer { .. } => {}
                }
                // A coordinator that takes over continues the count from here.
                self.close_window(wall_seconds);
                self.save_metrics().await;
            }
            Observation::Iteration(totals) => {
                let done = totals.iteration + 1;
                if let Some(row) = self.metrics.iteration(totals, wall_seconds).cloned() {
                    self.show(&Row::Iteration(row));
                    self.tell_kubeflow(done, false);
                }
                self.unsaved = true;
            }
            Observation::Evaluated(report) => {
                let row = Row::Evaluation(self.metrics.evaluation(&report, wall_seconds));
                self.show(&row);
                self.save_metrics().await;
                self.save_curves().await;
            }
            Observation::Committed { .. } => self.save_metrics().await,
            Observation::Ended(_) => self.ended = Some(Instant::now()),
            _ => {}
        }
    }

    /// Writes the files a last time, and returns the run's result.
    pub async fn finish(mut self, outcome: &Outcome) -> Ending {
        self.progress.clear();
        let mut text = String::new();
        let wall_seconds = self.wall_seconds();
        self.close_window(wall_seconds);
        self.save_metrics().await;
        self.save_curves().await;
        if let Outcome::Succeeded { iteration } = outcome {
            self.tell_kubeflow(*iteration, true);
        }
        if let Some(teller) = self.kubeflow.take() {
            teller.finish().await;
        }
        if let Some(tracker) = self.mlflow.take() {
            let owned = self.is_owner(METRICS).await;
            tracker.finish(owned.then_some(outcome)).await;
        }
        let mut keys = vec![];
        if let Outcome::Succeeded { iteration } | Outcome::Stopped { iteration, .. } = outcome {
            let summary = Summary {
                repeated_iterations: self.repeated,
                ..Summary::new(&self.name, &self.metrics, *iteration, self.world_size, wall_seconds)
            };
            match serde_json::to_vec_pretty(&summary) {
                Ok(json) => self.save(SUMMARY, json).await,
                Err(error) => warn!(%error, "cannot write {SUMMARY}"),
            }
            if let Some(table) = summary.table() {
                text += &format!("{table}\n");
            }
            keys.push(("summary", SUMMARY));
        }
        keys.extend([("samples", SAMPLES), ("curves", CURVES), ("metrics", METRICS)]);
        for (name, key) in keys {
            if matches!(self.run.get(key).await, Ok(Some(_))) {
                text += &format!("{name:<11}{}\n", self.run.describe(key));
            }
        }
        let resumable = match self.run.checkpoints().await {
            Ok(checkpoints) => match checkpoints.last() {
                Some(newest) => {
                    text += &format!("checkpoint {}\n", self.run.describe(&manifest_key(*newest)));
                    true
                }
                None => false,
            },
            Err(error) => {
                warn!(%error, "cannot list the checkpoints");
                true
            }
        };
        Ending { text, resumable }
    }

    fn wall_seconds(&self) -> f64 {
        let now = self.ended.unwrap_or_else(Instant::now);
        self.earlier_seconds + (now - self.started).as_secs_f64()
    }

    fn rewind(&mut self, iteration: u64) {
        if self.metrics.rewind(iteration) {
            self.tensorboard.rewind(iteration);
            self.feed.rewind(iteration, self.metrics.rows().cloned().collect());
        }
    }

    fn close_window(&mut self, wall_seconds: f64) {
        if let Some(row) = self.metrics.close_window(wall_seconds).cloned() {
            self.show(&Row::Iteration(row));
        }
    }

    /// Shows a new row where rows are shown at once.
    fn show(&self, row: &Row) {
        self.feed.row(row);
        if let Some(tracker) = &self.mlflow {
            tracker.row(row);
        }
    }

    /// Tells the run's progress with the numbers of the newest rows.
    fn tell_kubeflow(&self, iteration: u64, done: bool) {
        let Some(teller) = &self.kubeflow else { return };
        let mut metrics = Vec::new();
        if let Some(row) = self.metrics.training().last() {
            metrics.extend([
                ("fake_score_loss", row.fake_score_loss),
                ("generator_loss", row.generator_loss),
                ("images_per_second", row.images_per_second),
            ]);
        }
        if let Some(fid) = self.metrics.evaluations(Subject::Student).last().and_then(|e| e.scores.fid) {
            metrics.push(("fid", fid));
        }
        let remaining_seconds = if done { Some(0.0) } else { self.progress.seconds_left(iteration) };
        teller.tell(kubeflow::Progress {
            iteration,
            iterations: self.iterations,
            done,
            remaining_seconds,
            metrics,
        });
    }

    async fn save_metrics(&mut self) {
        self.save_lines().await;
        self.save_events().await;
    }

    async fn save_lines(&mut self) {
        self.unsaved = false;
        match self.metrics.to_jsonl() {
            Ok(text) if text.is_empty() => {}
            Ok(text) => self.save(METRICS, text.into_bytes()).await,
            Err(error) => warn!(%error, "cannot write {METRICS}"),
        }
    }

    async fn save_events(&mut self) {
        let (wall_seconds, now) = (self.wall_seconds(), unix_time::now());
        let before = match self.ended {
            Some(_) => u64::MAX,
            None => self.metrics.reached().unwrap_or(0),
        };
        if self.is_owner(tensorboard::FOLDER).await
            && let Err(error) = self.tensorboard.save(self.metrics.rows(), before, wall_seconds, now).await
        {
            warn!(error = format!("{error:#}"), "TensorBoard's files cannot be written");
        }
    }

    async fn save_curves(&self) {
        let curves = Curves::new(&self.name, &self.metrics);
        match tokio::task::spawn_blocking(move || curves.draw()).await {
            Ok(Ok(Some(png))) => self.save(CURVES, png).await,
            Ok(Ok(None)) => {}
            Ok(Err(error)) => warn!("{error}"),
            Err(error) => warn!(%error, "cannot draw {CURVES}"),
        }
    }

    /// Whether this coordinator may write: where another one has taken over, the files are that one's.
    async fn is_owner(&self, key: &str) -> bool {
        let Some(own) = &self.coordinator else { return true };
        let place = self.run.describe(key);
        match self.run.coordinator().await {
            Ok(Some(owner)) if owner.name == *own => return true,
            Ok(_) => warn!("{place} is not written: another coordinator owns the run"),
            Err(error) => warn!(%error, "{place} is not written"),
        }
        false
    }

    async fn save(&self, key: &str, bytes: Vec<u8>) {
        if !self.is_owner(key).await {
            return;
        }
        if let Err(error) = self.run.put(key, bytes.into()).await {
            warn!(%error, "cannot write {}", self.run.describe(key));
        }
    }
}

#[cfg(test)]
mod tests {
    use potstill_core::observation::IterationTotals;
    use potstill_proto::{
        cursor::Generation,
        scores::Subject::{Student, Teacher},
    };
    use potstill_storage::Root;
    use potstill_storage::{coordinators::Coordinator, journal::Journal};
    use serde_json::Value;
    use tokio::sync::mpsc;

    use super::*;
    use fixtures::{evaluation, spec, totals};

    fn root() -> (tempfile::TempDir, Root) {
        let folder = tempfile::tempdir().unwrap();
        let root = Root::open(folder.path().to_str().unwrap()).unwrap();
        (folder, root)
    }

    fn generation(source: Source) -> Observation {
        Observation::GenerationOpened {
            generation: Generation(1),
            world_size: 2,
            source,
            repeated: 0,
            reason: "2 workers attached".into(),
        }
    }

    fn iterations(range: std::ops::Range<u64>) -> impl Iterator<Item = Observation> {
        range.map(|i| Observation::Iteration(IterationTotals { world_size: 2, ..totals(i) }))
    }

    /// One attempt at a run of 40 iterations.
    async fn attempt(root: &Root, resume: bool, observations: Vec<Observation>, outcome: Outcome) -> String {
        let run = root.run(&"r".parse().unwrap());
        let report = Monitor::open(run, &spec(40), resume, &Screen::without_bar()).await.unwrap();
        let (sender, receiver) = mpsc::unbounded_channel();
        for observation in observations {
            sender.send(observation).unwrap();
        }
        sender.send(Observation::Ended(outcome.clone())).unwrap();
        drop(sender);
        report.follow(receiver).await.finish(&outcome).await.text
    }

    async fn read(root: &Root, key: &str) -> Option<Vec<u8>> {
        root.run(&"r".parse().unwrap()).get(key).await.unwrap().map(Into::into)
    }

    async fn rows(root: &Root) -> Vec<(String, u64)> {
        let text = String::from_utf8(read(root, METRICS).await.unwrap()).unwrap();
        let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        rows.map(|row| (row["kind"].as_str().unwrap().to_owned(), row["iteration"].as_u64().unwrap()))
            .collect()
    }

    #[tokio::test]
    async fn a_run_leaves_its_files_and_says_where() {
        let (_folder, root) = root();
        let mut observations = vec![generation(Source::Fresh)];
        observations.push(Observation::Evaluated(evaluation(Teacher, 0, 3.0)));
        observations.push(Observation::Evaluated(evaluation(Student, 0, 300.0)));
        observations.extend(iterations(0..40));
        observations.push(Observation::Evaluated(evaluation(Student, 40, 5.0)));
        let text = attempt(&root, false, observations, Outcome::Succeeded { iteration: 40 }).await;

        let summary: Value = serde_json::from_slice(&read(&root, SUMMARY).await.unwrap()).unwrap();
        assert_eq!(summary["run"], "r");
        assert_eq!(summary["world_size"], 2);
        assert_eq!(summary["student"]["fid"], 5.0);
        assert_eq!(summary["initial"]["fid"], 300.0);
        assert!(read(&root, CURVES).await.unwrap().starts_with(b"\x89PNG"));
        assert_eq!(rows(&root).await.len(), 3 + 4);
        for part in ["teacher", SUMMARY, CURVES, METRICS] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert!(!text.contains(SAMPLES), "no worker wrote samples");
    }

    #[tokio::test]
    async fn a_resumed_run_continues_its_metrics_from_the_checkpoint() {
        let (_folder, root) = root();
        let mut observations = vec![generation(Source::Fresh)];
        observations.push(Observation::Evaluated(evaluation(Teacher, 0, 3.0)));
        observations.extend(iterations(0..20));
        observations.push(Observation::Committed { iteration: 20, bytes: 1 });
        observations.extend(iterations(20..33));
        attempt(&root, false, observations, Outcome::Failed { reason: "power".into() }).await;
        assert!(read(&root, SUMMARY).await.is_none(), "a failed run has no result");
        let before =
            Metrics::resume(&spec(40), std::str::from_utf8(&read(&root, METRICS).await.unwrap()).unwrap());
        let wall_before = before.unwrap().wall_seconds();

        let mut observations = vec![generation(Source::Checkpoint { manifest_key: manifest_key(20) })];
        observations.extend(iterations(20..40));
        attempt(&root, true, observations, Outcome::Succeeded { iteration: 40 }).await;
        let kinds = rows(&root).await;
        let iterations: Vec<u64> = kinds.iter().filter(|r| r.0 == "iteration").map(|r| r.1).collect();
        assert_eq!(iterations, [10, 20, 30, 40]);
        assert_eq!(kinds[0], ("evaluation".to_owned(), 0));
        let summary: Value = serde_json::from_slice(&read(&root, SUMMARY).await.unwrap()).unwrap();
        assert_eq!(summary["images"], 40 * 128);
        assert_eq!(summary["teacher"]["fid"], 3.0);
        assert!(summary["wall_seconds"].as_f64().unwrap() > wall_before);
        assert!(summary["student"]["fid"].is_null());
    }

    #[tokio::test]
    async fn a_coordinator_that_has_lost_the_run_writes_nothing() {
        let (_folder, root) = root();
        let run = root.run(&"r".parse().unwrap());
        run.put(METRICS, "the successor's".into()).await.unwrap();
        let started = |coordinator: &str| Observation::Started {
            coordinator: coordinator.to_owned(),
            repeated: 0,
            address: String::new(),
            resumed: false,
        };
        let observations = |coordinator| {
            let mut observations = vec![started(coordinator), generation(Source::Fresh)];
            observations.push(Observation::Evaluated(evaluation(Student, 0, 300.0)));
            observations.extend(iterations(0..20));
            observations
        };
        let owner =
            Coordinator { name: "successor".into(), address: String::new(), certificate: None, ended: None };
        let (journal, _) = Journal::open(&run).await.unwrap();
        run.announce(&journal, &owner).await.unwrap();
        let lost = Outcome::Failed { reason: "another coordinator has taken over".into() };
        attempt(&root, false, observations("old"), lost).await;
        assert_eq!(read(&root, METRICS).await.unwrap(), b"the successor's");
        assert!(read(&root, CURVES).await.is_none());
        attempt(&root, false, observations("successor"), Outcome::Succeeded { iteration: 20 }).await;
        assert_eq!(rows(&root).await.len(), 3);
    }

    #[tokio::test]
    async fn damaged_metrics_are_not_overwritten() {
        let (_folder, root) = root();
        let run = root.run(&"r".parse().unwrap());
        run.put(METRICS, "{".into()).await.unwrap();
        let error = Monitor::open(run, &spec(40), true, &Screen::without_bar()).await.err().unwrap();
        assert!(format!("{error:#}").contains("line 1"), "{error:#}");
        assert_eq!(read(&root, METRICS).await.unwrap(), b"{");
    }
}
