//! `[cluster]`: the number of workers, and timeouts.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{problems::Problems, units::duration};

/// Workers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ClusterSpec {
    /// With fewer workers than this the run waits.
    pub min_workers: u32,
    /// Workers beyond this number are standby.
    pub max_workers: u32,
    /// A worker that is silent for this long is dead. All other timeouts but `wait_timeout` derive from it: a worker
    /// sends a heartbeat every tenth of it, a worker without progress for four times as long hangs, and the ranks of a
    /// generation must meet within six times as long.
    #[serde(with = "duration")]
    #[schemars(with = "String")]
    pub failure_timeout: Duration,
    /// How long the run waits for `min_workers` before it fails.
    #[serde(with = "duration")]
    #[schemars(with = "String")]
    pub wait_timeout: Duration,
    /// A rank whose forward and backward passes take this many times the median, for twenty iterations in a row, is named
    /// as a straggler.
    pub straggler_factor: f64,
    /// A spare takes the place of a straggler.
    pub replace_stragglers: bool,
}

impl Default for ClusterSpec {
    fn default() -> Self {
        Self {
            min_workers: 1,
            max_workers: 1,
            failure_timeout: Duration::from_secs(10),
            wait_timeout: Duration::from_secs(300),
            straggler_factor: 1.5,
            replace_stragglers: false,
        }
    }
}

impl ClusterSpec {
    /// `micro_batches`: micro-batches of an iteration.
    pub(crate) fn validate(&self, micro_batches: Option<u32>, problems: &mut Problems) {
        problems.require(self.min_workers >= 1 && self.min_workers <= self.max_workers, || {
            format!(
                "cluster needs 1 ≤ min_workers ≤ max_workers; they are {} and {}",
                self.min_workers, self.max_workers
            )
        });
        if let Some(micro_batches) = micro_batches {
            problems.require(self.max_workers <= micro_batches, || {
                format!(
                    "{} workers but only {micro_batches} micro-batches per iteration (global_batch / micro_batch): lower \
                     distillation.micro_batch or use fewer workers",
                    self.max_workers
                )
            });
        }
        problems.require(self.straggler_factor > 1.0, || {
            format!("cluster.straggler_factor is {}; it must be above 1", self.straggler_factor)
        });
        let [failure, wait] = [self.failure_timeout, self.wait_timeout].map(humantime::format_duration);
        problems.require(
            (Duration::from_millis(100)..=Duration::from_secs(3600)).contains(&self.failure_timeout),
            || format!("cluster.failure_timeout is {failure}; it must be between 100ms and 1h"),
        );
        problems.require(self.wait_timeout >= self.failure_timeout, || {
            format!("cluster.wait_timeout is {wait}; it must be at least failure_timeout ({failure})")
        });
    }
}
