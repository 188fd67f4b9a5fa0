//! What the core reports: the source of the progress bar, the log, the metrics and the summary.

use potstill_proto::{
    cursor::Generation,
    message::{Source, ToWorker},
    scores::Evaluation,
    wire,
};
use serde::{Deserialize, Serialize};

/// Something that happened, with its reason where there was a choice.
#[derive(Clone, Debug, PartialEq)]
pub enum Observation {
    /// A coordinator started to run this run.
    Started {
        /// Its name.
        coordinator: String,
        /// Iterations that earlier coordinators' generations computed again.
        repeated: u64,
        /// Address at which workers and clients reach it.
        address: String,
        /// Whether there was a coordinator before it.
        resumed: bool,
    },
    /// The run cannot train now.
    Waiting {
        /// Workers attached.
        have: u32,
        /// Workers needed.
        need: u32,
        /// Why, as text.
        reason: String,
    },
    /// A worker attached.
    Attached {
        /// As text: id, host, process, device.
        worker: String,
    },
    /// A worker is gone.
    Lost {
        /// As text: id, host, process, device, rank.
        worker: String,
        /// How it was noticed.
        reason: String,
    },
    /// A new generation was opened.
    GenerationOpened {
        /// Its number.
        generation: Generation,
        /// How many ranks it has.
        world_size: u32,
        /// Where its state comes from.
        source: Source,
        /// Iterations that were or will be computed again, over the whole run so far.
        repeated: u64,
        /// Why it was opened.
        reason: String,
    },
    /// A generation ended before the run did.
    GenerationAbandoned {
        /// Its number.
        generation: Generation,
        /// Which worker is lost, or what failed.
        reason: String,
    },
    /// A rank computes much more slowly than the others for many iterations, or does so no longer.
    Straggler {
        /// As text: id, host, process, device, rank.
        worker: String,
        /// Whether it straggles from now on.
        straggles: bool,
        /// Seconds that it computed for a micro-batch in the last iteration.
        seconds: f64,
        /// The median over all ranks.
        median: f64,
    },
    /// An iteration is finished: every rank has reported it, or a surviving member had completed it. An index comes
    /// again only where a run had to go back to an older checkpoint because no surviving worker held its newest state.
    Iteration(IterationTotals),
    /// The teacher or the student was scored.
    Evaluated(Evaluation),
    /// A checkpoint exists.
    Committed {
        /// Completed iterations.
        iteration: u64,
        /// Bytes of its shards.
        bytes: u64,
    },
    /// A checkpoint could not be made; training continues.
    CheckpointFailed {
        /// Completed iterations.
        iteration: u64,
        /// Rank, key and cause.
        reason: String,
    },
    /// The run is over.
    Ended(Outcome),
}

/// One iteration, summed or averaged over the ranks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct IterationTotals {
    /// Index of the iteration, from 0.
    pub iteration: u64,
    /// Ranks that computed it.
    pub world_size: u32,
    /// Samples in each phase: the global batch.
    pub samples: u32,
    /// Mean over samples of the fake-score loss.
    pub fake_score_loss: f64,
    /// Mean over samples of the generator loss.
    pub generator_loss: f64,
    /// Mean over samples of |f_φ − f_ψ|².
    pub score_difference: f64,
    /// L2 norm of the fake score's gradient.
    pub fake_score_grad_norm: f64,
    /// L2 norm of the generator's gradient.
    pub generator_grad_norm: f64,
    /// Samples dropped because something in them was not finite.
    pub non_finite_samples: u32,
    /// Gradient elements that were not finite and became 0.
    pub non_finite_gradients: u64,
    /// Mean over samples of the discriminator's loss; none before the adversarial loss has started.
    pub discriminator_loss: Option<f64>,
    /// Mean over samples of the generator's adversarial loss.
    pub generator_adversarial_loss: Option<f64>,
    /// fp16's loss scales, of fake score and generator; 1 otherwise.
    pub loss_scales: [f64; 2],
    /// The slowest rank's times, in seconds.
    pub seconds: wire::StepSeconds,
    /// The most memory in bytes that any of the ranks has needed so far; none where no rank knows.
    pub memory_peak: Option<u64>,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "how", rename_all = "kebab-case")]
pub enum Outcome {
    /// All iterations are done and the last checkpoint is committed.
    Succeeded {
        /// Iterations completed.
        iteration: u64,
    },
    /// It was asked to stop, and has saved its state.
    Stopped {
        /// Iterations completed.
        iteration: u64,
        /// Who asked.
        reason: String,
    },
    /// It cannot continue.
    Failed {
        /// Why, and what to do about it.
        reason: String,
    },
}

impl Outcome {
    /// The message that tells a worker that the run is over.
    #[must_use]
    pub fn stop_message(&self) -> ToWorker {
        match self {
            Self::Succeeded { iteration } => ToWorker::Stop {
                success: true,
                reason: format!("the run is complete: {iteration} iterations"),
            },
            Self::Stopped { reason, .. } => ToWorker::Stop { success: true, reason: reason.clone() },
            Self::Failed { reason } => ToWorker::Stop { success: false, reason: reason.clone() },
        }
    }
}
