//! Commands that need libtorch: `potstill-worker` carries them out.

use std::{convert::Infallible, ffi::OsString, process::ExitCode};

use clap::Args;

use crate::launch::worker;

/// A subcommand that needs libtorch: `potstill-worker` reads its arguments, `--help` among them.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub struct HandedOn {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    arguments: Vec<OsString>,
}

impl HandedOn {
    /// Becomes the worker program.
    pub fn on(self, subcommand: &str) -> anyhow::Result<ExitCode> {
        let never: Infallible = worker::become_worker(subcommand, &self.arguments)?;
        match never {}
    }
}
