//! `metrics.jsonl`: the metrics of a run, one JSON object a line.
//!
//! Two kinds of line. `iteration` lines carry means over a window of iterations; `evaluation` lines carry the scores of
//! the teacher or of the student. `iteration` counts completed iterations, `images` the samples they used, so that the
//! lines of both kinds share an axis. A number that was not finite is `null`.

use potstill_core::observation::IterationTotals;
use potstill_proto::{
    scores::{self, Scores, Subject},
    wire,
};
use potstill_spec::RunSpec;
use serde::{Deserialize, Deserializer, Serialize};

/// A line that is not of this module's format.
#[derive(Debug, thiserror::Error)]
#[error("line {line} of metrics.jsonl cannot be read ({source}); move the file away to continue without it")]
pub struct MetricsError {
    /// The line's number, from 1.
    line: usize,
    source: serde_json::Error,
}

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Row {
    /// A window of training.
    Iteration(Training),
    /// The teacher or the student was scored.
    Evaluation(Evaluation),
}

/// Means over the last `iterations` iterations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// Completed iterations at the end of the window.
    pub iteration: u64,
    /// Iterations in the window.
    pub iterations: u64,
    /// Images seen so far.
    pub images: u64,
    /// Ranks that computed the window's last iteration.
    pub world_size: u32,
    /// Mean over samples of the fake-score loss.
    #[serde(deserialize_with = "nan_if_null")]
    pub fake_score_loss: f64,
    /// Mean over samples of the generator loss.
    #[serde(deserialize_with = "nan_if_null")]
    pub generator_loss: f64,
    /// Mean over samples of |f_φ − f_ψ|².
    #[serde(deserialize_with = "nan_if_null")]
    pub score_difference: f64,
    /// Mean L2 norm of the fake score's gradient.
    #[serde(deserialize_with = "nan_if_null")]
    pub fake_score_grad_norm: f64,
    /// Mean L2 norm of the generator's gradient.
    #[serde(deserialize_with = "nan_if_null")]
    pub generator_grad_norm: f64,
    /// Samples per second of training alone: no evaluation, no waiting for workers.
    #[serde(deserialize_with = "nan_if_null")]
    pub images_per_second: f64,
    /// Mean seconds of one iteration by kind of work, of the slowest rank.
    pub seconds: Seconds,
    /// Mean over samples of the discriminator's loss; absent without the adversarial loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discriminator_loss: Option<f64>,
    /// Mean over samples of the generator's adversarial loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generator_adversarial_loss: Option<f64>,
    /// fp16's loss scales at the end of the window, of fake score and generator; absent where both are 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scales: Option<[f64; 2]>,
    /// The most memory in bytes that a rank's process has needed so far: on GPUs of tensors, on CPUs its resident set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_peak_bytes: Option<u64>,
    /// Samples dropped in the window because something in them was not finite.
    pub non_finite_samples: u64,
    /// Gradient elements in the window that were not finite.
    pub non_finite_gradients: u64,
    /// Seconds of all attempts at this run, up to this line.
    pub wall_seconds: f64,
}

/// Seconds of one iteration by kind of work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seconds {
    /// Forward and backward.
    pub compute: f64,
    /// Waiting for collectives.
    pub communication: f64,
    /// Both optimizers.
    pub optimizer: f64,
    /// The whole iteration.
    pub total: f64,
}

/// One evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// The subject: teacher or student.
    pub subject: Subject,
    /// Completed iterations.
    pub iteration: u64,
    /// Images seen so far.
    pub images: u64,
    /// The result.
    pub scores: Scores,
    /// Seconds of all attempts at this run, up to this line.
    pub wall_seconds: f64,
}

/// JSON has no NaN or infinity: they are written as `null`.
fn nan_if_null<'de, D: Deserializer<'de>>(number: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(number)?.unwrap_or(f64::NAN))
}

impl Seconds {
    fn add(&mut self, other: &wire::StepSeconds, weight: f64) {
        self.compute += other.compute * weight;
        self.communication += other.communication * weight;
        self.optimizer += other.optimizer * weight;
        self.total += other.total * weight;
    }
}

/// The lines of a run so far, and the window that is not complete yet.
#[derive(Debug)]
pub struct Metrics {
    rows: Vec<Row>,
    window: Vec<IterationTotals>,
    global_batch: u64,
    iterations: u64,
    window_length: u64,
    checkpoint_every: u64,
}

impl Metrics {
    /// No lines yet. A window has ten iterations, or in long runs a two-thousandth of all, so that the file stays small
    /// enough to be written as a whole. It also ends where a checkpoint is due, so that a resumed run can continue the
    /// file without a gap.
    #[must_use]
    pub fn new(spec: &RunSpec) -> Self {
        let iterations = spec.distillation.iterations;
        Self {
            rows: Vec::new(),
            window: Vec::new(),
            global_batch: spec.distillation.global_batch.into(),
            iterations,
            window_length: (iterations / 2000).max(10),
            checkpoint_every: spec.checkpoint.every.max(1),
        }
    }

    /// Continues from the lines of an earlier attempt.
    ///
    /// # Errors
    /// [`MetricsError`] names the first line that cannot be read.
    pub fn resume(spec: &RunSpec, text: &str) -> Result<Self, MetricsError> {
        let mut metrics = Self::new(spec);
        for (index, line) in text.lines().enumerate() {
            let row =
                serde_json::from_str(line).map_err(|source| MetricsError { line: index + 1, source })?;
            metrics.rows.push(row);
        }
        Ok(metrics)
    }

    /// The file's text.
    ///
    /// # Errors
    /// None known: every row has a JSON form.
    pub fn to_jsonl(&self) -> Result<String, serde_json::Error> {
        let mut text = String::new();
        for row in &self.rows {
            text += &serde_json::to_string(row)?;
            text.push('\n');
        }
        Ok(text)
    }

    /// Adds an iteration; ends the window where one ends, and returns its line then.
    pub fn iteration(&mut self, totals: IterationTotals, wall_seconds: f64) -> Option<&Training> {
        let completed = totals.iteration + 1;
        // A new coordinator receives reports again that its predecessor had counted, but not evaluations.
        let begun = totals.iteration;
        self.rows.retain(|row| !matches!(row, Row::Iteration(training) if training.iteration > begun));
        self.window.push(totals);
        if completed.is_multiple_of(self.window_length)
            || completed.is_multiple_of(self.checkpoint_every)
            || completed == self.iterations
        {
            return self.close_window(wall_seconds);
        }
        None
    }

    /// Ends the current window, if it holds an iteration, and returns its line.
    pub fn close_window(&mut self, wall_seconds: f64) -> Option<&Training> {
        let window = std::mem::take(&mut self.window);
        let last = window.last()?;
        let iteration = last.iteration + 1;
        let weight = 1.0 / window.len() as f64;
        let mean = |of: fn(&IterationTotals) -> f64| window.iter().map(of).sum::<f64>() * weight;
        // In the window in which the adversarial loss starts, the mean is over the iterations that have it.
        let optional = |of: fn(&IterationTotals) -> Option<f64>| {
            let values: Vec<f64> = window.iter().filter_map(of).collect();
            (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
        };
        let mut seconds = Seconds::default();
        for totals in &window {
            seconds.add(&totals.seconds, weight);
        }
        self.rows.push(Row::Iteration(Training {
            iteration,
            iterations: window.len() as u64,
            images: iteration * self.global_batch,
            world_size: last.world_size,
            fake_score_loss: mean(|t| t.fake_score_loss),
            generator_loss: mean(|t| t.generator_loss),
            score_difference: mean(|t| t.score_difference),
            fake_score_grad_norm: mean(|t| t.fake_score_grad_norm),
            generator_grad_norm: mean(|t| t.generator_grad_norm),
            images_per_second: mean(|t| f64::from(t.samples)) / seconds.total,
            seconds,
            discriminator_loss: optional(|t| t.discriminator_loss),
            generator_adversarial_loss: optional(|t| t.generator_adversarial_loss),
            loss_scales: Some(last.loss_scales).filter(|scales| *scales != [1.0; 2]),
            memory_peak_bytes: window.iter().filter_map(|t| t.memory_peak).max(),
            non_finite_samples: window.iter().map(|t| u64::from(t.non_finite_samples)).sum(),
            non_finite_gradients: window.iter().map(|t| t.non_finite_gradients).sum(),
            wall_seconds,
        }));
        self.training().last()
    }

    /// Adds an evaluation, and returns its line; a second one of the same subject and iteration replaces the first.
    pub fn evaluation(&mut self, evaluation: &scores::Evaluation, wall_seconds: f64) -> Evaluation {
        let scores::Evaluation { iteration, subject, scores, .. } = *evaluation;
        self.rows.retain(
            |row| !matches!(row, Row::Evaluation(e) if e.subject == subject && e.iteration == iteration),
        );
        let images = iteration * self.global_batch;
        let row = Evaluation { subject, iteration, images, scores, wall_seconds };
        self.rows.push(Row::Evaluation(row.clone()));
        row
    }

    /// Training continues from the state after `iteration` iterations: removes the lines beyond it. The teacher does
    /// not train, so its evaluations stay. Returns whether there were any.
    pub fn rewind(&mut self, iteration: u64) -> bool {
        let before = self.rows.len();
        self.window.retain(|totals| totals.iteration < iteration);
        self.rows.retain(|row| match row {
            Row::Iteration(training) => training.iteration <= iteration,
            Row::Evaluation(e) => e.subject == Subject::Teacher || e.iteration <= iteration,
        });
        self.rows.len() < before
    }

    /// All lines, oldest first.
    pub fn rows(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter()
    }

    /// The furthest iteration that a line about the student has; none without such a line.
    #[must_use]
    pub fn reached(&self) -> Option<u64> {
        let trained = self.training().map(|training| training.iteration);
        trained.chain(self.evaluations(Subject::Student).map(|evaluation| evaluation.iteration)).max()
    }

    /// All windows, oldest first.
    pub fn training(&self) -> impl Iterator<Item = &Training> {
        self.rows.iter().filter_map(|row| match row {
            Row::Iteration(training) => Some(training),
            Row::Evaluation(_) => None,
        })
    }

    /// All evaluations of `subject`, oldest first.
    pub fn evaluations(&self, subject: Subject) -> impl DoubleEndedIterator<Item = &Evaluation> {
        self.rows.iter().filter_map(move |row| match row {
            Row::Evaluation(evaluation) if evaluation.subject == subject => Some(evaluation),
            _ => None,
        })
    }

    /// Seconds of all attempts up to the last line; 0 without lines.
    #[must_use]
    pub fn wall_seconds(&self) -> f64 {
        self.rows.last().map_or(0.0, |row| match row {
            Row::Iteration(training) => training.wall_seconds,
            Row::Evaluation(evaluation) => evaluation.wall_seconds,
        })
    }

    /// Images of one iteration.
    #[must_use]
    pub fn global_batch(&self) -> u64 {
        self.global_batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::fixtures::{evaluation, spec, totals};

    #[test]
    fn windows_are_means_and_end_where_a_checkpoint_is_due() {
        let mut spec = spec(100);
        spec.checkpoint.every = 25;
        let mut metrics = Metrics::new(&spec);
        for i in 0..25 {
            metrics.iteration(IterationTotals { non_finite_samples: 1, ..totals(i) }, i as f64);
        }
        let rows: Vec<_> = metrics.training().collect();
        assert_eq!(
            rows.iter().map(|r| (r.iteration, r.iterations)).collect::<Vec<_>>(),
            [(10, 10), (20, 10), (25, 5)]
        );
        let expected = (0..10).map(|i| totals(i).generator_loss).sum::<f64>() / 10.0;
        assert!((rows[0].generator_loss - expected).abs() < 1e-12);
        assert_eq!(rows[0].non_finite_samples, 10);
        assert_eq!(rows[2].images, 25 * 128);
        let per_second = 128.0 / totals(0).seconds.total;
        assert!((rows[0].images_per_second - per_second).abs() < 1e-9, "{}", rows[0].images_per_second);
        assert_eq!(rows[1].wall_seconds, 19.0);
    }

    #[test]
    fn lines_are_json_with_a_kind_and_read_back_the_same() {
        let mut metrics = Metrics::new(&spec(20));
        metrics.evaluation(&evaluation(Subject::Teacher, 0, 3.0), 1.0);
        for i in 0..20 {
            metrics.iteration(totals(i), 2.0);
        }
        metrics.evaluation(&evaluation(Subject::Student, 20, 9.0), 3.0);
        let text = metrics.to_jsonl().unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let kinds: Vec<_> = lines.iter().map(|l| l["kind"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["evaluation", "iteration", "iteration", "evaluation"]);
        assert_eq!(lines[0]["subject"], "teacher");
        assert_eq!(lines[3]["scores"]["fid"], 9.0);
        assert!(lines[1]["seconds"]["communication"].is_number());

        let again = Metrics::resume(&spec(20), &text).unwrap();
        assert_eq!(again.rows, metrics.rows);
        assert_eq!(again.wall_seconds(), 3.0);
    }

    #[test]
    fn what_lies_beyond_the_resumed_checkpoint_is_forgotten_but_not_the_teacher() {
        let mut metrics = Metrics::new(&spec(100));
        for i in 0..47 {
            metrics.iteration(totals(i), 0.0);
        }
        metrics.evaluation(&evaluation(Subject::Student, 30, 8.0), 0.0);
        metrics.evaluation(&evaluation(Subject::Student, 40, 7.0), 0.0);
        metrics.evaluation(&evaluation(Subject::Teacher, 40, 2.0), 0.0);
        metrics.rewind(30);
        assert_eq!(metrics.training().map(|r| r.iteration).collect::<Vec<_>>(), [10, 20, 30]);
        assert_eq!(metrics.evaluations(Subject::Student).map(|e| e.iteration).collect::<Vec<_>>(), [30]);
        assert_eq!(metrics.evaluations(Subject::Teacher).count(), 1);
        for i in 30..40 {
            metrics.iteration(totals(i), 0.0);
        }
        let last = metrics.training().last().unwrap();
        assert_eq!((last.iteration, last.iterations), (40, 10));
    }

    #[test]
    fn a_second_scoring_replaces_the_first() {
        let mut metrics = Metrics::new(&spec(100));
        metrics.evaluation(&evaluation(Subject::Student, 30, 8.0), 0.0);
        metrics.evaluation(&evaluation(Subject::Student, 30, 7.5), 0.0);
        let fids: Vec<_> = metrics.evaluations(Subject::Student).map(|e| e.scores.fid).collect();
        assert_eq!(fids, [Some(7.5)]);
    }

    #[test]
    fn numbers_that_are_not_finite_survive_as_null() {
        let mut metrics = Metrics::new(&spec(1));
        metrics.iteration(IterationTotals { generator_loss: f64::NAN, ..totals(0) }, 0.0);
        let text = metrics.to_jsonl().unwrap();
        assert!(text.contains("\"generator_loss\":null"), "{text}");
        let again = Metrics::resume(&spec(1), &text).unwrap();
        assert!(again.training().next().unwrap().generator_loss.is_nan());
    }

    #[test]
    fn a_damaged_line_is_named() {
        let error = Metrics::resume(&spec(1), "{\"kind\":\"iteration\"").unwrap_err();
        assert!(error.to_string().starts_with("line 1 of metrics.jsonl cannot be read"), "{error}");
    }
}
