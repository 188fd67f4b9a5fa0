//! The coordinator's state machine.
//!
//! [`Core::step`] takes the time and an event and returns the actions to take, as data. It reads no clock, draws no
//! random number and touches no network or storage: a recorded sequence of events gives the same actions again, and a
//! simulated world can drive thousands of workers through it.
//!
//! ```
//! use std::time::Duration;
//!
//! use potstill_core::{
//!     Action, Core, Event, Setup, Tick,
//!     terms::{Division, Terms, Timeouts},
//! };
//!
//! let mut core = Core::new(Setup {
//!     coordinator: "c1".into(),
//!     address: "host:7070".into(),
//!     certificate: None,
//!     run_id: "demo".into(),
//!     terms: Terms {
//!         iterations: 100,
//!         micro_batches: 4,
//!         micro_batch: 32,
//!         min_workers: 1,
//!         max_workers: 2,
//!         timeouts: Timeouts::new(Duration::from_secs(10), Duration::from_secs(300)),
//!         scored: false,
//!         collapse_share: 0.25,
//!         division: Division::Whole,
//!         stop_after_failures: None,
//!         straggler_factor: 1.5,
//!         replace_stragglers: false,
//!     },
//!     specification: String::new(),
//!     storage_url: "memory:///".into(),
//!     history: vec![],
//!     checkpoints: vec![],
//!     ranks_may_live: false,
//!     from_teacher: false,
//! });
//! let mut actions = Vec::new();
//! core.step(Tick(0), Event::Started, &mut actions);
//! assert!(matches!(actions[0], Action::Persist(_)), "the journal comes first");
//! assert!(core.next_deadline().is_some(), "it does not wait for workers for ever");
//! ```
//!
//! One job for each module: who is attached and alive ([`membership`]); who gets which place in a generation and where
//! its state comes from ([`assignment`]); what every iteration computed, exactly once ([`steps`]), and which ranks the others
//! wait for ([`stragglers`]); which checkpoints exist ([`ledger`]); and the life of the run that ties them together ([`Core`]).

pub mod assignment;
pub mod ledger;
pub mod membership;
pub mod observation;
pub mod record;
mod run;
pub mod steps;
pub mod stragglers;
pub mod terms;

use std::collections::BTreeSet;

use potstill_proto::message::{FromWorker, Hello, ToWorker};

pub use crate::run::{Core, Setup};
use crate::{
    ledger::Checkpoint,
    observation::{Observation, Outcome},
    record::Record,
};

/// A moment on the coordinator's monotonic clock, in milliseconds since an arbitrary start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tick(pub u64);

impl Tick {
    /// The moment `millis` later.
    #[must_use]
    pub fn after(self, millis: u64) -> Self {
        Self(self.0.saturating_add(millis))
    }
}

/// One `Attach` stream. A number is used once within a coordinator's life, so that late messages of a dead stream
/// cannot be taken for messages of its successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct StreamId(pub u64);

/// A client that waits for an answer. A number is used once within a coordinator's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClientId(pub u64);

/// Why a checkpoint was not committed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Uncommitted {
    /// The error.
    pub reason: String,
    /// Ranks that reported a shard which is not in the storage, as the coordinator sees it.
    pub unseen: BTreeSet<u32>,
    /// Where the manifest lies if it was written and only the answer was lost; none if it was not sent.
    pub manifest_key: Option<String>,
}

/// An input of the state machine.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The first event: the journal is open and workers may attach.
    Started,
    /// A worker sent its hello on a new stream.
    Attached {
        /// The stream.
        stream: StreamId,
        /// The hello.
        hello: Hello,
    },
    /// A worker sent a message after its hello.
    Received {
        /// Its stream.
        stream: StreamId,
        /// The message.
        message: FromWorker,
    },
    /// A stream has ended.
    Closed {
        /// The stream.
        stream: StreamId,
        /// How it was noticed.
        reason: String,
    },
    /// A deadline may have passed.
    Timer,
    /// Storage answered [`Action::Commit`].
    CommitAnswered {
        /// The checkpoint's iteration.
        iteration: u64,
        /// The manifest's key below the run's folder, or why there is no manifest.
        result: Result<String, Uncommitted>,
    },
    /// The answer to [`Action::Verify`].
    Verified {
        /// The manifest's key.
        manifest_key: String,
        /// What is wrong with the checkpoint, if something is; or why it could not be read.
        result: Result<Option<String>, String>,
    },
    /// A client asked for a checkpoint; the answer is [`Action::Answer`].
    CheckpointRequested {
        /// The client that waits for the answer.
        client: ClientId,
    },
    /// A client or a signal asked the run to save and stop.
    StopRequested {
        /// Who asked, and why.
        reason: String,
    },
    /// The process that starts the workers has given up.
    WorkersUnavailable {
        /// Why.
        reason: String,
    },
    /// The coordinator itself did not listen for a while, and the clock stood still: workers that are lost soon after
    /// may be alive.
    Deaf {
        /// For how long.
        millis: u64,
    },
    /// The journal cannot be continued: another coordinator owns it, or storage is lost.
    JournalLost {
        /// Which of the two, and its cause.
        reason: String,
    },
}

/// What the coordinator must do, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send a message to a worker.
    Send {
        /// Its stream.
        stream: StreamId,
        /// The message.
        message: ToWorker,
    },
    /// End a stream after what was sent on it.
    Close {
        /// The stream.
        stream: StreamId,
    },
    /// Append to the journal. No later action may be executed before the record is durable.
    Persist(Record),
    /// Check that a checkpoint's shards exist, and write its manifest; the answer comes as [`Event::CommitAnswered`].
    Commit(Checkpoint),
    /// Read a checkpoint whole, to find out whether it is damaged; the answer comes as [`Event::Verified`].
    Verify {
        /// Its manifest's key below the run's folder.
        manifest_key: String,
    },
    /// Remove the checkpoints that retention does not keep, and objects that belong to no checkpoint.
    Retain {
        /// Iterations of the checkpoints that are being read or committed.
        in_use: BTreeSet<u64>,
        /// Objects that belong to no checkpoint are removed up to this iteration; later ones may be about to be
        /// committed.
        up_to: u64,
    },
    /// Answer a request for a checkpoint: the iteration of one that exists now, or why there is none.
    Answer {
        /// The client that asked.
        client: ClientId,
        /// The answer.
        result: Result<u64, String>,
    },
    /// Report to the log, the monitor and the metrics.
    Observe(Observation),
    /// Log a decision that changes no state, such as a message that was ignored, with its reason.
    Log(String),
    /// The run is over; no action follows.
    End(Outcome),
}
