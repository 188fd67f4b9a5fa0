//! Random schedules over a small world of workers: deaths, pauses, late and repeated messages, storage failures.
//!
//! Whatever happens: at most one generation lives, its number grows and is durable before anybody hears of it; only the live
//! generation's checkpoints are committed; no torn state is ever a source; every micro-batch of a finished iteration is
//! counted once; and when the faults end, the run succeeds. The same schedule always gives the same actions.

#![allow(clippy::unwrap_used)] // A panic here is a failed test.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use potstill_core::{
    Action, Core, Event, Setup, StreamId, Tick,
    observation::{Observation, Outcome},
    record::Record,
};
use potstill_proto::{
    PROTOCOL,
    cursor::{Cursor, Generation},
    message::{Assignment, FromWorker, Hello, Request, Source, ToWorker, WorkerId},
    spec::RunSpec,
    wire,
};
use proptest::prelude::*;

const SLOTS: usize = 4;
const MIN_WORKERS: u32 = 2;
const MAX_WORKERS: u32 = 3;
const ITERATIONS: u64 = 6;
const CHECKPOINT_EVERY: u64 = 2;
const MICRO_BATCHES: u32 = 5;
const FAILURE_MILLIS: u64 = 1000;

#[derive(Clone, Debug)]
enum Op {
    /// The next message of this slot's worker arrives; it may arrive twice.
    Deliver { slot: usize, twice: bool },
    /// This slot's worker reads its next message; it may fail to answer.
    Read { slot: usize, answer: bool },
    /// This slot's worker goes on with its work; if a broadcast into it is cut off, its state may be torn; a shard that it
    /// writes may fail.
    Work { slot: usize, torn: bool, write: bool },
    /// It dies. The coordinator sees that later.
    Kill { slot: usize },
    /// The coordinator sees that a stream of a dead worker is closed.
    SeeClosed { slot: usize },
    /// An empty slot gets a new worker.
    Spawn { slot: usize },
    /// Storage answers.
    Answer { ok: bool },
    /// Time passes.
    Pass { millis: u64 },
}

fn op() -> impl Strategy<Value = Op> {
    let slot = || 0..SLOTS;
    prop_oneof![
        12 => (slot(), prop::bool::weighted(0.1)).prop_map(|(slot, twice)| Op::Deliver { slot, twice }),
        10 => (slot(), prop::bool::weighted(0.8)).prop_map(|(slot, answer)| Op::Read { slot, answer }),
        16 => (slot(), any::<bool>(), prop::bool::weighted(0.8))
            .prop_map(|(slot, torn, write)| Op::Work { slot, torn, write }),
        1 => slot().prop_map(|slot| Op::Kill { slot }),
        4 => slot().prop_map(|slot| Op::SeeClosed { slot }),
        3 => slot().prop_map(|slot| Op::Spawn { slot }),
        3 => prop::bool::weighted(0.7).prop_map(|ok| Op::Answer { ok }),
        3 => (1..FAILURE_MILLIS / 4).prop_map(|millis| Op::Pass { millis }),
    ]
}

/// A worker process.
struct Process {
    stream: StreamId,
    alive: bool,
    to_core: VecDeque<FromWorker>,
    from_core: VecDeque<ToWorker>,
    /// Iterations that its state has been through; `None` when the state is torn.
    state: Option<u64>,
    place: Option<Assignment>,
    /// Whether it takes part in its place's collectives.
    joined: bool,
    left: bool,
    finished: bool,
    /// Whether it was asked to part at the next boundary.
    part: bool,
}

/// What the ranks of a generation share through their collectives.
#[derive(Default)]
struct Group {
    /// What the source broadcasts.
    source: Option<u64>,
    /// The newest iteration that each rank has put its share into.
    contributed: BTreeMap<u32, u64>,
    /// Ranks that left or died.
    gone: BTreeSet<u32>,
    /// The iteration in which somebody raised the flag to part, once that iteration is complete.
    parts_after: Option<u64>,
    /// Iterations in which somebody raised it.
    raised: BTreeSet<u64>,
}

struct World {
    core: Core,
    now: u64,
    streams: u64,
    slots: Vec<Option<Process>>,
    /// Dead workers whose stream the coordinator still believes in.
    unseen: Vec<StreamId>,
    groups: BTreeMap<Generation, Group>,
    commits: VecDeque<u64>,
    manifests: BTreeMap<String, u64>,
    persisted: Option<Generation>,
    /// Micro-batches reported so far of (generation, iteration).
    covered: BTreeMap<(u64, u64), Vec<u32>>,
    last_iteration: Option<u64>,
    outcome: Option<Outcome>,
    trace: Vec<String>,
}

impl World {
    fn new() -> Self {
        let mut spec = RunSpec::default();
        spec.distillation.iterations = ITERATIONS;
        spec.distillation.global_batch = MICRO_BATCHES * 2;
        spec.distillation.micro_batch = 2;
        spec.cluster.min_workers = MIN_WORKERS;
        spec.cluster.max_workers = MAX_WORKERS;
        spec.cluster.failure_timeout_seconds = FAILURE_MILLIS as f64 / 1000.0;
        spec.cluster.wait_timeout_seconds = 1e6;
        let setup = Setup {
            coordinator: "c".into(),
            address: "here:1".into(),
            run_id: "run".into(),
            spec,
            specification: String::new(),
            storage_url: String::new(),
            history: Vec::new(),
            checkpoints: Vec::new(),
            ranks_may_live: false,
        };
        let mut world = Self {
            core: Core::new(setup),
            now: 0,
            streams: 0,
            slots: (0..SLOTS).map(|_| None).collect(),
            unseen: Vec::new(),
            groups: BTreeMap::new(),
            commits: VecDeque::new(),
            manifests: BTreeMap::new(),
            persisted: None,
            covered: BTreeMap::new(),
            last_iteration: None,
            outcome: None,
            trace: Vec::new(),
        };
        world.step(Event::Started);
        world
    }

    fn step(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.core.step(Tick(self.now), event, &mut actions);
        for action in actions {
            assert!(self.outcome.is_none() || !matches!(action, Action::Commit(_)), "a commit after the end");
            self.trace.push(format!("{} {action:?}", self.now));
            self.act(action);
        }
    }

    fn process(&mut self, stream: StreamId) -> Option<&mut Process> {
        self.slots.iter_mut().flatten().find(|p| p.stream == stream)
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Send { stream, message } => {
                if let ToWorker::Assignment(a) = &message {
                    assert_eq!(
                        Some(a.generation),
                        self.persisted,
                        "sent before it was durable, or after its time"
                    );
                    if a.source == (Source::Peer { rank: a.rank })
                        && let Some(process) = self.process(stream)
                    {
                        let state = process.state.expect("a torn state was chosen as the source");
                        // It may be behind, when whoever was further has died.
                        self.last_iteration = self.last_iteration.min(state.checked_sub(1));
                    }
                }
                if let Some(process) = self.process(stream) {
                    process.from_core.push_back(message);
                }
            }
            Action::Close { stream } => {
                self.unseen.retain(|s| *s != stream);
                let slot = self.slots.iter().position(|p| p.as_ref().is_some_and(|p| p.stream == stream));
                if let Some(slot) = slot {
                    self.die(slot);
                    self.unseen.retain(|s| *s != stream);
                }
            }
            Action::Persist(Record::GenerationOpened { generation, members, .. }) => {
                assert!(Some(generation) > self.persisted);
                assert!((MIN_WORKERS..=MAX_WORKERS).contains(&u32::try_from(members.len()).unwrap()));
                self.persisted = Some(generation);
            }
            Action::Commit(checkpoint) => {
                assert_eq!(Some(checkpoint.generation), self.persisted);
                let ranks: Vec<u32> = checkpoint.shards.iter().map(|s| s.rank).collect();
                assert_eq!(ranks, (0..u32::try_from(ranks.len()).unwrap()).collect::<Vec<_>>());
                for shard in &checkpoint.shards {
                    assert_eq!(
                        (shard.generation, shard.iteration),
                        (checkpoint.generation.0, checkpoint.iteration)
                    );
                }
                self.commits.push_back(checkpoint.iteration);
            }
            Action::Observe(Observation::Iteration(totals)) => {
                // The generation whose reports made it: the live one, or the one before when that is being replaced.
                let generation = self.persisted.unwrap().0;
                let live = self.covered.get(&(generation, totals.iteration));
                let before = self.covered.get(&(generation - 1, totals.iteration));
                let mut covered = live.or(before).expect("an iteration without reports").clone();
                covered.sort_unstable();
                if live.is_some() {
                    assert_eq!(covered, (0..MICRO_BATCHES).collect::<Vec<_>>(), "{totals:?}");
                }
                assert!(covered.windows(2).all(|w| w[0] != w[1]), "counted twice: {covered:?}");
                assert_eq!(totals.samples, MICRO_BATCHES * 2);
                assert!(self.last_iteration.is_none_or(|last| totals.iteration > last), "{totals:?}");
                self.last_iteration = Some(totals.iteration);
            }
            Action::Observe(Observation::GenerationOpened { source, .. }) => match source {
                // A run goes back only where the newest state does not live on.
                Source::Fresh => self.last_iteration = None,
                Source::Checkpoint { manifest_key } => {
                    self.last_iteration = self.manifests[&manifest_key].checked_sub(1);
                }
                Source::Peer { .. } => {}
            },
            Action::End(outcome) => self.outcome = Some(outcome),
            Action::Persist(_)
            | Action::Observe(_)
            | Action::Log(_)
            | Action::Retain { .. }
            | Action::Answer { .. } => {}
        }
    }

    fn die(&mut self, slot: usize) {
        let Some(process) = &mut self.slots[slot] else { return };
        if !process.alive {
            return;
        }
        process.alive = false;
        self.unseen.push(process.stream);
        if let Some(place) = &process.place {
            self.groups.entry(place.generation).or_default().gone.insert(place.rank);
        }
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Deliver { slot, twice } => self.deliver(slot, twice),
            Op::Read { slot, answer } => self.read(slot, answer),
            Op::Work { slot, torn, write } => self.work(slot, torn, write),
            Op::Kill { slot } => self.die(slot),
            Op::SeeClosed { slot } => {
                let dead = self.slots[slot].as_ref().filter(|p| !p.alive).map(|p| p.stream);
                if let Some(stream) = dead
                    && self.unseen.contains(&stream)
                {
                    self.unseen.retain(|s| *s != stream);
                    self.step(Event::Closed { stream, reason: "reset".into() });
                }
            }
            Op::Spawn { slot } => {
                if self.slots[slot].as_ref().is_none_or(|p| !p.alive) {
                    self.spawn(slot);
                }
            }
            Op::Answer { ok } => {
                if let Some(iteration) = self.commits.pop_front() {
                    // Losing the last checkpoint rightly fails the run: see the unit tests.
                    let result = if ok || iteration == ITERATIONS {
                        let key = format!("m{iteration}");
                        self.manifests.insert(key.clone(), iteration);
                        Ok(key)
                    } else {
                        Err("503".into())
                    };
                    self.step(Event::CommitAnswered { iteration, result });
                }
            }
            Op::Pass { millis } => {
                self.now += millis;
                self.step(Event::Timer);
            }
        }
    }

    fn spawn(&mut self, slot: usize) {
        let stream = StreamId(self.streams);
        self.streams += 1;
        self.slots[slot] = Some(Process {
            stream,
            alive: true,
            to_core: VecDeque::new(),
            from_core: VecDeque::new(),
            state: Some(0),
            place: None,
            joined: false,
            left: false,
            finished: false,
            part: false,
        });
        let hello = Hello {
            protocol: PROTOCOL,
            worker: WorkerId(format!("w{}", stream.0)),
            run_id: "run".into(),
            host: "host".into(),
            pid: 1,
            device: "cpu".into(),
            store_address: "host:1".into(),
            held: None,
            place: None,
        };
        self.step(Event::Attached { stream, hello });
        self.step(Event::Received { stream, message: FromWorker::Ready });
    }

    fn deliver(&mut self, slot: usize, twice: bool) {
        let Some(process) = &mut self.slots[slot] else { return };
        let stream = process.stream;
        let message = match process.to_core.pop_front() {
            Some(message) => message,
            // A living worker always has a heartbeat to send; while it loads, that may tell of a state half overwritten.
            None if process.alive => FromWorker::Heartbeat {
                generation: process.place.as_ref().map(|p| p.generation).unwrap_or_default(),
                cursor: Cursor::boundary(process.state.unwrap_or(ITERATIONS)),
                progress: 0,
                activity: String::new(),
                waiting: false,
            },
            None => return,
        };
        if let FromWorker::StepReport(report) = &message
            && Some(Generation(report.generation)) == self.persisted
        {
            let covered = self.covered.entry((report.generation, report.iteration)).or_default();
            covered.extend(report.first_micro_batch..report.first_micro_batch + report.micro_batches);
        }
        for _ in 0..=u8::from(twice) {
            self.step(Event::Received { stream, message: message.clone() });
        }
    }

    fn read(&mut self, slot: usize, answer: bool) {
        let Some(process) = self.slots[slot].as_mut().filter(|p| p.alive) else { return };
        match process.from_core.pop_front() {
            Some(ToWorker::Assignment(assignment)) => {
                if let Some(old) = process.place.replace(assignment) {
                    self.groups.entry(old.generation).or_default().gone.insert(old.rank);
                }
                process.joined = false;
                process.left = false;
                process.finished = false;
                process.part = false;
            }
            Some(ToWorker::Request { generation, what: Request::Yield }) => {
                process.part = process.place.as_ref().is_some_and(|p| p.generation == generation);
            }
            Some(ToWorker::Abandon { generation, .. }) => {
                let current = process.place.as_ref().is_some_and(|p| p.generation == generation);
                if current && !process.left {
                    self.leave(slot, answer);
                }
            }
            Some(ToWorker::Stop { .. } | ToWorker::Refused { .. }) => self.die(slot),
            _ => {}
        }
    }

    fn leave(&mut self, slot: usize, answer: bool) {
        let Some(process) = &mut self.slots[slot] else { return };
        let Some(place) = &process.place else { return };
        process.left = true;
        self.groups.entry(place.generation).or_default().gone.insert(place.rank);
        if answer {
            let cursor = Cursor::boundary(process.state.unwrap_or(0));
            let error = "reset by peer".into();
            process.to_core.push_back(FromWorker::CollectiveFailed {
                generation: place.generation,
                cursor,
                error,
            });
        }
    }

    fn work(&mut self, slot: usize, torn: bool, write: bool) {
        let Some(process) = self.slots[slot].as_mut().filter(|p| p.alive && !p.left) else { return };
        let Some(place) = process.place.clone() else { return };
        let group = self.groups.entry(place.generation).or_default();
        if !process.joined {
            let state = match &place.source {
                Source::Fresh => Some(0),
                Source::Checkpoint { manifest_key } => Some(self.manifests[manifest_key]),
                Source::Peer { rank } if *rank == place.rank => {
                    group.source = process.state;
                    process.state
                }
                Source::Peer { .. } => group.source,
            };
            match (state, &place.source) {
                (Some(state), _) => {
                    process.state = Some(state);
                    process.joined = true;
                }
                (None, Source::Peer { rank }) if group.gone.contains(rank) => {
                    if torn {
                        process.state = None;
                    }
                    self.leave(slot, true);
                }
                _ => {}
            }
            return;
        }
        let state = process.state.unwrap();
        if state >= ITERATIONS {
            if !process.finished {
                process.finished = true;
                self.save(slot, true);
                let process = self.slots[slot].as_mut().unwrap();
                let cursor = Cursor::boundary(state);
                process.to_core.push_back(FromWorker::Finished { generation: place.generation, cursor });
            }
            return;
        }
        if group.parts_after.is_some_and(|last| state > last) {
            process.left = true;
            let (generation, cursor) = (place.generation, Cursor::boundary(state));
            process.to_core.push_back(FromWorker::Yielded { generation, cursor });
            return;
        }
        // The flags travel with the first contribution to an iteration, and are the same for all who read them.
        if group.contributed.insert(place.rank, state) != Some(state) && process.part {
            group.raised.insert(state);
        }
        let waits_for: Vec<u32> = (0..place.world_size)
            .filter(|rank| group.contributed.get(rank).is_none_or(|iteration| *iteration < state))
            .collect();
        if waits_for.iter().any(|rank| group.gone.contains(rank)) {
            self.leave(slot, true);
        } else if waits_for.is_empty() {
            if group.raised.contains(&state) && state + 1 < ITERATIONS {
                group.parts_after = Some(state);
            }
            process.state = Some(state + 1);
            process.to_core.push_back(FromWorker::StepReport(wire::StepReport {
                generation: place.generation.0,
                iteration: state,
                first_micro_batch: place.micro_batches.first,
                micro_batches: place.micro_batches.count,
                samples: place.micro_batches.count * 2,
                ..Default::default()
            }));
            if (state + 1).is_multiple_of(CHECKPOINT_EVERY) && state + 1 < ITERATIONS {
                self.save(slot, write);
            }
        }
    }

    fn save(&mut self, slot: usize, ok: bool) {
        let Some(process) = &mut self.slots[slot] else { return };
        let (Some(place), Some(iteration)) = (&process.place, process.state) else { return };
        let (generation, rank) = (place.generation.0, place.rank);
        process.to_core.push_back(if ok {
            FromWorker::ShardReceipt(wire::ShardReceipt { generation, iteration, rank, ..Default::default() })
        } else {
            FromWorker::ShardFailed(wire::ShardFailed { generation, iteration, rank, ..Default::default() })
        });
    }

    /// No more faults: everybody who is missing comes back, and everything that is said is heard.
    fn recover(&mut self) {
        for _ in 0..20 * ITERATIONS * SLOTS as u64 {
            for slot in 0..SLOTS {
                self.apply(&Op::SeeClosed { slot });
                if self.outcome.is_none() {
                    self.apply(&Op::Spawn { slot });
                }
                self.apply(&Op::Read { slot, answer: true });
                self.apply(&Op::Work { slot, torn: false, write: true });
                self.apply(&Op::Deliver { slot, twice: false });
            }
            self.apply(&Op::Answer { ok: true });
            self.apply(&Op::Pass { millis: FAILURE_MILLIS / 20 });
            if self.outcome.is_some() {
                return;
            }
        }
    }
}

fn run(ops: &[Op]) -> World {
    let mut world = World::new();
    for slot in 0..SLOTS {
        world.spawn(slot);
    }
    for op in ops {
        world.apply(op);
    }
    world.recover();
    world
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_invariants_hold_and_the_run_succeeds_once_faults_stop(
        ops in prop::collection::vec(op(), 0..600)
    ) {
        let world = run(&ops);
        prop_assert_eq!(
            &world.outcome,
            &Some(Outcome::Succeeded { iteration: ITERATIONS }),
            "{}",
            world.trace.join("\n")
        );
    }

    #[test]
    fn the_same_schedule_gives_the_same_actions(ops in prop::collection::vec(op(), 0..150)) {
        prop_assert_eq!(run(&ops).trace, run(&ops).trace);
    }
}
