//! One worker process.

use potstill_proto::{
    cursor::{Cursor, Generation},
    message::{Assignment, FromWorker, Place, Source, WorkerId},
};

use crate::{group::Flags, state::State, world::happening::Happening};

/// What a process is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It starts and loads the files that the run reads.
    Booting,
    /// It waits for a place.
    Idle,
    /// It waits for the other ranks of its generation.
    Meeting,
    /// It takes the state of its place, which overwrites its own.
    Loading,
    /// It computes its share of a phase.
    Computing,
    /// It waits for the reduction to which it has contributed its share.
    Reducing,
    /// It saves before it yields or finishes.
    Saving,
    /// It has nothing left to compute.
    Finished,
}

/// The slices of a state that a rank of a generation holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slices {
    /// The generation that cut the state.
    pub generation: u64,
    /// Into how many slices.
    pub count: u32,
    /// The rank's own.
    pub own: u32,
    /// The one of another rank, of which it holds a copy.
    pub copy: Option<u32>,
}

impl Slices {
    /// Whether a slice is one of these.
    #[must_use]
    pub fn has(&self, slice: u32) -> bool {
        self.own == slice || self.copy == Some(slice)
    }
}

/// A worker process.
#[derive(Debug)]
pub struct Process {
    /// Its machine.
    pub slot: usize,
    /// Whether it is alive.
    pub alive: bool,
    /// It is paused; events for it are deferred.
    pub paused: bool,
    /// It is of another version: it must not get a place.
    pub foreign: bool,
    /// Its main thread makes no progress while its session sends heartbeats.
    pub hung: bool,
    /// Its side of a partition; 0 is the coordinators' side.
    pub side: u64,
    /// Its current stage.
    pub stage: Stage,
    /// Grows with every change of stage: events that were planned for an earlier stage are dropped.
    pub turn: u64,
    /// Whether the current operation is about to fail for it.
    pub failing: bool,
    /// Its state, or the state that it holds slices of; `None` when it is torn or was never loaded.
    pub state: Option<State>,
    /// What it holds of the state, where ranks hold slices: those of the newest generation that it loaded, and those of
    /// the one before until a collective has shown that all ranks have loaded theirs.
    pub slices: Vec<Slices>,
    /// It has contributed to the reduction that steps its state: it can make that step without its peers once one of them
    /// is known to have made it.
    pub prepared: bool,
    /// Its newest place.
    pub place: Option<Assignment>,
    /// The requests that it has received.
    pub flags: Flags,
    /// Why it leaves, once it does.
    pub leaving: Option<String>,
    /// Its stream, by number.
    pub link: Option<usize>,
    /// Its messages of its newest generation that no checkpoint covers.
    pub retained: Vec<FromWorker>,
    /// Its count of completed units of work.
    pub progress: u64,
    /// Events that are deferred while it is paused.
    pub deferred: Vec<Happening>,
}

impl Process {
    /// A process that has just been started.
    #[must_use]
    pub fn new(slot: usize) -> Self {
        Self {
            slot,
            alive: true,
            paused: false,
            foreign: false,
            hung: false,
            side: 0,
            stage: Stage::Booting,
            turn: 0,
            failing: false,
            state: None,
            slices: Vec::new(),
            prepared: false,
            place: None,
            flags: Flags::default(),
            leaving: None,
            link: None,
            retained: Vec::new(),
            progress: 0,
            deferred: Vec::new(),
        }
    }

    /// The name of the process with this number.
    #[must_use]
    pub fn id(number: usize) -> WorkerId {
        WorkerId(format!("w{number}"))
    }

    /// Enters another stage.
    pub fn enter(&mut self, stage: Stage) {
        self.stage = stage;
        self.turn += 1;
        self.failing = false;
        self.progress += 1;
    }

    /// Whether it holds this state, or can make the one step that leads to it.
    #[must_use]
    pub fn reaches(&self, state: State) -> bool {
        self.state.is_some_and(|own| own == state || (self.prepared && own.step() == state))
    }

    /// Gives up its state.
    pub fn forget(&mut self) {
        (self.state, self.prepared) = (None, false);
        self.slices.clear();
    }

    /// Whether it is in its generation's group.
    #[must_use]
    pub fn in_group(&self) -> bool {
        self.place.is_some() && !matches!(self.stage, Stage::Booting | Stage::Idle)
    }

    /// Its newest generation; 0 before the first.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.place.as_ref().map(|place| place.generation).unwrap_or_default()
    }

    /// The place that its hello names.
    #[must_use]
    pub fn named_place(&self) -> Option<Place> {
        self.place.as_ref().map(|place| Place { generation: place.generation, rank: place.rank })
    }

    /// The state that its hello names: none where it may be overwritten before a coordinator receives the hello.
    #[must_use]
    pub fn counted_on(&self) -> Option<Cursor> {
        let is_source = |place: &Assignment| place.source == Source::Peer { rank: place.rank };
        let about_to_be_overwritten =
            self.stage == Stage::Meeting && !self.place.as_ref().is_some_and(is_source);
        self.held().filter(|_| !about_to_be_overwritten)
    }

    /// The cursor of its state: none while that is being overwritten. Slices are taken over beside those that are held.
    #[must_use]
    pub fn held(&self) -> Option<Cursor> {
        let overwritten = self.stage == Stage::Loading && self.slices.is_empty();
        let state = self.state.filter(|_| !overwritten)?;
        Some(state.cursor)
    }

    /// A checkpoint of `iteration` exists: drops the messages that it covers.
    pub fn covered(&mut self, iteration: u64) {
        self.retained.retain(|message| match message {
            FromWorker::StepReport(report) => report.iteration >= iteration,
            FromWorker::Evaluation(report) => report.iteration > iteration,
            FromWorker::ShardReceipt(receipt) => receipt.iteration > iteration,
            FromWorker::ShardFailed(failure) => failure.iteration > iteration,
            _ => true,
        });
    }
}
