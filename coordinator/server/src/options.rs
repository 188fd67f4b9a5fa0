//! What a coordinator serves and where it listens.

use std::net::SocketAddr;

use potstill_spec::RunSpec;
use potstill_storage::{Root, RunId};

use crate::Security;

/// What a coordinator serves and where it listens.
pub struct Options {
    /// Address to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The run's specification, validated, with absolute paths.
    pub spec: RunSpec,
    /// The run's name.
    pub run_id: RunId,
    /// The storage that holds it.
    pub storage: Root,
    /// Whether the run may or must exist.
    pub resume: Resume,
    /// Whether the run may start from the teacher although none of the checkpoints that it had can be read.
    pub from_teacher: bool,
    /// How it shows who it is, and whom it lets in.
    pub security: Security,
    /// The address of the run's page, for those who ask for the status; empty without one.
    pub page: String,
    /// Whether workers of an earlier coordinator of this run may be alive; false where they end with their coordinator.
    pub ranks_may_live: bool,
}

/// Whether to continue a run that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// It must not exist.
    Never,
    /// It must exist.
    Always,
    /// Continue it if it exists; start it otherwise.
    Auto,
}
