//! The worker of Potstill: all of one process but the networks and the losses.
//!
//! The folders form layers. Each uses those below it and none above:
//!
//! 1. `commands`: the commands of the program, one file for each.
//! 2. `training`: a rank's iterations, from joining a generation to leaving it.
//! 3. `evaluation`: samples and their metrics.
//! 4. `model`: loads teachers and students, with prompts and latents.
//! 5. `checkpoint`: a rank's share of a checkpoint, saved and restored.
//! 6. `session`: the stream to the coordinator.
//! 7. `data`: image files, tars, captions.
//! 8. `process`: devices, the lifeline, fault injection.

mod checkpoint;
mod commands;
mod data;
mod evaluation;
mod model;
mod process;
mod session;
mod training;

pub use commands::main;
