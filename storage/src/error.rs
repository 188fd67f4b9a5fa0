//! What can go wrong on storage.

use std::time::Duration;

/// A storage operation that failed; says which object and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The URL names no store.
    #[error("storage {url:?}: {problem}; use a path, or a URL of file://, s3://, gs://, az:// or memory://")]
    BadUrl {
        /// What was given.
        url: String,
        /// Why it does not do.
        problem: String,
    },
    /// The store did not do what it was asked.
    #[error("cannot {operation} {place}: {source}")]
    Store {
        /// "read", "write", "list" …
        operation: &'static str,
        /// Path or URL of the object.
        place: String,
        /// What the store says.
        source: object_store::Error,
    },
    /// The store did not answer.
    #[error("cannot {operation} {place}: no answer within {} s", patience.as_secs())]
    NoAnswer {
        /// "read", "write", "list" …
        operation: &'static str,
        /// Path or URL of the object.
        place: String,
        /// How long it was waited for.
        patience: Duration,
    },
    /// A create-only object is there already, with another content.
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
    /// The store overwrites where it was asked to create only.
    #[error(
        "the storage at {url} ignores conditional writes (If-None-Match: *): it overwrote an object that it was asked only \
         to create, so two coordinators could not be told apart there; use another store, or a newer version of this one"
    )]
    NotConditional {
        /// The store.
        url: String,
    },
    /// A checkpoint is whole, but in another format than is wanted.
    #[error("checkpoint {place} is in format {found}: {advice}")]
    Format {
        /// Path or URL of its manifest.
        place: String,
        /// The format that it is in.
        found: u32,
        /// Who wrote it, and what to do.
        advice: String,
    },
    /// What was read is not what was written.
    #[error("{place} is damaged: {problem}")]
    Damaged {
        /// Path or URL of the object.
        place: String,
        /// How that was noticed.
        problem: String,
    },
}
