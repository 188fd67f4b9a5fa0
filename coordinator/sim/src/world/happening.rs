//! The events of a world.

use potstill_core::{Uncommitted, ledger::Checkpoint};
use potstill_proto::message::{FromWorker, Hello, ToWorker};

use crate::state::State;

/// An event. Processes, links and coordinators are named by number.
#[derive(Clone, Debug)]
pub enum Happening {
    /// A machine starts a worker.
    Boot {
        /// The machine.
        slot: usize,
    },
    /// A process has completed the work of its stage.
    Work {
        /// The process.
        process: usize,
        /// Its turn when the event was planned.
        turn: u64,
    },
    /// The operation that a rank waits for is complete.
    Reduced {
        /// The process.
        process: usize,
        /// Its turn when the event was planned.
        turn: u64,
    },
    /// The operation that a rank waits for fails.
    Fails {
        /// The process.
        process: usize,
        /// Its turn when the event was planned.
        turn: u64,
        /// The error.
        error: &'static str,
    },
    /// A rank's shard of a checkpoint is written, or could not be.
    Uploaded {
        /// The process.
        process: usize,
        /// The generation in which it was saved.
        generation: u64,
        /// The rank that saved it.
        rank: u32,
        /// The state that was saved.
        state: State,
    },
    /// A process sends a heartbeat.
    Heartbeat {
        /// The process.
        process: usize,
    },
    /// A process tries to reach a coordinator.
    Reconnect {
        /// The process.
        process: usize,
    },
    /// A message arrives at a coordinator.
    Up {
        /// The link.
        link: usize,
        /// The message.
        what: Up,
    },
    /// A message arrives at a worker; `None`: the end of the stream.
    Down {
        /// The link.
        link: usize,
        /// The message.
        message: Option<ToWorker>,
    },
    /// A coordinator notices that a link is broken.
    Severed {
        /// The link.
        link: usize,
    },
    /// A worker notices that its link is broken.
    Noticed {
        /// The link.
        link: usize,
    },
    /// A coordinator's deadline.
    Timer {
        /// The coordinator.
        coordinator: usize,
        /// The deadline.
        at: u64,
    },
    /// A coordinator checks that no other one has written to the journal.
    Watch {
        /// The coordinator.
        coordinator: usize,
    },
    /// A manifest reaches storage.
    Lands {
        /// The coordinator that wrote it.
        coordinator: usize,
        /// Its content.
        checkpoint: Checkpoint,
        /// Whether it is written, and how storage answers.
        verdict: Verdict,
    },
    /// Storage's answer reaches a coordinator.
    Answers {
        /// The coordinator.
        coordinator: usize,
        /// The checkpoint's iteration.
        iteration: u64,
        /// The answer.
        result: Result<String, Uncommitted>,
    },
    /// A coordinator's record is durable, or its answer is an error.
    Persisted {
        /// The coordinator.
        coordinator: usize,
    },
    /// A coordinator has read a checkpoint.
    Verified {
        /// The coordinator.
        coordinator: usize,
        /// The checkpoint's manifest.
        manifest_key: String,
    },
    /// A coordinator that stood still listens again.
    Listens {
        /// The coordinator.
        coordinator: usize,
        /// Since when it stood still.
        since: u64,
    },
    /// A coordinator starts.
    Start,
    /// A fault is injected.
    Fault,
    /// No more faults are injected.
    Calm,
    /// A paused process continues.
    Resume {
        /// The process.
        process: usize,
    },
    /// A partition ends.
    Heal {
        /// The side that was cut off.
        side: u64,
    },
}

/// A message from a worker, or the end of its stream.
#[derive(Clone, Debug)]
pub enum Up {
    /// The first message.
    Hello(Hello),
    /// Any other message.
    Message(FromWorker),
    /// The end of the stream.
    End,
}

/// How storage handles a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is written.
    Written,
    /// It is not written.
    Refused,
    /// It is written, and the answer is an error.
    Lie,
}
