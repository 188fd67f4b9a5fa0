//! What of a run's specification decides how it is coordinated.

use std::{num::NonZeroU32, time::Duration};

/// The terms of a run, validated.
#[derive(Clone, Debug, PartialEq)]
pub struct Terms {
    /// Iterations of the whole run.
    pub iterations: u64,
    /// Micro-batches in one iteration, at least one for each worker.
    pub micro_batches: u32,
    /// Samples in a micro-batch.
    pub micro_batch: u32,
    /// Fewer workers than this and the run waits.
    pub min_workers: u32,
    /// More workers than this stand by.
    pub max_workers: u32,
    /// How long to wait for what.
    pub timeouts: Timeouts,
    /// Whether the teacher and the student are scored.
    pub scored: bool,
    /// The run stops when the student's diversity falls below this share of the teacher's.
    pub collapse_share: f64,
    /// The run ends after so many failed checkpoints in a row; without it, it never does for that.
    pub stop_after_failures: Option<NonZeroU32>,
}

/// Every timeout of a run, derived from `failure_timeout` so that they cannot contradict each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Between two heartbeats.
    pub heartbeat_millis: u64,
    /// Silent for so long: unknown.
    pub unknown_millis: u64,
    /// Silent for so long: dead.
    pub dead_millis: u64,
    /// Heartbeats without progress for so long: hung. Four times as long as for silence: one unit of work, such as a
    /// micro-batch, may take a while.
    pub hang_millis: u64,
    /// Bound for one collective: longer than it takes to find the peer that is dead or hung, so that the coordinator speaks
    /// first.
    pub collective_millis: u64,
    /// How long to wait for workers.
    pub wait_millis: u64,
}

impl Timeouts {
    /// Derives them. `failure`: a worker that is silent for so long is dead. `wait`: how long to wait for workers.
    #[must_use]
    pub fn new(failure: Duration, wait: Duration) -> Self {
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        Self {
            heartbeat_millis: millis(failure / 10).max(20),
            unknown_millis: millis(failure / 3),
            dead_millis: millis(failure),
            hang_millis: millis(failure * 4),
            collective_millis: millis(failure * 6),
            wait_millis: millis(wait),
        }
    }
}
