//! Why a coordinator cannot be found, or a secret not be made or read.

/// Why a coordinator cannot be found, or a secret not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The run has had no coordinator.
    #[error("run {run} has no coordinator: there is no object below {place}")]
    NoCoordinator {
        /// The run.
        run: String,
        /// Where it would be.
        place: String,
    },
    /// The run's coordinator uses TLS, and there is no key.
    #[error("there is no join key {place}: was it removed? A coordinator that starts writes another")]
    NoKey {
        /// Where it would be.
        place: String,
    },
    /// The run's coordinator lets everybody in, which was not asked for.
    #[error("the coordinator at {address} serves without TLS and without a key; --insecure accepts that")]
    Insecure {
        /// The coordinator's address.
        address: String,
    },
    /// A secret or a file with an invitation cannot be read.
    #[error("{place}: {problem}")]
    Unusable {
        /// The file or object.
        place: String,
        /// What is wrong.
        problem: String,
    },
    /// The storage's error.
    #[error(transparent)]
    Storage(#[from] potstill_storage::Error),
    /// The system gives no random numbers.
    #[error("the system gives no random numbers for a secret")]
    NoRandomNumbers,
    /// No connection.
    #[error("cannot connect to {address}: {problem}")]
    Unreachable {
        /// The address.
        address: String,
        /// What failed.
        problem: String,
    },
}

impl AccessError {
    /// Whether a later attempt may succeed: the coordinator may be starting.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::NoCoordinator { .. } | Self::NoKey { .. } | Self::Storage(_) | Self::Unreachable { .. } => {
                true
            }
            Self::Insecure { .. } | Self::Unusable { .. } | Self::NoRandomNumbers => false,
        }
    }
}
