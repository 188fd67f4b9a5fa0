//! Reads the files of a run.

use anyhow::Context;
use bytes::Bytes;
use potstill_proto::scores::Subject;
use potstill_spec::RunSpec;
use potstill_storage::{Run, layout::SAMPLES};

use crate::monitor::{
    CURVES, METRICS, SUMMARY,
    metrics::{Evaluation, Metrics},
    summary::Summary,
};

/// The content of a run's folder.
pub struct Gathered {
    /// The frozen specification.
    pub specification: String,
    /// Its final summary, or if the run is not finished, one made from its last evaluation.
    pub summary: Summary,
    /// Whether the run is finished.
    pub finished: bool,
    /// Every evaluation of the student, in order.
    pub evaluations: Vec<Evaluation>,
    /// Wall time of the run and the summed time of all ranks, in seconds, over all attempts.
    pub device_seconds: f64,
    /// `samples.png`.
    pub samples: Option<Bytes>,
    /// `curves.png`.
    pub curves: Option<Bytes>,
}

impl Gathered {
    /// Reads the run's folder.
    ///
    /// # Errors
    /// There is no such run, or a file of it cannot be read.
    pub async fn load(run: &Run) -> anyhow::Result<Self> {
        let specification = run.specification().await?.with_context(|| {
            format!("there is no run {}: {} is missing", run.id(), run.describe("run.toml"))
        })?;
        let spec = RunSpec::of_finished_run(&specification)?;
        let metrics = match run.get(METRICS).await? {
            Some(bytes) => Metrics::resume(&spec, &String::from_utf8_lossy(&bytes))
                .with_context(|| run.describe(METRICS))?,
            None => Metrics::new(&spec),
        };
        let finished = match run.get(SUMMARY).await? {
            Some(bytes) => Some(
                serde_json::from_slice::<Summary>(&bytes)
                    .with_context(|| format!("cannot read {}", run.describe(SUMMARY)))?,
            ),
            None => None,
        };
        let evaluations: Vec<Evaluation> = metrics.evaluations(Subject::Student).cloned().collect();
        let (summary, finished) = match finished {
            Some(summary) => (summary, true),
            None => {
                let last = evaluations.last().map_or(0, |e| e.iteration);
                let name = run.id().to_string();
                (Summary::new(&name, &metrics, last, None, metrics.wall_seconds()), false)
            }
        };
        let device_seconds = summary.wall_seconds * f64::from(summary.world_size.unwrap_or(1));
        Ok(Self {
            specification,
            summary,
            finished,
            evaluations,
            device_seconds,
            samples: run.get(SAMPLES).await?,
            curves: run.get(CURVES).await?,
        })
    }
}
