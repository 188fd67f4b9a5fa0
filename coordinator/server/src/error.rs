//! Errors that keep a coordinator from starting.

use std::{net::SocketAddr, path::PathBuf};

use potstill_access::AccessError;
use potstill_core::record::Unreadable;
use potstill_spec::layers::LayerError;

/// Why a coordinator could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address is in use, or not of this machine.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The system's error.
        source: std::io::Error,
    },
    /// The certificate cannot be used.
    #[error("the coordinator's certificate: {0}")]
    Certificate(String),
    /// A secret cannot be made or read.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// The storage cannot be used.
    #[error("storage: {0}")]
    Storage(#[from] potstill_storage::Error),
    /// The teacher's file is missing or cannot be read.
    #[error("cannot read the teacher's weights {path} (teacher.weights): {source}")]
    Teacher {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The teacher's file is not the one whose SHA-256 the specification states.
    #[error("the teacher's weights {path} have SHA-256 {actual}; teacher.sha256 is {given}")]
    OtherTeacher {
        /// The file.
        path: PathBuf,
        /// Its SHA-256.
        actual: String,
        /// The specification's `teacher.sha256`.
        given: String,
    },
    /// A run of this name exists.
    #[error("run {run} exists; give --resume to continue it or another --run-id")]
    RunExists {
        /// Its name.
        run: String,
    },
    /// There is no run or checkpoint for `--resume`.
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
        /// Its coordinator's address.
        address: String,
    },
    /// The run was started with another specification.
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
    /// The run has completed its iterations.
    #[error(
        "run {run} is already complete ({iteration} iterations); raise distillation.iterations to train on"
    )]
    Complete {
        /// Its name.
        run: String,
        /// Its completed iterations.
        iteration: u64,
    },
    /// A specification cannot be read or written.
    #[error(transparent)]
    Specification(#[from] LayerError),
    /// A record of the journal cannot be read.
    #[error("record {index} of the journal cannot be read: {source}")]
    Record {
        /// Its index, from 0.
        index: usize,
        /// The cause.
        source: Unreadable,
    },
    /// The journal cannot be continued.
    #[error("{0}")]
    Journal(String),
}

impl StartError {
    /// Whether the command line, the run file or the state of the run is at fault, rather than the network or storage.
    #[must_use]
    pub fn is_of_usage(&self) -> bool {
        match self {
            Self::Listen { .. }
            | Self::Certificate(_)
            | Self::Teacher { .. }
            | Self::OtherTeacher { .. }
            | Self::RunExists { .. }
            | Self::Served { .. }
            | Self::NothingToResume { .. }
            | Self::Differs { .. }
            | Self::Complete { .. }
            | Self::Specification(_) => true,
            Self::Access(_) | Self::Storage(_) | Self::Record { .. } | Self::Journal(_) => false,
        }
    }
}
