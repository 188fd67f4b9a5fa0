//! `potstill checkpoint`: saves a checkpoint now; lists, verifies and restores checkpoints.

use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand};
use potstill_access::{Locator, Role};
use potstill_logging::print;
use potstill_storage::{Root, layout};

use super::{
    exit::NOT_GOOD,
    run_name::{AskedRun, RunName, runtime},
};
use crate::checkpoints;

const AFTER_VERIFY_HELP: &str = "\
Exit codes:
  0  every checkpoint is complete
  1  the run cannot be read
  2  the command line is not acceptable
  3  a checkpoint is damaged";

/// The subcommands of `potstill checkpoint`.
#[derive(Debug, Subcommand)]
pub enum Checkpoint {
    /// Save a checkpoint now, and wait until it is committed
    Save(AskedRun),
    /// List a run's checkpoints, without reading their shards
    List(ListArguments),
    /// Read every shard of a run's checkpoints and compare the checksums
    #[command(after_help = AFTER_VERIFY_HELP)]
    Verify(ListArguments),
    /// Start a new run from a checkpoint of another run, which is verified and copied
    Restore(RestoreArguments),
}

/// Arguments of `list` and `verify`.
#[derive(Debug, Args)]
pub struct ListArguments {
    #[command(flatten)]
    run: RunName,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Arguments of `restore`.
#[derive(Debug, Args)]
pub struct RestoreArguments {
    #[command(flatten)]
    run: RunName,
    /// Name of the new run
    #[arg(long, value_name = "NAME")]
    to: String,
    /// The checkpoint's iteration [default: the newest complete checkpoint]
    #[arg(long, value_name = "N")]
    iteration: Option<u64>,
}

impl Checkpoint {
    /// Executes the subcommand.
    pub fn main(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Save(run) => save(&run),
            Self::List(arguments) => arguments.list(false),
            Self::Verify(arguments) => arguments.list(true),
            Self::Restore(arguments) => arguments.restore(),
        }
    }
}

fn save(asked: &AskedRun) -> anyhow::Result<ExitCode> {
    let iteration = runtime()?.block_on(async { asked.connect(Role::Operator).await?.checkpoint().await })?;
    let place = match asked.locator(Role::Operator)? {
        Locator::Storage { run, .. } => run.describe(&layout::manifest_key(iteration)),
        Locator::File(_) | Locator::Fixed(_) => layout::manifest_key(iteration),
    };
    print(format_args!("{place}"));
    Ok(ExitCode::SUCCESS)
}

impl ListArguments {
    fn list(self, verify: bool) -> anyhow::Result<ExitCode> {
        let run = self.run.open()?;
        let entries = runtime()?.block_on(checkpoints::list(&run, verify))?;
        if self.json {
            print(format_args!("{}", serde_json::to_string_pretty(&entries)?));
        } else {
            print(format_args!("{}", checkpoints::table(&entries)));
        }
        let damaged = entries.iter().any(|entry| entry.problem.is_some());
        Ok(if damaged { ExitCode::from(NOT_GOOD) } else { ExitCode::SUCCESS })
    }
}

impl RestoreArguments {
    fn restore(self) -> anyhow::Result<ExitCode> {
        let storage = Root::open_existing(&self.run.storage).context("--storage")?;
        let (from, to) =
            (storage.run(&self.run.run.parse()?), storage.run(&self.to.parse().context("--to")?));
        let restored = runtime()?.block_on(checkpoints::restore(&from, &to, self.iteration))?;
        print(format_args!("{}", to.describe(&layout::manifest_key(restored))));
        print(format_args!(
            "To continue, repeat the command that started {} with --run-id {} --resume",
            from.id(),
            to.id()
        ));
        Ok(ExitCode::SUCCESS)
    }
}
