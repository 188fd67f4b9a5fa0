//! The units of work that this process has completed. Heartbeats carry their number: while it grows, the process does not hang.
//!
//! A unit is whatever may take long on a slow machine: a micro-batch, an evaluation of a network, an image that is decoded, a
//! prompt that is read or embedded, a tensor or a piece of a file that is read.

use std::sync::atomic::{AtomicU64, Ordering};

use potstill_models::weights;
use potstill_storage::pieces;

static COMPLETED: AtomicU64 = AtomicU64::new(0);

/// Counts a completed unit.
pub fn complete() {
    COMPLETED.fetch_add(1, Ordering::Relaxed);
}

/// The number of units so far.
pub fn completed() -> u64 {
    COMPLETED.load(Ordering::Relaxed) + pieces::read() + weights::copied()
}
