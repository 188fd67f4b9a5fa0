//! The arguments that name the run of a command.

use anyhow::Context;
use clap::Args;
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

/// A runtime of one thread, for commands that only send requests and read.
///
/// # Errors
/// The system cannot create it.
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}
