//! `potstill-worker`: the half of Potstill that links libtorch.

mod agent;
mod chain;
mod check;
mod checkpoint;
mod clip;
mod control_lane;
mod dataset;
mod device;
mod evaluate;
mod evaluation;
mod export;
mod faults;
mod kept;
mod lifeline;
mod logging;
mod model;
mod pictures;
mod plan;
mod protocol;
mod rank;
mod reference;
mod sample;
mod samples;
mod session;
mod student;
mod teacher;
mod training;
mod transfer;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Potstill's worker: trains, scores and saves on behalf of a coordinator.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// One per node: keeps the ranks of this machine alive until the run is over.
    Agent(agent::Arguments),
    /// One per device: attaches to the coordinator and trains.
    Rank(rank::Arguments),
    /// Scores a student, or a teacher, beside real images.
    Evaluate(evaluate::Arguments),
    /// Says whether a text-to-image run fits its devices, before anything is loaded.
    Plan(plan::Arguments),
    /// Writes the averaged generator of a checkpoint: a file, or a folder in diffusers' layout.
    Export(export::Arguments),
    /// Makes images with a student.
    Sample(sample::Arguments),
    /// Reads a run specification from standard input and tries to load everything it names.
    Check,
    /// Trains a small EDM teacher on an image file.
    TrainTeacher(teacher::Arguments),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Agent(arguments) => Ok(agent::main(&arguments)),
        Command::Rank(arguments) => rank::main(arguments),
        Command::Evaluate(arguments) => evaluate::main(arguments),
        Command::Plan(arguments) => plan::main(arguments),
        Command::Export(arguments) => export::main(arguments),
        Command::Sample(arguments) => sample::main(arguments),
        Command::Check => check::main(),
        Command::TrainTeacher(arguments) => teacher::main(arguments),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {}", chain::chain(&error));
        ExitCode::FAILURE
    })
}
