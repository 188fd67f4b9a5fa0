//! What the coordinator wants that has not been acted on.

use potstill_proto::{
    cursor::Generation,
    message::{Assignment, Request, ToWorker},
};

/// See the module's documentation.
#[derive(Default)]
pub struct Orders {
    /// A place in a new generation.
    pub assignment: Option<Assignment>,
    /// The generation to leave, and why.
    abandoned: Option<(Generation, String)>,
    /// The run is over: whether it succeeded, and why.
    pub stop: Option<(bool, String)>,
    /// A checkpoint is wanted in this generation.
    checkpoint: Option<Generation>,
    /// A checkpoint and then an end are wanted in this generation.
    checkpoint_and_stop: Option<Generation>,
    /// This generation's ranks are to yield at a boundary.
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

    /// Whether a checkpoint was asked of `generation`; asked once, answered once.
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
            // The link acts on these itself.
            ToWorker::Welcome { .. } | ToWorker::Restart { .. } => {}
        }
    }
}
