//! Errors of storage operations.

use std::time::Duration;

use crate::refusals;

/// A storage operation that failed; names the object and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The URL is not one of a supported store.
    #[error("storage {url:?}: {problem}")]
    BadUrl {
        /// The URL.
        url: String,
        /// Why it is not accepted.
        problem: String,
    },
    /// The store reported an error.
    #[error("cannot {operation} {place}: {}", refusals::told(source, place))]
    Store {
        /// What was tried: "read", "write", "list" …
        operation: &'static str,
        /// Path or URL of the object.
        place: String,
        /// The store's error.
        source: object_store::Error,
    },
    /// The store did not answer in time.
    #[error("cannot {operation} {place}: no answer within {} s", patience.as_secs())]
    NoAnswer {
        /// What was tried: "read", "write", "list" …
        operation: &'static str,
        /// Path or URL of the object.
        place: String,
        /// The timeout.
        patience: Duration,
    },
    /// A create-only object exists already, with another content.
    #[error("{place} exists already, with another content")]
    AlreadyExists {
        /// Path or URL of the object.
        place: String,
    },
    /// Another coordinator has written the journal's next record.
    #[error("another coordinator has taken over this run: it wrote {place}")]
    Fenced {
        /// Path or URL of the record.
        place: String,
    },
    /// The newest record of the journal is gone.
    #[error(
        "{place}, which this coordinator has written, is gone: was the run's folder removed, or its file system unmounted?"
    )]
    Vanished {
        /// Path or URL of the record.
        place: String,
    },
    /// The store overwrote an object that it was asked only to create.
    #[error(
        "the storage at {url} ignores conditional writes (If-None-Match: *): it overwrote an object that it was asked only \
         to create, so two coordinators could not be told apart there; use another store, or a newer version of this one"
    )]
    NotConditional {
        /// The store's URL.
        url: String,
    },
    /// A checkpoint is complete, but its format is not supported here.
    #[error("checkpoint {place} is in format {found}: {advice}")]
    Format {
        /// Path or URL of its manifest.
        place: String,
        /// Its format.
        found: u32,
        /// Which version wrote it, and what to do.
        advice: String,
    },
    /// An object's content is not what was written.
    #[error("{place} is damaged: {problem}")]
    Damaged {
        /// Path or URL of the object.
        place: String,
        /// How it was noticed.
        problem: String,
    },
}
