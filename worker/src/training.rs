//! What a rank does in one generation: take the state, then iterate until the run ends or the generation does.

use std::{
    path::Path,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use potstill_c10d::{Backend, ProcessGroup, Reducer, ReducerOptions, TcpStore};
use potstill_distill::{
    adam::AdamSettings,
    gradient::Gradient,
    noise::{Karras, LogNormal},
    phase::{self, MicroBatchLoss, Settings},
    state::State,
};
use potstill_models::{Denoiser, EdmNetwork, Mode};
use potstill_proto::{
    cursor::{Cursor, Phase},
    message::{Assignment, FromWorker, Source},
    spec::RunSpec,
    wire::{EvaluationReport, StepReport, StepSeconds, Subject},
};
use potstill_storage::Run;
use sha2::{Digest, Sha256};
use tch::{Device, Tensor};
use tokio::{runtime::Handle, task::JoinHandle};

use crate::{
    checkpoint::{self, Snapshot},
    control_lane::{Flags, Lane},
    evaluation::{Evaluator, Sampler},
    pictures,
    session::Session,
    transfer,
};

/// How often a rank that waits to join looks for other orders.
const LOOK: Duration = Duration::from_millis(20);

/// Columns and rows of each half of `samples.png`.
const PICTURE: (u32, u32) = (10, 4);

/// The files that a run reads, loaded.
pub struct Inputs {
    teacher: EdmNetwork,
    evaluator: Option<Evaluator>,
}

impl Inputs {
    /// Loads teacher, extractor and reference images.
    ///
    /// # Errors
    /// A file that is missing, damaged, of another content than the run was started with, or does not fit the others.
    pub fn load(spec: &RunSpec, device: Device) -> anyhow::Result<Self> {
        let teacher = load_teacher(&spec.teacher.weights, spec.teacher.sha256.as_deref(), device)?;
        let evaluator = Evaluator::load(&spec.evaluation, &teacher, device)?;
        Ok(Self { teacher, evaluator })
    }
}

/// What stays the same over all generations of a process.
pub struct Job {
    spec: RunSpec,
    settings: Settings,
    teacher: Box<dyn Denoiser>,
    evaluator: Option<Evaluator>,
    run: Run,
    runtime: Handle,
}

/// Why a generation is over for this rank.
pub enum Ending {
    /// Nothing left to compute.
    Finished,
    /// It has left the group: it was told to, or a collective failed.
    Left(String),
}

/// Why the work of a generation stops before its end.
enum Interruption {
    Left(String),
    Collective(potstill_c10d::Error),
    Fatal(anyhow::Error),
}

impl From<potstill_c10d::Error> for Interruption {
    fn from(error: potstill_c10d::Error) -> Self {
        Self::Collective(error)
    }
}

impl From<anyhow::Error> for Interruption {
    fn from(error: anyhow::Error) -> Self {
        Self::Fatal(error)
    }
}

impl Job {
    /// Loads what the run reads.
    ///
    /// # Errors
    /// See [`Inputs::load`].
    pub fn load(spec: RunSpec, run: Run, runtime: Handle, device: Device) -> anyhow::Result<Self> {
        let Inputs { teacher, evaluator } = Inputs::load(&spec, device)?;
        let d = &spec.distillation;
        let settings = Settings {
            seed: d.seed,
            micro_batch: d.micro_batch.into(),
            sigma_init: spec.generator.sigma_init,
            alpha: d.alpha,
            sigma_data: teacher.config().sigma_data,
            fake_score_noise: LogNormal { mean: d.fake_score_noise.mean, std: d.fake_score_noise.std },
            generator_noise: Karras {
                sigma_min: d.generator_noise.sigma_min,
                sigma_max: d.generator_noise.sigma_max,
                rho: d.generator_noise.rho,
                u_max: d.generator_noise.u_max,
            },
            training_mode: if d.dropout { Mode::Train } else { Mode::Eval },
            device,
        };
        Ok(Self { spec, settings, teacher: teacher.frozen(), evaluator, run, runtime })
    }

    fn adam(&self, learning_rate: f64) -> AdamSettings {
        let o = &self.spec.optimiser;
        AdamSettings { learning_rate, betas: o.betas, epsilon: o.epsilon }
    }

    fn evaluation_due(&self, iteration: u64) -> bool {
        let every = self.spec.evaluation.every;
        iteration == 0
            || iteration >= self.spec.distillation.iterations
            || (every > 0 && iteration.is_multiple_of(every))
    }
}

/// Reads a teacher and checks that it is the one the run was started with.
fn load_teacher(path: &Path, sha256: Option<&str>, device: Device) -> anyhow::Result<EdmNetwork> {
    let bytes = std::fs::read(path)
        .with_context(|| format!("cannot read the teacher's weights {}", path.display()))?;
    if let Some(expected) = sha256 {
        let found: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        anyhow::ensure!(
            found == expected,
            "the teacher's weights {} have SHA-256 {found} on this machine, but the run was started with {expected}",
            path.display()
        );
    }
    EdmNetwork::from_bytes(&bytes, device).with_context(|| format!("teacher's weights {}", path.display()))
}

/// The state a rank holds between generations.
#[derive(Default)]
pub struct Holding {
    /// `None`: nothing worth keeping.
    pub state: Option<State>,
    /// How far it is; the start when there is no state.
    pub cursor: Cursor,
}

/// One generation's work on this rank.
struct Member<'a> {
    job: &'a Job,
    session: &'a mut Session,
    assignment: &'a Assignment,
    group: ProcessGroup,
    fake_score: Reducer,
    generator: Reducer,
    /// Views of the fake score for the generator phase.
    frozen_fake_score: Box<dyn Denoiser>,
    upload: Option<JoinHandle<()>>,
    non_finite_streak: u32,
}

/// Takes part in the assigned generation until it is over. `holding` keeps the state whatever happens.
///
/// # Errors
/// What no other worker could do better: the run must end.
pub fn run_generation(
    job: &Job,
    session: &mut Session,
    holding: &mut Holding,
    assignment: &Assignment,
    host: &str,
    collective_timeout: Duration,
) -> anyhow::Result<Ending> {
    session.progress.set_generation(assignment.generation);
    let result = take_part(job, session, holding, assignment, host, collective_timeout);
    session.leave_group();
    match result {
        Ok(()) => Ok(Ending::Finished),
        Err(Interruption::Left(reason)) => Ok(Ending::Left(reason)),
        Err(Interruption::Collective(error)) => {
            // It may have failed only because the session aborted it.
            let called_away = session.orders()?.interruption(assignment.generation);
            Ok(Ending::Left(called_away.unwrap_or_else(|| error.to_string())))
        }
        Err(Interruption::Fatal(error)) => Err(error),
    }
}

fn take_part(
    job: &Job,
    session: &mut Session,
    holding: &mut Holding,
    assignment: &Assignment,
    host: &str,
    timeout: Duration,
) -> Result<(), Interruption> {
    session.progress.set_activity("joining");
    let group = join(job, session, assignment, host, timeout)?;
    // From here on an order to leave ends every collective at once.
    session.enter_group(assignment.generation, &group);
    if let Some(reason) = session.orders()?.interruption(assignment.generation) {
        return Err(Interruption::Left(reason));
    }

    let (state, cursor) = obtain_state(job, session, holding, assignment, &group)?;
    let reducer = |network: &dyn Denoiser| {
        let reducer = Reducer::new(network.parameters().leaves(), &group, ReducerOptions::default())?;
        // An interrupted phase may have left gradients behind.
        reducer.zero_grad()?;
        Ok::<_, potstill_c10d::Error>(reducer)
    };
    let mut member = Member {
        fake_score: reducer(state.fake_score.as_ref())?,
        generator: reducer(state.generator.as_ref())?,
        frozen_fake_score: state.fake_score.frozen(),
        job,
        session,
        assignment,
        group,
        upload: None,
        non_finite_streak: 0,
    };
    holding.cursor = cursor;
    member.work(holding.state.insert(state), &mut holding.cursor)
}

/// Meets the other ranks. Waiting for them cannot be interrupted, so a thread of its own does it, and is left behind when
/// the coordinator calls this rank away.
fn join(
    job: &Job,
    session: &mut Session,
    assignment: &Assignment,
    host: &str,
    timeout: Duration,
) -> Result<ProcessGroup, Interruption> {
    let (store_host, store_port) = assignment
        .store_address
        .rsplit_once(':')
        .and_then(|(h, p)| Some((h.to_owned(), p.parse::<u16>().ok()?)))
        .with_context(|| format!("{:?} is not host:port", assignment.store_address))?;
    let backend = match job.settings.device {
        Device::Cuda(device) => Backend::Nccl { device },
        _ => Backend::Gloo { host: host.to_owned() },
    };
    let prefix = assignment.generation.store_prefix();
    let (rank, world_size) = (assignment.rank as usize, assignment.world_size as usize);
    let (joined, joining) = mpsc::channel();
    thread::spawn(move || {
        let group = TcpStore::connect(&store_host, store_port, timeout)
            .and_then(|store| store.prefix(&prefix))
            .and_then(|store| ProcessGroup::new(&backend, &store, rank, world_size, timeout));
        let _ = joined.send(group);
    });
    loop {
        match joining.recv_timeout(LOOK) {
            Ok(group) => return Ok(group?),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                return Err(anyhow::anyhow!("the thread that joins the group ended").into());
            }
        }
        if let Some(reason) = session.orders()?.interruption(assignment.generation) {
            return Err(Interruption::Left(reason));
        }
    }
}

/// Takes the state from where the assignment says. On failure the rank is left with a whole state or with none.
fn obtain_state(
    job: &Job,
    session: &Session,
    holding: &mut Holding,
    assignment: &Assignment,
    group: &ProcessGroup,
) -> Result<(State, Cursor), Interruption> {
    let held = std::mem::take(holding);
    match &assignment.source {
        Source::Fresh => Ok((State::from_teacher(job.teacher.as_ref()), Cursor::default())),
        Source::Checkpoint { manifest_key } => {
            session.progress.set_activity("loading a checkpoint");
            let mut state = held.state.unwrap_or_else(|| State::from_teacher(job.teacher.as_ref()));
            let iteration = job.runtime.block_on(checkpoint::restore(&job.run, manifest_key, &mut state))?;
            Ok((state, Cursor::boundary(iteration)))
        }
        Source::Peer { rank } => {
            session.progress.set_activity("taking the state from a peer");
            let state = held.state.unwrap_or_else(|| State::from_teacher(job.teacher.as_ref()));
            match transfer::broadcast(group, *rank as usize, &state, held.cursor) {
                Ok(cursor) => Ok((state, cursor)),
                Err(error) => {
                    if *rank == assignment.rank {
                        *holding = Holding { state: Some(state), cursor: held.cursor };
                    }
                    Err(error.into())
                }
            }
        }
    }
}

/// Sums of one rank's share of one iteration.
#[derive(Default)]
struct Totals {
    fake_score_loss: f64,
    generator_loss: f64,
    score_difference: f64,
    dropped: u32,
}

impl Member<'_> {
    fn work(&mut self, state: &mut State, cursor: &mut Cursor) -> Result<(), Interruption> {
        self.session.progress.set_cursor(*cursor);
        if self.assignment.score_teacher {
            self.evaluate(state, cursor.iteration, Subject::Teacher)?;
        }
        let iterations = self.job.spec.distillation.iterations;
        let mut stop = false;
        loop {
            let at_boundary = cursor.phase == Phase::FakeScore;
            let last = at_boundary && cursor.iteration >= iterations;
            if last || stop {
                self.save(state, cursor.iteration)?;
            }
            if at_boundary && !stop && self.job.evaluation_due(cursor.iteration) {
                self.evaluate(state, cursor.iteration, Subject::Student)?;
            }
            if last && self.assignment.rank == 0 {
                self.draw(state)?;
            }
            if last || stop {
                return Ok(());
            }
            self.session.progress.set_activity("training");
            let flags = self.iterate(state, cursor)?;
            stop = flags.stop;
            let due = cursor.iteration.is_multiple_of(self.job.spec.checkpoint.every);
            if !stop && cursor.iteration < iterations && (due || flags.checkpoint) {
                self.save(state, cursor.iteration)?;
            }
        }
    }

    /// Leaves when the coordinator wants that.
    fn heed(&mut self) -> Result<(), Interruption> {
        let generation = self.assignment.generation;
        match self.session.orders()?.interruption(generation) {
            Some(reason) => Err(Interruption::Left(reason)),
            None => Ok(()),
        }
    }

    /// One iteration, or the rest of it: fake-score phase, then generator phase.
    fn iterate(&mut self, state: &mut State, cursor: &mut Cursor) -> Result<Flags, Interruption> {
        let started = Instant::now();
        let iteration = cursor.iteration;
        let generation = self.assignment.generation;
        self.heed()?;
        let orders = self.session.orders()?;
        let flags =
            Flags { stop: orders.stop_wanted(generation), checkpoint: orders.take_checkpoint(generation) };
        let lane = Lane::issue(&self.group, flags)?;

        let mut totals = Totals::default();
        let mut seconds = StepSeconds::default();
        let mut fake_score_gradient = (f64::NAN, 0);
        let d = &self.job.spec.distillation;
        let o = &self.job.spec.optimiser;

        if cursor.phase == Phase::FakeScore {
            let gradient = self.accumulate(state, Phase::FakeScore, iteration, &mut totals, &mut seconds)?;
            let step = Instant::now();
            let gradient = Gradient::repaired(gradient);
            state.step_fake_score(&gradient, iteration, &self.job.adam(o.fake_score_learning_rate));
            self.fake_score.zero_grad()?;
            seconds.optimiser += step.elapsed().as_secs_f64();
            fake_score_gradient = (gradient.norm, gradient.non_finite);
            cursor.phase = Phase::Generator;
            self.session.progress.set_cursor(*cursor);
        } else {
            // The first half was done in another generation, whose sums are not at hand.
            totals.fake_score_loss = f64::NAN;
        }

        let gradient = self.accumulate(state, Phase::Generator, iteration, &mut totals, &mut seconds)?;
        let step = Instant::now();
        let gradient = Gradient::repaired(gradient);
        let adam = self.job.adam(o.generator_learning_rate);
        state.step_generator(&gradient, iteration, &adam, o.ema_half_life_images, d.global_batch);
        self.generator.zero_grad()?;
        seconds.optimiser += step.elapsed().as_secs_f64();
        *cursor = Cursor::boundary(iteration + 1);
        self.session.progress.set_cursor(*cursor);

        let waiting = Instant::now();
        let flags = lane.read()?;
        seconds.communication += waiting.elapsed().as_secs_f64();

        let non_finite_gradients = fake_score_gradient.1 + gradient.non_finite;
        let share = self.assignment.micro_batches;
        seconds.total = started.elapsed().as_secs_f64();
        self.session.send(FromWorker::StepReport(StepReport {
            generation: generation.0,
            iteration,
            first_micro_batch: share.first,
            micro_batches: share.count,
            samples: share.count * d.micro_batch,
            fake_score_loss_sum: totals.fake_score_loss,
            generator_loss_sum: totals.generator_loss,
            score_difference_sum: totals.score_difference,
            fake_score_grad_norm: fake_score_gradient.0,
            generator_grad_norm: gradient.norm,
            non_finite_samples: totals.dropped,
            non_finite_gradients,
            seconds: Some(seconds),
        }));
        self.watch_finiteness(iteration, non_finite_gradients)?;
        Ok(flags)
    }

    /// Ends the run when gradients have not been finite for too long. Gradients are equal on all ranks, so all ranks
    /// come to the same end.
    fn watch_finiteness(&mut self, iteration: u64, non_finite: u64) -> anyhow::Result<()> {
        self.non_finite_streak = if non_finite > 0 { self.non_finite_streak + 1 } else { 0 };
        let limit = self.job.spec.distillation.non_finite_limit;
        anyhow::ensure!(
            self.non_finite_streak < limit,
            "{limit} iterations in a row, up to iteration {iteration}, had gradients that were not finite ({non_finite} \
             elements in the last): the run has diverged. Nothing was saved since; lower the learning rates and resume from \
             the newest checkpoint, or start again"
        );
        Ok(())
    }

    /// Runs this rank's micro-batches of one phase and returns the gradient of the mean loss over the global batch, equal
    /// on all ranks. Adds to the totals and to the times.
    fn accumulate(
        &mut self,
        state: &State,
        phase: Phase,
        iteration: u64,
        totals: &mut Totals,
        seconds: &mut StepSeconds,
    ) -> Result<Tensor, Interruption> {
        let started = Instant::now();
        // The reducer takes the mean over ranks; this makes it the sum over samples divided by the global batch.
        let scale =
            f64::from(self.assignment.world_size) / f64::from(self.job.spec.distillation.global_batch);
        let indices = self.assignment.micro_batches.indices();
        let last = indices.end - 1;
        let mut exposed = Duration::ZERO;
        let mut reported = Vec::with_capacity(indices.len());
        for index in indices {
            self.heed()?;
            let micro_batch = self.micro_batch(state, phase, iteration, index);
            let scaled = &micro_batch.loss * scale;
            if index == last {
                let reducer = match phase {
                    Phase::FakeScore => &self.fake_score,
                    Phase::Generator => &self.generator,
                };
                exposed = reducer.backward(&scaled)?;
            } else {
                scaled.f_backward().context("backward pass")?;
            }
            let MicroBatchLoss { loss, score_difference, dropped } = micro_batch;
            reported.push((loss.detach(), score_difference, dropped));
            self.session.progress.tick();
        }
        for (loss, score_difference, dropped) in reported {
            let total = match phase {
                Phase::FakeScore => &mut totals.fake_score_loss,
                Phase::Generator => &mut totals.generator_loss,
            };
            *total += loss.double_value(&[]);
            totals.score_difference += score_difference.map_or(0.0, |s| s.double_value(&[]));
            totals.dropped += dropped.int64_value(&[]) as u32;
        }
        let network = match phase {
            Phase::FakeScore => &state.fake_score,
            Phase::Generator => &state.generator,
        };
        let gradient = network.parameters().flat_grad();
        seconds.communication += exposed.as_secs_f64();
        seconds.compute += started.elapsed().saturating_sub(exposed).as_secs_f64();
        Ok(gradient)
    }

    fn micro_batch(&self, state: &State, phase: Phase, iteration: u64, index: u32) -> MicroBatchLoss {
        let settings = &self.job.settings;
        let generator = state.generator.as_ref();
        match phase {
            Phase::FakeScore => {
                phase::fake_score(generator, state.fake_score.as_ref(), settings, iteration, index)
            }
            Phase::Generator => {
                let (fake_score, teacher) = (self.frozen_fake_score.as_ref(), self.job.teacher.as_ref());
                phase::generator(generator, fake_score, teacher, settings, iteration, index)
            }
        }
    }

    /// Snapshots this rank's share and starts its upload. Waits for the one before, so that at most one is in memory.
    fn save(&mut self, state: &State, iteration: u64) -> Result<(), Interruption> {
        self.finish_upload()?;
        let a = self.assignment;
        let snapshot = Snapshot::take(state, iteration, a.rank, a.world_size);
        let upload =
            snapshot.upload(self.job.run.clone(), a.generation, a.rank, a.world_size, self.session.outbox());
        self.upload = Some(self.job.runtime.spawn(upload));
        Ok(())
    }

    fn finish_upload(&mut self) -> anyhow::Result<()> {
        match self.upload.take() {
            Some(upload) => self.job.runtime.block_on(upload).context("the upload's task ended"),
            None => Ok(()),
        }
    }

    fn student<'s>(&self, state: &'s State) -> Sampler<'s> {
        Sampler::Student { generator: state.generator_ema.as_ref(), sigma_init: self.job.settings.sigma_init }
    }

    fn evaluate(&mut self, state: &State, iteration: u64, subject: Subject) -> Result<(), Interruption> {
        let Some(evaluator) = &self.job.evaluator else { return Ok(()) };
        let (activity, sampler) = match subject {
            Subject::Teacher => ("scoring the teacher", Sampler::Teacher(self.job.teacher.as_ref())),
            Subject::Student => ("scoring the student", self.student(state)),
        };
        self.session.progress.set_activity(activity);
        let scores = evaluator.score(sampler, &self.group, || self.session.progress.tick())??;
        if self.assignment.rank == 0 {
            self.session.send(FromWorker::Evaluation(EvaluationReport {
                generation: self.assignment.generation.0,
                iteration,
                subject: subject.into(),
                scores: Some(scores),
            }));
        }
        self.heed()
    }

    /// Writes `samples.png`: teacher above student, same noise, same classes.
    fn draw(&self, state: &State) -> anyhow::Result<()> {
        let Some(evaluator) = &self.job.evaluator else { return Ok(()) };
        let (columns, rows) = PICTURE;
        let count = i64::from(columns * rows);
        let blocks = [Sampler::Teacher(self.job.teacher.as_ref()), self.student(state)]
            .map(|sampler| evaluator.first_images(sampler, count));
        let png = pictures::grid(&blocks, columns)?;
        self.job.runtime.block_on(self.job.run.put("samples.png", png.into()))?;
        Ok(())
    }
}
