//! Coordinators: the state machine and the shell that executes its actions.

use std::collections::{BTreeMap, VecDeque};

use potstill_core::{
    Action, Core, Event, Setup, Tick, Uncommitted, ledger::Checkpoint, observation::Outcome, record::Record,
};

use rand::RngExt;

use super::{
    World,
    happening::{Happening, Verdict},
    parts::Coordinator,
};
use crate::storage::manifest_key;

/// Why a shell stops executing the actions of a step.
enum Halt {
    /// The journal belongs to another coordinator.
    Fenced,
    /// The journal answers with an error.
    Unwritten,
    /// It died.
    Died,
}

impl World {
    /// The coordinator that workers reach, if there is one.
    pub(super) fn reachable(&self) -> Option<usize> {
        self.coordinators.iter().rposition(|c| c.core.is_some())
    }

    /// A new coordinator takes the run over.
    pub(super) fn start_coordinator(&mut self) {
        let number = self.coordinators.len();
        let history = match self.storage.history() {
            Ok(history) => history,
            Err(error) => return self.breaks(format!("the journal cannot be read: {error}")),
        };
        if let Some(Record::Ended { outcome: outcome @ Outcome::Succeeded { .. } }) = history.last() {
            self.outcome = Some(outcome.clone());
            return;
        }
        let core = Core::new(Setup {
            coordinator: format!("c{number}"),
            address: format!("c{number}:1"),
            certificate: None,
            run_id: "run".into(),
            terms: self.scenario.terms(),
            specification: String::new(),
            storage_url: String::new(),
            history,
            checkpoints: self.storage.survey(),
            ranks_may_live: true,
            from_teacher: false,
        });
        self.coordinators.push(Coordinator {
            core: Some(core),
            next_record: self.storage.records(),
            dies_after: None,
            timer: None,
            clients: BTreeMap::new(),
            told: None,
            generation: None,
            unwritten: false,
            persisting: None,
            pending: VecDeque::new(),
            waiting: VecDeque::new(),
            still: None,
            deaf: 0,
            deferred: Vec::new(),
        });
        self.step(number, Event::Started);
        self.plan(self.scenario.watch_millis, Happening::Watch { coordinator: number });
    }

    /// The check by which a coordinator that writes nothing learns that another one owns the journal.
    pub(super) fn watches(&mut self, coordinator: usize) {
        let of = &self.coordinators[coordinator];
        if of.core.is_none() {
            return;
        }
        if of.still.is_some() {
            return self.coordinators[coordinator].deferred.push(Happening::Watch { coordinator });
        }
        if of.persisting.is_some() {
            return self.plan(self.scenario.watch_millis, Happening::Watch { coordinator });
        }
        if of.next_record < self.storage.records() {
            self.step(coordinator, Event::JournalLost { reason: "another coordinator took over".into() });
        } else {
            self.plan(self.scenario.watch_millis, Happening::Watch { coordinator });
        }
    }

    /// A coordinator dies; a successor comes after a while.
    pub(super) fn coordinator_dies(&mut self, coordinator: usize) {
        self.coordinator_ends(coordinator);
        let downtime = self.between((1, 3 * self.scenario.failure_millis));
        self.plan(downtime, Happening::Start);
    }

    pub(super) fn coordinator_ends(&mut self, coordinator: usize) {
        let of = &mut self.coordinators[coordinator];
        of.core = None;
        of.clients.clear();
        (of.persisting, of.still) = (None, None);
        of.pending.clear();
        of.waiting.clear();
        of.deferred.clear();
        for link in 0..self.links.len() {
            if self.links[link].coordinator == coordinator && std::mem::take(&mut self.links[link].open) {
                self.send_down(link, None);
            }
        }
    }

    pub(super) fn timer(&mut self, coordinator: usize, at: u64) {
        let of = &mut self.coordinators[coordinator];
        if of.still.is_some() {
            return of.deferred.push(Happening::Timer { coordinator, at });
        }
        if of.timer == Some(at) && of.core.is_some() {
            of.timer = None;
            // Deadlines are looked at when the record is written.
            if of.persisting.is_some() {
                return;
            }
            self.step(coordinator, Event::Timer);
            let deadline = self.deadline(coordinator);
            if let Some(deadline) = deadline.filter(|deadline| *deadline <= at) {
                let stand = self.stand();
                self.breaks(format!(
                    "the deadline {deadline} ms is over and does not change: the shell would loop without end ({stand})"
                ));
            }
        }
    }

    /// When a coordinator's next deadline is, in the world's time.
    fn deadline(&self, coordinator: usize) -> Option<u64> {
        let of = &self.coordinators[coordinator];
        Some(of.core.as_ref().and_then(Core::next_deadline)?.0 + of.deaf)
    }

    pub(super) fn stands_still(&self, coordinator: usize) -> bool {
        self.coordinators[coordinator].still.is_some()
    }

    /// A coordinator that stood still listens again: what has arrived meanwhile is heard before any deadline, as the shell
    /// does it.
    pub(super) fn listens(&mut self, coordinator: usize, since: u64) {
        let now = self.now;
        let of = &mut self.coordinators[coordinator];
        if of.still.take() != Some(since) || of.core.is_none() {
            return;
        }
        of.deaf += now - since;
        let (mut timers, deferred): (Vec<_>, Vec<_>) = std::mem::take(&mut of.deferred)
            .into_iter()
            .partition(|what| matches!(what, Happening::Timer { .. } | Happening::Watch { .. }));
        for what in deferred {
            self.happens(what);
        }
        self.step(coordinator, Event::Deaf { millis: now - since });
        self.coordinators[coordinator].timer = None;
        timers.retain(|what| matches!(what, Happening::Watch { .. }));
        for what in timers {
            self.plan(0, what);
        }
        self.sets_timer(coordinator);
    }

    /// An event reaches a coordinator: it waits while a record is being written.
    pub(super) fn step(&mut self, coordinator: usize, event: Event) {
        let now = self.now;
        let of = &mut self.coordinators[coordinator];
        if of.core.is_none() {
            return;
        }
        of.waiting.push_back((Tick(now - of.deaf), event));
        self.proceeds(coordinator);
    }

    /// Executes actions in their order, up to one that waits for the journal, and feeds the events that wait to the state
    /// machine.
    fn proceeds(&mut self, coordinator: usize) {
        loop {
            self.executes(coordinator);
            let of = &mut self.coordinators[coordinator];
            if of.persisting.is_some() {
                return;
            }
            let Some((tick, event)) = of.waiting.pop_front() else { break };
            let Some(core) = &mut of.core else { return };
            let mut actions = Vec::new();
            core.step(tick, event, &mut actions);
            of.pending.extend(actions);
        }
        self.check_size(coordinator);
        self.sets_timer(coordinator);
    }

    fn sets_timer(&mut self, coordinator: usize) {
        let Some(deadline) = self.deadline(coordinator) else { return };
        let of = &mut self.coordinators[coordinator];
        let at = deadline.max(self.now);
        if of.timer.is_none_or(|timer| at < timer) {
            of.timer = Some(at);
            self.queue.push(at, Happening::Timer { coordinator, at });
        }
    }

    fn executes(&mut self, coordinator: usize) {
        while self.coordinators[coordinator].persisting.is_none() {
            let Some(action) = self.coordinators[coordinator].pending.pop_front() else { return };
            self.traces(coordinator, &action);
            if let Action::Persist(record) = action {
                let slow = !self.calm && self.chance(self.scenario.faults.slow_journal);
                let lost = self.lost_step(coordinator, &record);
                self.coordinators[coordinator].persisting = Some((record, lost));
                if slow {
                    let most = 2 * self.scenario.failure_millis;
                    let delay = self.between((0, most));
                    return self.plan(delay, Happening::Persisted { coordinator });
                }
                self.writes(coordinator);
            } else {
                self.acts(coordinator, action);
            }
        }
    }

    /// A slow store has the record now.
    pub(super) fn persisted(&mut self, coordinator: usize) {
        if self.stands_still(coordinator) {
            return self.coordinators[coordinator].deferred.push(Happening::Persisted { coordinator });
        }
        if self.coordinators[coordinator].core.is_some() {
            self.writes(coordinator);
            self.proceeds(coordinator);
        }
    }

    /// The store answers the write of a record.
    fn writes(&mut self, coordinator: usize) {
        let Some((record, lost)) = self.coordinators[coordinator].persisting.take() else { return };
        let reason = match self.persists(coordinator, &record) {
            Ok(()) => {
                if let Some(lost) = lost {
                    self.breaks(lost);
                }
                return;
            }
            Err(Halt::Died) => return self.coordinator_dies(coordinator),
            Err(Halt::Fenced) => "another coordinator took over".to_owned(),
            Err(Halt::Unwritten) => {
                self.coordinators[coordinator].unwritten = true;
                "503 Slow Down".to_owned()
            }
        };
        let now = self.now;
        let of = &mut self.coordinators[coordinator];
        of.pending.clear();
        of.waiting = VecDeque::from([(Tick(now - of.deaf), Event::JournalLost { reason })]);
    }

    fn acts(&mut self, coordinator: usize, action: Action) {
        match action {
            Action::Send { stream, message } => {
                let link = usize::try_from(stream.0).unwrap_or(usize::MAX);
                self.check_message(coordinator, link, &message);
                if self.links.get(link).is_some_and(|link| link.open) {
                    self.send_down(link, Some(message));
                }
            }
            Action::Close { stream } => {
                let link = usize::try_from(stream.0).unwrap_or(usize::MAX);
                if let Some(of) = self.links.get_mut(link)
                    && std::mem::take(&mut of.open)
                {
                    self.send_down(link, None);
                }
            }
            // It has been taken out already.
            Action::Persist(_) => {}
            Action::Verify { manifest_key } => {
                let delay = self.between(self.scenario.write);
                self.plan(delay, Happening::Verified { coordinator, manifest_key });
            }
            Action::Commit(checkpoint) => self.commits(coordinator, checkpoint),
            Action::Retain { in_use, up_to } => self.storage.retain(&in_use, up_to, self.scenario.keep),
            Action::Answer { client, result } => self.check_answer(coordinator, client, &result),
            Action::Observe(observation) => self.check_observation(coordinator, &observation),
            Action::Log(_) => {}
            Action::End(outcome) => {
                // Requests that came after the end was decided get the answer that the run is over.
                for (_, event) in std::mem::take(&mut self.coordinators[coordinator].waiting) {
                    if let Event::CheckpointRequested { client } = event {
                        self.coordinators[coordinator].clients.remove(&client);
                    }
                }
                let of = &self.coordinators[coordinator];
                let owns = !of.unwritten && of.next_record == self.storage.records();
                // Where the journal is lost, answers are dropped with the rest of the step, and clients see the shell
                // end.
                if owns && !self.coordinators[coordinator].clients.is_empty() {
                    self.breaks(
                        "the run ended and a client that asked for a checkpoint has no answer".into(),
                    );
                }
                self.coordinator_ends(coordinator);
                if owns {
                    self.check_outcome(&outcome);
                    self.outcome = Some(outcome);
                } else if self.reachable().is_none() {
                    self.plan(1, Happening::Start);
                }
            }
        }
    }

    /// A coordinator has read a checkpoint whole.
    pub(super) fn verified(&mut self, coordinator: usize, manifest_key: String) {
        if self.stands_still(coordinator) {
            let later = Happening::Verified { coordinator, manifest_key };
            return self.coordinators[coordinator].deferred.push(later);
        }
        let whole = self.storage.read(&manifest_key).is_some_and(|manifest| manifest.whole);
        let damage = (!whole).then(|| "a shard's SHA-256 is another".to_owned());
        self.step(coordinator, Event::Verified { manifest_key, result: Ok(damage) });
    }

    fn persists(&mut self, coordinator: usize, record: &Record) -> Result<(), Halt> {
        let fails = !self.calm && self.chance(self.scenario.faults.journal);
        if fails && self.rng.random_bool(0.5) {
            return Err(Halt::Unwritten);
        }
        let of = &mut self.coordinators[coordinator];
        match self.storage.append(of.next_record, record) {
            Ok(true) => of.next_record += 1,
            Ok(false) => return Err(Halt::Fenced),
            Err(error) => self.breaks(format!("{record:?} cannot be encoded: {error}")),
        }
        if let Record::GenerationOpened { generation, members, source, .. } = record {
            self.check_opening(coordinator, *generation, members, source);
        }
        if fails {
            return Err(Halt::Unwritten);
        }
        let of = &mut self.coordinators[coordinator];
        match &mut of.dies_after {
            Some(0) => Err(Halt::Died),
            Some(more) => {
                *more -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn commits(&mut self, coordinator: usize, checkpoint: Checkpoint) {
        self.check_commit(coordinator, &checkpoint);
        let faults = self.scenario.faults.clone();
        // Damage to the last checkpoint would rightly fail the run.
        let last = checkpoint.iteration >= self.scenario.iterations || self.stop_requested;
        let verdict = if last || self.calm {
            Verdict::Written
        } else if self.chance(faults.commit) {
            Verdict::Refused
        } else if self.chance(faults.lie) {
            Verdict::Lie
        } else {
            Verdict::Written
        };
        let slow = !self.calm && self.chance(faults.slow);
        let most = 5 * self.scenario.failure_millis;
        let delay = self.between(if slow { (0, most) } else { self.scenario.write });
        self.plan(delay, Happening::Lands { coordinator, checkpoint, verdict });
    }

    /// A manifest reaches storage.
    pub(super) fn lands(&mut self, coordinator: usize, checkpoint: &Checkpoint, verdict: Verdict) {
        let alive = self.coordinators[coordinator].core.is_some();
        // A manifest that a dead coordinator had sent may have been lost with it.
        if !alive && self.rng.random_bool(0.5) {
            return;
        }
        let iteration = checkpoint.iteration;
        let unseen = self.storage.unseen(checkpoint);
        let failed = |reason: &str| {
            let manifest_key = Some(manifest_key(iteration));
            Uncommitted { reason: reason.to_owned(), manifest_key, ..Uncommitted::default() }
        };
        let result = match verdict {
            // What a dead coordinator had sent was checked before.
            _ if alive && !unseen.is_empty() => {
                Err(Uncommitted { reason: "it is missing".to_owned(), unseen, manifest_key: None })
            }
            Verdict::Refused => Err(failed("503 Slow Down")),
            Verdict::Written => Ok(self.storage.commit(checkpoint)),
            Verdict::Lie => {
                self.storage.commit(checkpoint);
                Err(failed("connection reset by peer"))
            }
        };
        if result.is_ok() {
            self.check_landed(coordinator, iteration);
        }
        let delay = self.between(self.scenario.write);
        self.plan(delay, Happening::Answers { coordinator, iteration, result });
    }

    pub(super) fn answered(
        &mut self,
        coordinator: usize,
        iteration: u64,
        result: Result<String, Uncommitted>,
    ) {
        if self.stands_still(coordinator) {
            let later = Happening::Answers { coordinator, iteration, result };
            return self.coordinators[coordinator].deferred.push(later);
        }
        self.step(coordinator, Event::CommitAnswered { iteration, result });
    }
}
