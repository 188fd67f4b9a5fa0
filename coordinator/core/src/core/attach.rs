//! Workers come and go.

use potstill_proto::{
    PROTOCOL,
    message::{Hello, ToWorker},
};

use super::{Actions, Core, Stage, ending::stop_message, log, send};
use crate::{Action, StreamId, observation::Observation, record::Record};

impl Core {
    pub(super) fn started(&mut self, actions: &mut Actions) {
        let coordinator = self.coordinator.clone();
        actions.push(Action::Persist(if self.resumed {
            Record::Resumed { coordinator, iteration: self.steps.finished(), iterations: self.iterations }
        } else {
            Record::RunStarted { coordinator, run_id: self.run_id.clone() }
        }));
        if let Stage::Gathering(gathering) = &mut self.stage {
            gathering.short_since = self.now;
        }
        self.recount(actions);
    }

    pub(super) fn attached(&mut self, stream: StreamId, hello: Hello, actions: &mut Actions) {
        if let Some(reason) = self.refusal(&hello) {
            log(actions, format!("worker {} is refused: {reason}", hello.worker));
            send(actions, stream, ToWorker::Refused { reason });
            actions.push(Action::Close { stream });
            return;
        }
        if let Stage::Ended(outcome) = &self.stage {
            send(actions, stream, stop_message(outcome));
            actions.push(Action::Close { stream });
            return;
        }
        let worker = self.members.attach(self.now, stream, hello).describe();
        send(
            actions,
            stream,
            ToWorker::Welcome {
                run_id: self.run_id.clone(),
                specification: self.specification.clone(),
                storage_url: self.storage_url.clone(),
                heartbeat_millis: self.timeouts.heartbeat_millis,
                collective_timeout_millis: self.timeouts.collective_millis,
            },
        );
        actions.push(Action::Observe(Observation::Attached { worker: worker.clone() }));
        match &self.stage {
            Stage::Training(training) => {
                let full = self.steps.world_size() >= self.max_workers;
                if full || self.stop.is_some() || !training.finished.is_empty() {
                    log(actions, format!("worker {worker} stands by"));
                } else {
                    self.abandon(format!("worker {worker} joins"), None, actions);
                }
            }
            Stage::Gathering(_) => self.recount(actions),
            Stage::Settling(_) | Stage::Ended(_) => {}
        }
    }

    fn refusal(&self, hello: &Hello) -> Option<String> {
        if hello.protocol != PROTOCOL {
            return Some(format!(
                "it speaks protocol {}, the coordinator {PROTOCOL}: install the same version of Potstill on both",
                hello.protocol
            ));
        }
        if hello.run_id != self.run_id {
            return Some(format!(
                "it was started for run {:?}; this coordinator serves run {:?}",
                hello.run_id, self.run_id
            ));
        }
        self.members
            .stream_of(&hello.worker)
            .map(|_| format!("a worker with the id {} is attached already", hello.worker))
    }

    /// A stream is gone, or its worker's lease is over.
    pub(super) fn lost(&mut self, stream: StreamId, reason: &str, actions: &mut Actions) {
        let rank = self.rank(stream);
        let Some(member) = self.members.remove(stream) else { return };
        let mut worker = member.describe();
        if let Some(rank) = rank {
            worker = format!("{worker}, rank {rank}");
        }
        if matches!(self.stage, Stage::Ended(_)) {
            return;
        }
        let observation = Observation::Lost { worker: worker.clone(), reason: reason.into() };
        actions.push(Action::Observe(observation));
        let lost = format!("worker {worker} is lost: {reason}");
        match &mut self.stage {
            Stage::Training(training) => {
                let iteration = training.finished.values().next().map(|cursor| cursor.iteration);
                let only_the_manifest_is_left =
                    training.all_finished() && iteration.is_some_and(|i| self.ledger.is_committing(i));
                if rank.is_some() && !only_the_manifest_is_left {
                    self.abandon(lost, None, actions);
                }
            }
            Stage::Settling(settling) => {
                settling.keepers.remove(&stream);
                if settling.awaiting.remove(&stream) || rank.is_some() {
                    settling.explained = true;
                    settling.since = self.now;
                    settling.reason = lost;
                }
            }
            Stage::Gathering(_) => self.recount(actions),
            Stage::Ended(_) => {}
        }
    }

    /// The rank that a stream holds in the newest generation.
    pub(super) fn rank(&self, stream: StreamId) -> Option<u32> {
        let place = self.members.get(stream)?.place?;
        Some(place.rank).filter(|_| place.generation == self.generation)
    }
}
