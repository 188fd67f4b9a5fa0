//! A simulated world around the coordinator's state machine.
//!
//! Workers with their collectives, links, storage with its journal, and coordinators live in virtual time. One number,
//! the [`Seed`], decides everything: the shape of the world, every duration and every fault. The coordinators are real
//! ([`potstill_core::Core`]); everything around them is a model of how workers, networks and object storage behave.
//! After every step the invariants are checked; see [`Violation`].
//!
//! One job for each module: the shape of a world ([`scenario`]); the order of its events ([`queue`]); the state of a
//! worker ([`state`]); the collectives of a generation ([`group`]); one worker ([`process`]); object storage
//! ([`storage`]); and the world that ties them together ([`world`]).

pub mod group;
pub mod process;
pub mod queue;
pub mod report;
pub mod scenario;
pub mod state;
pub mod storage;
pub mod world;

use crate::world::World;
pub use crate::{
    report::{Report, Seed, Violation},
    scenario::Scenario,
};

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

/// Runs a world of this shape, and keeps its last `record` actions for the [`Violation`].
///
/// # Errors
/// [`Violation`].
pub fn replay(scenario: &Scenario, seed: Seed, actions: usize) -> Result<Report, Violation> {
    World::new(scenario.clone(), seed, actions).run()
}
