//! The shape of a world.

use std::{num::NonZeroU32, time::Duration};

use potstill_core::terms::{Division, Terms, Timeouts};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::report::Seed;

/// Faults and how often they are injected.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Faults {
    /// Mean milliseconds between two faults; 0: there are none.
    pub every_millis: u64,
    /// Weight of a crash of some workers.
    pub crash: u32,
    /// The largest share of all machines that one crash in five affects; the others affect one machine.
    pub crash_share: f64,
    /// Weight of a pause of a worker.
    pub pause: u32,
    /// Weight of a worker that hangs: it sends heartbeats and makes no progress.
    pub hang: u32,
    /// Weight of a partition between some workers and all others.
    pub partition: u32,
    /// Weight of the coordinator's death; a successor starts later.
    pub coordinator: u32,
    /// Weight of a second coordinator while the first one is alive.
    pub second: u32,
    /// Weight of a worker that leaves.
    pub leave: u32,
    /// Weight of a request for a checkpoint.
    pub request: u32,
    /// Weight of a request to stop.
    pub stop: u32,
    /// Weight of damage to a checkpoint.
    pub damage: u32,
    /// Weight of damage to all checkpoints.
    pub ruin: u32,
    /// Weight of a coordinator that stands still for a while: it hears nothing, and its clock does not run.
    pub stall: u32,
    /// Weight of a stranger that attaches, claims what belongs to others, and lies.
    pub stranger: u32,
    /// Weight of a worker of another version.
    pub other_version: u32,
    /// Weight of ranks that report shards that they have not written.
    pub liars: u32,
    /// Share of journal records that take up to two failure timeouts.
    pub slow_journal: f64,
    /// Share of messages that arrive twice.
    pub twice: f64,
    /// Share of messages that take up to half the failure timeout.
    pub late: f64,
    /// Share of journal records whose answer is an error. Half of them are written all the same. Either case ends the
    /// coordinator.
    pub journal: f64,
    /// Share of shards that cannot be written.
    pub shard: f64,
    /// Share of manifests that cannot be written.
    pub commit: f64,
    /// Share of manifests that are written although storage answers with an error.
    pub lie: f64,
    /// Share of manifests whose answer takes up to five failure timeouts.
    pub slow: f64,
}

/// A world's shape. Times are in milliseconds; a pair is a range, both ends included.
#[derive(Clone, Debug, PartialEq)]
pub struct Scenario {
    /// Machines, each of which restarts its one worker when that dies.
    pub slots: usize,
    /// Further machines, whose storage is another than the coordinator's.
    pub blind: usize,
    /// Further machines that reach the coordinator and none of the others.
    pub cut_off: usize,
    /// Whether each rank holds a slice of the state, and a copy of one other rank's.
    pub sliced: bool,
    /// Ranks of a group that holds all slices, at least, where there may be several groups.
    pub shard_group: Option<NonZeroU32>,
    /// Machines of one host.
    pub per_host: usize,
    /// With fewer workers than this the run waits.
    pub min_workers: u32,
    /// Workers beyond this number are standby.
    pub max_workers: u32,
    /// Iterations of the run.
    pub iterations: u64,
    /// Iterations between two checkpoints.
    pub checkpoint_every: u64,
    /// Checkpoints that storage keeps.
    pub keep: usize,
    /// The failure timeout.
    pub failure_millis: u64,
    /// How often a coordinator checks that no other one has written to the journal.
    pub watch_millis: u64,
    /// How long a run waits for workers, and for shards when its ranks have yielded.
    pub wait_millis: u64,
    /// Computation of one phase.
    pub phase: (u64, u64),
    /// Start of a process until it is ready.
    pub boot: (u64, u64),
    /// Taking over a state.
    pub load: (u64, u64),
    /// Writing a shard or a manifest.
    pub write: (u64, u64),
    /// Delivery of one message.
    pub link: (u64, u64),
    /// The faults.
    pub faults: Faults,
    /// How long faults are injected.
    pub faulty_millis: u64,
}

impl Scenario {
    /// A world of this size without faults.
    #[must_use]
    pub fn calm(min_workers: u32, max_workers: u32, spares: usize) -> Self {
        Self {
            slots: max_workers as usize + spares,
            blind: 0,
            cut_off: 0,
            sliced: false,
            shard_group: None,
            per_host: 1,
            min_workers,
            max_workers,
            iterations: 12,
            checkpoint_every: 4,
            keep: 2,
            failure_millis: 1000,
            watch_millis: 10_000,
            wait_millis: 30_000,
            phase: (20, 60),
            boot: (200, 600),
            load: (10, 50),
            write: (5, 100),
            link: (1, 4),
            faults: Faults::default(),
            faulty_millis: 0,
        }
    }

    /// The mid-sized world of a seed: some kinds of fault are frequent, some are absent.
    #[must_use]
    pub fn mixed(seed: Seed) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed.0 ^ 0x5eed);
        let most = if rng.random_bool(0.9) { 10 } else { 36 };
        let max_workers = rng.random_range(2..=most);
        let min_workers = rng.random_range(1..=max_workers.min(4));
        let spares = rng.random_range(0..=4);
        let mut weight = |p: f64, most: u32| {
            if rng.random_bool(p) { rng.random_range(1..=most) } else { 0 }
        };
        let faults = Faults {
            crash: weight(0.8, 6),
            crash_share: 1.0,
            pause: weight(0.6, 4),
            hang: weight(0.4, 2),
            partition: weight(0.5, 3),
            coordinator: weight(0.6, 4),
            second: weight(0.3, 2),
            leave: weight(0.4, 3),
            request: weight(0.6, 4),
            stop: weight(0.05, 1),
            damage: weight(0.3, 2),
            stall: weight(0.4, 3),
            stranger: weight(0.3, 3),
            other_version: weight(0.2, 1),
            ruin: weight(0.05, 1),
            liars: weight(0.2, 2),
            ..Faults::default()
        };
        let mut share = |p: f64, most: f64| {
            if rng.random_bool(p) { rng.random_range(0.0..most) } else { 0.0 }
        };
        let faults = Faults {
            twice: share(0.5, 0.1),
            late: share(0.4, 0.05),
            shard: share(0.3, 0.2),
            commit: share(0.3, 0.4),
            lie: share(0.3, 0.3),
            slow: share(0.3, 0.4),
            slow_journal: share(0.3, 0.2),
            ..faults
        };
        let faults = Faults { every_millis: rng.random_range(150..2500), ..faults };
        let blind = if rng.random_bool(0.3) { rng.random_range(1..=2) } else { 0 };
        // Alone it could train, and hold a state that no other worker can take.
        let cut_off = usize::from(rng.random_bool(0.3) && min_workers > 1 && blind == 0);
        let sliced = rng.random_bool(0.25);
        let per_host = 1 + seed.0 as usize % 3;
        // Not drawn, so that each seed's world stays what it was in all else.
        let shard_group = NonZeroU32::new([0, 2, 3, 2][seed.0 as usize / 3 % 4]).filter(|_| sliced);
        let phase = *[(5, 20), (20, 60), (40, 300)].get(rng.random_range(0..3)).unwrap_or(&(20, 60));
        Self {
            iterations: rng.random_range(4..=30),
            checkpoint_every: rng.random_range(1..=8),
            keep: rng.random_range(1..=3),
            phase,
            boot: (100, rng.random_range(200..2000)),
            load: (5, rng.random_range(10..400)),
            write: (2, rng.random_range(10..500)),
            faults,
            faulty_millis: rng.random_range(2_000..9_000),
            blind,
            cut_off,
            sliced,
            shard_group,
            per_host,
            ..Self::calm(min_workers, max_workers, spares)
        }
    }

    /// All machines: the ordinary ones, the blind, the cut-off.
    #[must_use]
    pub fn machines(&self) -> usize {
        self.slots + self.blind + self.cut_off
    }

    /// Whether the storage of this machine is another than the coordinator's.
    #[must_use]
    pub fn is_blind(&self, slot: usize) -> bool {
        (self.slots..self.slots + self.blind).contains(&slot)
    }

    /// Whether this machine reaches none of the others.
    #[must_use]
    pub fn is_cut_off(&self, slot: usize) -> bool {
        (self.slots + self.blind..self.machines()).contains(&slot)
    }

    /// The terms of its coordinators.
    #[must_use]
    pub fn terms(&self) -> Terms {
        Terms {
            iterations: self.iterations,
            micro_batches: self.micro_batches(),
            micro_batch: 2,
            min_workers: self.min_workers,
            max_workers: self.max_workers,
            timeouts: Timeouts::new(
                Duration::from_millis(self.failure_millis),
                Duration::from_millis(self.wait_millis),
            ),
            scored: false,
            collapse_share: 0.0,
            division: match self.shard_group {
                Some(smallest) => Division::SlicesInGroups(smallest),
                None if self.sliced => Division::Slices,
                None => Division::Whole,
            },
            stop_after_failures: None,
            straggler_factor: 1.5,
            replace_stragglers: true,
        }
    }

    /// Micro-batches of one iteration: more than there are ranks, and not a multiple of them.
    #[must_use]
    pub fn micro_batches(&self) -> u32 {
        self.max_workers + 3
    }

    /// When a run must be over, after faults have stopped.
    #[must_use]
    pub fn deadline_millis(&self) -> u64 {
        let iteration = 2 * (self.phase.1 + 10 * self.link.1) + self.write.1;
        // Each turn without the cut-off one is as long as it takes to see that its ranks hang.
        let turns = if self.cut_off > 0 { 10 + u64::from(self.max_workers) } else { 0 };
        self.faulty_millis
            + turns * 7 * self.failure_millis
            + 2 * self.wait_millis
            + 60 * self.failure_millis
            + 4 * self.iterations * iteration
            + 10 * self.boot.1
    }
}
