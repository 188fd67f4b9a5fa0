//! What a process loads once, for all generations that it takes part in.

use std::path::Path;

use anyhow::{Context, ensure};
use potstill_c10d::LowerPrecision;
use potstill_distill::{
    adam::AdamSettings,
    adversarial::{Adversarial, RealData},
    condition::Conditions,
    generator::{Matching, ddpm_times},
    gradient::Clip,
    guidance::Guidance,
    loss::Weighting,
    loss_scale::LossScales,
    phase::Settings,
    state::{Layout, Slice, State},
    time::TimeLaw,
};
use potstill_models::{Denoiser, Mode};
use potstill_proto::{
    message::Assignment,
    spec::{self, AdversarialSpec, Precision, RunSpec},
};
use potstill_storage::Run;
use tch::{Device, Kind};
use tokio::runtime::Handle;

use crate::{
    checkpoint::Staging,
    dataset::{
        Dataset, Shape,
        pairs::{self, Pair},
    },
    evaluation::Evaluator,
    model::{Model, Space, Wanted, load_unet},
    samples::SampleSet,
    student::Student,
};

/// The files that a run reads, loaded.
pub struct Inputs {
    teacher: Box<dyn Denoiser>,
    space: Space,
    /// The generator to start from, where that is not the teacher.
    start: Option<Box<dyn Denoiser>>,
    real: Option<Box<dyn RealData>>,
    evaluator: Option<Evaluator>,
}

impl Inputs {
    /// Loads teacher, generator to start from, prompts, real samples, extractor and reference.
    ///
    /// # Errors
    /// A file that is missing, damaged, of another content than the run was started with, or does not fit the others.
    pub fn load(spec: &RunSpec, device: Device) -> anyhow::Result<Self> {
        let model = Model::load(spec, device)?;
        let start = match &spec.generator.start_from {
            Some(path) => Some(load_start(path, &model, device)?),
            None => None,
        };
        let pairs = match &spec.adversarial {
            Some(adversarial) if model.latent.is_some() => {
                let [_, height, width] = model.image_shape();
                let pairs = pairs::load(&adversarial.data, [height, width], adversarial.limit);
                pairs.context("adversarial.data")?
            }
            _ => vec![],
        };
        let captions = pairs.iter().map(|pair| pair.caption.clone()).collect();
        let prompts = spec.prompts.as_ref().map(Wanted::File);
        let (teacher, space) = model.into_space(prompts, captions, Wanted::evaluation(spec))?;
        let guided = spec.guidance.scales() != [1.0; 3];
        ensure!(
            !guided || space.is_conditional(),
            "guidance needs a teacher that knows classes, but {} is unconditional: set guidance.preset = \"none\"",
            spec.teacher.weights.display()
        );
        ensure!(
            spec.distillation.weighting != spec::Weighting::OneMinusT,
            "distillation.weighting = \"one-minus-t\" is for flow-matching teachers; {} is none",
            spec.teacher.model.clone().unwrap_or_else(|| spec.teacher.weights.display().to_string())
        );
        let [_, last] = teacher.time_range();
        let timesteps = [spec.generator.initial_timestep, spec.distillation.timesteps[1]];
        ensure!(
            spec.teacher.model.is_none() || timesteps.iter().all(|time| f64::from(*time) <= last),
            "generator.initial_timestep and distillation.timesteps reach to {timesteps:?}; the teacher's last timestep is {last}"
        );
        let real = match &spec.adversarial {
            Some(adversarial) => Some(load_real(adversarial, &space, pairs)?),
            None => None,
        };
        let evaluator = Evaluator::load(&spec.evaluation, &space, device)?;
        Ok(Self { teacher, space, start, real, evaluator })
    }
}

/// The generator that a run starts from: an exported one of the teacher's architecture.
fn load_start(path: &Path, teacher: &Model, device: Device) -> anyhow::Result<Box<dyn Denoiser>> {
    let network: Box<dyn Denoiser> = match path.is_dir() {
        true => Box::new(load_unet(path, device).context("generator.start_from")?),
        false => Student::from_file(path, device).context("generator.start_from")?.model.network,
    };
    let (start, teacher) = (network.parameters().entries(), teacher.parameters().entries());
    ensure!(
        start == teacher,
        "generator.start_from: {} is of another architecture than the teacher",
        path.display()
    );
    Ok(network)
}

/// Real samples for the adversarial loss.
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

/// What stays the same over all generations of a process.
pub struct Job {
    pub(super) spec: RunSpec,
    pub(super) settings: Settings,
    pub(super) teacher: Box<dyn Denoiser>,
    start: Option<Box<dyn Denoiser>>,
    pub(super) conditions: Box<dyn Conditions>,
    pub(super) real: Option<Box<dyn RealData>>,
    pub(super) evaluator: Option<Evaluator>,
    pub(super) samples: SampleSet,
    pub(super) run: Run,
    pub(super) runtime: Handle,
    pub(super) staging: Staging,
}

impl Job {
    /// Loads what the run reads.
    ///
    /// # Errors
    /// See [`Inputs::load`].
    pub fn load(spec: RunSpec, run: Run, runtime: Handle, device: Device) -> anyhow::Result<Self> {
        let Inputs { teacher, space, start, real, evaluator } = Inputs::load(&spec, device)?;
        let settings = settings(&spec, device);
        let conditions = space.conditions();
        let samples = SampleSet::new(&spec.evaluation, space, device);
        let weights = if spec.memory.bf16_weights { Kind::BFloat16 } else { Kind::Float };
        let frozen =
            |network: Box<dyn Denoiser>| network.over(network.parameters().flat().to_kind(weights), false);
        let (teacher, start) = (frozen(teacher), start.map(frozen));
        Ok(Self {
            spec,
            settings,
            teacher,
            start,
            conditions,
            real,
            evaluator,
            samples,
            run,
            runtime,
            staging: Staging::default(),
        })
    }

    /// The state before the first iteration, of which a rank holds a slice.
    pub(super) fn first_state(&self, slice: Slice) -> State {
        let dynamic = self.spec.distillation.precision == Precision::Fp16;
        let teacher = self.teacher.as_ref();
        let generator = self.start.as_deref().unwrap_or(teacher);
        let layout = Layout {
            slice,
            weights: teacher.parameters().flat().kind(),
            average_on_host: self.spec.memory.offload_ema,
        };
        State::starting_from(teacher, generator, LossScales::new(dynamic, self.settings.device), layout)
    }

    /// What a rank holds of master weights, moments and average.
    pub(super) fn slice(&self, assignment: &Assignment) -> Slice {
        match self.spec.memory.shard_optimiser {
            true => Slice { rank: assignment.rank as usize, world: assignment.world_size as usize },
            false => Slice::WHOLE,
        }
    }

    /// What mixed precision makes of fp32 weights, where networks compute in something else than their weights are.
    pub(super) fn mixed_precision(&self) -> Option<LowerPrecision> {
        match self.spec.distillation.precision {
            _ if self.spec.memory.bf16_weights => None,
            Precision::Fp32 => None,
            Precision::Bf16 => Some(LowerPrecision::BFloat16),
            Precision::Fp16 => Some(LowerPrecision::Half),
        }
    }

    /// Images that all ranks together have generated per phase before an iteration.
    fn images_before(&self, iteration: u64) -> u64 {
        iteration * u64::from(self.spec.distillation.global_batch)
    }

    /// Whether the generator moves in an iteration.
    pub(super) fn trains_generator(&self, iteration: u64) -> bool {
        self.images_before(iteration) >= self.spec.distillation.generator_start_images
    }

    /// Adam's settings in an iteration for a network with this learning rate.
    pub(super) fn adam(&self, learning_rate: f64, iteration: u64) -> AdamSettings {
        let o = &self.spec.optimiser;
        let factor = o.decay.as_ref().map_or(1.0, |decay| decay.factor(self.images_before(iteration)));
        AdamSettings { learning_rate: learning_rate * factor, betas: o.betas, epsilon: o.epsilon }
    }

    pub(super) fn clip(&self) -> Clip {
        let o = &self.spec.optimiser;
        Clip { value: o.clip_value, norm: o.clip_norm }
    }

    pub(super) fn evaluation_due(&self, iteration: u64) -> bool {
        let every = self.spec.evaluation.every;
        iteration == 0
            || iteration >= self.spec.distillation.iterations
            || (every > 0 && iteration.is_multiple_of(every))
    }
}

/// Times of the generator's steps.
pub fn times(spec: &RunSpec) -> Vec<f64> {
    match spec.teacher.model {
        Some(_) => ddpm_times(spec.generator.initial_timestep, spec.generator.steps),
        None => spec.generator.sigmas.clone(),
    }
}

/// Laws of the times of the fake-score phase and of the generator phase.
fn time_laws(spec: &RunSpec) -> [TimeLaw; 2] {
    let d = &spec.distillation;
    if spec.teacher.model.is_some() {
        let [first, last] = d.timesteps.map(i64::from);
        return [TimeLaw::Uniform { first, last }; 2];
    }
    [
        TimeLaw::LogNormal { mean: d.fake_score_noise.mean, std: d.fake_score_noise.std },
        TimeLaw::Karras {
            sigma_min: d.generator_noise.sigma_min,
            sigma_max: d.generator_noise.sigma_max,
            rho: d.generator_noise.rho,
            u_max: d.generator_noise.u_max,
        },
    ]
}

/// What decides a micro-batch besides the networks.
pub fn settings(spec: &RunSpec, device: Device) -> Settings {
    let [fake_score_times, generator_times] = time_laws(spec);
    let (d, [fake_score_training, fake_score, teacher]) = (&spec.distillation, spec.guidance.scales());
    Settings {
        seed: d.seed,
        micro_batch: d.micro_batch.into(),
        times: times(spec),
        matching: match spec.generator.matching {
            spec::Matching::UniformStep => Matching::OneStep { weights: spec.generator.weights() },
            spec::Matching::FinalStep => Matching::FinalStep,
        },
        alpha: d.alpha,
        weighting: match d.weighting {
            spec::Weighting::ScoreIdentity => Weighting::ScoreIdentity,
            spec::Weighting::OneMinusT => Weighting::OneMinusT,
            spec::Weighting::Snr => Weighting::Snr,
            spec::Weighting::SqrtSnr => Weighting::SqrtSnr,
        },
        fake_score_times,
        generator_times,
        guidance: Guidance {
            fake_score_training,
            fake_score,
            teacher,
            condition_dropout: spec.guidance.condition_dropout,
        },
        adversarial: spec.adversarial.as_ref().map(|a| Adversarial {
            score_identity_weight: a.score_identity_weight,
            generator_weight: a.generator_weight,
            discriminator_weight: a.discriminator_weight,
            start_iteration: a.start_images.div_ceil(d.global_batch.into()),
            approximate_r1: a.approximate_r1,
            approximate_r1_sigma: a.approximate_r1_sigma,
        }),
        training_mode: if d.dropout { Mode::Train } else { Mode::Eval },
        device,
    }
}
