//! What decides a world, and what became of it.

use potstill_core::observation::Outcome;

/// Decides everything that happens in a world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seed(pub u64);

/// What became of a world in which nothing broke.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// How the run ended.
    pub outcome: Outcome,
    /// Hash of every action of every coordinator, with its time.
    pub trace: u64,
    /// Virtual milliseconds until the end.
    pub millis: u64,
    /// Things that happened.
    pub happenings: u64,
    /// Actions that coordinators took.
    pub actions: u64,
    /// Generations that were opened.
    pub generations: u64,
    /// Coordinators that the run had.
    pub coordinators: usize,
    /// Faults that struck.
    pub faults: u64,
}

/// Something that must always be true is not.
#[derive(Clone, Debug, thiserror::Error)]
#[error("run(Seed({seed})) at {millis} ms: {what}\nlast actions:\n{}", actions.join("\n"))]
pub struct Violation {
    /// Gives the same again.
    pub seed: u64,
    /// When, in virtual milliseconds.
    pub millis: u64,
    /// What broke.
    pub what: String,
    /// What coordinators did before, where that was recorded; see [`replay`](crate::replay).
    pub actions: Vec<String>,
}
