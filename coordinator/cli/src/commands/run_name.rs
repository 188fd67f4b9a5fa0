//! The arguments that name the run of a command, and its coordinator.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Args;
use potstill_access::{Invitation, Locator, Role, address};
use potstill_core::record::Record;
use potstill_server::client::{Client, history};
use potstill_storage::{Root, Run};

#[derive(Debug, Args)]
pub struct RunName {
    /// The run's name
    pub run: String,
    /// Storage of runs: a folder or a URL
    #[arg(long, value_name = "URL", default_value = ".")]
    pub storage: String,
}

impl RunName {
    /// The run's folder.
    ///
    /// # Errors
    /// The storage cannot be opened, or the name is not a valid run id.
    pub fn open(&self) -> anyhow::Result<Run> {
        Ok(Root::open_existing(&self.storage).context("--storage")?.run(&self.run.parse()?))
    }
}

/// A run whose coordinator is asked. Its address, its certificate and the join key are read from the storage.
#[derive(Debug, Args)]
pub struct AskedRun {
    #[command(flatten)]
    pub name: RunName,
    /// File with an invitation (potstill invite), for a machine that does not see the run's storage
    #[arg(long, value_name = "FILE", conflicts_with = "storage")]
    join: Option<PathBuf>,
    /// Address of the coordinator, if another than the one that it states, as HOST:PORT
    #[arg(long, value_name = "ADDRESS", conflicts_with = "join", value_parser = address::coordinator)]
    coordinator: Option<String>,
    /// Accept a coordinator that serves without TLS and without a key
    #[arg(long)]
    insecure: bool,
}

impl AskedRun {
    /// Finds its coordinator, to be asked as `role`.
    ///
    /// # Errors
    /// As for [`RunName::open`].
    pub fn locator(&self, role: Role) -> anyhow::Result<Locator> {
        Ok(match &self.join {
            Some(file) => {
                let text =
                    std::fs::read_to_string(file).with_context(|| format!("--join {}", file.display()))?;
                let invitation = Invitation::parse(&text, &file.display().to_string())?;
                let (invited, run) = (&invitation.run_id, &self.name.run);
                ensure!(invited == run, "{} is an invitation to run {invited}, not {run}", file.display());
                Locator::Fixed(invitation)
            }
            None => Locator::Storage {
                run: self.name.open()?,
                role,
                address: self.coordinator.clone(),
                insecure: self.insecure,
            },
        })
    }

    /// Connects to its coordinator, as `role`.
    ///
    /// # Errors
    /// The run is over, or its coordinator cannot be found or does not answer.
    pub async fn connect(&self, role: Role) -> anyhow::Result<Client> {
        let locator = self.locator(role)?;
        let error = match Client::of(&locator).await {
            Ok(client) => return Ok(client),
            Err(error) => error,
        };
        if let Locator::Storage { run, .. } = &locator
            && let Some(Record::Ended { .. }) = history(run).await?.last()
        {
            anyhow::bail!("run {} is over", run.id());
        }
        Err(error)
    }
}

/// A runtime of one thread, for commands that only send requests and read.
///
/// # Errors
/// The system cannot create it.
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}
