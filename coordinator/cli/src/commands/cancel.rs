//! `potstill cancel`: asks a run to save and stop.

use std::process::ExitCode;

use potstill_access::Role;
use potstill_logging::print;

use super::run_name::{AskedRun, runtime};

/// Sends the request and prints how to resume the run.
pub fn cancel(asked: &AskedRun) -> anyhow::Result<ExitCode> {
    let reason = "potstill cancel".to_owned();
    runtime()?.block_on(async { asked.connect(Role::Operator).await?.cancel(reason).await })?;
    let run = &asked.name.run;
    print(format_args!("run {run} saves and stops; to resume it, start it with --run-id {run} --resume"));
    Ok(ExitCode::SUCCESS)
}
