//! The coordinator of Potstill and the parts of the `potstill` command.

pub mod address;
pub mod checkpoints;
pub mod client;
pub mod decision;
pub mod launch;
pub mod report;
pub mod server;
pub mod status;
