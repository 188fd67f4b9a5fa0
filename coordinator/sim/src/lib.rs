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

/// The same, and keeps the last so many actions for the [`Violation`].
///
/// # Errors
/// [`Violation`].
pub fn replay(scenario: &Scenario, seed: Seed, actions: usize) -> Result<Report, Violation> {
    World::new(scenario.clone(), seed, actions).run()
}
