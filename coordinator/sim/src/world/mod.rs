//! The world, which processes one event after another.

mod checks;
mod coordinators;
mod faults;
pub mod happening;
mod links;
mod parts;
mod slices;
mod workers;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    hash::{DefaultHasher, Hasher},
};

use potstill_core::observation::Outcome;
use potstill_proto::cursor::Cursor;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use self::{
    happening::Happening,
    parts::{Coordinator, Link},
};
use crate::{
    group::Group,
    process::Process,
    queue::Queue,
    report::{Report, Seed, Violation},
    scenario::Scenario,
    storage::Storage,
};

/// See the crate's documentation.
pub struct World {
    scenario: Scenario,
    seed: Seed,
    rng: ChaCha8Rng,
    now: u64,
    queue: Queue<Happening>,
    processes: Vec<Process>,
    /// The newest process on each machine.
    slots: Vec<usize>,
    links: Vec<Link>,
    groups: BTreeMap<u64, Group>,
    coordinators: Vec<Coordinator>,
    storage: Storage,
    /// The newest generation in the journal.
    generation: u64,
    /// The furthest state that any group has reached.
    furthest: Option<Cursor>,
    /// Whether all checkpoints were damaged at once.
    ruined: bool,
    /// Lineages of states whose slices were looked for and not found.
    given_up: BTreeSet<u64>,
    /// Slices and the processes that have held them, by the generation that cut the state.
    holders: BTreeMap<u64, Vec<(u32, usize)>>,
    partitions: u64,
    clients: u64,
    calm: bool,
    stop_requested: bool,
    outcome: Option<Outcome>,
    broken: Option<String>,
    trace: DefaultHasher,
    /// The newest actions, where they are recorded.
    recorded: VecDeque<String>,
    record: usize,
    happenings: u64,
    actions: u64,
    faults: u64,
}

impl World {
    /// A world at its start. The last `record` actions are kept for the report.
    #[must_use]
    pub fn new(scenario: Scenario, seed: Seed, record: usize) -> Self {
        let mut world = Self {
            rng: ChaCha8Rng::seed_from_u64(seed.0),
            scenario,
            seed,
            now: 0,
            queue: Queue::default(),
            processes: Vec::new(),
            slots: Vec::new(),
            links: Vec::new(),
            groups: BTreeMap::new(),
            coordinators: Vec::new(),
            storage: Storage::default(),
            generation: 0,
            furthest: None,
            ruined: false,
            given_up: BTreeSet::new(),
            holders: BTreeMap::new(),
            partitions: 0,
            clients: 0,
            calm: false,
            stop_requested: false,
            outcome: None,
            broken: None,
            trace: DefaultHasher::new(),
            recorded: VecDeque::new(),
            record,
            happenings: 0,
            actions: 0,
            faults: 0,
        };
        world.plan(0, Happening::Start);
        for slot in 0..world.scenario.machines() {
            world.slots.push(usize::MAX);
            let late = world.between((0, world.scenario.failure_millis / 2));
            world.plan(late, Happening::Boot { slot });
        }
        if world.scenario.faults.every_millis > 0 {
            world.plan(0, Happening::Fault);
        }
        world.plan(world.scenario.faulty_millis, Happening::Calm);
        world
    }

    /// Processes events until the run is over.
    ///
    /// # Errors
    /// [`Violation`].
    pub fn run(mut self) -> Result<Report, Violation> {
        let deadline = self.scenario.deadline_millis();
        while self.broken.is_none() && self.outcome.is_none() {
            let Some((at, what)) = self.queue.pop() else {
                self.breaks("no event is planned although the run is not over".to_owned());
                break;
            };
            self.now = at;
            if at > deadline {
                self.breaks(format!(
                    "the run has not ended although faults stopped long ago: {}",
                    self.stand()
                ));
                break;
            }
            self.happenings += 1;
            self.happens(what);
        }
        self.check_end();
        match (self.broken, self.outcome) {
            (None, Some(outcome)) => Ok(Report {
                outcome,
                trace: self.trace.finish(),
                millis: self.now,
                happenings: self.happenings,
                actions: self.actions,
                generations: self.generation,
                coordinators: self.coordinators.len(),
                faults: self.faults,
            }),
            (broken, _) => Err(Violation {
                seed: self.seed.0,
                millis: self.now,
                what: broken.unwrap_or_default(),
                actions: self.recorded.into(),
            }),
        }
    }

    fn happens(&mut self, what: Happening) {
        match what {
            Happening::Boot { slot } => self.boot(slot),
            Happening::Work { process, .. }
            | Happening::Reduced { process, .. }
            | Happening::Fails { process, .. }
            | Happening::Uploaded { process, .. }
            | Happening::Heartbeat { process }
            | Happening::Reconnect { process } => self.process_event(process, what),
            Happening::Down { link, .. } | Happening::Noticed { link } => {
                self.process_event(self.links[link].process, what);
            }
            Happening::Up { link, what } if self.stands_still(self.links[link].coordinator) => {
                let coordinator = self.links[link].coordinator;
                self.coordinators[coordinator].deferred.push(Happening::Up { link, what });
            }
            Happening::Up { link, what } => self.arrives(link, what),
            Happening::Severed { link } if self.stands_still(self.links[link].coordinator) => {
                let coordinator = self.links[link].coordinator;
                self.coordinators[coordinator].deferred.push(Happening::Severed { link });
            }
            Happening::Severed { link } => self.closed(link, "keepalive timed out"),
            Happening::Timer { coordinator, at } => self.timer(coordinator, at),
            Happening::Watch { coordinator } => self.watches(coordinator),
            Happening::Persisted { coordinator } => self.persisted(coordinator),
            Happening::Verified { coordinator, manifest_key } => self.verified(coordinator, manifest_key),
            Happening::Listens { coordinator, since } => self.listens(coordinator, since),
            Happening::Lands { coordinator, checkpoint, verdict } => {
                self.lands(coordinator, &checkpoint, verdict);
            }
            Happening::Answers { coordinator, iteration, result } => {
                self.answered(coordinator, iteration, result);
            }
            Happening::Start => self.start_coordinator(),
            Happening::Fault => self.fault(),
            Happening::Calm => self.calm_down(),
            Happening::Resume { process } => self.resume(process),
            Happening::Heal { side } => self.heal(side),
        }
    }

    /// Plans an event for `delay` milliseconds from now.
    fn plan(&mut self, delay: u64, what: Happening) {
        self.queue.push(self.now + delay, what);
    }

    fn between(&mut self, range: (u64, u64)) -> u64 {
        self.rng.random_range(range.0..=range.1)
    }

    fn chance(&mut self, share: f64) -> bool {
        share > 0.0 && self.rng.random_bool(share)
    }

    /// Records the first violation.
    fn breaks(&mut self, what: String) {
        self.broken.get_or_insert(what);
    }
}
