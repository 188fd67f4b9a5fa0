//! The command line, one file for each command.

mod cancel;
mod checkpoint;
mod exit;
mod handed_on;
mod invite;
mod page;
mod report;
mod run;
mod run_name;
mod status;

use std::{process::ExitCode, sync::LazyLock};

use clap::{Parser, Subcommand, error::ErrorKind};
use potstill_logging::print;

use self::{
    checkpoint::Checkpoint,
    exit::{complain, ended},
    handed_on::HandedOn,
    invite::InviteArguments,
    page::PageArguments,
    report::{AFTER_REPORT_HELP, ReportArguments},
    run::{AFTER_HELP, Launch, Serve},
    run_name::AskedRun,
    status::StatusArguments,
};
use crate::launch::{Exit, worker};

/// With the commit that a release was built from (`POTSTILL_COMMIT` in the build's environment).
static VERSION: LazyLock<String> = LazyLock::new(|| {
    let commit = option_env!("POTSTILL_COMMIT").unwrap_or("no release");
    format!("{} ({commit})", env!("CARGO_PKG_VERSION"))
});

/// Distills a diffusion model into a generator of a few steps, on one machine or on a cluster.
#[derive(Debug, Parser)]
#[command(name = "potstill", version = VERSION.as_str(), after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run on this machine: the coordinator and its workers, with one command
    #[command(after_help = AFTER_HELP)]
    Launch(Launch),
    /// Run the coordinator alone; workers attach from other machines
    #[command(after_help = AFTER_HELP)]
    Serve(Serve),
    /// Write a report that compares teacher and student, and check thresholds
    #[command(after_help = AFTER_REPORT_HELP)]
    Report(ReportArguments),
    /// Show what a run is doing: its workers, its progress, what it waits for
    Status(StatusArguments),
    /// Print the address of a run's live page, with the token that opens it
    Page(PageArguments),
    /// Save a checkpoint now; list, verify or restore checkpoints
    #[command(subcommand)]
    Checkpoint(Checkpoint),
    /// Save a checkpoint and stop the run; --resume continues it
    Cancel(AskedRun),
    /// Write an invitation: what a machine that does not see the run's storage needs to reach the coordinator
    Invite(InviteArguments),
    /// Start the workers of one machine, and restart those that die (potstill-worker)
    Agent(HandedOn),
    /// Run one worker (potstill-worker)
    Rank(HandedOn),
    /// Check what a run needs of this machine: devices, collectives, network, storage, limits (potstill-worker)
    Doctor(HandedOn),
    /// Train a small teacher on an image file (potstill-worker)
    TrainTeacher(HandedOn),
    /// Compute the metrics of a student or a teacher against real images (potstill-worker)
    Evaluate(HandedOn),
    /// Check whether a text-to-image run fits its devices, before anything is loaded (potstill-worker)
    Plan(HandedOn),
    /// Write the averaged generator of a checkpoint: a file, or a folder in diffusers' layout (potstill-worker)
    Export(HandedOn),
    /// Make samples with a student (potstill-worker)
    Sample(HandedOn),
}

/// Executes the command line.
pub fn main() -> ExitCode {
    let cli = Cli::try_parse().unwrap_or_else(|told| {
        // The worker program's line says what this program cannot know: libtorch, CUDA and NCCL.
        if told.kind() == ErrorKind::DisplayVersion
            && let Some(worker) = worker::version()
        {
            print(format_args!("{}\n{worker}", told.to_string().trim_end()));
            std::process::exit(0);
        }
        told.exit()
    });
    let handed_on = match cli.command {
        Command::Launch(arguments) => return arguments.main(),
        Command::Serve(arguments) => return arguments.main(),
        Command::Report(arguments) => return ended(arguments.write()),
        Command::Status(arguments) => return ended(arguments.show()),
        Command::Page(arguments) => return ended(arguments.show()),
        Command::Checkpoint(command) => return ended(command.main()),
        Command::Invite(arguments) => return ended(arguments.write()),
        Command::Cancel(run) => return ended(cancel::cancel(&run)),
        Command::Agent(handed) => handed.on("agent"),
        Command::Rank(handed) => handed.on("rank"),
        Command::Doctor(handed) => handed.on("doctor"),
        Command::TrainTeacher(handed) => handed.on("train-teacher"),
        Command::Evaluate(handed) => handed.on("evaluate"),
        Command::Plan(handed) => handed.on("plan"),
        Command::Export(handed) => handed.on("export"),
        Command::Sample(handed) => handed.on("sample"),
    };
    handed_on.unwrap_or_else(|error| complain(&error, Exit::Usage))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
