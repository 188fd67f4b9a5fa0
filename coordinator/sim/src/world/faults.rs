//! Faults, and how they end.

use potstill_core::{ClientId, Event};
use potstill_proto::{
    PROTOCOL,
    cursor::{Cursor, Generation},
    message::{FromWorker, Hello, Place},
    wire,
};
use rand::RngExt;

use super::{
    World,
    happening::{Happening, Up},
};
use crate::{
    process::{Process, Stage},
    storage::manifest_key,
};

impl World {
    /// Injects a fault, and plans the next one.
    pub(super) fn fault(&mut self) {
        if self.calm {
            return;
        }
        let faults = self.scenario.faults.clone();
        let next = self.between((1, 2 * faults.every_millis));
        self.plan(next, Happening::Fault);
        type Strike = fn(&mut World);
        let strikes: [(u32, Strike); 15] = [
            (faults.crash, Self::crash),
            (faults.pause, Self::pause),
            (faults.hang, Self::hang),
            (faults.partition, Self::part),
            (faults.coordinator, Self::kill_coordinator),
            (faults.second, Self::start_coordinator),
            (faults.leave, Self::leave),
            (faults.request, Self::request),
            (faults.stop, Self::stop),
            (faults.damage, Self::rot),
            (faults.ruin, Self::ruin),
            (faults.stall, Self::stall),
            (faults.stranger, Self::stranger),
            (faults.other_version, Self::other_version),
            (faults.liars, Self::lie),
        ];
        let sum: u32 = strikes.iter().map(|(weight, _)| weight).sum();
        if sum == 0 {
            return;
        }
        let mut at = self.rng.random_range(0..sum);
        for (weight, strike) in strikes {
            if at < weight {
                self.faults += 1;
                return strike(self);
            }
            at -= weight;
        }
    }

    fn any_process(&mut self) -> Option<usize> {
        let living: Vec<_> =
            self.slots.iter().copied().filter(|p| self.processes.get(*p).is_some_and(|p| p.alive)).collect();
        if living.is_empty() { None } else { Some(living[self.rng.random_range(0..living.len())]) }
    }

    fn crash(&mut self) {
        let most = (self.slots.len() as f64 * self.scenario.faults.crash_share) as usize;
        let most = if self.rng.random_bool(0.2) { most.max(1) } else { 1 };
        for _ in 0..self.rng.random_range(1..=most) {
            if let Some(process) = self.any_process() {
                self.dies(process);
            }
        }
    }

    fn pause(&mut self) {
        if let Some(process) = self.any_process()
            && !self.processes[process].paused
        {
            self.processes[process].paused = true;
            let millis = self.between((20, 3 * self.scenario.failure_millis));
            self.plan(millis, Happening::Resume { process });
        }
    }

    /// A paused process continues in the state it was in; the events that were deferred reach it now.
    pub(super) fn resume(&mut self, process: usize) {
        self.processes[process].paused = false;
        for what in std::mem::take(&mut self.processes[process].deferred) {
            self.plan(0, what);
        }
    }

    fn hang(&mut self) {
        if let Some(process) = self.any_process()
            && self.processes[process].stage != Stage::Booting
        {
            self.processes[process].hung = true;
        }
    }

    /// Some workers are cut off from the coordinators and from all other workers.
    fn part(&mut self) {
        self.partitions += 1;
        let side = self.partitions;
        let share = self.rng.random_range(0.1..0.7);
        for slot in 0..self.slots.len() {
            let process = self.slots[slot];
            let cut = self.rng.random_bool(share);
            if !cut || !self.processes.get(process).is_some_and(|p| p.alive && p.side == 0) {
                continue;
            }
            self.processes[process].side = side;
            if let Some(link) = self.processes[process].link {
                self.links[link].broken = true;
                let patience = 2 * self.scenario.failure_millis;
                let (severed, noticed) = (self.between((0, patience)), self.between((0, patience)));
                self.plan(severed, Happening::Severed { link });
                self.plan(noticed, Happening::Noticed { link });
            }
        }
        let millis = self.between((20, 3 * self.scenario.failure_millis));
        self.plan(millis, Happening::Heal { side });
    }

    /// A partition ends: collectives that waited for packets continue.
    pub(super) fn heal(&mut self, side: u64) {
        for process in &mut self.processes {
            if process.side == side {
                process.side = 0;
            }
        }
        let groups: Vec<_> = self.groups.keys().copied().collect();
        for generation in groups {
            self.completes(generation);
        }
    }

    fn kill_coordinator(&mut self) {
        let Some(coordinator) = self.reachable() else { return };
        if self.rng.random_bool(0.5) {
            // The coordinator dies right after a record, before the actions that follow it.
            self.coordinators[coordinator].dies_after = Some(self.rng.random_range(0..3));
        } else {
            self.coordinator_dies(coordinator);
        }
    }

    fn leave(&mut self) {
        if let Some(process) = self.any_process()
            && self.processes[process].leaving.is_none()
            && !self.processes[process].paused
        {
            let reason = "SIGTERM".to_owned();
            self.processes[process].leaving = Some(reason.clone());
            self.says(process, FromWorker::Leaving { reason });
        }
    }

    fn request(&mut self) {
        let Some(coordinator) = self.reachable() else { return };
        let client = ClientId(self.clients);
        self.clients += 1;
        self.coordinators[coordinator].clients.insert(client, self.now);
        self.step(coordinator, Event::CheckpointRequested { client });
    }

    fn stop(&mut self) {
        let Some(coordinator) = self.reachable() else { return };
        self.stop_requested = true;
        self.step(coordinator, Event::StopRequested { reason: "Ctrl-C".into() });
    }

    /// A coordinator stands still for a while.
    fn stall(&mut self) {
        let Some(coordinator) = self.reachable().filter(|c| !self.stands_still(*c)) else { return };
        let since = self.now;
        self.coordinators[coordinator].still = Some(since);
        let millis = self.between((20, 3 * self.scenario.failure_millis));
        self.plan(millis, Happening::Listens { coordinator, since });
    }

    /// A stranger claims the place and the state of a rank, and says what that rank could say.
    fn stranger(&mut self) {
        let Some(coordinator) = self.reachable() else { return };
        let rank = self.rng.random_range(0..self.scenario.max_workers);
        let generation = Generation(self.generation);
        let iteration = self.rng.random_range(0..=self.scenario.iterations);
        let process = self.processes.len();
        // No process answers for it.
        self.processes.push(Process { alive: false, ..Process::new(usize::MAX) });
        let link = self.connect(coordinator, process);
        let claimed = self.rng.random_range(1..=self.scenario.iterations + 1);
        let held = self.rng.random_bool(0.5).then_some(Cursor::boundary(claimed));
        let hello = Hello { held, place: Some(Place { generation, rank }), ..self.hello(process) };
        self.send_up(link, Up::Hello(hello));
        let (cursor, key) = (Cursor::boundary(iteration), format!("checkpoints/{iteration:012}"));
        let lies = [
            // Once it is ready it would be given a place, and its state to the others.
            FromWorker::Ready,
            FromWorker::StepReport(wire::StepReport {
                generation: generation.0,
                iteration,
                ..wire::StepReport::default()
            }),
            FromWorker::ShardReceipt(wire::ShardReceipt {
                generation: generation.0,
                iteration,
                rank,
                key,
                bytes: 1,
                ..wire::ShardReceipt::default()
            }),
            FromWorker::CheckpointDamaged {
                generation,
                manifest_key: manifest_key(iteration),
                error: "a lie".to_owned(),
            },
            FromWorker::StateIncomplete { generation, cursor: Cursor::default(), error: "a lie".to_owned() },
            FromWorker::Yielded { generation, cursor },
            FromWorker::Finished { generation, cursor },
            FromWorker::CollectiveFailed {
                generation: Generation(generation.0 + 7),
                cursor,
                error: String::new(),
            },
            FromWorker::Failed { generation, error: "a lie".to_owned() },
        ];
        for lie in lies {
            if self.rng.random_bool(0.5) {
                self.send_up(link, Up::Message(lie));
            }
        }
        self.send_up(link, Up::End);
    }

    /// The ranks of the newest generation say that shards are durable that they cannot have written: of an iteration beyond
    /// the run, or of another rank.
    fn lie(&mut self) {
        let Some(group) = self.groups.get(&self.generation) else { return };
        let iteration = match self.rng.random_bool(0.5) || group.members.len() == 1 {
            true => self.scenario.iterations + 1,
            false => self.scenario.checkpoint_every,
        };
        let members = group.members.clone();
        let beyond = iteration > self.scenario.iterations;
        for (rank, process) in (0u32..).zip(&members) {
            let Some(link) = self.processes[*process].link else { continue };
            let rank = if beyond { rank } else { (rank + 1) % members.len() as u32 };
            let (generation, key) = (self.generation, format!("checkpoints/{iteration:012}"));
            let receipt =
                wire::ShardReceipt { generation, iteration, rank, key, bytes: 1, ..Default::default() };
            self.send_up(link, Up::Message(FromWorker::ShardReceipt(receipt)));
        }
    }

    fn other_version(&mut self) {
        let Some(coordinator) = self.reachable() else { return };
        let process = self.processes.len();
        self.processes.push(Process { alive: false, foreign: true, ..Process::new(usize::MAX) });
        let link = self.connect(coordinator, process);
        let hello = Hello { protocol: PROTOCOL - 1, ..self.hello(process) };
        self.send_up(link, Up::Hello(hello));
        self.send_up(link, Up::Message(FromWorker::Ready));
    }

    /// Damages a shard of the newest checkpoint, unless it is the last or the only one that is whole.
    fn rot(&mut self) {
        // The state may be lost as well: with a slice of it, or where only the newest checkpoint is kept.
        if self.scenario.sliced || self.scenario.keep < 2 {
            return;
        }
        let committed = self.storage.committed();
        let whole = |iteration: u64| self.storage.manifest(iteration).is_some_and(|manifest| manifest.whole);
        // Another damaged one would be kept as the second of those that retention keeps.
        if committed.len() < 2 || !committed.iter().all(|checkpoint| whole(checkpoint.iteration)) {
            return;
        }
        let newest = committed.last().map(|checkpoint| checkpoint.iteration);
        if let Some(iteration) = newest.filter(|iteration| *iteration < self.scenario.iterations) {
            self.storage.damage(iteration);
        }
    }

    /// Damages all checkpoints but the last of the run, and half of the time ends all workers: if none holds the state then, the
    /// run cannot succeed.
    fn ruin(&mut self) {
        for checkpoint in self.storage.committed() {
            if checkpoint.iteration < self.scenario.iterations {
                self.storage.damage(checkpoint.iteration);
                self.ruined = true;
            }
        }
        if self.ruined && self.rng.random_bool(0.5) {
            while let Some(process) = self.any_process() {
                self.dies(process);
            }
        }
    }

    /// Faults stop. Workers that hang continue to hang: to find them is the coordinator's task.
    pub(super) fn calm_down(&mut self) {
        self.calm = true;
        for process in 0..self.processes.len() {
            if self.processes[process].alive {
                self.resume(process);
            }
        }
        for coordinator in 0..self.coordinators.len() {
            if let Some(since) = self.coordinators[coordinator].still {
                self.listens(coordinator, since);
            }
        }
        for side in 1..=self.partitions {
            self.heal(side);
        }
        if self.reachable().is_none() {
            self.plan(self.scenario.failure_millis * 3, Happening::Start);
        }
    }
}
