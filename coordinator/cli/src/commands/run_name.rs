//! The run that a command is about, as its arguments name it.

use anyhow::Context;
use clap::Args;
use potstill_storage::{Root, Run};

#[derive(Debug, Args)]
pub struct RunName {
    /// The run's name
    pub run: String,
    /// Where runs are kept
    #[arg(long, value_name = "URL", default_value = ".")]
    pub storage: String,
}

impl RunName {
    /// Its folder.
    ///
    /// # Errors
    /// The storage cannot be opened, or the name cannot be a run's.
    pub fn open(&self) -> anyhow::Result<Run> {
        Ok(Root::open(&self.storage).context("--storage")?.run(&self.run.parse()?))
    }
}

/// For commands that only ask and read.
///
/// # Errors
/// The system's.
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}
