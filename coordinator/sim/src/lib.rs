//! A simulated world over the coordinator's state machine.
//!
//! Workers with their collectives, links, storage with its journal, and coordinators live in virtual time. One number, the
//! [`Seed`], decides everything: the shape of the world, every duration and every fault. The coordinators are real
//! ([`potstill_core::Core`]); everything around them is a model of how workers, networks and object storage behave. After
//! every step the world is compared with what must always be true; see [`Violation`].
//!
//! One job for each module: what a world is made of ([`scenario`]); the order of what happens ([`queue`]); what a worker
//! holds ([`state`]); what the ranks of a generation do together ([`group`]); one worker ([`process`]); object storage
//! ([`storage`]); and the world that ties them together ([`world`]).

pub mod group;
pub mod process;
pub mod queue;
pub mod scenario;
pub mod state;
pub mod storage;
pub mod world;

use potstill_core::observation::Outcome;

pub use crate::scenario::Scenario;
use crate::world::World;

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
    /// What coordinators did before, where that was recorded; see [`replay`].
    pub actions: Vec<String>,
}

/// Runs the mid-sized world of a seed.
///
/// # Errors
/// [`Violation`].
pub fn run(seed: Seed) -> Result<Report, Violation> {
    run_in(&Scenario::mixed(seed), seed)
}

/// Runs a world of this shape.
///
/// # Errors
/// [`Violation`].
pub fn run_in(scenario: &Scenario, seed: Seed) -> Result<Report, Violation> {
    World::new(scenario.clone(), seed, 0).run()
}

/// The same, and keeps the last so many actions for the [`Violation`].
///
/// # Errors
/// [`Violation`].
pub fn replay(scenario: &Scenario, seed: Seed, actions: usize) -> Result<Report, Violation> {
    World::new(scenario.clone(), seed, actions).run()
}
