//! Commands that need libtorch and are executed by `potstill-worker`.

use std::{convert::Infallible, ffi::OsString, process::ExitCode};

use clap::Args;

use crate::launch::worker;

/// A subcommand that needs libtorch: `potstill-worker` reads its arguments, including `--help`.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub struct HandedOn {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    arguments: Vec<OsString>,
}

impl HandedOn {
    /// Replaces this process by the worker program.
    pub fn on(self, subcommand: &str) -> anyhow::Result<ExitCode> {
        let never: Infallible = worker::become_worker(subcommand, &self.arguments)?;
        match never {}
    }
}
