//! What can happen in a world.

use potstill_core::ledger::Checkpoint;
use potstill_proto::message::{FromWorker, Hello, ToWorker};

use crate::state::State;

/// Something that happens. Processes, links and coordinators are named by number.
#[derive(Clone, Debug)]
pub enum Happening {
    /// A machine starts a worker.
    Boot {
        /// The machine.
        slot: usize,
    },
    /// A process has done what its stage was about.
    Work {
        /// Which one.
        process: usize,
        /// Its turn when that was planned.
        turn: u64,
    },
    /// The operation that a rank waits for is complete.
    Reduced {
        /// Which process.
        process: usize,
        /// Its turn when that was planned.
        turn: u64,
    },
    /// The operation that a rank waits for fails.
    Fails {
        /// Which process.
        process: usize,
        /// Its turn when that was planned.
        turn: u64,
        /// How.
        error: &'static str,
    },
    /// A rank's share of a checkpoint is written, or not.
    Uploaded {
        /// Which process.
        process: usize,
        /// Its generation then.
        generation: u64,
        /// Its rank then.
        rank: u32,
        /// What it saved.
        state: State,
    },
    /// A process says that it lives.
    Heartbeat {
        /// Which one.
        process: usize,
    },
    /// A process tries to reach a coordinator.
    Reconnect {
        /// Which one.
        process: usize,
    },
    /// Something arrives at a coordinator.
    Up {
        /// On which link.
        link: usize,
        /// What.
        what: Up,
    },
    /// Something arrives at a worker; `None`: the end of the stream.
    Down {
        /// On which link.
        link: usize,
        /// What.
        message: Option<ToWorker>,
    },
    /// A coordinator sees that a link is broken.
    Severed {
        /// Which one.
        link: usize,
    },
    /// A worker sees that its link is broken.
    Noticed {
        /// Which one.
        link: usize,
    },
    /// A coordinator's deadline.
    Timer {
        /// Which coordinator.
        coordinator: usize,
        /// The deadline.
        at: u64,
    },
    /// A coordinator looks whether the journal is still its own.
    Watch {
        /// Which coordinator.
        coordinator: usize,
    },
    /// A manifest reaches storage.
    Lands {
        /// Whose it is.
        coordinator: usize,
        /// What it says.
        checkpoint: Checkpoint,
        /// What storage makes of it.
        verdict: Verdict,
    },
    /// Storage's answer reaches a coordinator.
    Answers {
        /// Which coordinator.
        coordinator: usize,
        /// The checkpoint's iteration.
        iteration: u64,
        /// The answer.
        result: Result<String, String>,
    },
    /// A coordinator starts.
    Start,
    /// Something goes wrong.
    Fault,
    /// Nothing goes wrong any more.
    Calm,
    /// A paused process goes on.
    Resume {
        /// Which one.
        process: usize,
    },
    /// A partition ends.
    Heal {
        /// Which one.
        side: u64,
    },
}

/// What a worker's end of a stream carries.
#[derive(Clone, Debug)]
pub enum Up {
    /// The first message.
    Hello(Hello),
    /// Any other.
    Message(FromWorker),
    /// The end.
    End,
}

/// What storage makes of a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is written.
    Written,
    /// It is not.
    Refused,
    /// It is written, and the answer is an error.
    Lie,
}
