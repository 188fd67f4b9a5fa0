//! Everything that a process loads once for all its generations.

use std::{
    cell::{Cell, RefCell},
    path::Path,
};

use anyhow::{Context, ensure};
use potstill_distill::{
    adversarial::{Adversarial, RealData, Scaling},
    augmentation::{self, Augmentation},
    condition::Conditions,
    counters::Counters,
    draws::NamedStreams,
    generator::Matching,
    guidance::Guidance,
    loss::Weighting,
    noise_distribution::NoiseDistribution,
    schedule::Schedule,
    settings::Settings,
    state::{Layout, Slice, Start, State},
};
use potstill_models::{
    Denoiser, ForwardProcess, Mode, diffusers::ModelFolder, gate::absent, weights::Mapped,
};
use potstill_proto::message::{Assignment, Replica};
use potstill_spec::{self as spec, AdversarialSpec, Precision, RunSpec, Shard};
use potstill_storage::Run;
use tch::{Device, Kind, Tensor};
use tokio::runtime::Handle;

use super::step::Recipe;
use crate::{
    checkpoint::Staging,
    data::{
        Dataset, Shape,
        pairs::{self, Pair},
    },
    evaluation::Evaluator,
    evaluation::samples::SampleSet,
    model::student::Student,
    model::{Model, Space, Wanted, adapters, initial_timestep, load_unet, times, weights_kind},
    process::memory::Memory,
};

/// The files that a run reads, loaded.
pub struct Inputs {
    teacher: Box<dyn Denoiser>,
    space: Space,
    /// The generator to start from, if that is not the teacher.
    start: Option<Box<dyn Denoiser>>,
    /// The weights of teacher and start, where these networks have none in memory.
    files: Option<Files>,
    real: Option<Box<dyn RealData>>,
    evaluator: Option<Evaluator>,
    settings: Settings,
}

impl Inputs {
    /// Loads teacher, generator to start from, prompts, real samples, extractor and reference.
    ///
    /// # Errors
    /// A file is missing, damaged, has other content than when the run was started, or does not fit the others.
    pub fn load(spec: &RunSpec, device: Device) -> anyhow::Result<Self> {
        let divided = spec.memory.shard == Shard::Parameters;
        let mut model = match divided {
            true => Model::load_divided(spec, device)?,
            false => Model::load(spec, weights_kind(spec), device)?,
        };
        let mut start_in_files = None;
        let start = match (&spec.generator.start_from, &spec.lora) {
            (Some(path), None) if divided => {
                let (network, weights) =
                    ModelFolder::open(path).and_then(|folder| folder.mapped_denoiser(device)).with_context(|| {
                        "generator.start_from, which must be a text-to-image model's folder with memory.shard = \"parameters\""
                    })?;
                start_in_files = Some(weights);
                Some(fitting(Box::new(network), path, &model)?)
            }
            (Some(path), None) => Some(load_start(path, &model, weights_kind(spec), device)?),
            (Some(path), Some(lora)) => {
                let read = adapters::read(model.network.as_ref(), lora, path);
                Some(read.with_context(|| format!("generator.start_from: {}", path.display()))?)
            }
            (None, Some(lora)) => {
                adapters::empty(model.network.as_ref(), lora)?;
                None
            }
            (None, None) => None,
        };
        let pairs = match &spec.adversarial {
            Some(adversarial) if model.latent.is_some() => {
                pairs::load(&adversarial.data, adversarial.limit, spec.distillation.seed)
                    .context("adversarial.data")?
            }
            _ => vec![],
        };
        let files = model.files.take().map(|teacher| Files { teacher, start: start_in_files });
        let captions = pairs.iter().map(|pair| pair.caption.clone()).collect();
        let prompts = spec.prompts.as_ref().map(Wanted::File);
        let (teacher, space) = model.into_space(prompts, captions, Wanted::evaluation(spec))?;
        let guided = spec.guidance.scales() != [1.0; 3];
        ensure!(
            !guided || space.is_conditional(),
            "guidance needs a class-conditional teacher, but {} is unconditional: set guidance.preset = \"none\"",
            spec.teacher
        );
        let settings = settings(spec, teacher.process(), device);
        ensure!(
            settings.weighting.fits(teacher.process()),
            "distillation.weighting = {} is for flow-matching teachers; {} is not one",
            serde_json::to_string(&spec.distillation.weighting)?,
            spec.teacher
        );
        ensure!(
            settings.augmentation.is_none() || teacher.augment_dim() == augmentation::LABELS,
            "distillation.augmentation needs a teacher that takes EDM's {} augmentation labels (augment_dim); {} takes {}",
            augmentation::LABELS,
            spec.teacher,
            teacher.augment_dim()
        );
        let [_, last] = teacher.time_range();
        let timesteps = [initial_timestep(spec, teacher.process()), spec.distillation.timesteps[1]];
        ensure!(
            spec.teacher.model.is_none() || timesteps.iter().all(|time| f64::from(*time) <= last),
            "generator.initial_timestep and distillation.timesteps reach to {timesteps:?}; the teacher's last timestep is {last}"
        );
        let real = match &spec.adversarial {
            Some(adversarial) => Some(load_real(adversarial, &space, pairs)?),
            None => None,
        };
        let evaluator = Evaluator::load(&spec.evaluation, &space, device)?;
        Ok(Self { teacher, space, start, files, real, evaluator, settings })
    }
}

/// Weights that are in their files until slices of them are needed.
struct Files {
    teacher: Mapped,
    start: Option<Mapped>,
}

/// Loads the generator that a run starts from: an exported one of the teacher's architecture.
fn load_start(path: &Path, teacher: &Model, kind: Kind, device: Device) -> anyhow::Result<Box<dyn Denoiser>> {
    let network: Box<dyn Denoiser> = match path.is_dir() {
        true => Box::new(load_unet(path, kind, device).context("generator.start_from")?),
        false => Student::from_file(path, device).context("generator.start_from")?.model.network,
    };
    fitting(network, path, teacher)
}

/// The generator to start from, which must be of the teacher's architecture.
fn fitting(network: Box<dyn Denoiser>, path: &Path, teacher: &Model) -> anyhow::Result<Box<dyn Denoiser>> {
    let (start, teacher) = (network.parameters().entries(), teacher.parameters().entries());
    ensure!(
        start == teacher,
        "generator.start_from: {} is of another architecture than the teacher",
        path.display()
    );
    Ok(network)
}

/// Loads real samples for the adversarial loss.
fn load_real(spec: &AdversarialSpec, space: &Space, pairs: Vec<Pair>) -> anyhow::Result<Box<dyn RealData>> {
    if space.prompts().is_some() {
        tracing::info!(samples = pairs.len(), "image-text pairs loaded");
        return Ok(Box::new(space.real_pairs(pairs, spec.cache.as_deref())?));
    }
    let shape = Shape { sample: space.sample, classes: space.classes };
    let data = Dataset::load(&spec.data, shape).context("adversarial.data")?;
    let data = match spec.limit {
        Some(limit) => data.limit(limit),
        None => data,
    };
    tracing::info!(samples = data.len(), "real samples loaded");
    Ok(Box::new(data.into_real_samples(space.classes)))
}

/// Everything that stays the same over all generations of a process.
pub struct Job {
    pub(super) spec: RunSpec,
    pub(super) recipe: Recipe,
    pub(super) teacher: Box<dyn Denoiser>,
    start: Option<Box<dyn Denoiser>>,
    files: Option<Files>,
    /// The newest slice of the teacher that was read from its files.
    slice_of_teacher: RefCell<Option<(Slice, Tensor)>>,
    /// The teacher with new adapters: fake score and generator, where these train adapters.
    adapted: Option<[Box<dyn Denoiser>; 2]>,
    conditions: Box<dyn Conditions>,
    real: Option<Box<dyn RealData>>,
    pub(super) evaluator: Option<Evaluator>,
    pub(super) samples: SampleSet,
    pub(super) run: Run,
    pub(super) runtime: Handle,
    pub(super) staging: Staging,
    pub(super) memory: Memory,
    /// Whether this process has completed an iteration.
    pub(super) has_worked: Cell<bool>,
}

impl Job {
    /// The run's specification.
    pub fn spec(&self) -> &RunSpec {
        &self.spec
    }

    /// Loads the files that the run reads.
    ///
    /// # Errors
    /// See [`Inputs::load`].
    pub fn load(spec: RunSpec, run: Run, runtime: Handle, device: Device) -> anyhow::Result<Self> {
        let memory = Memory::of(device);
        let Inputs { teacher, space, start, files, real, evaluator, settings } = Inputs::load(&spec, device)?;
        let recipe = Recipe::new(&spec, settings);
        let conditions = space.conditions();
        let samples = SampleSet::new(&spec.evaluation, space, device);
        let weights = weights_kind(&spec);
        let frozen = |network: Box<dyn Denoiser>| {
            let flat = network.parameters().flat();
            let flat = match files {
                None => flat.to_kind(weights),
                Some(_) => absent(flat.numel() as i64, (weights, flat.device())),
            };
            network.over(flat, false)
        };
        let teacher = frozen(teacher);
        let (start, adapted) = match &spec.lora {
            None => (start.map(frozen), None),
            Some(lora) => {
                let [fake_score, mut generator] =
                    adapters::first(teacher.as_ref(), lora, spec.distillation.seed)?;
                if let Some(start) = start {
                    generator = generator.over(start.parameters().flat().shallow_clone(), true);
                }
                (None, Some([fake_score, generator]))
            }
        };
        Ok(Self {
            spec,
            recipe,
            teacher,
            start,
            files,
            slice_of_teacher: RefCell::default(),
            adapted,
            conditions,
            real,
            evaluator,
            samples,
            run,
            runtime,
            staging: Staging::default(),
            memory,
            has_worked: Cell::new(false),
        })
    }

    /// The state before the first iteration, or the slices of it that a rank is to hold.
    pub(super) fn first_state(&self, assignment: &Assignment) -> State {
        let dynamic = self.spec.distillation.precision == Precision::Fp16;
        let (fake_score, generator) = match &self.adapted {
            Some([fake_score, generator]) => (fake_score.as_ref(), generator.as_ref()),
            None => (self.teacher.as_ref(), self.start.as_deref().unwrap_or(self.teacher.as_ref())),
        };
        let (slice, copy) = self.slices(assignment);
        let layout = Layout {
            slice,
            copy,
            // Adapters are small: they are fp32 also where the network beneath is not.
            weights: generator.parameters().flat().kind(),
            average_on_host: self.spec.memory.offload_ema || self.spec.memory.offload_optimizer,
            optimizer_on_host: self.spec.memory.offload_optimizer,
            first_moments: self.recipe.optimizer.first_moments(),
            // Adapters are held whole, on a network that is gathered.
            gathered: self.files.is_some() && self.adapted.is_none(),
        };
        let [fake_score, generator] = [fake_score, generator].map(Start::of);
        let counters = Counters::new(dynamic);
        let Some(Files { teacher, start }) = self.files.as_ref().filter(|_| layout.gathered) else {
            return State::starting_from(fake_score, generator, counters, layout);
        };
        let of_teacher = |range| teacher.range(range);
        let of_generator = |range| start.as_ref().unwrap_or(teacher).range(range);
        let fake_score = Start { values: Some(&of_teacher), ..fake_score };
        let generator = Start { values: Some(&of_generator), ..generator };
        State::starting_from(fake_score, generator, counters, layout)
    }

    /// A rank's slice of the teacher's weights, where no rank holds all of them: in their data type, on the device.
    pub(super) fn slice_of_teacher(&self, assignment: &Assignment) -> Option<Tensor> {
        let files = self.files.as_ref()?;
        let (slice, _) = self.slices(assignment);
        let mut newest = self.slice_of_teacher.borrow_mut();
        if newest.as_ref().is_none_or(|(of, _)| *of != slice) {
            // Before there is memory for another one.
            *newest = None;
            let flat = self.teacher.parameters().flat();
            let values = files.teacher.range(slice.range(flat.numel() as i64));
            *newest = Some((slice, values.to_kind(flat.kind()).to_device(flat.device())));
        }
        newest.as_ref().map(|(_, values)| values.shallow_clone())
    }

    /// Whether each rank holds slices of the state.
    pub(super) fn is_sliced(&self) -> bool {
        self.spec.memory.is_sharded()
    }

    /// The slice of master weights, moments and average that a rank owns, and the one that it holds a copy of.
    pub(super) fn slices(&self, assignment: &Assignment) -> (Slice, Option<Slice>) {
        let world = assignment.world_size as usize;
        let slice = |rank: u32| Slice { rank: rank as usize, world };
        match (self.is_sliced(), assignment.replica) {
            (true, None) => {
                (slice(assignment.rank), assignment.partners.map(|partners| slice(partners.copies)))
            }
            // The other replicas are its copies.
            (true, Some(Replica { slice, slices, .. })) => {
                (Slice { rank: slice as usize, world: slices as usize }, None)
            }
            (false, _) => (Slice::WHOLE, None),
        }
    }

    /// Parameters that are trained of one network.
    pub(super) fn trained_parameters(&self) -> i64 {
        let trained =
            self.adapted.as_ref().map_or(self.teacher.as_ref(), |[_, generator]| generator.as_ref());
        trained.parameters().flat().numel() as i64
    }

    /// The source of this run's micro-batches.
    pub(super) fn draws(&self) -> NamedStreams<'_> {
        // Classes as in SiDA; captions only where the run has no prompts of its own.
        let conditions_of_real = self.spec.prompts.as_ref().is_none_or(|prompts| prompts.data.is_none());
        NamedStreams {
            settings: &self.recipe.settings,
            conditions: self.conditions.as_ref(),
            real: self.real.as_deref(),
            conditions_of_real,
            sample_shape: self.teacher.sample_shape(),
        }
    }

    /// Whether a picture of the student is drawn while training.
    pub(super) fn picture_due(&self, iteration: u64) -> bool {
        let evaluation = &self.spec.evaluation;
        let every = evaluation.pictures_every.or(evaluation.every);
        every.is_some_and(|every| iteration.is_multiple_of(every.get()))
    }

    pub(super) fn evaluation_due(&self, iteration: u64) -> bool {
        let every = self.spec.evaluation.every;
        iteration == 0
            || iteration >= self.spec.distillation.iterations
            || every.is_some_and(|every| iteration.is_multiple_of(every.get()))
    }
}

/// Noise distributions of the fake-score phase and of the generator phase.
fn noise_distributions(spec: &RunSpec, process: &ForwardProcess) -> [NoiseDistribution; 2] {
    let d = &spec.distillation;
    match process {
        ForwardProcess::Edm { .. } => [
            NoiseDistribution::LogNormal { mean: d.fake_score_noise.mean, std: d.fake_score_noise.std },
            NoiseDistribution::Karras {
                sigma_min: d.generator_noise.sigma_min,
                sigma_max: d.generator_noise.sigma_max,
                rho: d.generator_noise.rho,
                u_max: d.generator_noise.u_max,
            },
        ],
        ForwardProcess::Ddpm { .. } => {
            let [first, last] = d.timesteps.map(i64::from);
            [NoiseDistribution::Uniform { first, last }; 2]
        }
        ForwardProcess::Flow => [NoiseDistribution::SID_DIT; 2],
    }
}

/// Everything that decides a micro-batch besides the networks, for the teacher's forward process.
pub fn settings(spec: &RunSpec, process: &ForwardProcess, device: Device) -> Settings {
    let [fake_score_times, generator_times] = noise_distributions(spec, process);
    let (d, [fake_score_training, fake_score, teacher]) = (&spec.distillation, spec.guidance.scales());
    Settings {
        seed: d.seed,
        micro_batch: d.micro_batch.into(),
        times: times(spec, process),
        matching: match spec.generator.matching {
            spec::Matching::UniformStep => Matching::OneStep { weights: spec.generator.weights() },
            spec::Matching::FinalStep => Matching::FinalStep,
        },
        alpha: d.alpha,
        weighting: match d.weighting {
            spec::Weighting::ScoreIdentity => Weighting::ScoreIdentity,
            spec::Weighting::OneMinusT => Weighting::OneMinusT,
            spec::Weighting::OneMinusTSquared => Weighting::OneMinusTSquared,
            spec::Weighting::InverseT => Weighting::InverseT,
            spec::Weighting::InverseTSquared => Weighting::InverseTSquared,
            spec::Weighting::Snr => Weighting::Snr,
            spec::Weighting::SqrtSnr => Weighting::SqrtSnr,
        },
        score_identity_weight: d.score_identity_weight,
        fake_score_times,
        generator_times,
        guidance: Guidance {
            fake_score_training,
            fake_score,
            teacher,
            condition_dropout: spec.guidance.dropout(*process == ForwardProcess::Flow),
        },
        augmentation: d.augmentation.map(|probability| Augmentation { probability }),
        adversarial: spec.adversarial.as_ref().map(|a| Adversarial {
            scaling: match a.scaling {
                spec::Scaling::Sida => Scaling::Sida,
                spec::Scaling::SidDit => Scaling::SidDit,
            },
            generator_weight: a.generator_weight,
            discriminator_weight: a.discriminator_weight,
            approximate_r1: a.approximate_r1,
            approximate_r1_sigma: a.approximate_r1_sigma,
        }),
        schedule: Schedule {
            global_batch: d.global_batch.into(),
            generator_start_images: d.generator_start_images,
            join_images: spec.adversarial.as_ref().and_then(|a| a.join_images),
            fake_score_updates: d.fake_score_updates.into(),
        },
        training_mode: match &spec.lora {
            _ if d.dropout => Mode::Train,
            Some(lora) if lora.dropout > 0.0 => Mode::TrainAdapters,
            _ => Mode::Eval,
        },
        device,
    }
}
