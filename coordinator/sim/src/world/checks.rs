//! The invariants.

use std::{
    fmt::{self, Write},
    hash::Hasher,
};

use potstill_core::{
    Action, ClientId, Event, StreamId,
    ledger::Checkpoint,
    observation::{Observation, Outcome},
    record::Record,
};
use potstill_proto::{
    cursor::{Cursor, Generation},
    message::{Assignment, Source, ToWorker},
};

use super::{World, slices};
use crate::{group::Group, process::Process, state::State};

struct Hashed<'h, H>(&'h mut H);

impl<H: Hasher> Write for Hashed<'_, H> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.write(text.as_bytes());
        Ok(())
    }
}

/// Counts bytes that would be written.
struct Count(usize);

impl Write for Count {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0 += text.len();
        Ok(())
    }
}

impl World {
    /// Adds an action to the trace, by which two runs are compared.
    pub(super) fn traces(&mut self, coordinator: usize, action: &Action) {
        self.actions += 1;
        let now = self.now;
        // Writing to a hash or to a string cannot fail.
        let _ = write!(Hashed(&mut self.trace), "{now} {coordinator} {action:?}");
        if self.record > 0 {
            if self.recorded.len() == self.record {
                self.recorded.pop_front();
            }
            self.recorded.push_back(format!("{now} c{coordinator} {action:?}"));
        }
    }

    /// What is lost by the generation that a coordinator has decided to open: a state that is further than its source's, of a
    /// worker that the coordinator could have heard. While the record is written more can be heard; the next generation
    /// takes it into account.
    pub(super) fn lost_step(&self, coordinator: usize, record: &Record) -> Option<String> {
        let Record::GenerationOpened { generation, members, source, .. } = record else { return None };
        let start = self.start_of(members, source)?;
        let waits = |number: usize| {
            let of_link = |stream: &StreamId| stream.0 == number as u64;
            self.coordinators[coordinator].waiting.iter().any(|(_, event)| match event {
                Event::Attached { stream, .. } | Event::Received { stream, .. } => of_link(stream),
                _ => false,
            })
        };
        let mut reported = Vec::new();
        for (number, link) in self.links.iter().enumerate() {
            if link.coordinator != coordinator || !link.open || link.broken {
                continue;
            }
            let of = &self.processes[link.process];
            let heard = link.up == 0 && link.down == 0 && of.alive && !of.paused && !of.hung;
            let idle = !of.in_group() && of.leaving.is_none();
            if heard && idle && of.held() > Some(start) && !waits(number) {
                reported.push(link.process);
            }
        }
        let ranks = || reported.iter().map(|process| &self.processes[*process]);
        let whole = |of: &Process| {
            let Some(state) = of.state else { return false };
            let given_up = self.given_up.contains(&state.lineage);
            !self.scenario.sliced || (!given_up && slices::complete(ranks, state).is_some())
        };
        let process = *reported.iter().find(|process| whole(&self.processes[**process]))?;
        let held = self.processes[process].held()?;
        Some(format!(
            "a completed step is lost: {generation} starts at {start}, and w{process}, which has reported it, holds {held}"
        ))
    }

    /// Where a generation starts; `None` where its source holds no complete state.
    fn start_of(&self, members: &[String], source: &Source) -> Option<Cursor> {
        match source {
            Source::Fresh => Some(Cursor::default()),
            Source::Checkpoint { manifest_key } => match self.storage.read(manifest_key) {
                Some(manifest) => Some(Cursor::boundary(manifest.checkpoint.iteration)),
                None => Some(Cursor::default()),
            },
            Source::Peer { rank } => {
                let number: usize = members.get(*rank as usize)?.strip_prefix('w')?.parse().ok()?;
                self.processes.get(number)?.held()
            }
        }
    }

    /// A generation is in the journal: it is newer than all others, its size is allowed, and its source holds a complete
    /// state.
    pub(super) fn check_opening(
        &mut self,
        coordinator: usize,
        generation: Generation,
        members: &[String],
        source: &Source,
    ) {
        if generation.0 <= self.generation {
            self.breaks(format!("{generation} is opened after generation {}", self.generation));
        }
        self.generation = generation.0;
        self.coordinators[coordinator].generation = Some(generation.0);
        let allowed = self.scenario.min_workers as usize..=self.scenario.max_workers as usize;
        if !allowed.contains(&members.len()) {
            self.breaks(format!("{generation} has {} members; allowed are {allowed:?}", members.len()));
        }
        let numbers: Vec<usize> =
            members.iter().filter_map(|id| id.strip_prefix('w')?.parse().ok()).collect();
        if *source == Source::Fresh && self.ruined {
            self.breaks(format!(
                "{generation} begins again from the teacher although checkpoints have existed"
            ));
        }
        let start = self.start_of(members, source);
        if start.is_none() && self.scenario.sliced {
            // The source may have learnt meanwhile that the others' slices are gone: it says so in this generation.
            self.groups.insert(generation.0, Group { members: numbers, ..Group::default() });
            return;
        }
        let Some(start) = start else {
            return self.breaks(format!("the source of {generation} holds no complete state: {source:?}"));
        };
        // A run goes back only where its newest state is lost.
        let told = &mut self.coordinators[coordinator].told;
        *told = (*told).min(start.iteration.checked_sub(1));
        self.groups.insert(generation.0, Group { members: numbers, ..Group::default() });
    }

    /// A message is about to be sent.
    pub(super) fn check_message(&mut self, coordinator: usize, link: usize, message: &ToWorker) {
        let ToWorker::Assignment(assignment) = message else { return };
        let Assignment { generation, rank, world_size, micro_batches, .. } = assignment;
        if self.coordinators[coordinator].generation != Some(generation.0) {
            self.breaks(format!("{generation} is assigned before it is durable, or after it is over"));
        }
        let all = self.scenario.micro_batches();
        let process = self.links.get(link).map(|link| link.process);
        if process.is_some_and(|process| self.processes[process].foreign) {
            self.breaks(format!("{assignment:?} is sent to a worker of another version"));
        }
        let Some(group) = self.groups.get_mut(&generation.0) else { return };
        let follows = micro_batches.first == group.assigned;
        group.assigned += micro_batches.count;
        let complete = *rank + 1 < *world_size || group.assigned == all;
        let right = group.members.get(*rank as usize).copied() == process
            && group.members.len() == *world_size as usize;
        if !follows || !complete {
            self.breaks(format!("{generation}'s shares do not cover every micro-batch once: {assignment:?}"));
        } else if !right {
            self.breaks(format!("{assignment:?} is sent to {process:?}, another than the journal's member"));
        }
    }

    /// A checkpoint is about to be committed: one generation's, every rank's share, of one state.
    pub(super) fn check_commit(&mut self, coordinator: usize, checkpoint: &Checkpoint) {
        let Checkpoint { generation, iteration, shards } = checkpoint;
        let world_size = self.groups.get(&generation.0).map_or(0, |group| group.members.len());
        let ranks: Vec<_> = shards.iter().map(|shard| shard.rank as usize).collect();
        let same = shards.iter().all(|s| s.generation == generation.0 && s.iteration == *iteration);
        if ranks != (0..world_size).collect::<Vec<_>>() || !same {
            self.breaks(format!("the checkpoint of iteration {iteration} is not complete: {checkpoint:?}"));
        }
        let expected = format!("{:016x}", State::undisturbed(*iteration).lineage);
        if shards.iter().any(|shard| shard.sha256 != expected) {
            self.breaks(format!(
                "the checkpoint of iteration {iteration} holds the state of another iteration"
            ));
        }
        if self.coordinators[coordinator].core.is_none() {
            self.breaks(format!("a coordinator that has ended commits iteration {iteration}"));
        }
    }

    /// A manifest that the journal's owner writes names shards that exist. One that a dead coordinator had sent may
    /// arrive after a sweep; a coordinator that lists the checkpoints finds it torn, and it does not count.
    pub(super) fn check_landed(&mut self, coordinator: usize, iteration: u64) {
        let owns = self.coordinators[coordinator].next_record == self.storage.records();
        if owns && self.coordinators[coordinator].core.is_some() && self.storage.is_torn(iteration) {
            self.breaks(format!("the checkpoint of iteration {iteration} exists without all of its shards"));
        }
    }

    pub(super) fn check_answer(
        &mut self,
        coordinator: usize,
        client: ClientId,
        result: &Result<u64, String>,
    ) {
        if self.coordinators[coordinator].clients.remove(&client).is_none() {
            self.breaks(format!(
                "{client:?}'s request for a checkpoint is answered twice, or was never made"
            ));
        }
        if let Ok(iteration) = result
            && self.storage.committed().last().is_none_or(|newest| newest.iteration < *iteration)
        {
            self.breaks(format!(
                "{client:?} gets a checkpoint of iteration {iteration} as its answer, which does not exist"
            ));
        }
    }

    /// Every observation is true, and made once.
    pub(super) fn check_observation(&mut self, coordinator: usize, observation: &Observation) {
        let Observation::Iteration(totals) = observation else { return };
        let iteration = totals.iteration;
        if self.furthest < Some(Cursor::boundary(iteration + 1)) {
            self.breaks(format!(
                "iteration {iteration} is observed as finished, but no rank has completed it"
            ));
        }
        if totals.samples != self.scenario.micro_batches() * 2 {
            self.breaks(format!("iteration {iteration} has {} samples", totals.samples));
        }
        let told = &mut self.coordinators[coordinator].told;
        if told.is_some_and(|told| told >= iteration) {
            self.breaks(format!("iteration {iteration} is counted twice"));
        } else {
            *told = Some(iteration);
        }
    }

    /// The memory of a coordinator is bounded: the text of its `Debug` output is proportional to its workers and, for
    /// the list of checkpoints, to the run's length.
    pub(super) fn check_size(&mut self, coordinator: usize) {
        if !self.actions.is_multiple_of(256) || self.scenario.slots > 64 {
            return;
        }
        let Some(core) = &self.coordinators[coordinator].core else { return };
        let mut size = Count(0);
        // Counting cannot fail.
        let _ = write!(size, "{core:?}");
        let open = self.links.iter().filter(|l| l.open && l.coordinator == coordinator).count();
        // A successor receives all reports again that no checkpoint covers.
        let retained: usize = self.processes.iter().map(|process| process.retained.len()).sum();
        let most = 16_000
            + 4_000 * open.max(self.scenario.max_workers as usize)
            + 600 * retained
            + 200 * usize::try_from(self.scenario.iterations).unwrap_or(usize::MAX);
        if size.0 > most {
            self.breaks(format!("the coordinator has grown to {} bytes of text with {open} workers", size.0));
        }
    }

    pub(super) fn check_outcome(&mut self, outcome: &Outcome) {
        let expected = match outcome {
            Outcome::Succeeded { iteration } => *iteration == self.scenario.iterations,
            Outcome::Stopped { .. } => self.stop_requested,
            Outcome::Failed { reason } => {
                self.ruined && reason.starts_with("every checkpoint of this run is damaged")
            }
        };
        if !expected {
            self.breaks(format!("the run ended wrongly: {outcome:?}"));
        }
    }

    /// A run that succeeded has saved the state of an undisturbed run.
    pub(super) fn check_end(&mut self) {
        let Some(Outcome::Succeeded { iteration }) = self.outcome else { return };
        let saved = self.storage.manifest(iteration).filter(|manifest| manifest.whole);
        let state = saved.map(|manifest| manifest.state());
        let expected = State::undisturbed(self.scenario.iterations);
        if state != Some(expected) {
            self.breaks(format!("the run succeeded with {state:?}; an undisturbed one gives {expected:?}"));
        }
    }

    /// The state of the world, as text.
    pub(super) fn stand(&self) -> String {
        let coordinator = match self.reachable().and_then(|c| self.coordinators[c].core.as_ref()) {
            Some(core) => {
                let status = core.status();
                format!(
                    "{} ({}), generation {}, iteration {}, {} members",
                    status.state,
                    status.reason,
                    status.generation,
                    status.iteration,
                    status.members.len()
                )
            }
            None => "no coordinator".to_owned(),
        };
        let workers: Vec<_> = self
            .slots
            .iter()
            .map(|number| {
                let of = &self.processes[*number];
                let flags = (of.alive, of.paused, of.hung, of.side, of.link);
                format!(
                    "w{number} {:?} {flags:?} in generation {} at {:?}",
                    of.stage,
                    of.generation().0,
                    of.held()
                )
            })
            .collect();
        format!("{coordinator}; {}", workers.join("; "))
    }
}
