//! The rank's reports in its newest generation that no checkpoint covers yet.
//!
//! A coordinator that dies loses the reports that it has received. Its successor starts from the newest checkpoint, so
//! the rank sends again the reports after that; each is counted once.

use potstill_proto::{
    cursor::Generation,
    message::{FromWorker, Place},
};

/// See the module's documentation.
#[derive(Default)]
pub struct Retained {
    /// The rank's newest place.
    pub place: Option<Place>,
    /// Whether the rank holds the state from which that place's generation starts, or a later one.
    is_source: bool,
    /// The newest checkpoint that it was told of.
    pub saved: u64,
    messages: Vec<FromWorker>,
}

impl Retained {
    /// A new place: reports of an older one are dropped.
    pub fn assigned(&mut self, place: Place, is_source: bool) {
        self.place = Some(place);
        self.is_source = is_source;
        self.messages.retain(|message| {
            matches!(message, FromWorker::Ready | FromWorker::Leaving { .. } | FromWorker::Failed { .. })
        });
    }

    /// Whether a coordinator may rely on the state that the rank holds, which is that of generation `loaded`. Between
    /// its assignment and the moment when it has taken over its place's state, the old one may be overwritten at any
    /// time, without a message to the coordinator.
    pub fn keeps_state(&self, loaded: Generation) -> bool {
        self.place.is_some_and(|place| self.is_source || loaded >= place.generation)
    }

    /// A checkpoint of `iteration` exists.
    pub fn committed(&mut self, iteration: u64) {
        self.messages.retain(|message| match message {
            FromWorker::StepReport(report) => report.iteration >= iteration,
            FromWorker::Evaluation(report) => report.iteration > iteration,
            FromWorker::ShardReceipt(receipt) => receipt.iteration > iteration,
            FromWorker::ShardFailed(failure) => failure.iteration > iteration,
            _ => true,
        });
    }

    /// Keeps a message if a successor would need it.
    pub fn keep(&mut self, message: &FromWorker) {
        let generation = match message {
            FromWorker::StepReport(report) => Generation(report.generation),
            FromWorker::Evaluation(report) => report.generation,
            FromWorker::ShardReceipt(receipt) => Generation(receipt.generation),
            FromWorker::ShardFailed(failure) => Generation(failure.generation),
            FromWorker::CollectiveFailed { generation, .. }
            | FromWorker::Yielded { generation, .. }
            | FromWorker::CheckpointDamaged { generation, .. }
            | FromWorker::StateIncomplete { generation, .. }
            | FromWorker::Finished { generation, .. } => *generation,
            // It concerns the worker, not its place.
            FromWorker::Failed { .. } | FromWorker::Ready | FromWorker::Leaving { .. } => {
                return self.messages.push(message.clone());
            }
            FromWorker::Heartbeat { .. } => return,
        };
        if self.place.is_some_and(|place| place.generation == generation) {
            self.messages.push(message.clone());
        }
    }

    /// All kept messages, in the order in which they were sent.
    pub fn messages(&self) -> impl Iterator<Item = &FromWorker> {
        self.messages.iter()
    }
}

#[cfg(test)]
mod tests {
    use potstill_proto::wire::{ShardReceipt, StepReport};

    use super::*;

    fn step(generation: u64, iteration: u64) -> FromWorker {
        FromWorker::StepReport(StepReport { generation, iteration, ..Default::default() })
    }

    fn receipt(generation: u64, iteration: u64) -> FromWorker {
        FromWorker::ShardReceipt(ShardReceipt { generation, iteration, ..Default::default() })
    }

    fn at(generation: u64) -> Place {
        Place { generation: Generation(generation), rank: 0 }
    }

    #[test]
    fn what_a_checkpoint_covers_and_older_generations_are_forgotten() {
        let mut retained = Retained::default();
        retained.keep(&FromWorker::Ready);
        retained.assigned(at(1), false);
        for message in [step(1, 0), step(1, 1), receipt(1, 2), step(1, 2), step(0, 9)] {
            retained.keep(&message);
        }
        let kept = |retained: &Retained| retained.messages().cloned().collect::<Vec<_>>();
        assert_eq!(kept(&retained), [FromWorker::Ready, step(1, 0), step(1, 1), receipt(1, 2), step(1, 2)]);
        retained.committed(2);
        assert_eq!(kept(&retained), [FromWorker::Ready, step(1, 2)]);
        retained.assigned(at(2), false);
        assert_eq!(kept(&retained), [FromWorker::Ready]);
    }

    #[test]
    fn a_state_that_may_be_overwritten_is_not_counted_on() {
        let place = Place { generation: Generation(2), rank: 1 };
        let mut retained = Retained::default();
        assert!(!retained.keeps_state(Generation(0)));
        retained.assigned(place, false);
        assert!(!retained.keeps_state(Generation(1)));
        assert!(retained.keeps_state(Generation(2)));
        retained.assigned(place, true);
        assert!(retained.keeps_state(Generation(1)));
    }
}
