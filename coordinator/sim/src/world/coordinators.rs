//! Coordinators: the state machine and the shell that executes its actions.

use std::collections::{BTreeMap, VecDeque};

use potstill_core::{
    Action, Core, Event, Setup, Tick, ledger::Checkpoint, observation::Outcome, record::Record,
};

use rand::RngExt;

use super::{
    World,
    happening::{Happening, Verdict},
    parts::Coordinator,
};

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
            run_id: "run".into(),
            terms: self.scenario.terms(),
            specification: String::new(),
            storage_url: String::new(),
            history,
            checkpoints: self.storage.survey(),
            ranks_may_live: true,
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
        self.coordinators[coordinator].core = None;
        self.coordinators[coordinator].clients.clear();
        for link in 0..self.links.len() {
            if self.links[link].coordinator == coordinator && std::mem::take(&mut self.links[link].open) {
                self.send_down(link, None);
            }
        }
    }

    pub(super) fn timer(&mut self, coordinator: usize, at: u64) {
        let of = &mut self.coordinators[coordinator];
        if of.timer == Some(at) && of.core.is_some() {
            of.timer = None;
            self.step(coordinator, Event::Timer);
            let deadline = self.coordinators[coordinator].core.as_ref().and_then(Core::next_deadline);
            if let Some(deadline) = deadline.filter(|deadline| deadline.0 <= at) {
                self.breaks(format!(
                    "the deadline {} ms is over and does not change: the shell would loop without end",
                    deadline.0
                ));
            }
        }
    }

    /// Feeds an event, and those that result from its actions, to a coordinator's state machine.
    pub(super) fn step(&mut self, coordinator: usize, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let now = self.now;
            let mut actions = Vec::new();
            let Some(core) = &mut self.coordinators[coordinator].core else { return };
            core.step(Tick(now), event, &mut actions);
            for action in actions {
                self.traces(coordinator, &action);
                match self.acts(coordinator, action) {
                    Ok(()) => {}
                    Err(Halt::Fenced) => {
                        let reason = "another coordinator took over".into();
                        events = VecDeque::from([Event::JournalLost { reason }]);
                        break;
                    }
                    Err(Halt::Unwritten) => {
                        self.coordinators[coordinator].unwritten = true;
                        events = VecDeque::from([Event::JournalLost { reason: "503 Slow Down".into() }]);
                        break;
                    }
                    Err(Halt::Died) => return self.coordinator_dies(coordinator),
                }
            }
            self.check_size(coordinator);
        }
        let of = &mut self.coordinators[coordinator];
        let Some(deadline) = of.core.as_ref().and_then(Core::next_deadline) else { return };
        let at = deadline.0.max(self.now);
        if of.timer.is_none_or(|timer| at < timer) {
            of.timer = Some(at);
            self.queue.push(at, Happening::Timer { coordinator, at });
        }
    }

    fn acts(&mut self, coordinator: usize, action: Action) -> Result<(), Halt> {
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
            Action::Persist(record) => return self.persists(coordinator, &record),
            Action::Commit(checkpoint) => self.commits(coordinator, checkpoint),
            Action::Retain { in_use, up_to } => self.storage.retain(&in_use, up_to, self.scenario.keep),
            Action::Answer { client, result } => self.check_answer(coordinator, client, &result),
            Action::Observe(observation) => self.check_observation(coordinator, &observation),
            Action::Log(_) => {}
            Action::End(outcome) => {
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
        Ok(())
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
        let result = match verdict {
            Verdict::Refused => Err("503 Slow Down".to_owned()),
            Verdict::Written => self.storage.commit(checkpoint),
            Verdict::Lie => self.storage.commit(checkpoint).and(Err("connection reset by peer".to_owned())),
        };
        self.check_landed(coordinator, iteration);
        let delay = self.between(self.scenario.write);
        self.plan(delay, Happening::Answers { coordinator, iteration, result });
    }

    pub(super) fn answered(&mut self, coordinator: usize, iteration: u64, result: Result<String, String>) {
        self.step(coordinator, Event::CommitAnswered { iteration, result });
    }
}
