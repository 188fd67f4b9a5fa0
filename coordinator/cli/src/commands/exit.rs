//! Exit codes and error messages of commands.

use std::process::ExitCode;

use potstill_logging::chain;

use crate::launch::Exit;

/// A check has failed: a threshold is not met, or a checkpoint is damaged.
pub const NOT_GOOD: u8 = 3;

/// Prints an error.
pub fn complain(error: &anyhow::Error, exit: Exit) -> ExitCode {
    eprintln!("error: {}", chain(error));
    exit.into()
}

/// The exit code of a command that does not run anything.
pub fn ended(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| complain(&error, Exit::Failed))
}
