//! Ranks for which the others wait in every iteration: they are named, and where the run wants it, a spare takes their place.

use super::{Actions, Cause, Core, Stage};
use crate::{Action, observation::Observation};

impl Core {
    /// An iteration is finished.
    pub(super) fn look_for_stragglers(&mut self, paces: &[f64], actions: &mut Actions) {
        for change in self.stragglers.finished(paces) {
            let Stage::Training(training) = &self.stage else { return };
            let stream = training.ranks.get(change.rank as usize);
            let Some(member) = stream.and_then(|stream| self.members.get(*stream)) else { continue };
            actions.push(Action::Observe(Observation::Straggler {
                worker: format!("{}, rank {}", member.describe(), change.rank),
                straggles: change.straggles,
                seconds: change.seconds,
                median: change.median,
            }));
        }
        self.replace_a_straggler(actions);
    }

    /// Gives the place of a straggler to a spare, where there are both and the run wants it.
    pub(super) fn replace_a_straggler(&mut self, actions: &mut Actions) {
        if !self.terms.replace_stragglers || self.members.count() <= self.steps.world_size() {
            return;
        }
        let Stage::Training(training) = &self.stage else { return };
        if training.yielding.is_some() {
            return;
        }
        let straggles = |rank| self.stragglers.of(rank).is_some_and(|(_, straggles)| straggles);
        let slow = (0u32..).zip(&training.ranks).find(|(rank, _)| straggles(*rank));
        let Some((rank, stream)) = slow.map(|(rank, stream)| (rank, *stream)) else { return };
        let Some(member) = self.members.get(stream) else { return };
        let reason =
            format!("a spare takes the place of worker {}, rank {rank}, which is slow", member.describe());
        // It is a spare itself after that, and in time for a run that waits for workers.
        self.members.bar(stream, self.now.after(self.terms.timeouts.wait_millis / 2));
        self.ask_to_yield(Cause::Agreed, reason, actions);
    }
}
