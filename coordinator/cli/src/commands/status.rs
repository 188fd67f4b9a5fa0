//! `potstill status`: shows what a run is doing.

use std::process::ExitCode;

use clap::Args;
use potstill_access::Role;

use super::run_name::{AskedRun, runtime};
use crate::status;
use potstill_logging::print;

/// Arguments of `potstill status`.
#[derive(Debug, Args)]
pub struct StatusArguments {
    #[command(flatten)]
    run: AskedRun,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

impl StatusArguments {
    /// Prints the status.
    pub fn show(self) -> anyhow::Result<ExitCode> {
        let locator = self.run.locator(Role::Viewer)?;
        let status = runtime()?.block_on(status::of(&locator))?;
        if self.json {
            print(format_args!("{}", serde_json::to_string_pretty(&status)?));
        } else {
            print(format_args!("{}", status.text()));
        }
        Ok(ExitCode::SUCCESS)
    }
}
