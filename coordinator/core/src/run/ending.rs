//! Commits checkpoints and ends the run.

use std::collections::BTreeSet;

use potstill_proto::message::{Request, ToWorker};

use super::{Actions, Core, Stage, Training, log, send};
use crate::{
    Action, ClientId, StreamId, Uncommitted,
    observation::{Observation, Outcome},
    record::Record,
};

impl Core {
    pub(super) fn commit_answered(
        &mut self,
        iteration: u64,
        result: Result<String, Uncommitted>,
        actions: &mut Actions,
    ) {
        if matches!(self.stage, Stage::Ended(_)) {
            return;
        }
        match result {
            Ok(manifest_key) => {
                let Some(checkpoint) = self.ledger.committed(iteration, manifest_key.clone()) else { return };
                self.from_teacher = false;
                actions.push(Action::Persist(Record::Committed { iteration, manifest_key }));
                let bytes = checkpoint.bytes();
                actions.push(Action::Observe(Observation::Committed { iteration, bytes }));
                for (stream, _) in self.members.iter() {
                    send(actions, stream, ToWorker::Committed { iteration });
                }
                self.failures = 0;
                let reading = self.start.exact && self.steps.finished() == self.start.cursor.iteration;
                let read = reading.then_some(self.start.cursor.iteration);
                // The newest too: storage may hold a newer one than the ledger, whose write it reported as failed.
                let newest = self.ledger.newest().map(|newest| newest.iteration);
                let in_use = self.ledger.committing().chain(read).chain(newest).collect();
                let up_to = newest.unwrap_or(0);
                actions.push(Action::Retain { in_use, up_to });
                self.answer(&Ok(iteration), actions);
                self.conclude(actions);
            }
            Err(Uncommitted { reason, unseen, manifest_key }) => {
                let reason = format!("the checkpoint could not be committed: {reason}");
                let generation = self.ledger.committing_of(iteration).map(|checkpoint| checkpoint.generation);
                // Where none is seen, the coordinator's own access may be at fault.
                let some_seen = !unseen.is_empty() && unseen.len() < self.steps.world_size() as usize;
                match self.ledger.commit_failed(iteration, reason.clone(), manifest_key) {
                    Some(again) => actions.push(Action::Commit(again)),
                    None if generation != Some(self.generation) => {
                        self.observe_failed_checkpoint(iteration, &reason, actions);
                    }
                    None if some_seen => self.shards_unseen(iteration, &unseen, &reason, actions),
                    None => self.checkpoint_failed(iteration, reason, actions),
                }
            }
        }
    }

    /// Some ranks of this generation wrote their shards to a place that is not the run's storage: they are sent away, and
    /// the others go on, or save again.
    fn shards_unseen(&mut self, iteration: u64, unseen: &BTreeSet<u32>, reason: &str, actions: &mut Actions) {
        self.observe_failed_checkpoint(iteration, reason, actions);
        let is_blind = |stream: &StreamId| self.rank(*stream).is_some_and(|rank| unseen.contains(&rank));
        let blind: Vec<_> = self.members.iter().map(|(stream, _)| stream).filter(is_blind).collect();
        for stream in blind {
            let worker = self.members.get(stream).map(|m| m.describe()).unwrap_or_default();
            let reason = format!(
                "worker {worker} wrote its share of the checkpoint of iteration {iteration} to a place that is not the run's \
                 storage, {}: {reason}",
                self.storage_url
            );
            self.send_away(stream, reason, actions);
        }
        // They may have gone by themselves, when nothing was left to do but to commit.
        if matches!(&self.stage, Stage::Training(training) if training.all_finished()) {
            self.abandon(format!("iteration {iteration} is saved again: {reason}"), None, actions);
        }
    }

    fn observe_failed_checkpoint(&mut self, iteration: u64, reason: &str, actions: &mut Actions) {
        actions.push(Action::Observe(Observation::CheckpointFailed { iteration, reason: reason.to_owned() }));
        self.answer(&Err(format!("the checkpoint of iteration {iteration} failed: {reason}")), actions);
        self.failures += 1;
    }

    pub(super) fn checkpoint_failed(&mut self, iteration: u64, reason: String, actions: &mut Actions) {
        self.observe_failed_checkpoint(iteration, &reason, actions);
        if iteration >= self.terms.iterations {
            self.fail(format!("the last checkpoint, of iteration {iteration}, failed: {reason}"), actions);
        } else if self.terms.stop_after_failures.is_some_and(|most| self.failures == most.get()) {
            let newest = match self.ledger.newest() {
                Some(newest) => format!("the newest one is of iteration {}", newest.iteration),
                None => "there is none yet".to_owned(),
            };
            let reason = format!(
                "{} checkpoints in a row failed (checkpoint.stop_after_failures), and {newest}; the last: {reason}",
                self.failures
            );
            self.fail(reason, actions);
        } else {
            self.conclude(actions);
        }
    }

    pub(super) fn checkpoint_requested(&mut self, client: ClientId, actions: &mut Actions) {
        let refusal = match &self.stage {
            Stage::Ended(_) => Some("the run is over"),
            Stage::Gathering(_) => Some("nothing is training: there is nothing new to save"),
            Stage::Training(training) if !training.finished.is_empty() => {
                Some("the run is ending and saves a last checkpoint")
            }
            _ if self.stop.is_some() => Some("the run is stopping and saves a last checkpoint"),
            _ => None,
        };
        if let Some(refusal) = refusal {
            return actions.push(Action::Answer { client, result: Err(refusal.to_owned()) });
        }
        self.clients.insert(client);
        // In all other stages the next generation is asked.
        if let Stage::Training(training) = &self.stage {
            self.request_checkpoint(training, actions);
        }
    }

    pub(super) fn request_checkpoint(&self, training: &Training, actions: &mut Actions) {
        for stream in &training.ranks {
            let generation = self.generation;
            send(actions, *stream, ToWorker::Request { generation, what: Request::Checkpoint });
        }
    }

    /// Answers all clients that wait for a checkpoint.
    fn answer(&mut self, result: &Result<u64, String>, actions: &mut Actions) {
        for client in std::mem::take(&mut self.clients) {
            actions.push(Action::Answer { client, result: result.clone() });
        }
    }

    pub(super) fn stop_requested(&mut self, reason: String, actions: &mut Actions) {
        if self.stop.is_some() || matches!(self.stage, Stage::Ended(_)) {
            return log(
                actions,
                format!("ignored: a request to stop ({reason}): the run is stopping already"),
            );
        }
        log(actions, format!("the run was asked to save and stop: {reason}"));
        self.stop = Some(reason.clone());
        match &self.stage {
            Stage::Training(training) => self.request_stop(training, actions),
            Stage::Gathering(_) => self.stop_without_generation(reason, actions),
            Stage::Reattaching(_) | Stage::Settling(_) | Stage::Ended(_) => {}
        }
    }

    pub(super) fn request_stop(&self, training: &Training, actions: &mut Actions) {
        for stream in &training.ranks {
            let generation = self.generation;
            send(actions, *stream, ToWorker::Request { generation, what: Request::CheckpointAndStop });
        }
    }

    pub(super) fn stop_without_generation(&mut self, reason: String, actions: &mut Actions) {
        let (iteration, newest) = match self.ledger.newest() {
            Some(newest) => {
                (newest.iteration, format!("the newest checkpoint is of iteration {}", newest.iteration))
            }
            None => (0, "there is no checkpoint".into()),
        };
        let reason = format!("{reason}; nothing was training, and {newest}");
        self.end(Outcome::Stopped { iteration, reason }, actions);
    }

    /// Ends the run if every rank has finished and its last checkpoint is committed or has failed.
    pub(super) fn conclude(&mut self, actions: &mut Actions) {
        let Stage::Training(training) = &self.stage else { return };
        if !training.all_finished() {
            return;
        }
        let cursors: BTreeSet<_> = training.finished.values().copied().collect();
        let iteration = match cursors.first() {
            Some(cursor) if cursors.len() == 1 => cursor.iteration,
            _ => {
                let stand: Vec<_> =
                    training.finished.iter().map(|(r, c)| format!("rank {r} at {c}")).collect();
                return self
                    .fail(format!("the ranks finished at different cursors: {}", stand.join(", ")), actions);
            }
        };
        if self.ledger.has(iteration) || iteration == 0 {
            self.end(
                if iteration >= self.terms.iterations {
                    Outcome::Succeeded { iteration }
                } else {
                    let reason = self.stop.clone().unwrap_or_else(|| "its workers ended early".into());
                    Outcome::Stopped { iteration, reason }
                },
                actions,
            );
        } else if let Some(failure) = self.ledger.failure(iteration) {
            self.fail(format!("the last checkpoint, of iteration {iteration}, failed: {failure}"), actions);
        }
    }

    pub(super) fn fail(&mut self, reason: String, actions: &mut Actions) {
        self.end(Outcome::Failed { reason }, actions);
    }

    pub(super) fn end(&mut self, outcome: Outcome, actions: &mut Actions) {
        if matches!(self.stage, Stage::Ended(_)) {
            return;
        }
        actions.push(Action::Persist(Record::Ended { outcome: outcome.clone() }));
        for (stream, _) in self.members.iter() {
            send(actions, stream, outcome.stop_message());
        }
        self.announce_end(outcome, actions);
    }

    /// Another coordinator owns the journal, or it cannot be written: nothing is persisted, and the workers are not
    /// stopped, so that the next coordinator finds them.
    pub(super) fn journal_lost(&mut self, reason: String, actions: &mut Actions) {
        actions.extend(self.members.iter().map(|(stream, _)| Action::Close { stream }));
        self.announce_end(Outcome::Failed { reason }, actions);
    }

    fn announce_end(&mut self, outcome: Outcome, actions: &mut Actions) {
        self.answer(&Err("the run has ended".to_owned()), actions);
        actions.push(Action::Observe(Observation::Ended(outcome.clone())));
        actions.push(Action::End(outcome.clone()));
        self.stage = Stage::Ended(outcome);
    }
}
