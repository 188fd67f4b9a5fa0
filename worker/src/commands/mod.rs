//! The commands of `potstill-worker`, one file for each.

mod agent;
mod check;
mod doctor;
mod evaluate;
mod export;
mod plan;
mod rank;
mod sample;
mod source;
mod train_teacher;
mod version;

use potstill_logging::chain;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Potstill's worker: trains, evaluates and saves as the coordinator assigns.
#[derive(Parser)]
#[command(version = version::VERSION.as_str(), about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Starts the ranks of this machine, and restarts those that die, until the run is over.
    Agent(agent::Arguments),
    /// Runs one rank on one device: attaches to the coordinator and trains.
    Rank(rank::Arguments),
    /// Computes the metrics of a student or a teacher against real images.
    Evaluate(evaluate::Arguments),
    /// Checks whether a text-to-image run fits its devices, before anything is loaded.
    Plan(plan::Arguments),
    /// Writes the averaged generator of a checkpoint: a file, or a folder in diffusers' layout.
    Export(export::Arguments),
    /// Makes samples with a student.
    Sample(sample::Arguments),
    /// Reads a run specification from standard input and loads all files that it names.
    Check,
    /// Checks what a run needs of this machine, and says what to mend.
    Doctor(doctor::Arguments),
    /// Trains a small EDM teacher on an image file.
    TrainTeacher(train_teacher::Arguments),
}

/// Runs the command that the command line names.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Agent(arguments) => Ok(agent::main(&arguments)),
        Command::Rank(arguments) => rank::main(arguments),
        Command::Evaluate(arguments) => evaluate::main(arguments),
        Command::Plan(arguments) => plan::main(arguments),
        Command::Export(arguments) => export::main(arguments),
        Command::Sample(arguments) => sample::main(arguments),
        Command::Check => check::main(),
        Command::Doctor(arguments) => doctor::main(&arguments),
        Command::TrainTeacher(arguments) => train_teacher::main(arguments),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {}", chain(&error));
        ExitCode::FAILURE
    })
}
