//! The object storage of runs, used by the coordinator and by its workers.
//!
//! ```text
//! <root>/runs/<run>/run.toml                                                   the frozen specification
//! <root>/runs/<run>/journal/<20 digits>.json                                   create-only records
//! <root>/runs/<run>/checkpoints/<12 digits>/<unique>/rank-003-of-008.safetensors
//! <root>/runs/<run>/checkpoints/<12 digits>/manifest.json                      create-only: the commit
//! ```
//!
//! Commits use one conditional write only, "create if absent", which every store has. [`Root::probe`] rejects a store
//! that ignores it.

pub mod checkpoint;
pub mod digest;
mod error;
mod faults;
pub mod journal;
pub mod layout;
pub mod retention;
mod root;
mod run;
mod run_id;
mod source;

pub use error::Error;
pub use root::Root;
pub use run::Run;
pub use run_id::{BadRunId, RunId};
pub use source::Source;
