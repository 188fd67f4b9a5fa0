//! The parts of a world besides processes and storage.

use std::collections::{BTreeMap, VecDeque};

use potstill_core::{Action, ClientId, Core, Event, Tick, record::Record};

use super::happening::Happening;

/// One coordinator.
#[derive(Debug)]
pub(super) struct Coordinator {
    /// `None` when it has died or ended.
    pub(super) core: Option<Core>,
    /// The journal's record that it writes next.
    pub(super) next_record: usize,
    /// It dies after this many more records.
    pub(super) dies_after: Option<u32>,
    /// The deadline of its timer.
    pub(super) timer: Option<u64>,
    /// The clients that have asked it for a checkpoint and have no answer yet.
    pub(super) clients: BTreeMap<ClientId, u64>,
    /// The last iteration that it has observed.
    pub(super) told: Option<u64>,
    /// The newest generation that it has persisted.
    pub(super) generation: Option<u64>,
    /// Whether its last record was answered with an error.
    pub(super) unwritten: bool,
    /// The record that is being written, and what is lost by it.
    pub(super) persisting: Option<(Record, Option<String>)>,
    /// The actions that wait for it, and the events that happen meanwhile, with their times on its clock.
    pub(super) pending: VecDeque<Action>,
    pub(super) waiting: VecDeque<(Tick, Event)>,
    /// Since when it stands still, if it does, and for how long it has in all: its clock does not count that.
    pub(super) still: Option<u64>,
    pub(super) deaf: u64,
    /// What reaches it when it listens again.
    pub(super) deferred: Vec<Happening>,
}

/// One stream. Its number is its [`StreamId`] too.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) coordinator: usize,
    pub(super) process: usize,
    /// A partition has broken it: no message passes any more, and neither end has noticed yet.
    pub(super) broken: bool,
    /// Whether the coordinator takes it for open.
    pub(super) open: bool,
    /// Messages that are under way, or not yet processed by a worker.
    pub(super) up: u32,
    pub(super) down: u32,
    pub(super) up_until: u64,
    pub(super) down_until: u64,
}
