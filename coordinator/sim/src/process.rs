//! One worker process.

use potstill_proto::{
    cursor::{Cursor, Generation},
    message::{Assignment, FromWorker, Place, Source, WorkerId},
};

use crate::{group::Flags, state::State, world::happening::Happening};

/// What a process is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It starts and loads what the run reads.
    Booting,
    /// It waits for a place.
    Idle,
    /// It waits for the other ranks of its generation.
    Meeting,
    /// It takes the state of its place, over its own.
    Loading,
    /// It computes its share of a phase.
    Computing,
    /// Its share is in the reduction.
    Reducing,
    /// It saves before it parts or finishes.
    Saving,
    /// It has nothing left to compute.
    Finished,
}

/// A worker process.
#[derive(Debug)]
pub struct Process {
    /// Its machine.
    pub slot: usize,
    /// Whether it lives.
    pub alive: bool,
    /// It is stopped; what happens to it waits here.
    pub paused: bool,
    /// Its main thread stands still while its session goes on.
    pub hung: bool,
    /// On which side of a partition it is; 0: the coordinators'.
    pub side: u64,
    /// What it does.
    pub stage: Stage,
    /// Grows with the stage: what was planned for an earlier one does not happen.
    pub turn: u64,
    /// Whether the operation at hand is about to fail for it.
    pub failing: bool,
    /// What it holds; `None` when that is torn, or nothing.
    pub state: Option<State>,
    /// Its newest place.
    pub place: Option<Assignment>,
    /// What it was asked for.
    pub flags: Flags,
    /// Why it would like to leave.
    pub leaving: Option<String>,
    /// Its stream, by number.
    pub link: Option<usize>,
    /// What it said in its newest generation and no checkpoint covers.
    pub retained: Vec<FromWorker>,
    /// Units of work.
    pub progress: u64,
    /// What waits for it to go on.
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
            hung: false,
            side: 0,
            stage: Stage::Booting,
            turn: 0,
            failing: false,
            state: None,
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

    /// Does something else from now on.
    pub fn enter(&mut self, stage: Stage) {
        self.stage = stage;
        self.turn += 1;
        self.failing = false;
        self.progress += 1;
    }

    /// Whether it takes part in its generation's group.
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

    /// The state that its hello names: none where it may be overwritten before anybody hears of it.
    #[must_use]
    pub fn counted_on(&self) -> Option<Cursor> {
        let is_source = |place: &Assignment| place.source == Source::Peer { rank: place.rank };
        let about_to_be_overwritten =
            self.stage == Stage::Meeting && !self.place.as_ref().is_some_and(is_source);
        self.held().filter(|_| !about_to_be_overwritten)
    }

    /// How far its state is: none while that is being overwritten.
    #[must_use]
    pub fn held(&self) -> Option<Cursor> {
        let state = self.state.filter(|_| self.stage != Stage::Loading)?;
        Some(state.cursor)
    }

    /// A checkpoint of `iteration` exists: forgets what that covers.
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
