//! Why a coordinator does not start.

use std::{net::SocketAddr, path::PathBuf};

use potstill_core::record::Unreadable;
use potstill_spec::layers::LayerError;

/// Why a coordinator could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address is in use, or not this machine's.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// What the system says.
        source: std::io::Error,
    },
    /// The storage cannot be used.
    #[error("storage: {0}")]
    Storage(#[from] potstill_storage::Error),
    /// The teacher's file is not there or cannot be read.
    #[error("cannot read the teacher's weights {path} (teacher.weights): {source}")]
    Teacher {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The teacher's file is not the one that the specification means.
    #[error("the teacher's weights {path} have SHA-256 {actual}; teacher.sha256 is {given}")]
    OtherTeacher {
        /// The file.
        path: PathBuf,
        /// What its bytes give.
        actual: String,
        /// What the specification says.
        given: String,
    },
    /// A run of this name exists.
    #[error("run {run} exists; give --resume to continue it or another --run-id")]
    RunExists {
        /// Its name.
        run: String,
    },
    /// `--resume` finds nothing to go on from.
    #[error("nothing to resume: {problem}")]
    NothingToResume {
        /// What is missing.
        problem: String,
    },
    /// Another coordinator serves the run.
    #[error(
        "run {run} is being served at {address}: stop that coordinator first (potstill cancel {run}), or wait for its end"
    )]
    Served {
        /// Its name.
        run: String,
        /// Where.
        address: String,
    },
    /// The run was started with other values.
    #[error(
        "run {run} was started with another specification, which decides its result:{}",
        differences.iter().map(|d| format!("\n  - {d}")).collect::<String>()
    )]
    Differs {
        /// Its name.
        run: String,
        /// One line for each field, with both values.
        differences: Vec<String>,
    },
    /// The run has reached its end.
    #[error(
        "run {run} is already complete ({iteration} iterations); raise distillation.iterations to train on"
    )]
    Complete {
        /// Its name.
        run: String,
        /// Its iterations.
        iteration: u64,
    },
    /// A specification cannot be read or written.
    #[error(transparent)]
    Specification(#[from] LayerError),
    /// A record of the journal cannot be read.
    #[error("record {index} of the journal cannot be read: {source}")]
    Record {
        /// Which record, from 0.
        index: usize,
        /// Why.
        source: Unreadable,
    },
    /// The journal cannot be continued.
    #[error("{0}")]
    Journal(String),
}

impl StartError {
    /// Whether the command line, the run file or the state of the run is at fault, and not the surroundings.
    #[must_use]
    pub fn is_of_usage(&self) -> bool {
        match self {
            Self::Listen { .. }
            | Self::Teacher { .. }
            | Self::OtherTeacher { .. }
            | Self::RunExists { .. }
            | Self::Served { .. }
            | Self::NothingToResume { .. }
            | Self::Differs { .. }
            | Self::Complete { .. }
            | Self::Specification(_) => true,
            Self::Storage(_) | Self::Record { .. } | Self::Journal(_) => false,
        }
    }
}
