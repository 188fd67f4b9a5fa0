//! The run's numbers for Prometheus, as OpenMetrics text. Names follow its conventions: base units, `_total` for what only grows, and
//! labels with few values, so that a run of a thousand workers has no more series than one of two.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError, atomic::AtomicU64},
    time::Instant,
};

use potstill_core::observation::{IterationTotals, Observation};
use potstill_proto::{
    message::Source,
    wire::{RunState, StatusReply},
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text::encode},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
        info::Info,
    },
    registry::{Registry, Unit},
};

/// The media type of the text.
pub const MEDIA_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Real = Gauge<f64, AtomicU64>;
type RealCounter = Counter<f64, AtomicU64>;

/// One label whose values are known beforehand.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Part {
    part: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Network {
    network: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Of {
    subject: &'static str,
    score: &'static str,
}

/// The run's metrics.
pub struct Prometheus {
    registry: Registry,
    iterations: Counter,
    images: Counter,
    iteration: Gauge,
    target: Gauge,
    committed: Gauge,
    repeated: Gauge,
    step_seconds: Histogram,
    part_seconds: Family<Part, RealCounter>,
    losses: Family<Network, Real>,
    norms: Family<Network, Real>,
    non_finite: Counter,
    memory_peak: Gauge,
    scores: Family<Of, Real>,
    checkpoint_bytes: Counter,
    checkpoint_seconds: Histogram,
    checkpoint_failures: Counter,
    generations: Family<Reason, Counter>,
    workers: Family<State, Gauge>,
    stragglers: Counter,
    recovery_seconds: Histogram,
    state: Family<State, Gauge>,
    readers: Gauge,
    since: Mutex<Since>,
}

/// What the next observations are compared with.
#[derive(Default)]
struct Since {
    /// When the newest iterations were finished, for the time to their checkpoints.
    finished: VecDeque<(u64, Instant)>,
    /// When the generation was abandoned that has not been recovered from.
    abandoned: Option<Instant>,
    opened: bool,
    lost: bool,
    world_size: u32,
}

/// Iterations whose end is remembered: a checkpoint is committed a few iterations later.
const REMEMBERED: usize = 1024;

/// Every state, so that each has a series.
const STATES: [(RunState, &str); 6] = [
    (RunState::Waiting, "waiting"),
    (RunState::Training, "training"),
    (RunState::Finishing, "finishing"),
    (RunState::Succeeded, "succeeded"),
    (RunState::Stopped, "stopped"),
    (RunState::Failed, "failed"),
];

/// Repeated operations of the storage, counted in its crate.
#[derive(Debug)]
struct Retries;

impl Collector for Retries {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let retries = ConstCounter::new(potstill_storage::retries());
        let help = "Operations of the storage that the coordinator repeated after an error";
        let metric = encoder.encode_descriptor("storage_retries", help, None, MetricType::Counter)?;
        retries.encode(metric)
    }
}

impl Prometheus {
    /// Of a run of this name.
    #[must_use]
    pub fn new(run: &str, iterations: u64) -> Self {
        let mut registry = Registry::with_prefix("potstill");
        let run = vec![("run", run.to_owned()), ("version", env!("CARGO_PKG_VERSION").to_owned())];
        registry.register("run", "The run and the program that coordinates it", Info::new(run));
        registry.register_collector(Box::new(Retries));
        macro_rules! metric {
            ($name:literal, $help:literal, $metric:expr) => {{
                let metric = $metric;
                registry.register($name, $help, metric.clone());
                metric
            }};
            ($name:literal, $help:literal, $unit:expr, $metric:expr) => {{
                let metric = $metric;
                registry.register_with_unit($name, $help, $unit, metric.clone());
                metric
            }};
        }
        let target: Gauge =
            metric!("target_iterations", "Iterations that the run is to reach", Gauge::default());
        target.set(signed(iterations));
        Self {
            iterations: metric!(
                "iterations",
                "Iterations finished under this coordinator",
                Counter::default()
            ),
            images: metric!("images", "Images generated for finished iterations", Counter::default()),
            iteration: metric!("iteration", "Iterations of the run that are finished", Gauge::default()),
            target,
            committed: metric!(
                "committed_iteration",
                "Iterations in the newest checkpoint",
                Gauge::default()
            ),
            repeated: metric!("repeated_iterations", "Iterations computed more than once", Gauge::default()),
            step_seconds: metric!(
                "step",
                "Time of an iteration, of its slowest rank",
                Unit::Seconds,
                // 10 ms to 20 minutes.
                Histogram::new(exponential_buckets(0.01, 2.0, 18))
            ),
            part_seconds: metric!(
                "step_part",
                "Time of iterations by kind of work, of the slowest rank",
                Unit::Seconds,
                Family::default()
            ),
            losses: metric!("loss", "Losses of the last iteration, mean over samples", Family::default()),
            norms: metric!("gradient_norm", "L2 norms of the last iteration's gradients", Family::default()),
            non_finite: metric!(
                "non_finite_samples",
                "Samples dropped for a value that is not finite",
                Counter::default()
            ),
            memory_peak: metric!(
                "worker_memory_peak",
                "The most memory that a rank has needed: of tensors on a GPU, the resident set on a CPU",
                Unit::Bytes,
                Gauge::default()
            ),
            scores: metric!("score", "The newest scores of teacher and student", Family::default()),
            checkpoint_bytes: metric!(
                "checkpoint",
                "Bytes of committed checkpoints",
                Unit::Bytes,
                Counter::default()
            ),
            checkpoint_seconds: metric!(
                "checkpoint_commit",
                "Time from a checkpoint's last iteration to its commit",
                Unit::Seconds,
                // 0.1 s to 54 minutes.
                Histogram::new(exponential_buckets(0.1, 2.0, 16))
            ),
            checkpoint_failures: metric!(
                "checkpoint_failures",
                "Checkpoints that could not be made",
                Counter::default()
            ),
            generations: metric!(
                "generations",
                "Generations opened, by what made them necessary",
                Family::default()
            ),
            workers: metric!("workers", "Attached workers, by whether they hold a rank", Family::default()),
            stragglers: metric!(
                "stragglers",
                "Times that a rank was found to hold up the others",
                Counter::default()
            ),
            recovery_seconds: metric!(
                "recovery",
                "Time from an abandoned generation to the next finished iteration",
                Unit::Seconds,
                Histogram::new(exponential_buckets(0.1, 2.0, 14))
            ),
            state: metric!("state", "1 for the state that the run is in", Family::default()),
            readers: metric!("page_readers", "Live pages that are open", Gauge::default()),
            since: Mutex::default(),
            registry,
        }
    }

    /// Counts an observation.
    pub fn observe(&self, observation: &Observation) {
        let mut since = self.since.lock().unwrap_or_else(PoisonError::into_inner);
        match observation {
            Observation::Lost { .. } => since.lost = true,
            Observation::GenerationAbandoned { .. } => {
                since.abandoned.get_or_insert_with(Instant::now);
            }
            Observation::GenerationOpened { source, repeated, world_size, .. } => {
                let reason = match (since.opened, since.lost, since.abandoned) {
                    (false, ..) if *source == Source::Fresh => "start",
                    (false, ..) => "resume",
                    (true, true, _) => "worker-lost",
                    (true, false, Some(_)) => "failure",
                    (true, false, None) => "membership",
                };
                self.generations.get_or_create(&Reason { reason }).inc();
                self.repeated.set(signed(*repeated));
                (since.opened, since.lost, since.world_size) = (true, false, *world_size);
            }
            Observation::Iteration(totals) => {
                if let Some(abandoned) = since.abandoned.take() {
                    self.recovery_seconds.observe(abandoned.elapsed().as_secs_f64());
                }
                since.finished.push_back((totals.iteration + 1, Instant::now()));
                if since.finished.len() > REMEMBERED {
                    since.finished.pop_front();
                }
                self.iteration(totals);
            }
            Observation::Evaluated(evaluation) => {
                let subject = evaluation.subject.name();
                for (score, value) in evaluation.scores.named() {
                    if let Some(value) = value {
                        self.scores.get_or_create(&Of { subject, score }).set(value);
                    }
                }
            }
            Observation::Committed { iteration, bytes } => {
                self.committed.set(signed(*iteration));
                self.checkpoint_bytes.inc_by(*bytes);
                if let Some((_, at)) = since.finished.iter().rev().find(|(finished, _)| finished == iteration)
                {
                    self.checkpoint_seconds.observe(at.elapsed().as_secs_f64());
                }
            }
            Observation::CheckpointFailed { .. } => {
                self.checkpoint_failures.inc();
            }
            Observation::Straggler { straggles: true, .. } => {
                self.stragglers.inc();
            }
            Observation::Straggler { straggles: false, .. }
            | Observation::Started { .. }
            | Observation::Waiting { .. }
            | Observation::Attached { .. }
            | Observation::Ended(_) => {}
        }
    }

    fn iteration(&self, totals: &IterationTotals) {
        self.iterations.inc();
        self.images.inc_by(totals.samples.into());
        self.iteration.set(signed(totals.iteration + 1));
        self.step_seconds.observe(totals.seconds.total);
        for (part, seconds) in [
            ("compute", totals.seconds.compute),
            ("communication", totals.seconds.communication),
            ("optimizer", totals.seconds.optimizer),
        ] {
            self.part_seconds.get_or_create(&Part { part }).inc_by(seconds.max(0.0));
        }
        let losses = [
            ("fake_score", Some(totals.fake_score_loss)),
            ("generator", Some(totals.generator_loss)),
            ("discriminator", totals.discriminator_loss),
            ("generator_adversarial", totals.generator_adversarial_loss),
        ];
        for (network, loss) in losses {
            if let Some(loss) = loss {
                self.losses.get_or_create(&Network { network }).set(loss);
            }
        }
        for (network, norm) in
            [("fake_score", totals.fake_score_grad_norm), ("generator", totals.generator_grad_norm)]
        {
            self.norms.get_or_create(&Network { network }).set(norm);
        }
        self.non_finite.inc_by(totals.non_finite_samples.into());
        if let Some(peak) = totals.memory_peak {
            self.memory_peak.set(i64::try_from(peak).unwrap_or(i64::MAX));
        }
    }

    /// The text, with what `status` says of the present, and the number of pages that are open.
    ///
    /// # Errors
    /// None known: the text is written to memory.
    pub fn text(&self, status: &StatusReply, readers: usize) -> Result<String, std::fmt::Error> {
        let now = status.state();
        self.readers.set(i64::try_from(readers).unwrap_or(i64::MAX));
        for (state, name) in STATES {
            self.state.get_or_create(&State { state: name }).set((now == state).into());
        }
        let world_size = self.since.lock().unwrap_or_else(PoisonError::into_inner).world_size;
        let trains = matches!(now, RunState::Training | RunState::Finishing);
        let ranks = if trains { world_size.min(status.member_count) } else { 0 };
        let standby = status.member_count.saturating_sub(ranks);
        for (state, workers) in [("rank", ranks), ("standby", standby)] {
            self.workers.get_or_create(&State { state }).set(workers.into());
        }
        self.iteration.set(signed(status.iteration));
        self.target.set(signed(status.iterations));
        if let Some(iteration) = status.committed_iteration {
            self.committed.set(signed(iteration));
        }
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// Counts of iterations are far below 2⁶³.
fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
