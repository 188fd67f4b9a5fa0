//! `potstill status`: shows what a run is doing.

use std::{io::IsTerminal, process::ExitCode, time::Duration};

use clap::Args;
use potstill_access::Role;

use super::run_name::{AskedRun, runtime};
use crate::status;
use potstill_logging::print;

/// The pause between two looks at a run.
const AGAIN: Duration = Duration::from_secs(2);
/// Clears a terminal and goes to its upper left corner.
const CLEAR: &str = "\x1b[2J\x1b[H";

/// Arguments of `potstill status`.
#[derive(Debug, Args)]
pub struct StatusArguments {
    #[command(flatten)]
    run: AskedRun,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Show it again every two seconds until the run has ended
    #[arg(long)]
    watch: bool,
}

impl StatusArguments {
    /// Prints the status.
    pub fn show(self) -> anyhow::Result<ExitCode> {
        let locator = self.run.locator(Role::Viewer)?;
        let runtime = runtime()?;
        let screen = self.watch && std::io::stdout().is_terminal();
        loop {
            let status = runtime.block_on(status::of(&locator))?;
            let text = match (self.json, self.watch) {
                (true, true) => serde_json::to_string(&status)?,
                (true, false) => serde_json::to_string_pretty(&status)?,
                (false, _) => status.text(),
            };
            // On a terminal in the place of what was shown before.
            print(format_args!("{}{text}", if screen { CLEAR } else { "" }));
            if !self.watch || status.is_over() {
                return Ok(ExitCode::SUCCESS);
            }
            runtime.block_on(tokio::time::sleep(AGAIN));
        }
    }
}
