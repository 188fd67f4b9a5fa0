//! What a process loads once, for all generations that it takes part in.

use std::path::Path;

use anyhow::Context;
use potstill_distill::{
    adam::AdamSettings,
    generator::Matching,
    guidance::Guidance,
    noise::{Karras, LogNormal},
    phase::Settings,
};
use potstill_models::{Denoiser, EdmNetwork, Mode};
use potstill_proto::spec::{self, RunSpec};
use potstill_storage::Run;
use sha2::{Digest, Sha256};
use tch::Device;
use tokio::runtime::Handle;

use crate::{evaluation::Evaluator, samples::SampleSet};

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
        let guided = spec.guidance.scales() != [1.0; 3];
        anyhow::ensure!(
            !guided || teacher.classes() > 0,
            "guidance needs a teacher that knows classes, but {} is unconditional: set guidance.preset = \"none\"",
            spec.teacher.weights.display()
        );
        let evaluator = Evaluator::load(&spec.evaluation, &teacher, device)?;
        Ok(Self { teacher, evaluator })
    }
}

/// What stays the same over all generations of a process.
pub struct Job {
    pub(super) spec: RunSpec,
    pub(super) settings: Settings,
    pub(super) teacher: Box<dyn Denoiser>,
    pub(super) evaluator: Option<Evaluator>,
    pub(super) samples: SampleSet,
    pub(super) run: Run,
    pub(super) runtime: Handle,
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
            sigmas: spec.generator.sigmas.clone(),
            matching: match spec.generator.matching {
                spec::Matching::UniformStep => Matching::UniformStep,
                spec::Matching::FinalStep => Matching::FinalStep,
            },
            alpha: d.alpha,
            sigma_data: teacher.config().sigma_data,
            fake_score_noise: LogNormal { mean: d.fake_score_noise.mean, std: d.fake_score_noise.std },
            generator_noise: Karras {
                sigma_min: d.generator_noise.sigma_min,
                sigma_max: d.generator_noise.sigma_max,
                rho: d.generator_noise.rho,
                u_max: d.generator_noise.u_max,
            },
            guidance: guidance(&spec),
            training_mode: if d.dropout { Mode::Train } else { Mode::Eval },
            device,
        };
        let samples = SampleSet::new(&spec.evaluation, device);
        Ok(Self { spec, settings, teacher: teacher.frozen(), evaluator, samples, run, runtime })
    }

    pub(super) fn adam(&self, learning_rate: f64) -> AdamSettings {
        let o = &self.spec.optimiser;
        AdamSettings { learning_rate, betas: o.betas, epsilon: o.epsilon }
    }

    pub(super) fn evaluation_due(&self, iteration: u64) -> bool {
        let every = self.spec.evaluation.every;
        iteration == 0
            || iteration >= self.spec.distillation.iterations
            || (every > 0 && iteration.is_multiple_of(every))
    }
}

fn guidance(spec: &RunSpec) -> Guidance {
    let [fake_score_training, fake_score, teacher] = spec.guidance.scales();
    let condition_dropout = spec.guidance.condition_dropout;
    Guidance { fake_score_training, fake_score, teacher, condition_dropout }
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
