//! What to serve, and where.

use std::net::SocketAddr;

use potstill_spec::RunSpec;
use potstill_storage::{Root, RunId};

/// What to serve, and where.
pub struct Options {
    /// Address to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The run, validated, its paths absolute.
    pub spec: RunSpec,
    /// Its name.
    pub run_id: RunId,
    /// Where it is kept.
    pub storage: Root,
    /// Whether it exists.
    pub resume: Resume,
    /// Whether workers may have outlived an earlier coordinator of this run; not where they live and die with it.
    pub ranks_may_live: bool,
}

/// Whether to go on with a run that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// It must not exist.
    Never,
    /// It must exist.
    Always,
    /// Go on with it if it exists; start it otherwise.
    Auto,
}
