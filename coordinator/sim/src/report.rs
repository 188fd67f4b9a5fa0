//! The input and the result of a world.

use potstill_core::observation::Outcome;

/// Decides everything that happens in a world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seed(pub u64);

/// The result of a world without a violation.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// How the run ended.
    pub outcome: Outcome,
    /// Hash of every action of every coordinator, with its time.
    pub trace: u64,
    /// Virtual milliseconds until the end.
    pub millis: u64,
    /// Events.
    pub happenings: u64,
    /// Actions that coordinators took.
    pub actions: u64,
    /// Generations that were opened.
    pub generations: u64,
    /// Coordinators that the run had.
    pub coordinators: usize,
    /// Faults that were injected.
    pub faults: u64,
}

/// An invariant does not hold.
#[derive(Clone, Debug, thiserror::Error)]
#[error("run(Seed({seed})) at {millis} ms: {what}\nlast actions:\n{}", actions.join("\n"))]
pub struct Violation {
    /// The seed of the world; it gives the same violation again.
    pub seed: u64,
    /// When, in virtual milliseconds.
    pub millis: u64,
    /// The invariant that does not hold.
    pub what: String,
    /// The actions of coordinators before it, where they were recorded; see [`replay`](crate::replay).
    pub actions: Vec<String>,
}
