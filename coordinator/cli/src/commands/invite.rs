//! `potstill invite`: writes what a machine needs to reach a run's coordinator without the run's storage.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;
use potstill_access::{Locator, Role, address};
use potstill_logging::print;

use super::run_name::{RunName, runtime};

/// Arguments of `potstill invite`.
#[derive(Debug, Args)]
pub struct InviteArguments {
    #[command(flatten)]
    run: RunName,
    /// What the invitation allows: worker attaches workers; operator saves checkpoints and cancels; viewer sees the status
    #[arg(long, value_name = "ROLE")]
    role: Role,
    /// Address of the coordinator, if another than the one that it states, as HOST:PORT
    #[arg(long, value_name = "ADDRESS", value_parser = address::coordinator)]
    coordinator: Option<String>,
    /// The file to write or replace; only its owner can read it
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

impl InviteArguments {
    /// Writes the file.
    pub fn write(self) -> anyhow::Result<ExitCode> {
        let run = self.run.open()?;
        let locator = Locator::Storage { run, role: self.role, address: self.coordinator, insecure: false };
        let invitation = runtime()?.block_on(locator.find())?;
        invitation.write(&self.output)?;
        print(format_args!(
            "{}: --join {} reaches run {} at {} as {}, as long as its coordinator has the certificate that it has now",
            self.output.display(),
            self.output.display(),
            invitation.run_id,
            invitation.address,
            self.role
        ));
        Ok(ExitCode::SUCCESS)
    }
}
