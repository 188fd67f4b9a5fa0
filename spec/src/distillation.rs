//! `[distillation]`: score identity distillation.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problems::{Problems, positive};

/// One iteration of SiD (docs/algorithm.md §3, §7).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DistillationSpec {
    /// Seed of all random numbers of the run.
    pub seed: u64,
    /// Iterations, each with a fake-score phase and a generator phase.
    pub iterations: u64,
    /// Samples per phase over all ranks.
    pub global_batch: u32,
    /// Samples per forward pass. Divides `global_batch`; changes the trajectory, unlike the number of workers.
    pub micro_batch: u32,
    /// α of the generator loss: 1.2 for EDM in SiD (AFHQ 1.0), 1.0 elsewhere.
    pub alpha: f64,
    /// ω of the generator loss.
    pub weighting: Weighting,
    /// λ_sid: weight of the score identity loss, halved once the adversarial term has joined. 100 in SiD, SiDA and
    /// SiD-DiT, 1 in SiD-LSG. With Adam it sets the scale of `optimizer.epsilon` and of the adversarial term relative
    /// to this loss.
    pub score_identity_weight: f64,
    /// The generator is frozen until more images than this have been seen; without it, it is never frozen. SiDA:
    /// 100,000; SiD-DiT: 20,000.
    pub generator_start_images: Option<u64>,
    /// Updates of the fake score (iterations) for each update of the generator: 1 in SiD, 5 in DMD2 (2405.14867).
    pub fake_score_updates: u32,
    /// Probability of EDM's augmentations (2206.00364, appendix F.2) of the samples from which the fake score and the
    /// discriminator learn, always including horizontal flips: 0.12 for CIFAR-10, 0.15 for FFHQ and AFHQ in SiD's code.
    /// The teacher must take augmentation labels.
    pub augmentation: Option<f64>,
    /// Data type in which the networks compute. Weights, moments and reductions are fp32 in any case.
    pub precision: Precision,
    /// Noise distribution of the fake-score phase: ln σ ~ N(mean, std²).
    pub fake_score_noise: LogNormalSpec,
    /// Noise distribution of the generator phase: Karras spacing with u ~ U[0, u_max).
    pub generator_noise: KarrasSpec,
    /// Least and greatest timestep of both phases for a text-to-image model, drawn uniformly: 20 and 979 in SiD-LSG (2406.01561).
    pub timesteps: [u32; 2],
    /// Whether the networks' dropout layers are active while the fake score and the generator train.
    pub dropout: bool,
    /// Whether micro-batches are computed as CUDA graphs: a GPU then waits less for the host, which matters where micro-batches are
    /// small. Gradients are reduced after the last micro-batch instead of beside it, which changes results by rounding at most. On the
    /// CPU there are no graphs.
    pub cuda_graphs: bool,
    /// Stop with an error after this many iterations in a row with non-finite gradients or losses.
    pub non_finite_limit: u32,
}

impl Default for DistillationSpec {
    fn default() -> Self {
        Self {
            seed: 0,
            iterations: 1000,
            global_batch: 128,
            micro_batch: 64,
            alpha: 1.2,
            weighting: Weighting::ScoreIdentity,
            score_identity_weight: 100.0,
            generator_start_images: None,
            fake_score_updates: 1,
            augmentation: None,
            precision: Precision::Fp32,
            fake_score_noise: LogNormalSpec::default(),
            generator_noise: KarrasSpec::default(),
            timesteps: [20, 979],
            dropout: true,
            cuda_graphs: false,
            non_finite_limit: 10,
        }
    }
}

/// ω: the weight of a sample in the generator's loss (docs/algorithm.md §3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Weighting {
    /// 1 / max(mean|x_g − f_φ|, 1e-5) (SiD, 2404.04057).
    #[default]
    ScoreIdentity,
    /// 1 − t; for flow-matching teachers only (2509.25127).
    OneMinusT,
    /// 1 − t²; for flow-matching teachers only (2509.25127's code).
    OneMinusTSquared,
    /// 1/t; for flow-matching teachers only (2509.25127's code).
    InverseT,
    /// 1/t²; for flow-matching teachers only (2509.25127's code).
    InverseTSquared,
    /// The signal-to-noise ratio.
    Snr,
    /// The square root of the signal-to-noise ratio.
    SqrtSnr,
}

/// Data type in which the networks compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits.
    #[default]
    Fp32,
    /// bfloat16: fp32's range, 8 bits of precision.
    Bf16,
    /// Half precision, with a dynamic loss scale. SiD uses an `optimizer.epsilon` of 1e-6 with it.
    Fp16,
}

/// ln σ ~ N(mean, std²), EDM's training distribution (EDM table 1: −1.2, 1.2).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LogNormalSpec {
    /// Mean of ln σ.
    pub mean: f64,
    /// Standard deviation of ln σ.
    pub std: f64,
}

impl Default for LogNormalSpec {
    fn default() -> Self {
        Self { mean: -1.2, std: 1.2 }
    }
}

/// σ = (σ_max^{1/ρ} + (1−u)(σ_min^{1/ρ} − σ_max^{1/ρ}))^ρ, u ~ U[0, u_max) (SiD for EDM teachers).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct KarrasSpec {
    /// Smallest noise level, reached at u = 0.
    pub sigma_min: f64,
    /// Largest noise level, the limit for u → 1.
    pub sigma_max: f64,
    /// Spacing exponent.
    pub rho: f64,
    /// Upper end of u.
    pub u_max: f64,
}

impl Default for KarrasSpec {
    fn default() -> Self {
        Self { sigma_min: 0.002, sigma_max: 80.0, rho: 7.0, u_max: 0.8 }
    }
}

impl DistillationSpec {
    /// `reads`: whether the teacher is a text-to-image model.
    pub(crate) fn validate(&self, reads: bool, problems: &mut Problems) {
        for (name, count) in [
            ("iterations", self.iterations),
            ("micro_batch", self.micro_batch.into()),
            ("fake_score_updates", self.fake_score_updates.into()),
            ("non_finite_limit", self.non_finite_limit.into()),
        ] {
            problems.require(count > 0, || format!("distillation.{name} is 0; it must be at least 1"));
        }
        problems.require(
            self.global_batch > 0
                && self.micro_batch > 0
                && self.global_batch.is_multiple_of(self.micro_batch),
            || {
                format!(
                    "distillation.global_batch ({}) is not a multiple of distillation.micro_batch ({})",
                    self.global_batch, self.micro_batch
                )
            },
        );
        problems.require(self.alpha.is_finite() && (0.0..=2.0).contains(&self.alpha), || {
            format!("distillation.alpha is {}; it must lie in [0, 2]", self.alpha)
        });
        problems
            .require(self.fake_score_noise.mean.is_finite() && positive(self.fake_score_noise.std), || {
                "distillation.fake_score_noise needs a finite mean and a std > 0".into()
            });
        self.generator_noise.validate(problems);
        problems.require(self.timesteps[0] <= self.timesteps[1], || {
            format!("distillation.timesteps are {:?}; the first must not exceed the last", self.timesteps)
        });
        problems.require(positive(self.score_identity_weight), || {
            format!("distillation.score_identity_weight is {}; it must be > 0", self.score_identity_weight)
        });
        if let Some(probability) = self.augmentation {
            problems.require((0.0..=1.0).contains(&probability), || {
                format!("distillation.augmentation is {probability}; a probability lies in [0, 1]")
            });
            problems.require(!reads, || {
                "distillation.augmentation is for EDM networks that take augmentation labels".into()
            });
        }
    }
}

impl KarrasSpec {
    fn validate(&self, problems: &mut Problems) {
        problems.require(
            positive(self.sigma_min) && self.sigma_max.is_finite() && self.sigma_min < self.sigma_max,
            || {
                format!(
                    "distillation.generator_noise needs 0 < sigma_min < sigma_max; they are {} and {}",
                    self.sigma_min, self.sigma_max
                )
            },
        );
        problems.require(positive(self.rho), || {
            format!("distillation.generator_noise.rho is {}; it must be > 0", self.rho)
        });
        problems.require(self.u_max > 0.0 && self.u_max <= 1.0, || {
            format!("distillation.generator_noise.u_max is {}; it must lie in (0, 1]", self.u_max)
        });
    }
}
