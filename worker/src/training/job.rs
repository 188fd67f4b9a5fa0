//! What a process loads once, for all generations that it takes part in.

use std::path::Path;

use anyhow::Context;
use potstill_c10d::LowerPrecision;
use potstill_distill::{
    adam::AdamSettings,
    adversarial::{Adversarial, RealSamples},
    generator::Matching,
    gradient::Clip,
    guidance::Guidance,
    loss::Weighting,
    loss_scale::LossScales,
    phase::Settings,
    state::State,
    time::TimeLaw,
};
use potstill_models::{Denoiser, EdmNetwork, Mode};
use potstill_proto::spec::{self, Precision, RunSpec};
use potstill_storage::Run;
use sha2::{Digest, Sha256};
use tch::Device;
use tokio::runtime::Handle;

use crate::{
    checkpoint::Staging,
    dataset::{Dataset, Shape},
    evaluation::Evaluator,
    samples::SampleSet,
    student::Student,
};

/// The files that a run reads, loaded.
pub struct Inputs {
    teacher: EdmNetwork,
    /// The generator to start from, where that is not the teacher.
    start: Option<Box<dyn Denoiser>>,
    real: Option<RealSamples>,
    evaluator: Option<Evaluator>,
}

impl Inputs {
    /// Loads teacher, generator to start from, real samples, extractor and reference.
    ///
    /// # Errors
    /// A file that is missing, damaged, of another content than the run was started with, or does not fit the others.
    pub fn load(spec: &RunSpec, device: Device) -> anyhow::Result<Self> {
        let teacher = load_teacher(&spec.teacher.weights, spec.teacher.sha256.as_deref(), device)?;
        let guided = spec.guidance.scales() != [1.0; 3];
        anyhow::ensure!(
            !guided || teacher.classes() > 0,
            "guidance needs a teacher that knows classes, but {} is unconditional: set guidance.preset = \"none\"",
            spec.teacher.weights.display()
        );
        anyhow::ensure!(
            spec.distillation.weighting != spec::Weighting::OneMinusT,
            "distillation.weighting = \"one-minus-t\" is for flow-matching teachers; {} is an EDM network",
            spec.teacher.weights.display()
        );
        let start = match &spec.generator.start_from {
            Some(path) => Some(load_start(path, &teacher, device)?),
            None => None,
        };
        let real = match &spec.adversarial {
            Some(adversarial) => {
                let shape = Shape { sample: teacher.sample_shape(), classes: teacher.classes() };
                let data = Dataset::load(&adversarial.data, shape).context("adversarial.data")?;
                let data = match adversarial.limit {
                    Some(limit) => data.limit(limit),
                    None => data,
                };
                tracing::info!(samples = data.len(), "real samples loaded");
                Some(data.into_real_samples())
            }
            None => None,
        };
        let evaluator = Evaluator::load(&spec.evaluation, &teacher, device)?;
        Ok(Self { teacher, start, real, evaluator })
    }
}

/// The generator that a run starts from: an exported one of the teacher's architecture.
fn load_start(path: &Path, teacher: &EdmNetwork, device: Device) -> anyhow::Result<Box<dyn Denoiser>> {
    let student = Student::from_file(path, device).context("generator.start_from")?;
    anyhow::ensure!(
        student.network.config_json() == teacher.config_json(),
        "generator.start_from: {} is of another architecture than the teacher",
        path.display()
    );
    Ok(student.network)
}

/// What stays the same over all generations of a process.
pub struct Job {
    pub(super) spec: RunSpec,
    pub(super) settings: Settings,
    pub(super) teacher: Box<dyn Denoiser>,
    start: Option<Box<dyn Denoiser>>,
    pub(super) real: Option<RealSamples>,
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
        let Inputs { teacher, start, real, evaluator } = Inputs::load(&spec, device)?;
        let settings = settings(&spec, device);
        let samples = SampleSet::new(&spec.evaluation, device);
        let teacher = teacher.frozen();
        Ok(Self {
            spec,
            settings,
            teacher,
            start,
            real,
            evaluator,
            samples,
            run,
            runtime,
            staging: Staging::default(),
        })
    }

    /// The state before the first iteration.
    pub(super) fn first_state(&self) -> State {
        let dynamic = self.spec.distillation.precision == Precision::Fp16;
        let teacher = self.teacher.as_ref();
        let generator = self.start.as_deref().unwrap_or(teacher);
        State::starting_from(teacher, generator, LossScales::new(dynamic, self.settings.device))
    }

    /// What the networks compute in, where that is not fp32.
    pub(super) fn lower_precision(&self) -> Option<LowerPrecision> {
        match self.spec.distillation.precision {
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

fn settings(spec: &RunSpec, device: Device) -> Settings {
    let (d, [fake_score_training, fake_score, teacher]) = (&spec.distillation, spec.guidance.scales());
    Settings {
        seed: d.seed,
        micro_batch: d.micro_batch.into(),
        times: spec.generator.sigmas.clone(),
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
        fake_score_times: TimeLaw::LogNormal { mean: d.fake_score_noise.mean, std: d.fake_score_noise.std },
        generator_times: TimeLaw::Karras {
            sigma_min: d.generator_noise.sigma_min,
            sigma_max: d.generator_noise.sigma_max,
            rho: d.generator_noise.rho,
            u_max: d.generator_noise.u_max,
        },
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

/// Reads a teacher and checks that it is the one the run was started with.
pub fn load_teacher(path: &Path, sha256: Option<&str>, device: Device) -> anyhow::Result<EdmNetwork> {
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
