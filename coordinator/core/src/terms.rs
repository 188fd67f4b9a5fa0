//! The part of a run's specification that the coordinator needs.

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
    /// With fewer workers than this the run waits.
    pub min_workers: u32,
    /// Workers beyond this number are standby.
    pub max_workers: u32,
    /// How the ranks divide the state.
    pub division: Division,
    /// The run's timeouts.
    pub timeouts: Timeouts,
    /// Whether the teacher and the student are scored.
    pub scored: bool,
    /// The run stops when the student's diversity falls below this share of the teacher's.
    pub collapse_share: f64,
    /// The run ends after this number of failed checkpoints in a row; if none, failed checkpoints never end it.
    pub stop_after_failures: Option<NonZeroU32>,
    /// A rank that computes for this many times the median is a straggler.
    pub straggler_factor: f64,
    /// Whether a spare takes the place of a straggler.
    pub replace_stragglers: bool,
}

/// How the ranks of a generation divide the state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Division {
    /// Every rank holds all of it.
    #[default]
    Whole,
    /// Each rank holds a slice of its own, and a copy of another rank's.
    Slices,
    /// Groups of at least this many ranks each hold all slices, if the ranks can form several of equal size; otherwise as
    /// [`Slices`](Self::Slices).
    SlicesInGroups(NonZeroU32),
}

impl Division {
    /// Whether each rank holds a slice.
    #[must_use]
    pub fn is_sliced(self) -> bool {
        self != Self::Whole
    }
}

/// Every timeout of a run, derived from `failure_timeout` so that they cannot contradict each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Time between two heartbeats.
    pub heartbeat_millis: u64,
    /// A worker that is silent for this long is unknown.
    pub unknown_millis: u64,
    /// A worker that is silent for this long is dead.
    pub dead_millis: u64,
    /// A worker whose heartbeats show no progress for this long hangs. Four times the timeout for silence: one unit of
    /// work, such as a micro-batch, may take a while.
    pub hang_millis: u64,
    /// How long the ranks of a generation may take to meet: longer than it takes to find the one that is dead or hangs,
    /// so that the coordinator reports it first.
    pub joining_millis: u64,
    /// How long to wait for workers.
    pub wait_millis: u64,
}

impl Timeouts {
    /// Derives them. `failure`: a worker that is silent for this long is dead. `wait`: how long to wait for workers.
    #[must_use]
    pub fn new(failure: Duration, wait: Duration) -> Self {
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        Self {
            heartbeat_millis: millis(failure / 10).max(20),
            unknown_millis: millis(failure / 3),
            dead_millis: millis(failure),
            hang_millis: millis(failure * 4),
            joining_millis: millis(failure * 6),
            wait_millis: millis(wait),
        }
    }
}
