//! The object storage of runs, used by the coordinator and by its workers.
//!
//! ```text
//! <root>/runs/<run>/run.toml                                                   the specification
//! <root>/runs/<run>/join.key                                                   what lets workers and users in
//! <root>/runs/<run>/coordinators/<20 digits>.json                              where each coordinator is or was
//! <root>/runs/<run>/journal/<20 digits>.json                                   create-only records
//! <root>/runs/<run>/journal-segments/<12 digits>.jsonl                         a thousand of them in one object
//! <root>/runs/<run>/checkpoints/<12 digits>/<unique>/rank-003-of-008.safetensors
//! <root>/runs/<run>/checkpoints/<12 digits>/manifest.json                      create-only: the commit
//! ```
//!
//! Commits use one conditional write only, "create if absent", which every store has. [`Root::probe`] refuses a store that
//! ignores it.
//!
//! ```
//! use potstill_storage::{Root, checkpoint::Manifest, layout};
//!
//! # let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
//! # runtime.block_on(async {
//! let root = Root::open("memory:///")?;
//! root.probe().await?;
//! let run = root.run(&"demo".parse()?);
//! let written = run.write_shard(&layout::shard_key(20, "g1", 0, 1), 0, "state".into()).await?;
//! assert!(run.checkpoints().await?.is_empty(), "a shard alone is no checkpoint");
//! run.confirm_shard(&written.shard, written.e_tag.as_deref()).await?;
//! run.commit(&Manifest::new(20, 1, vec![written.shard])).await?;
//! assert_eq!(run.checkpoints().await?.into_iter().collect::<Vec<_>>(), [20]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod aws_profile;
pub mod checkpoint;
pub mod coordinators;
pub mod digest;
mod error;
mod faults;
pub mod journal;
pub mod layout;
mod new_file;
mod patience;
pub mod pieces;
mod refusals;
pub mod retention;
mod root;
mod run;
mod run_id;
mod source;

pub use error::Error;
pub use patience::retries;
pub use root::Root;
pub use run::Run;
pub use run_id::{BadRunId, RunId};
pub use source::Source;
