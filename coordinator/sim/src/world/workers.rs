//! The behavior of workers.

use potstill_proto::{
    PROTOCOL,
    cursor::{Cursor, Generation, Phase},
    message::{FromWorker, Hello, Source, ToWorker},
    scores::{Evaluation, Scores, Subject},
    wire,
};

use rand::RngExt;

use super::{
    World,
    happening::{Happening, Up},
};
use crate::{
    group::Flags,
    process::{Process, Stage},
    state::State,
};

impl World {
    /// A machine starts a worker, unless it has one.
    pub(super) fn boot(&mut self, slot: usize) {
        if self.processes.get(self.slots[slot]).is_some_and(|p| p.alive) {
            return;
        }
        let process = self.processes.len();
        self.slots[slot] = process;
        self.processes.push(Process::new(slot));
        let load = self.between(self.scenario.boot);
        self.plan(load, Happening::Work { process, turn: 0 });
        self.plan(0, Happening::Reconnect { process });
        let beat = self.between((1, self.heartbeat_millis()));
        self.plan(beat, Happening::Heartbeat { process });
    }

    fn heartbeat_millis(&self) -> u64 {
        (self.scenario.failure_millis / 10).max(20)
    }

    /// A process ends. Its sockets close, unless a partition hides that.
    pub(super) fn dies(&mut self, process: usize) {
        let of = &mut self.processes[process];
        if !of.alive {
            return;
        }
        of.alive = false;
        of.deferred.clear();
        if let Some(link) = of.link.take() {
            self.send_up(link, Up::End);
        }
        if self.processes[process].in_group() {
            self.is_gone(process);
        }
        let slot = self.processes[process].slot;
        let boot = self.between((50, self.scenario.failure_millis));
        self.plan(boot, Happening::Boot { slot });
    }

    /// An event for a process, which happens now or when the process is no longer paused.
    pub(super) fn process_event(&mut self, process: usize, what: Happening) {
        let of = &mut self.processes[process];
        if !of.alive {
            return;
        }
        let main_thread = match &what {
            Happening::Work { .. } | Happening::Reduced { .. } | Happening::Fails { .. } => true,
            // A process that does not obey is ended by its agent.
            Happening::Down { message: Some(message), .. } => {
                !matches!(message, ToWorker::Restart { .. } | ToWorker::Stop { .. })
            }
            _ => false,
        };
        if of.paused || (of.hung && main_thread) {
            return of.deferred.push(what);
        }
        match what {
            Happening::Work { turn, .. } if turn == of.turn => self.works(process),
            Happening::Reduced { turn, .. } if turn == of.turn => self.reduced(process),
            Happening::Fails { turn, error, .. } if turn == of.turn => self.leaves(process, Some(error)),
            Happening::Uploaded { generation, rank, state, .. } => {
                self.uploaded(process, generation, rank, state);
            }
            Happening::Heartbeat { .. } => self.beats(process),
            Happening::Reconnect { .. } => self.reconnects(process),
            Happening::Noticed { link } if of.link == Some(link) => self.stream_ends(process),
            Happening::Down { link, message } => {
                self.links[link].down -= 1;
                if self.processes[process].link == Some(link) && !self.links[link].broken {
                    match message {
                        Some(message) => self.reads(process, message),
                        None => self.stream_ends(process),
                    }
                }
            }
            _ => {}
        }
    }

    fn stream_ends(&mut self, process: usize) {
        self.processes[process].link = None;
        let backoff = self.between((1, self.scenario.failure_millis / 8));
        self.plan(backoff, Happening::Reconnect { process });
    }

    fn reconnects(&mut self, process: usize) {
        let of = &self.processes[process];
        if of.link.is_some() {
            return;
        }
        let Some(coordinator) = self.reachable().filter(|_| of.side == 0) else {
            let backoff = self.between((1, self.scenario.failure_millis / 4));
            return self.plan(backoff, Happening::Reconnect { process });
        };
        let hello = self.hello(process);
        let mut messages = Vec::new();
        if of.stage != Stage::Booting {
            messages.push(FromWorker::Ready);
        }
        messages.extend(of.leaving.clone().map(|reason| FromWorker::Leaving { reason }));
        messages.extend(of.retained.iter().cloned());
        let link = self.connect(coordinator, process);
        self.processes[process].link = Some(link);
        self.send_up(link, Up::Hello(hello));
        for message in messages {
            self.send_up(link, Up::Message(message));
        }
    }

    /// The hello of a process.
    pub(super) fn hello(&self, process: usize) -> Hello {
        let of = &self.processes[process];
        Hello {
            protocol: PROTOCOL,
            worker: Process::id(process),
            run_id: "run".into(),
            host: format!("host{}", of.slot / self.scenario.per_host),
            pid: 1,
            device: "cpu".into(),
            held: of.counted_on(),
            place: of.named_place(),
        }
    }

    /// A worker sends a message; reports are retained until a checkpoint covers them.
    pub(super) fn says(&mut self, process: usize, message: FromWorker) {
        let of = &mut self.processes[process];
        let fleeting =
            matches!(message, FromWorker::Heartbeat { .. } | FromWorker::Ready | FromWorker::Leaving { .. });
        if !fleeting {
            of.retained.push(message.clone());
        }
        if let Some(link) = of.link {
            self.send_up(link, Up::Message(message));
        }
    }

    fn beats(&mut self, process: usize) {
        let millis = self.heartbeat_millis();
        self.plan(millis, Happening::Heartbeat { process });
        let last = Cursor::boundary(self.scenario.iterations);
        let of = &mut self.processes[process];
        if !of.hung && matches!(of.stage, Stage::Loading | Stage::Saving | Stage::Computing) {
            of.progress += 1;
        }
        let heartbeat = FromWorker::Heartbeat {
            generation: of.generation(),
            // While the state is being overwritten the heartbeat may name a state that is not complete.
            cursor: of.held().unwrap_or(last),
            progress: of.progress,
            activity: String::new(),
            waiting: matches!(of.stage, Stage::Meeting | Stage::Reducing) && !of.hung,
        };
        self.says(process, heartbeat);
    }

    fn reads(&mut self, process: usize, message: ToWorker) {
        let of = &mut self.processes[process];
        match message {
            ToWorker::Assignment(assignment) => {
                if of.in_group() {
                    self.leaves(process, None);
                }
                let of = &mut self.processes[process];
                of.place = Some(assignment);
                of.flags = Flags::default();
                of.retained.clear();
                of.enter(Stage::Meeting);
                self.contributes(process);
            }
            ToWorker::Abandon { generation, .. } => {
                if of.in_group() && of.generation() == generation {
                    self.leaves(process, Some("the coordinator abandoned it"));
                }
            }
            ToWorker::Committed { iteration } => of.covered(iteration),
            ToWorker::Request { generation, what } => {
                if of.generation() == generation {
                    of.flags.raise(what);
                }
            }
            ToWorker::Stop { .. } | ToWorker::Restart { .. } => self.dies(process),
            ToWorker::Refused { reason } => self.breaks(format!("worker w{process} is refused: {reason}")),
            ToWorker::Welcome { .. } => {}
        }
    }

    /// The work of the stage is complete.
    fn works(&mut self, process: usize) {
        match self.processes[process].stage {
            Stage::Booting => {
                self.processes[process].enter(Stage::Idle);
                // A blind one sees that its storage is another; or its file system is unmounted only afterwards.
                let blind = self.scenario.is_blind(self.processes[process].slot);
                let message = match blind && self.rng.random_bool(0.5) {
                    true => FromWorker::Failed {
                        generation: Generation(0),
                        error: "its storage is another than the coordinator's".to_owned(),
                    },
                    false => FromWorker::Ready,
                };
                self.says(process, message);
            }
            Stage::Loading => self.loaded(process),
            Stage::Computing => {
                self.processes[process].enter(Stage::Reducing);
                self.contributes(process);
            }
            Stage::Saving => self.saved(process),
            Stage::Idle | Stage::Meeting | Stage::Reducing | Stage::Finished => {}
        }
    }

    fn place(&self, process: usize) -> (Generation, u32, u32) {
        let of = &self.processes[process];
        of.place.as_ref().map_or((Generation(0), 0, 0), |a| (a.generation, a.rank, a.world_size))
    }

    /// A rank contributes its share to its group's operation, which starts when all shares are there.
    fn contributes(&mut self, process: usize) {
        let (generation, rank, world_size) = self.place(process);
        let of = &self.processes[process];
        let (flags, state) = (of.flags, of.state);
        let reducing = of.stage == Stage::Reducing;
        self.processes[process].prepared |= reducing;
        let group = self.groups.entry(generation.0).or_default();
        let mine = state.filter(|_| reducing);
        if group.arrived.is_empty() {
            group.from = mine;
        }
        let equal = group.from == mine;
        group.arrived.insert(rank);
        group.raised = if reducing { group.raised.or(flags) } else { group.raised };
        let broken = !group.gone.is_empty();
        let complete = group.arrived.len() == world_size as usize;
        if !equal {
            let theirs = group.from;
            self.breaks(format!("ranks of {generation} reduce different states: {mine:?}, {theirs:?}"));
        } else if broken {
            self.fails_soon(process);
        } else if complete {
            // It has no timeout of its own: the coordinator finds the rank that does not come.
            self.completes(generation.0);
        }
    }

    /// A group's operation is complete, if its ranks can reach each other; each of them is notified after its own
    /// delay.
    pub(super) fn completes(&mut self, generation: u64) {
        let Some(group) = self.groups.get_mut(&generation) else { return };
        let alone = group.members.len() == 1;
        if !alone && group.members.iter().any(|m| self.scenario.is_cut_off(self.processes[*m].slot)) {
            return;
        }
        let mut sides = group.members.iter().map(|m| self.processes[*m].side);
        let first = sides.next();
        let whole = group.arrived.len() == group.members.len() && group.gone.is_empty();
        if !whole || !sides.all(|side| Some(side) == first) {
            return;
        }
        group.arrived.clear();
        if self.scenario.sliced && group.from.is_none() {
            self.find_slices(generation);
        }
        let group = self.groups.entry(generation).or_default();
        if let Some(from) = group.from {
            let to = from.step().cursor;
            group.reached = Some(to);
            if to.phase == Phase::FakeScore {
                group.agreed = std::mem::take(&mut group.raised);
            }
            self.furthest = self.furthest.max(Some(to));
        }
        for member in self.groups[&generation].members.clone() {
            let turn = self.processes[member].turn;
            let slow = self.rng.random_ratio(1, 50);
            let delay = if slow { self.between((1, 40)) } else { self.between((1, 3)) };
            self.plan(delay, Happening::Reduced { process: member, turn });
        }
    }

    /// A rank that left its group has no state any more.
    pub(super) fn loses_its_state(&mut self, process: usize, message: FromWorker) {
        self.is_gone(process);
        let of = &mut self.processes[process];
        of.forget();
        of.enter(Stage::Idle);
        self.says(process, message);
    }

    /// A rank has left its group or died: ranks that wait for it notice, unless a partition hides that.
    pub(super) fn is_gone(&mut self, process: usize) {
        let (generation, rank, _) = self.place(process);
        let side = self.processes[process].side;
        let group = self.groups.entry(generation.0).or_default();
        group.gone.insert(rank);
        group.arrived.remove(&rank);
        if group.gone.len() > 1 && side == 0 {
            return; // The first rank that left made it fail for all.
        }
        for member in group.members.clone() {
            let of = &self.processes[member];
            let waits = matches!(of.stage, Stage::Meeting | Stage::Reducing);
            if of.alive && waits && of.side == side && of.generation() == generation {
                self.fails_soon(member);
            }
        }
    }

    fn fails_soon(&mut self, process: usize) {
        if std::mem::replace(&mut self.processes[process].failing, true) {
            return;
        }
        let turn = self.processes[process].turn;
        let delay = self.between((1, 20));
        self.plan(delay, Happening::Fails { process, turn, error: "connection reset by peer" });
    }

    /// A rank leaves its group and keeps its state, if that is complete.
    fn leaves(&mut self, process: usize, why: Option<&str>) {
        if !self.processes[process].in_group() {
            return;
        }
        // Slices are taken over beside those that are held.
        let torn = !self.scenario.sliced
            && self.processes[process].stage == Stage::Loading
            && self.rng.random_bool(0.5);
        self.is_gone(process);
        let of = &mut self.processes[process];
        of.enter(Stage::Idle);
        if torn {
            of.state = None;
        }
        let generation = of.generation();
        let cursor = of.state.map(|state| state.cursor).unwrap_or_default();
        if let Some(error) = why {
            let error = error.to_owned();
            self.says(process, FromWorker::CollectiveFailed { generation, cursor, error });
        }
    }

    /// The operation that a rank waited for is complete.
    fn reduced(&mut self, process: usize) {
        let (generation, rank, _) = self.place(process);
        let group = &self.groups[&generation.0];
        let hurt = !group.gone.is_empty();
        let agreed = group.agreed;
        if hurt && self.rng.random_bool(0.5) {
            // The ranks that died took a part of the result with them.
            return self.leaves(process, Some("connection reset by peer"));
        }
        if group.incomplete {
            let earlier = group.source.filter(|source| self.processes[process].reaches(*source));
            return self.cannot_put_together(process, earlier);
        }
        let of = &mut self.processes[process];
        if of.stage == Stage::Meeting {
            let source = of.place.as_ref().map(|place| place.source.clone());
            if self.scenario.sliced {
                self.catches_up(process, generation.0);
            } else if source == Some(Source::Peer { rank }) {
                if of.state.is_none() {
                    return self.breaks(format!("w{process}, whose state is torn, is {generation}'s source"));
                }
                let state = of.state;
                self.groups.entry(generation.0).or_default().source = state;
                return self.computes(process);
            }
            self.processes[process].enter(Stage::Loading);
            return self.works_in(process, self.scenario.load);
        }
        (of.state, of.prepared) = (of.state.map(State::step), false);
        // All have loaded theirs.
        of.slices.drain(..of.slices.len().saturating_sub(1));
        let cursor = of.held().unwrap_or_default();
        if cursor.phase == Phase::Generator {
            return self.computes(process);
        }
        self.boundary(process, cursor.iteration, agreed);
    }

    fn works_in(&mut self, process: usize, range: (u64, u64)) {
        let (turn, delay) = (self.processes[process].turn, self.between(range));
        self.plan(delay, Happening::Work { process, turn });
    }

    fn computes(&mut self, process: usize) {
        let of = &mut self.processes[process];
        let cursor = of.state.map(|state| state.cursor).unwrap_or_default();
        if cursor.iteration >= self.scenario.iterations {
            of.enter(Stage::Saving);
            return self.works_in(process, self.scenario.write);
        }
        of.enter(Stage::Computing);
        self.works_in(process, self.scenario.phase);
    }

    /// A rank has taken over the state of its place, or finds that it cannot.
    fn loaded(&mut self, process: usize) {
        let Some(place) = self.processes[process].place.clone() else { return };
        let state = match &place.source {
            Source::Fresh => State::FRESH,
            Source::Checkpoint { manifest_key } => {
                let blind = self.scenario.is_blind(self.processes[process].slot);
                match self.storage.read(manifest_key).filter(|manifest| manifest.whole && !blind) {
                    Some(manifest) => manifest.state(),
                    None => {
                        let (generation, manifest_key) = (place.generation, manifest_key.clone());
                        let error = "a shard's SHA-256 is another".into();
                        let damaged = FromWorker::CheckpointDamaged { generation, manifest_key, error };
                        return self.loses_its_state(process, damaged);
                    }
                }
            }
            Source::Peer { rank } => {
                let group = &self.groups[&place.generation.0];
                // Slices come from all ranks, another state from one.
                let lost =
                    if self.scenario.sliced { !group.gone.is_empty() } else { group.gone.contains(rank) };
                match group.source {
                    Some(state) if !lost => state,
                    _ if lost => {
                        return self.leaves(process, Some("connection reset by peer"));
                    }
                    // The source has not started to broadcast yet.
                    _ => return self.works_in(process, (20, 20)),
                }
            }
        };
        self.processes[process].state = Some(state);
        self.takes_slices(process, &place);
        self.computes(process);
    }

    /// A rank has completed an iteration and executes the requests that all have agreed on.
    fn boundary(&mut self, process: usize, iteration: u64, agreed: Flags) {
        let of = &mut self.processes[process];
        of.flags = of.flags.less(agreed);
        let (Some(place), Some(state)) = (of.place.clone(), of.state) else { return };
        let generation = place.generation.0;
        self.says(
            process,
            FromWorker::StepReport(wire::StepReport {
                generation,
                iteration: iteration - 1,
                first_micro_batch: place.micro_batches.first,
                micro_batches: place.micro_batches.count,
                samples: place.micro_batches.count * 2,
                ..Default::default()
            }),
        );
        let finishes = agreed.stop || iteration >= self.scenario.iterations;
        let saves = finishes || agreed.save || iteration.is_multiple_of(self.scenario.checkpoint_every);
        if saves && place.rank == 0 {
            let generation = place.generation;
            let scores = Scores { diversity: Some(1.0), ..Scores::default() };
            let subject = Subject::Student;
            let report = Evaluation { generation, iteration, subject, scores };
            self.says(process, FromWorker::Evaluation(report));
        }
        if finishes || agreed.yields {
            let stage = if finishes { Flags { stop: true, save: true, yields: false } } else { agreed };
            self.processes[process].flags = stage;
            self.processes[process].enter(Stage::Saving);
            let write = if saves { self.scenario.write } else { (0, 0) };
            return self.works_in(process, write);
        }
        if saves {
            let delay = self.between(self.scenario.write);
            let rank = place.rank;
            self.plan(delay, Happening::Uploaded { process, generation, rank, state });
        }
        self.computes(process);
    }

    /// A rank has saved what it was to save before it yields or finishes.
    fn saved(&mut self, process: usize) {
        let (generation, rank, _) = self.place(process);
        let of = &self.processes[process];
        let (flags, Some(state)) = (of.flags, of.state) else { return };
        let State { cursor, .. } = state;
        let iteration = cursor.iteration;
        let finishes = flags.stop || iteration >= self.scenario.iterations;
        if finishes || flags.save || iteration.is_multiple_of(self.scenario.checkpoint_every) {
            self.uploaded(process, generation.0, rank, state);
        }
        let of = &mut self.processes[process];
        if finishes {
            of.enter(Stage::Finished);
            self.says(process, FromWorker::Finished { generation, cursor });
        } else {
            of.enter(Stage::Idle);
            self.says(process, FromWorker::Yielded { generation, cursor });
        }
    }

    /// A rank's shard of a checkpoint is written, or could not be. The last shard can always be written: without it no
    /// run can succeed.
    fn uploaded(&mut self, process: usize, generation: u64, rank: u32, state: State) {
        let iteration = state.cursor.iteration;
        let last = iteration >= self.scenario.iterations || self.stop_requested;
        let ok = last || self.calm || !self.chance(self.scenario.faults.shard);
        let key = format!("checkpoints/{iteration:012}/g{generation}/rank-{rank:05}");
        let message = if ok {
            // A generation of blind ranks alone is not modelled: what it computes could be saved nowhere.
            let blind = |p: &usize| self.scenario.is_blind(self.processes[*p].slot);
            let sighted = self.groups.get(&generation).is_some_and(|group| !group.members.iter().all(blind));
            if !(sighted && blind(&process)) {
                self.storage.write_shard(iteration, generation, rank);
            }
            let sha256 = format!("{:016x}", state.lineage);
            FromWorker::ShardReceipt(wire::ShardReceipt {
                generation,
                iteration,
                rank,
                key,
                bytes: 1,
                sha256,
                e_tag: None,
            })
        } else {
            let error = "503 Slow Down".to_owned();
            FromWorker::ShardFailed(wire::ShardFailed { generation, iteration, rank, key, error })
        };
        if self.processes[process].generation().0 == generation {
            self.says(process, message);
        } else if let Some(link) = self.processes[process].link {
            self.send_up(link, Up::Message(message));
        }
    }
}
