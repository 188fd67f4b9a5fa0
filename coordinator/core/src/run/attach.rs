//! Workers attach, yield, leave and are lost.

use potstill_proto::{
    PROTOCOL,
    message::{Hello, Place, Request, ToWorker},
};

use super::{Actions, Cause, Core, Stage, log, send};
use crate::{Action, StreamId, observation::Observation, record::Record};

impl Core {
    pub(super) fn started(&mut self, actions: &mut Actions) {
        let (coordinator, address) = (self.coordinator.clone(), self.address.clone());
        let certificate = self.certificate.clone();
        actions.push(Action::Persist(if self.resumed {
            let iteration = self.steps.finished();
            Record::Resumed {
                coordinator,
                iteration,
                iterations: self.terms.iterations,
                address,
                certificate,
            }
        } else {
            Record::RunStarted { coordinator, run_id: self.run_id.clone(), address, certificate }
        }));
        actions.push(Action::Observe(Observation::Started {
            coordinator: self.coordinator.clone(),
            repeated: self.repeated,
            address: self.address.clone(),
            resumed: self.resumed,
        }));
        if let Stage::Gathering(gathering) = &mut self.stage {
            gathering.short_since = self.now;
        }
        self.start_waiting(actions);
        self.recount(actions);
    }

    pub(super) fn attached(&mut self, stream: StreamId, mut hello: Hello, actions: &mut Actions) {
        if let Some(reason) = self.refusal(&hello) {
            log(actions, format!("worker {} is refused: {reason}", hello.worker));
            send(actions, stream, ToWorker::Refused { reason });
            actions.push(Action::Close { stream });
            return;
        }
        if let Stage::Ended(outcome) = &self.stage {
            send(actions, stream, outcome.stop_message());
            actions.push(Action::Close { stream });
            return;
        }
        if let Some(old) = self.members.stream_of(&hello.worker) {
            self.lost(old, "it is replaced by its new connection", actions);
            actions.push(Action::Close { stream: old });
        }
        // Not refused: another coordinator may have taken over and given it a place.
        if let Some(held) = hello.held.take_if(|_| !self.placed.contains(&hello.worker)) {
            log(
                actions,
                format!(
                    "worker {} says that it holds the state at {held}; it is not believed, since the journal never gave it a place",
                    hello.worker
                ),
            );
        }
        let claimed = hello.place;
        if claimed.is_some_and(|place| place.generation <= self.incomplete) {
            hello.held = None;
        }
        // A worker may claim any place: only the journal says whose it is.
        let place = claimed.filter(|place| self.owns(&hello.worker, *place));
        let worker = self.members.attach(self.now, stream, hello, place).describe();
        send(
            actions,
            stream,
            ToWorker::Welcome {
                run_id: self.run_id.clone(),
                specification: self.specification.clone(),
                storage_url: self.storage_url.clone(),
                heartbeat_millis: self.terms.timeouts.heartbeat_millis,
                joining_timeout_millis: self.terms.timeouts.joining_millis,
                patience_millis: self.terms.timeouts.wait_millis,
                coordinator: self.coordinator.clone(),
            },
        );
        actions.push(Action::Observe(Observation::Attached { worker }));
        let awaited = place.is_some_and(|place| self.came_back(stream, place));
        if let Some(Place { generation, .. }) = claimed
            && !awaited
        {
            let reason = "this generation continues without this worker, which was taken for lost".to_owned();
            send(actions, stream, ToWorker::Abandon { generation, reason });
        }
        self.reattach(actions);
    }

    /// A worker has loaded what the run reads.
    pub(super) fn ready(&mut self, stream: StreamId, actions: &mut Actions) {
        self.members.set_ready(stream);
        self.can_be_placed(stream, actions);
    }

    /// A worker can be given a place from now on.
    pub(super) fn can_be_placed(&mut self, stream: StreamId, actions: &mut Actions) {
        match &self.stage {
            Stage::Training(_) if self.rank(stream).is_none() => {
                self.welcome_joiners(actions);
                self.replace_a_straggler(actions);
            }
            Stage::Gathering(_) => self.recount(actions),
            _ => {}
        }
    }

    /// Asks the ranks to yield at the next boundary if a worker could join them.
    pub(super) fn welcome_joiners(&mut self, actions: &mut Actions) {
        let room = self.terms.max_workers > self.steps.world_size()
            && self.members.count() > self.steps.world_size();
        if room {
            let joiner = self.members.eligible().find(|(stream, _)| self.rank(*stream).is_none());
            if let Some((_, joiner)) = joiner {
                let reason = format!("worker {} joins", joiner.describe());
                self.ask_to_yield(Cause::Agreed, reason, actions);
            }
        }
    }

    /// Asks the ranks to yield at the next boundary, unless they are about to end anyway.
    pub(super) fn ask_to_yield(&mut self, cause: Cause, reason: String, actions: &mut Actions) {
        let Stage::Training(training) = &mut self.stage else { return };
        let asked = training.yielding.as_ref().map(|(cause, _)| *cause);
        if self.stop.is_some() || !training.finished.is_empty() || asked >= Some(cause) {
            return;
        }
        let what = match cause {
            Cause::AgreedAndSaving => Request::CheckpointAndYield,
            _ => Request::Yield,
        };
        for stream in &training.ranks {
            send(actions, *stream, ToWorker::Request { generation: self.generation, what });
        }
        log(actions, format!("{} is asked to yield at the next boundary: {reason}", self.generation));
        training.yielding = Some((cause, reason));
    }

    /// A worker has announced that it leaves: it saves its shard and goes at the next boundary, or at once where it has
    /// no place.
    pub(super) fn leaving(&mut self, stream: StreamId, reason: String, actions: &mut Actions) {
        let Some(member) = self.members.get(stream) else { return };
        if member.leaving().is_some() {
            return;
        }
        let worker = member.describe();
        log(actions, format!("worker {worker} is about to leave: {reason}"));
        self.members.set_leaving(stream, reason.clone());
        let placed = self.rank(stream).is_some();
        match &self.stage {
            Stage::Training(_) if placed => {
                let reason = format!("worker {worker} leaves: {reason}");
                self.ask_to_yield(Cause::AgreedAndSaving, reason, actions);
            }
            Stage::Settling(_) if placed => {}
            Stage::Reattaching(_) if placed => {}
            _ => self.let_go(stream, actions),
        }
    }

    /// Stops a worker that leaves and holds no place any more.
    pub(super) fn let_go(&mut self, stream: StreamId, actions: &mut Actions) {
        let Some(member) = self.members.get(stream) else { return };
        let Some(reason) = member.leaving() else { return };
        let saved = match self.ledger.newest() {
            Some(newest) => format!("iteration {} is saved", newest.iteration),
            None => "nothing is saved yet".to_owned(),
        };
        let reason = format!("{reason}; {saved}");
        send(actions, stream, ToWorker::Stop { success: true, reason: reason.clone() });
        self.lost(stream, &reason, actions);
        actions.push(Action::Close { stream });
    }

    fn refusal(&self, hello: &Hello) -> Option<String> {
        if hello.protocol != PROTOCOL {
            return Some(format!(
                "it uses protocol {}, the coordinator protocol {PROTOCOL}: install the same version of Potstill on both",
                hello.protocol
            ));
        }
        if hello.run_id != self.run_id {
            return Some(format!(
                "it was started for run {:?}; this coordinator serves run {:?}",
                hello.run_id, self.run_id
            ));
        }
        if let Some(held) = hello.held.filter(|held| held.iteration > self.terms.iterations) {
            return Some(format!(
                "it claims to hold the state at {held}; the run has {} iterations",
                self.terms.iterations
            ));
        }
        None
    }

    /// A stream has ended, or its worker's lease is over.
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
            // It may still attach again.
            Stage::Reattaching(reattaching) => {
                reattaching.here.retain(|_, here| *here != stream);
                reattaching.left.remove(&stream);
            }
            Stage::Settling(settling) => {
                settling.holders.remove(&stream);
                if settling.awaiting.remove(&stream) || rank.is_some() {
                    settling.cause = Cause::Known;
                    settling.since = self.now;
                    settling.reason = lost;
                }
            }
            Stage::Gathering(gathering) => {
                gathering.failed_loads += u32::from(!member.is_ready());
                self.recount(actions);
            }
            Stage::Ended(_) => {}
        }
    }

    /// The rank that a stream holds in the newest generation.
    pub(super) fn rank(&self, stream: StreamId) -> Option<u32> {
        let place = self.members.get(stream)?.place?;
        Some(place.rank).filter(|_| place.generation == self.generation)
    }
}
