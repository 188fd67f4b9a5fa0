//! The state that the ranks of a generation share through their collectives.

use std::collections::BTreeSet;

use potstill_proto::{cursor::Cursor, message::Request};

use crate::state::State;

/// Requests to all ranks, as the control lane carries them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// Save at the next boundary.
    pub save: bool,
    /// Finish at the next boundary.
    pub stop: bool,
    /// Yield at the next boundary.
    pub yields: bool,
}

impl Flags {
    /// Adds a request.
    pub fn raise(&mut self, what: Request) {
        match what {
            Request::Checkpoint => self.save = true,
            Request::CheckpointAndStop => (self.save, self.stop) = (true, true),
            Request::Yield => self.yields = true,
            Request::CheckpointAndYield => (self.save, self.yields) = (true, true),
        }
    }

    /// The flags that are not in `done`.
    #[must_use]
    pub fn less(self, done: Self) -> Self {
        Self {
            save: self.save && !done.save,
            stop: self.stop && !done.stop,
            yields: self.yields && !done.yields,
        }
    }

    /// The flags that either of the two has.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            save: self.save || other.save,
            stop: self.stop || other.stop,
            yields: self.yields || other.yields,
        }
    }
}

/// One generation's process group. Its operations follow one another: all ranks meet, the source's state is broadcast, then
/// one reduction for each phase.
#[derive(Debug, Default)]
pub struct Group {
    /// Processes by rank.
    pub members: Vec<usize>,
    /// Micro-batches that were assigned so far, counted from the first.
    pub assigned: u32,
    /// The state that the source broadcasts, once it has started to.
    pub source: Option<State>,
    /// The generation whose slices of that state its ranks take over.
    pub cut: Option<u64>,
    /// Its ranks hold states in slices, and cannot put together one that is as far as they expect.
    pub incomplete: bool,
    /// Ranks that have contributed to the current operation.
    pub arrived: BTreeSet<u32>,
    /// The cursor from which the current operation starts; `None` while the ranks meet.
    pub from: Option<State>,
    /// Ranks that left or died.
    pub gone: BTreeSet<u32>,
    /// Flags raised in the current iteration.
    pub raised: Flags,
    /// Flags of the iteration that was completed last.
    pub agreed: Flags,
    /// The furthest state that it has reached.
    pub reached: Option<Cursor>,
}
