//! What a world consists of besides processes and storage.

use std::collections::BTreeMap;

use potstill_core::{ClientId, Core};

/// One coordinator.
#[derive(Debug)]
pub(super) struct Coordinator {
    /// `None` when it has died or ended.
    pub(super) core: Option<Core>,
    /// The journal's record that it writes next.
    pub(super) next_record: usize,
    /// It dies right after so many more records.
    pub(super) dies_after: Option<u32>,
    /// When it is to be woken.
    pub(super) timer: Option<u64>,
    /// Who asked it for a checkpoint and has no answer yet.
    pub(super) clients: BTreeMap<ClientId, u64>,
    /// The iteration that it told people about last.
    pub(super) told: Option<u64>,
    /// The newest generation that it wrote down.
    pub(super) generation: Option<u64>,
    /// Its last record was answered with an error.
    pub(super) unwritten: bool,
}

/// One stream. Its number is its [`StreamId`] too.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) coordinator: usize,
    pub(super) process: usize,
    /// A partition has broken it: nothing passes any more, and neither end knows yet.
    pub(super) broken: bool,
    /// Whether the coordinator believes in it.
    pub(super) open: bool,
    /// Messages on their way, or not yet looked at by a worker.
    pub(super) up: u32,
    pub(super) down: u32,
    pub(super) up_until: u64,
    pub(super) down_until: u64,
}
