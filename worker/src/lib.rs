//! The worker of Potstill: everything around the networks and the mathematics of one process.
//!
//! The folders are a stair. Each uses those below it and none above:
//!
//! 1. `commands`: what the program is asked to do, a file for each command.
//! 2. `training`: a rank's iterations, from joining a generation to leaving it.
//! 3. `evaluation`: samples, and what they score.
//! 4. `model`: teachers and students as they are loaded, with prompts and latents.
//! 5. `checkpoint`: a rank's share of a checkpoint, saved and restored.
//! 6. `session`: the stream to the coordinator.
//! 7. `data`: image files, tars, captions.
//! 8. `process`: devices, a lifeline, faults on purpose.

mod checkpoint;
mod commands;
mod data;
mod evaluation;
mod model;
mod process;
mod session;
mod training;

pub use commands::main;
