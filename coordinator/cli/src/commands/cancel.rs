//! `potstill cancel`: asks a run to save and stop.

use std::process::ExitCode;

use potstill_logging::print;
use potstill_server::client::Client;

use super::run_name::{RunName, runtime};

/// Sends the request and prints how to resume the run.
pub fn cancel(run: &RunName) -> anyhow::Result<ExitCode> {
    let run = run.open()?;
    let reason = "potstill cancel".to_owned();
    runtime()?.block_on(async { Client::of(&run).await?.cancel(reason).await })?;
    print(format_args!(
        "run {} saves and stops; to resume it, start it with --run-id {} --resume",
        run.id(),
        run.id()
    ));
    Ok(ExitCode::SUCCESS)
}
