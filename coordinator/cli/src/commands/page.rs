//! `potstill page`: prints the address of a run's page, with the token that opens it.

use std::process::ExitCode;

use anyhow::ensure;
use clap::Args;
use potstill_access::Role;
use potstill_logging::print;
use potstill_server::client::Client;

use super::run_name::{AskedRun, runtime};

/// Arguments of `potstill page`.
#[derive(Debug, Args)]
pub struct PageArguments {
    #[command(flatten)]
    run: AskedRun,
}

impl PageArguments {
    /// Prints the address.
    pub fn show(self) -> anyhow::Result<ExitCode> {
        let locator = self.run.locator(Role::Viewer)?;
        let (page, token) = runtime()?.block_on(async {
            let page = Client::of(&locator).await?.summary().await?.page;
            anyhow::Ok((page, locator.find().await?.token))
        })?;
        ensure!(!page.is_empty(), "the coordinator of run {} serves no page", self.run.name.run);
        match token {
            Some(token) => print(format_args!("{page}?token={token}")),
            None => print(format_args!("{page}")),
        }
        Ok(ExitCode::SUCCESS)
    }
}
