//! `potstill cancel`: have a run save and stop.

use std::process::ExitCode;

use potstill_server::client::Client;

use super::run_name::{RunName, runtime};

/// Asks for it.
pub fn cancel(run: &RunName) -> anyhow::Result<ExitCode> {
    let run = run.open()?;
    let reason = "potstill cancel".to_owned();
    runtime()?.block_on(async { Client::of(&run).await?.cancel(reason).await })?;
    println!("run {} saves and stops; to go on, start it with --run-id {} --resume", run.id(), run.id());
    Ok(ExitCode::SUCCESS)
}
