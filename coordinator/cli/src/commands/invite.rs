//! `potstill invite`: writes what a machine needs to reach a run's coordinator without the run's storage.

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, ValueEnum};
use potstill_access::{Locator, Role};
use potstill_logging::print;

use super::run_name::{RunName, runtime};

/// Arguments of `potstill invite`.
#[derive(Debug, Args)]
pub struct InviteArguments {
    #[command(flatten)]
    run: RunName,
    /// What the invitation allows: worker attaches workers; operator saves checkpoints and cancels; viewer sees the status
    #[arg(long, value_enum, value_name = "ROLE")]
    role: Invited,
    /// Address of the coordinator, if another than the one that it states, as HOST:PORT
    #[arg(long, value_name = "ADDRESS")]
    coordinator: Option<String>,
    /// The file to write or replace; only its owner can read it
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

/// See [`Role`].
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Invited {
    Worker,
    Operator,
    Viewer,
}

impl InviteArguments {
    /// Writes the file.
    pub fn write(self) -> anyhow::Result<ExitCode> {
        let role = match self.role {
            Invited::Worker => Role::Worker,
            Invited::Operator => Role::Operator,
            Invited::Viewer => Role::Viewer,
        };
        let run = self.run.open()?;
        let locator = Locator::Storage { run, role, address: self.coordinator, insecure: false };
        let invitation = runtime()?.block_on(locator.find())?;
        invitation.write(&self.output)?;
        print(format_args!(
            "{}: --join {} reaches run {} at {} as {role}, as long as its coordinator has the certificate that it has now",
            self.output.display(),
            self.output.display(),
            invitation.run_id,
            invitation.address
        ));
        Ok(ExitCode::SUCCESS)
    }
}
