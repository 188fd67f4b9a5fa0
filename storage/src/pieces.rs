//! How much this process has read: a process that reads for long can show by it that it does not stand still.

use std::sync::atomic::{AtomicU64, Ordering};

static READ: AtomicU64 = AtomicU64::new(0);

/// The number of pieces of files and objects that this process has read so far. Checkpoints do not count.
#[must_use]
pub fn read() -> u64 {
    READ.load(Ordering::Relaxed)
}

pub(crate) fn count() {
    READ.fetch_add(1, Ordering::Relaxed);
}
