//! Ranks for which the others wait in every iteration: they are named, and where the run wants it, a spare takes their place.

use super::{Actions, Cause, Core, Stage};
use crate::{Action, StreamId, observation::Observation};

/// How often the time of a hang a straggler gets no place after a spare has taken its own.
const BARRED: u64 = 30;

impl Core {
    /// An iteration is finished.
    pub(super) fn look_for_stragglers(&mut self, paces: &[f64], actions: &mut Actions) {
        for change in self.stragglers.finished(paces) {
            let Stage::Training(training) = &self.stage else { return };
            let Some(stream) = training.ranks.get(change.rank as usize).copied() else { continue };
            let Some(member) = self.members.get(stream) else { continue };
            let worker = format!("{}, rank {}", member.describe(), change.rank);
            actions.push(Action::Observe(Observation::Straggler {
                worker: worker.clone(),
                straggles: change.straggles,
                seconds: change.seconds,
                median: change.median,
            }));
            if change.straggles && self.terms.replace_stragglers {
                self.replace(stream, &worker, actions);
            }
        }
    }

    /// Gives the place of a straggler to a spare, if there is one.
    fn replace(&mut self, stream: StreamId, worker: &str, actions: &mut Actions) {
        if self.members.count() <= self.steps.world_size() {
            return;
        }
        self.members.bar(stream, self.now.after(BARRED * self.terms.timeouts.hang_millis));
        self.ask_to_yield(
            Cause::Agreed,
            format!("a spare takes the place of worker {worker}, which is slow"),
            actions,
        );
    }
}
