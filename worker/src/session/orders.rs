//! The coordinator's orders that have not been executed.

use potstill_proto::{
    cursor::Generation,
    message::{Assignment, Request, ToWorker},
};

/// See the module's documentation.
#[derive(Default)]
pub struct Orders {
    /// The assignment to a new generation.
    pub assignment: Option<Assignment>,
    /// The generation to leave, and why.
    abandoned: Option<(Generation, String)>,
    /// The run is over: whether it succeeded, and why.
    pub stop: Option<(bool, String)>,
    /// The generation that was asked for a checkpoint.
    checkpoint: Option<Generation>,
    /// The generation that was asked to save and stop.
    checkpoint_and_stop: Option<Generation>,
    /// The generation whose ranks were asked to yield.
    yields: Option<Generation>,
}

impl Orders {
    /// Why the rank should leave `generation` now, if it should.
    pub fn interruption(&self, generation: Generation) -> Option<String> {
        if let Some((_, reason)) = &self.stop {
            return Some(reason.clone());
        }
        if let Some((_, reason)) = self.abandoned.as_ref().filter(|(g, _)| *g >= generation) {
            return Some(reason.clone());
        }
        let next = self.assignment.as_ref().filter(|a| a.generation > generation)?;
        Some(format!("{} replaces it", next.generation))
    }

    /// Whether a checkpoint was requested from `generation`; each request is returned once.
    pub fn take_checkpoint(&mut self, generation: Generation) -> bool {
        self.checkpoint.take_if(|g| *g == generation).is_some()
    }

    /// Whether `generation` was asked to save and stop.
    pub fn stop_wanted(&self, generation: Generation) -> bool {
        self.checkpoint_and_stop == Some(generation)
    }

    /// Whether the ranks of `generation` were asked to yield.
    pub fn yield_wanted(&self, generation: Generation) -> bool {
        self.yields == Some(generation)
    }

    pub(super) fn take(&mut self, message: ToWorker) {
        match message {
            ToWorker::Assignment(assignment) => self.assignment = Some(assignment),
            ToWorker::Abandon { generation, reason } => self.abandoned = Some((generation, reason)),
            ToWorker::Stop { success, reason } => self.stop = Some((success, reason)),
            ToWorker::Refused { reason } => self.stop = Some((false, reason)),
            ToWorker::Request { generation, what } => match what {
                Request::Checkpoint => self.checkpoint = Some(generation),
                Request::CheckpointAndStop => self.checkpoint_and_stop = Some(generation),
                Request::Yield => self.yields = Some(generation),
                Request::CheckpointAndYield => {
                    self.checkpoint = Some(generation);
                    self.yields = Some(generation);
                }
            },
            ToWorker::Committed { iteration } => tracing::debug!(iteration, "checkpoint committed"),
            // The link executes these itself.
            ToWorker::Welcome { .. } | ToWorker::Restart { .. } => {}
        }
    }
}
