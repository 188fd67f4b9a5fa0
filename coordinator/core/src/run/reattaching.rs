//! A coordinator that takes over from one that died: the generation in the journal may be live, so its ranks are
//! awaited before anything changes. If all of them come back, the generation continues.

use std::collections::{BTreeMap, BTreeSet};

use potstill_proto::{
    cursor::Cursor,
    message::{Place, WorkerId},
};

use super::{Actions, Cause, Core, Gathering, Reattaching, Settling, Stage, Training, log, seconds};
use crate::{Action, StreamId, Tick, assignment::Start, observation::Observation, record::Record};

impl Core {
    /// Prepares to wait for the ranks of the generation that was the live one according to the journal.
    pub(super) fn await_generation(&mut self, history: &[Record]) {
        let mut living = None;
        for record in history {
            match record {
                Record::GenerationOpened { members, start, .. } => living = Some((members, *start)),
                Record::Ended { .. } => living = None,
                _ => {}
            }
        }
        let Some((members, start)) = living else { return };
        let expected: Vec<_> = members.iter().cloned().map(WorkerId).collect();
        (self.named, self.awaited) = (expected.clone(), true);
        let world_size = u32::try_from(expected.len()).unwrap_or(u32::MAX);
        let saved = self.ledger.newest().map_or(0, |newest| newest.iteration);
        // The ranks keep their reports until a checkpoint covers them, and send them again.
        self.start = Start { cursor: Cursor::boundary(start.max(saved)), exact: false };
        self.steps.reopen(world_size, self.start);
        self.stragglers.open(world_size);
        self.ledger.open(self.generation, world_size);
        self.stage = Stage::Reattaching(Reattaching {
            expected,
            here: BTreeMap::new(),
            left: BTreeSet::new(),
            finished: BTreeMap::new(),
            since: Tick::default(),
        });
    }

    /// All ranks that hold the newest state are lost, and that may be the coordinator's fault or the network's: before
    /// the run goes back to a checkpoint they have as long to come back as a silent worker has, once. Returns whether
    /// they are waited for.
    pub(super) fn await_holders(&mut self, actions: &mut Actions) -> bool {
        let finished = self.steps.finished();
        let saved = self.ledger.newest().map_or(0, |newest| newest.iteration);
        let held = self.members.eligible().filter_map(|(_, member)| member.held).max().unwrap_or_default();
        if self.awaited || self.named.is_empty() || finished <= saved.max(held.iteration) {
            return false;
        }
        let Some(reason) = self.unsure.take() else { return false };
        self.awaited = true;
        let expected = self.named.clone();
        let world_size = u32::try_from(expected.len()).unwrap_or(u32::MAX);
        // What they reported up to here counts already.
        self.start = Start { cursor: Cursor::boundary(finished), exact: false };
        self.steps.reopen(world_size, self.start);
        self.stragglers.open(world_size);
        self.ledger.open(self.generation, world_size);
        log(actions, format!("all ranks of {} seem lost but may be alive: {reason}", self.generation));
        self.stage = Stage::Reattaching(Reattaching {
            expected,
            here: BTreeMap::new(),
            left: BTreeSet::new(),
            finished: BTreeMap::new(),
            since: self.now,
        });
        self.start_waiting(actions);
        true
    }

    /// Until when the ranks may come back: they continue to train meanwhile, so waiting loses nothing.
    pub(super) fn reattached_by(&self, reattaching: &Reattaching) -> Tick {
        reattaching.since.after(self.terms.timeouts.dead_millis)
    }

    pub(super) fn start_waiting(&mut self, actions: &mut Actions) {
        let (now, iteration) = (self.now, self.start.cursor.iteration);
        let Stage::Reattaching(reattaching) = &mut self.stage else { return };
        reattaching.since = now;
        let need = u32::try_from(reattaching.expected.len()).unwrap_or(u32::MAX);
        let reason = format!(
            "{} was training at iteration {iteration} or later: waiting {:.1} s for its ranks",
            self.generation,
            seconds(self.terms.timeouts.dead_millis)
        );
        actions.push(Action::Observe(Observation::Waiting { have: 0, need, reason }));
    }

    /// How many ranks are awaited and for how long, as text.
    pub(super) fn missing_ranks(&self, reattaching: &Reattaching) -> String {
        let (here, expected) = (reattaching.here.len(), reattaching.expected.len());
        let left = seconds(self.reattached_by(reattaching).0.saturating_sub(self.now.0));
        format!("{here} of the {expected} ranks of {} are back; {left:.1} s are left", self.generation)
    }

    /// Whether a place in the newest generation was given to this worker.
    pub(super) fn owns(&self, worker: &WorkerId, place: Place) -> bool {
        place.generation == self.generation && self.named.get(place.rank as usize) == Some(worker)
    }

    /// A worker attached with its own place. Returns whether it is awaited there.
    pub(super) fn came_back(&mut self, stream: StreamId, place: Place) -> bool {
        let Stage::Reattaching(reattaching) = &mut self.stage else { return false };
        reattaching.here.insert(place.rank, stream);
        true
    }

    /// Continues as soon as all ranks are back, or when the time for that is over.
    pub(super) fn reattach(&mut self, actions: &mut Actions) {
        let Stage::Reattaching(reattaching) = &self.stage else { return };
        let missing = reattaching.expected.len() - reattaching.here.len();
        let late = self.reattached_by(reattaching) <= self.now;
        if missing > 0 && !late {
            return;
        }
        let empty = Stage::Gathering(Gathering::since(self.now, String::new()));
        let Stage::Reattaching(reattaching) = std::mem::replace(&mut self.stage, empty) else {
            return;
        };
        let Reattaching { expected, here, left, finished, .. } = reattaching;
        if here.is_empty() {
            return self.gather(format!("none of the ranks of {} came back", self.generation), actions);
        }
        let whole = missing == 0 && left.is_empty();
        if whole {
            log(actions, format!("all {} ranks of {} are back: it continues", here.len(), self.generation));
        }
        let training = Training {
            ranks: here.into_values().collect(),
            finished,
            yielding: None,
            look: self.now.after(self.terms.timeouts.hang_millis),
        };
        let holders: BTreeSet<_> = training
            .ranks
            .iter()
            .copied()
            .filter(|s| self.members.get(*s).is_some_and(|m| m.held.unwrap_or_default() >= self.start.cursor))
            .collect();
        if whole {
            if self.stop.is_some() {
                self.request_stop(&training, actions);
            } else if !self.clients.is_empty() {
                self.request_checkpoint(&training, actions);
            }
            self.stage = Stage::Training(training);
            self.welcome_joiners(actions);
            self.conclude(actions);
        } else {
            let reason = if missing > 0 {
                let gone = expected.len() - training.ranks.len();
                format!("{gone} of the {} ranks of {} did not come back", expected.len(), self.generation)
            } else {
                format!("a collective of {} failed while no coordinator was running", self.generation)
            };
            let awaiting: BTreeSet<_> =
                training.ranks.iter().copied().filter(|stream| !left.contains(stream)).collect();
            self.tell_to_abandon(&awaiting, &reason, actions);
            self.stage =
                Stage::Settling(Settling { awaiting, holders, cause: Cause::Known, since: self.now, reason });
        }
    }
}
