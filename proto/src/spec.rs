//! The run specification: everything that decides what a run computes and how it is run.
//!
//! Read through [`crate::layers`], validated as a whole, frozen as `run.toml` in the run's folder. On resume the frozen
//! one is compared with the one given: [`RunSpec::differences`].

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{layers, layers::LayerError};

/// A run, whole. Every section has defaults; only the teacher must be named.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunSpec {
    /// The pretrained network.
    pub teacher: TeacherSpec,
    /// What a text-to-image model is shown; only for those.
    pub prompts: Option<PromptsSpec>,
    /// The few-step generator.
    pub generator: GeneratorSpec,
    /// What SiD computes.
    pub distillation: DistillationSpec,
    /// The trade-off between alignment and diversity.
    pub guidance: GuidanceSpec,
    /// The adversarial loss with real samples; without this section the run is data-free.
    pub adversarial: Option<AdversarialSpec>,
    /// Adam and the averages.
    pub optimiser: OptimiserSpec,
    /// What saves memory on the devices.
    pub memory: MemorySpec,
    /// When to save, and how much to keep.
    pub checkpoint: CheckpointSpec,
    /// When and on what to score.
    pub evaluation: EvaluationSpec,
    /// How many workers, and how patient to be with them.
    pub cluster: ClusterSpec,
}

/// The pretrained score network f_φ.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TeacherSpec {
    /// An EDM network: safetensors file with the network's configuration in its metadata; a relative path is relative to the
    /// file that names it.
    pub weights: PathBuf,
    /// A text-to-image model instead: a folder in the layout of diffusers (Stable Diffusion 1.x, 2.x, SDXL), as a path, a
    /// URL of an object store, or the name of a repository on the Hugging Face hub.
    pub model: Option<String>,
    /// Height and width of that model's images, in pixels; by default what it was trained on.
    pub image_size: Option<[u32; 2]>,
    /// SHA-256 of that file, or of the folder's files one after the other. Filled in when the run is frozen; given by hand, it
    /// is checked.
    pub sha256: Option<String>,
}

/// What a text-to-image model is shown while it is distilled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PromptsSpec {
    /// A text file with one prompt a line, a JSONL file or a Parquet file: a path relative to the file that names it, or a URL. In
    /// an adversarial run it may be left out: then generated samples share the captions of the real images.
    pub data: String,
    /// Column of the prompts in JSONL and Parquet.
    pub column: String,
    /// Folder on this machine where the prompts' embeddings are kept: they are computed once, and the text encoders are released.
    /// Without it they are computed as they are needed.
    pub cache: Option<PathBuf>,
    /// SDXL's micro-conditioning: height and width of the original image; by default those of the model's images.
    pub original_size: Option<[u32; 2]>,
    /// SDXL's micro-conditioning: top and left of the crop.
    pub crop: [u32; 2],
}

impl Default for PromptsSpec {
    fn default() -> Self {
        Self {
            data: String::new(),
            column: "prompt".to_owned(),
            cache: None,
            original_size: None,
            crop: [0, 0],
        }
    }
}

/// The generator G_θ (ALGORITHM §2).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GeneratorSpec {
    /// K, the number of steps.
    pub steps: u32,
    /// Noise level of each step for the EDM family, falling; as many as steps. The first is σ_init: 2.5 in SiD. SiDA's code for
    /// EDM2 has σ_init·(K − i)/K for step i, with final-step matching.
    pub sigmas: Vec<f64>,
    /// t_init of a text-to-image model, whose step i is at timestep ⌊t_init·(1 − i/K)⌋. By default 625 (SiD-LSG, 2406.01561), and
    /// 999 for a flow (SiD-DiT, 2509.25127), whose times are timesteps/999.
    pub initial_timestep: Option<u32>,
    /// Which step's output is matched.
    pub matching: Matching,
    /// With uniform-step matching: how often each step is chosen, relative to the others; as many as steps. Without them all
    /// alike, as published (2505.12674).
    pub step_weights: Vec<f64>,
    /// An exported generator of the same architecture to start from, instead of a copy of the teacher: SiDA that continues
    /// SiD (2410.14919's SiD²A).
    pub start_from: Option<PathBuf>,
}

/// Which outputs of a K-step generator are trained to match the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Matching {
    /// One step in each iteration, chosen uniformly; back-propagation through that step alone (2505.12674).
    #[default]
    UniformStep,
    /// The last step; back-propagation through all (SiD-LSG, 2406.01561).
    FinalStep,
}

impl Default for GeneratorSpec {
    fn default() -> Self {
        Self {
            steps: 1,
            sigmas: vec![2.5],
            initial_timestep: None,
            matching: Matching::UniformStep,
            step_weights: vec![],
            start_from: None,
        }
    }
}

/// One iteration of SiD (ALGORITHM §3, §7).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DistillationSpec {
    /// Decides every random number of the run.
    pub seed: u64,
    /// Iterations of fake-score phase and generator phase.
    pub iterations: u64,
    /// Samples per phase over all ranks.
    pub global_batch: u32,
    /// Samples per forward pass. Divides `global_batch`; part of the trajectory, unlike the number of workers.
    pub micro_batch: u32,
    /// α of the generator loss: 1.2 for EDM in SiD (AFHQ 1.0), 1.0 elsewhere.
    pub alpha: f64,
    /// ω of the generator loss.
    pub weighting: Weighting,
    /// λ_sid: weight of the score identity loss, halved once the adversarial term has joined. 100 in SiD, SiDA and SiD-DiT, 1 in
    /// SiD-LSG. With Adam it decides what `optimiser.epsilon` means, and how the adversarial term compares.
    pub score_identity_weight: f64,
    /// The generator is frozen until more images than this have been seen; without it, it never is. SiDA: 100,000; SiD-DiT:
    /// 20,000.
    pub generator_start_images: Option<u64>,
    /// Updates of the fake score (iterations) to one update of the generator: 1 in SiD, 5 in DMD2 (2405.14867).
    pub fake_score_updates: u32,
    /// Probability of EDM's augmentations (2206.00364, appendix F.2) of what the fake score and the discriminator learn from,
    /// horizontal flips always among them: 0.12 for CIFAR-10, 0.15 for FFHQ and AFHQ in SiD's code. The teacher must take
    /// augmentation labels.
    pub augmentation: Option<f64>,
    /// Kind of number that the networks compute with. Weights, moments and reductions are fp32 whatever this is.
    pub precision: Precision,
    /// Noise law of the fake-score phase: ln σ ~ N(mean, std²).
    pub fake_score_noise: LogNormalSpec,
    /// Noise law of the generator phase: Karras spacing with u ~ U[0, u_max).
    pub generator_noise: KarrasSpec,
    /// Least and greatest timestep of both phases for a text-to-image model, drawn uniformly: 20 and 979 in SiD-LSG (2406.01561).
    pub timesteps: [u32; 2],
    /// Whether the networks' dropout layers are active while the fake score and the generator train.
    pub dropout: bool,
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
            non_finite_limit: 10,
        }
    }
}

/// ω: how much a sample counts in the generator's loss (ALGORITHM §3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Its root.
    SqrtSnr,
}

/// Kind of number that networks compute with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits.
    #[default]
    Fp32,
    /// bfloat16: fp32's range, 8 bits of precision.
    Bf16,
    /// Half precision, with a dynamic loss scale. SiD uses an `optimiser.epsilon` of 1e-6 with it.
    Fp16,
}

/// The adversarial loss: a Diffusion GAN on the fake score's encoder (SiDA, 2410.14919; ALGORITHM §5).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdversarialSpec {
    /// Real samples: an image file of this project's (safetensors), a folder with one sub-folder of images per class, a tar
    /// in the WebDataset layout or a folder of such; a path relative to the file that names it, or a URL. For a text-to-image
    /// model tars of images with captions.
    pub data: String,
    /// Folder on this machine where the latents of images with captions are kept: each is computed once. Without it they are
    /// computed as they are needed.
    pub cache: Option<PathBuf>,
    /// Use only so many of them, spread evenly over the whole.
    pub limit: Option<u64>,
    /// How the cross entropies become losses.
    pub scaling: Scaling,
    /// λ_adv of the generator. SiDA: 0.01; SiD-DiT: 1.
    pub generator_weight: f64,
    /// λ_D of the discriminator, which learns from the first image. SiDA and SiD-DiT: 1.
    pub discriminator_weight: f64,
    /// The generator's adversarial term joins when more images than this have been seen; without it, it is there from the first
    /// image. SiDA: 200,000; SiD-DiT: 40,000.
    pub join_images: Option<u64>,
    /// Weight of the approximate R1 penalty on real samples (2501.08316); 0: none.
    pub approximate_r1: f64,
    /// Standard deviation of its perturbation.
    pub approximate_r1_sigma: f64,
}

/// The two published ways to scale the discriminator's and the generator's cross entropies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scaling {
    /// SiDA's (2410.14919): means over a micro-batch; the discriminator's with the denoising loss's weight, the generator's with ω
    /// and the number of a sample's elements.
    #[default]
    Sida,
    /// SiD-DiT's (2509.25127): means over a sample, times the number of its elements; the generator's with ω.
    SidDit,
}

impl Default for AdversarialSpec {
    fn default() -> Self {
        Self {
            data: String::new(),
            cache: None,
            limit: None,
            scaling: Scaling::Sida,
            generator_weight: 0.01,
            discriminator_weight: 1.0,
            join_images: None,
            approximate_r1: 0.0,
            approximate_r1_sigma: 0.1,
        }
    }
}

/// Guidance (ALGORITHM §4): the prediction at scale κ is `u + κ·(c − u)`, u unconditional, c conditional.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GuidanceSpec {
    /// Which three scales.
    pub preset: GuidancePreset,
    /// κ of `lsg` (1.5, 2, 3 or 4.5 in SiD-LSG); the strength s of `anti-cfg`, for which no value is published: 1 is ours.
    pub scale: f64,
    /// κ₁ of `custom`: the fake score while it trains.
    pub fake_score_training: f64,
    /// κ₂ = κ₃ of `custom`: the fake score inside the generator loss.
    pub fake_score: f64,
    /// κ₄ of `custom`: the teacher.
    pub teacher: f64,
    /// Share of the fake score's samples that are made and learnt without their condition, where κ₁ or κ₂ is not 1 and κ₁ is not
    /// 0. By default 0.1 for `lsg` and `custom` (SiD-LSG), except on flows (SiD-DiT), and 0 for the others.
    pub condition_dropout: Option<f64>,
}

/// Known choices of the three scales.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuidancePreset {
    /// 1, 1, 1 (SiD).
    #[default]
    None,
    /// κ, κ, κ (SiD-LSG, 2406.01561).
    Lsg,
    /// 0, 0, 1: teacher without guidance, fake score without the condition (2505.12674).
    ZeroCfg,
    /// −s, −s, 1: negative guidance in the fake score (2505.12674).
    AntiCfg,
    /// As given.
    Custom,
}

impl Default for GuidanceSpec {
    fn default() -> Self {
        Self {
            preset: GuidancePreset::None,
            scale: 1.0,
            fake_score_training: 1.0,
            fake_score: 1.0,
            teacher: 1.0,
            condition_dropout: None,
        }
    }
}

impl GeneratorSpec {
    /// How often each step is chosen, relative to the others.
    #[must_use]
    pub fn weights(&self) -> Vec<f64> {
        if self.step_weights.is_empty() { vec![1.0; self.steps as usize] } else { self.step_weights.clone() }
    }
}

impl GuidanceSpec {
    /// κ₁, κ₂ = κ₃ and κ₄.
    #[must_use]
    pub fn scales(&self) -> [f64; 3] {
        match self.preset {
            GuidancePreset::None => [1.0; 3],
            GuidancePreset::Lsg => [self.scale; 3],
            GuidancePreset::ZeroCfg => [0.0, 0.0, 1.0],
            GuidancePreset::AntiCfg => [-self.scale, -self.scale, 1.0],
            GuidancePreset::Custom => [self.fake_score_training, self.fake_score, self.teacher],
        }
    }

    /// Share of conditions to drop, given whether the teacher is a flow.
    #[must_use]
    pub fn dropout(&self, flow: bool) -> f64 {
        let published = matches!(self.preset, GuidancePreset::Lsg | GuidancePreset::Custom) && !flow;
        self.condition_dropout.unwrap_or(if published { 0.1 } else { 0.0 })
    }
}

/// ln σ ~ N(mean, std²), EDM's training law (EDM table 1: −1.2, 1.2).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KarrasSpec {
    /// Smallest noise level, reached at u = 0.
    pub sigma_min: f64,
    /// Largest noise level, the limit at u = 1.
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

/// Adam for both networks, and the generator's average (ALGORITHM §6).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimiserSpec {
    /// Learning rate of the generator.
    pub generator_learning_rate: f64,
    /// Learning rate of the fake score network.
    pub fake_score_learning_rate: f64,
    /// β₁, β₂.
    pub betas: [f64; 2],
    /// β₁, β₂ of the generator, where they are others: SiD's for FFHQ has β₁ = 0.9 there.
    pub generator_betas: Option<[f64; 2]>,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Half-life of G_ema in images; bounded by 5 % of the images seen.
    pub ema_half_life_images: f64,
    /// Gradients longer than this L2 norm are scaled down to it; without it they are not (SiD).
    pub clip_norm: Option<f64>,
    /// Elements of the generator's gradient are kept within ± this; without it they are not (SiD, SiDA).
    pub generator_clip_value: Option<f64>,
    /// Elements of the gradient of the fake score, which is the discriminator too, are kept within ± this; without it they are not
    /// (SiD). SiDA: 1.
    pub fake_score_clip_value: Option<f64>,
    /// When both learning rates fall; without it they stay (SiD).
    pub decay: Option<DecaySpec>,
}

/// Learning rates fall linearly between two points of the run, counted in images so that more iterations or another
/// number of workers leave the trajectory before them as it is. Not in SiD: ours, for runs that end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecaySpec {
    /// Images seen when the fall begins.
    pub start_images: u64,
    /// Images seen when the fall ends.
    pub end_images: u64,
    /// What is left of the learning rates from then on; 0: nothing, so a run cannot go on beyond it.
    #[serde(default)]
    pub end_factor: f64,
}

impl DecaySpec {
    /// The factor of the learning rates after `images`.
    #[must_use]
    pub fn factor(&self, images: u64) -> f64 {
        let length = (self.end_images - self.start_images) as f64;
        let left = self.end_images.saturating_sub(images) as f64;
        self.end_factor + (1.0 - self.end_factor) * (left / length).min(1.0)
    }
}

impl Default for OptimiserSpec {
    fn default() -> Self {
        Self {
            generator_learning_rate: 1e-5,
            fake_score_learning_rate: 1e-5,
            betas: [0.0, 0.999],
            generator_betas: None,
            epsilon: 1e-8,
            ema_half_life_images: 500_000.0,
            clip_norm: None,
            generator_clip_value: None,
            fake_score_clip_value: None,
            decay: None,
        }
    }
}

/// What saves memory on the devices; `potstill plan` says how much.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MemorySpec {
    /// The networks' weights are bf16; fp32 master copies lie with the optimiser. For `distillation.precision = "bf16"` and
    /// text-to-image models.
    pub bf16_weights: bool,
    /// Blocks of a text-to-image model's networks are computed again in the backward pass instead of keeping what they computed
    /// (1604.06174).
    pub activation_checkpointing: bool,
    /// Each rank holds and steps one part of master weights, Adam's moments and G_ema (ZeRO stage 1, 1910.02054). What a rank
    /// that dies held is then in the newest checkpoint only.
    pub shard_optimiser: bool,
    /// G_ema lies in the host's memory.
    pub offload_ema: bool,
}

/// Checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointSpec {
    /// Save after every so many iterations; the last iteration always saves.
    pub every: u64,
    /// Keep so many of the newest; 0: all.
    pub keep_last: u64,
    /// Besides these keep every checkpoint whose iteration is a multiple of this; 0: none.
    pub keep_every: u64,
    /// Stop the run after so many failed saves in a row; 0: go on whatever fails.
    pub stop_after_failures: u32,
}

impl Default for CheckpointSpec {
    fn default() -> Self {
        Self { every: 500, keep_last: 5, keep_every: 0, stop_after_failures: 0 }
    }
}

/// Scores while training and at the end (ALGORITHM §8).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvaluationSpec {
    /// Score the student after every so many iterations, and at the end; 0: only at the end.
    pub every: u64,
    /// Samples to score on.
    pub samples: u32,
    /// Decides the evaluation's noise and conditions.
    pub seed: u64,
    /// Prompts to score a text-to-image model on, such as COCO's captions: a file in one of the forms of
    /// `prompts.data`, as a path relative to the file that names it, or a URL. By default those of `prompts.data`.
    pub prompts: Option<String>,
    /// Column of these prompts in JSONL and Parquet; by default `prompts.column`.
    pub prompts_column: Option<String>,
    /// How many samples each prompt gets at least, where there are enough prompts: `samples` divided by this many
    /// prompts are used. COCO's protocol has 1; diversity, which is measured among samples of one prompt, needs 2.
    pub samples_per_prompt: u32,
    /// What happens to samples and real images before they are compared.
    pub images: ImageTreatment,
    /// Height and width for `images`, in pixels: `resized` needs one (256 for FID on COCO); `patch` has 299,
    /// Inception's own, by default; `as-made` takes none.
    pub image_size: Option<u32>,
    /// TorchScript extractor: images in [−1, 1] → (features [N, D], logits [N, classes]). Without one nothing is scored.
    pub features: Option<PathBuf>,
    /// Real images to compare with: safetensors with `images` (u8, [N, C, H, W]), `labels` (u8, `[N]`) and the pixel
    /// range in its metadata, a folder, or a tar; features that `potstill evaluate --save-statistics` wrote; or an
    /// `.npz` file with the moments `mu` and `sigma`, which give FID but neither precision nor recall.
    pub reference: Option<PathBuf>,
    /// TorchScript CLIP, for text-to-image models: images in [−1, 1] and the prompts' tokens, int64 [N, tokens], of the model's first
    /// tokenizer → (image embeddings [N, D], text embeddings [N, D]). With one there is a CLIP score.
    pub clip: Option<PathBuf>,
    /// Steps of the teacher's sampler: Heun's for EDM, where 18 steps are 35 evaluations; guided DDIM for text-to-image models, where
    /// each step is two, and 50 steps are usual.
    pub teacher_steps: u32,
    /// Guidance scale of a text-to-image teacher's samples: 7.5 is diffusers' default for SD 1.5.
    pub teacher_guidance: f64,
    /// k of the k-nearest-neighbour manifolds behind precision and recall.
    pub neighbours: u32,
    /// The run stops when the student's diversity falls below this share of the teacher's: it has collapsed. 0: never.
    pub collapse_share: f64,
}

impl Default for EvaluationSpec {
    fn default() -> Self {
        Self {
            every: 0,
            samples: 2000,
            seed: 1_000_000_007,
            prompts: None,
            prompts_column: None,
            samples_per_prompt: 10,
            images: ImageTreatment::AsMade,
            image_size: None,
            features: None,
            reference: None,
            clip: None,
            teacher_steps: 18,
            teacher_guidance: 7.5,
            neighbours: 3,
            collapse_share: 0.25,
        }
    }
}

/// What happens to images before they are scored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageTreatment {
    /// Nothing: the extractor sees them as they are.
    #[default]
    AsMade,
    /// The largest square in their middle is resized to `image_size` with an antialiased Lanczos filter on 8 bits, as
    /// Pillow does: FID on COCO (GigaGAN, 2303.05511, and after it SiD-LSG, 2406.01561).
    Resized,
    /// A square of `image_size` is cut out of their middle at full resolution: patch FID (SDXL-Lightning, 2402.13929).
    Patch,
}

/// An [`ImageTreatment`] with its size in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// See [`ImageTreatment::AsMade`].
    AsMade,
    /// See [`ImageTreatment::Resized`].
    Resized(u32),
    /// See [`ImageTreatment::Patch`].
    Patch(u32),
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AsMade => f.write_str("as-made"),
            Self::Resized(size) => write!(f, "resized to {size}"),
            Self::Patch(size) => write!(f, "patch of {size}"),
        }
    }
}

/// Side of the patches that patch FID is measured on, in pixels: the size of Inception's input.
const PATCH: u32 = 299;

impl EvaluationSpec {
    /// What happens to images, with its size.
    ///
    /// # Errors
    /// The size is missing, or not wanted, or 0.
    pub fn protocol(&self) -> Result<Protocol, String> {
        match (self.images, self.image_size) {
            (_, Some(0)) => Err("evaluation.image_size is 0; it must be at least 1".into()),
            (ImageTreatment::AsMade, None) => Ok(Protocol::AsMade),
            (ImageTreatment::AsMade, Some(size)) => Err(format!(
                "evaluation.image_size is {size}, but evaluation.images is \"as-made\", which changes no size: set it to \
                 \"resized\" or \"patch\", or leave the size out"
            )),
            (ImageTreatment::Resized, Some(size)) => Ok(Protocol::Resized(size)),
            (ImageTreatment::Resized, None) => {
                Err("evaluation.images is \"resized\": say to what height and width with \
                                                    evaluation.image_size"
                    .into())
            }
            (ImageTreatment::Patch, size) => Ok(Protocol::Patch(size.unwrap_or(PATCH))),
        }
    }
}

/// Workers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClusterSpec {
    /// Fewer than this and the run waits.
    pub min_workers: u32,
    /// More than this stand by.
    pub max_workers: u32,
    /// The one patience setting, in seconds: a worker that is silent for so long is dead. Everything else derives from
    /// it; see [`Timeouts`].
    pub failure_timeout_seconds: f64,
    /// How long the run waits for `min_workers` before it gives up.
    pub wait_timeout_seconds: f64,
}

impl Default for ClusterSpec {
    fn default() -> Self {
        Self { min_workers: 1, max_workers: 1, failure_timeout_seconds: 10.0, wait_timeout_seconds: 300.0 }
    }
}

/// Every timeout of a run, derived from `failure_timeout_seconds` so that they cannot contradict each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Between two heartbeats.
    pub heartbeat_millis: u64,
    /// Silent for so long: unknown.
    pub unknown_millis: u64,
    /// Silent for so long: dead.
    pub dead_millis: u64,
    /// Without progress for so long although it breathes: hung. Four times as patient as with the silent: one unit of work,
    /// such as a micro-batch, may take a while.
    pub hang_millis: u64,
    /// Bound for one collective: longer than it takes to find the peer that is dead or hung, so that the coordinator speaks
    /// first.
    pub collective_millis: u64,
    /// How long to wait for workers.
    pub wait_millis: u64,
}

impl ClusterSpec {
    /// The derived timeouts.
    #[must_use]
    pub fn timeouts(&self) -> Timeouts {
        let millis = |seconds: f64| (seconds * 1000.0) as u64;
        let failure = self.failure_timeout_seconds;
        Timeouts {
            heartbeat_millis: millis(failure / 10.0).max(20),
            unknown_millis: millis(failure / 3.0),
            dead_millis: millis(failure),
            hang_millis: millis(failure * 4.0),
            collective_millis: millis(failure * 6.0),
            wait_millis: millis(self.wait_timeout_seconds),
        }
    }
}

/// Keys that earlier versions had, each with what became of it.
const FORMER_KEYS: &[(&str, &str)] = &[
    (
        "adversarial.score_identity_weight",
        "it is `distillation.score_identity_weight` now, and holds in every run, from the first image",
    ),
    (
        "adversarial.start_images",
        "it is `adversarial.join_images` now: the discriminator learns from the first image, and only the generator's term \
         waits, until more images than this have been seen",
    ),
    (
        "optimiser.clip_value",
        "it is `optimiser.generator_clip_value` and `optimiser.fake_score_clip_value` now",
    ),
];

impl RunSpec {
    /// Reads the layers, resolves relative paths against the file's folder, and validates.
    ///
    /// # Errors
    /// See [`LayerError`].
    pub fn load(file: &Path, sets: &[String]) -> Result<Self, LayerError> {
        let mut spec: Self = layers::load(file, sets, FORMER_KEYS)?;
        let absolute = std::path::absolute(file)
            .map_err(|source| LayerError::Unreadable { path: file.to_owned(), source })?;
        let folder = absolute.parent().unwrap_or(Path::new("/"));
        for path in [
            Some(&mut spec.teacher.weights).filter(|p| !p.as_os_str().is_empty()),
            spec.evaluation.features.as_mut(),
            spec.evaluation.reference.as_mut(),
            spec.evaluation.clip.as_mut(),
            spec.generator.start_from.as_mut(),
        ]
        .into_iter()
        .flatten()
        {
            *path = folder.join(&path);
        }
        let from_folder = |location: &mut String| {
            if !location.is_empty() && !location.contains("://") {
                *location = folder.join(&*location).display().to_string();
            }
        };
        if let Some(adversarial) = &mut spec.adversarial {
            from_folder(&mut adversarial.data);
            adversarial.cache = adversarial.cache.take().map(|cache| folder.join(cache));
        }
        if let Some(prompts) = &mut spec.prompts {
            from_folder(&mut prompts.data);
            prompts.cache = prompts.cache.take().map(|cache| folder.join(cache));
        }
        if let Some(prompts) = &mut spec.evaluation.prompts {
            from_folder(prompts);
        }
        // A name that is no folder here is one of the hub.
        if let Some(model) = &mut spec.teacher.model
            && folder.join(&*model).exists()
        {
            from_folder(model);
        }
        spec.validate()?;
        Ok(spec)
    }

    /// Reads a frozen specification.
    ///
    /// # Errors
    /// See [`LayerError`].
    pub fn from_toml(text: &str) -> Result<Self, LayerError> {
        let spec: Self = layers::from_str(text, "run.toml", FORMER_KEYS)?;
        spec.validate()?;
        Ok(spec)
    }

    /// Reads the frozen specification of a run that is only looked at or exported, of this version or an earlier one: keys that this
    /// version no longer has are passed over. A run that goes on is read by [`from_toml`](Self::from_toml), which refuses them.
    ///
    /// # Errors
    /// See [`LayerError`].
    pub fn of_finished_run(text: &str) -> Result<Self, LayerError> {
        let invalid = |problem: String| LayerError::Invalid { origin: "run.toml".to_owned(), problem };
        let mut table: toml::Table = text.parse().map_err(|e: toml::de::Error| invalid(e.to_string()))?;
        for (key, _) in FORMER_KEYS {
            if let Some((section, key)) = key.split_once('.')
                && let Some(section) = table.get_mut(section).and_then(toml::Value::as_table_mut)
            {
                section.remove(key);
            }
        }
        Self::from_toml(&table.to_string())
    }

    /// The frozen form.
    ///
    /// # Errors
    /// A value that TOML cannot hold, such as a path that is not UTF-8.
    pub fn to_toml(&self) -> Result<String, LayerError> {
        toml::to_string_pretty(self)
            .map_err(|e| LayerError::Invalid { origin: "run.toml".into(), problem: e.to_string() })
    }

    /// Number of micro-batches in one iteration.
    #[must_use]
    pub fn micro_batches(&self) -> u32 {
        self.distillation.global_batch / self.distillation.micro_batch
    }

    /// Checks every value and their agreement.
    ///
    /// # Errors
    /// [`LayerError::OutOfRange`] with one line for each problem.
    pub fn validate(&self) -> Result<(), LayerError> {
        let mut problems = Vec::new();
        let mut require = |holds: bool, problem: String| {
            if !holds {
                problems.push(problem);
            }
        };
        let positive = |x: f64| x.is_finite() && x > 0.0;

        let t = &self.teacher;
        require(
            t.weights.as_os_str().is_empty() == t.model.is_some(),
            "teacher.weights is missing: name the teacher's safetensors file, or a text-to-image model's folder as teacher.model; \
             not both"
                .into(),
        );
        require(
            t.image_size.is_none_or(|sides| t.model.is_some() && sides.iter().all(|side| *side > 0)),
            "teacher.image_size is height and width of a text-to-image model's images".into(),
        );
        require(
            t.model.is_some() == self.prompts.is_some(),
            "prompts and teacher.model go together: text-to-image models need prompts, others take none"
                .into(),
        );
        if let Some(prompts) = &self.prompts {
            require(
                !prompts.data.is_empty() || self.adversarial.is_some(),
                "prompts.data is missing: name the file with the prompts".into(),
            );
        }
        let m = &self.memory;
        require(
            !m.bf16_weights || (self.distillation.precision == Precision::Bf16 && t.model.is_some()),
            "memory.bf16_weights is for text-to-image models with distillation.precision = \"bf16\"".into(),
        );
        require(
            !m.activation_checkpointing || t.model.is_some(),
            "memory.activation_checkpointing is for text-to-image models".into(),
        );
        let g = &self.generator;
        require(g.steps >= 1, "generator.steps is 0; it must be at least 1".into());
        if t.model.is_some() {
            require(
                g.initial_timestep.is_none_or(|initial| initial >= g.steps),
                format!(
                    "generator.initial_timestep is {}, which leaves no {} different timesteps",
                    g.initial_timestep.unwrap_or_default(),
                    g.steps
                ),
            );
        } else {
            require(
                g.sigmas.len() == g.steps as usize,
                format!(
                    "generator.sigmas has {} noise levels, but generator.steps is {}: give one for each step",
                    g.sigmas.len(),
                    g.steps
                ),
            );
        }
        require(
            g.sigmas.iter().all(|s| positive(*s)) && g.sigmas.is_sorted_by(|a, b| a > b),
            format!("generator.sigmas are {:?}; they must be > 0 and fall from step to step", g.sigmas),
        );

        require(
            g.step_weights.is_empty()
                || (g.step_weights.len() == g.steps as usize
                    && g.step_weights.iter().all(|w| w.is_finite() && *w >= 0.0)
                    && g.step_weights.iter().sum::<f64>() > 0.0),
            format!(
                "generator.step_weights are {:?}; give one number ≥ 0 for each of the {} steps, not all 0, or none",
                g.step_weights, g.steps
            ),
        );
        require(
            g.step_weights.is_empty() || g.matching == Matching::UniformStep,
            "generator.step_weights say which step is matched how often; final-step matching matches the last only".into(),
        );

        let d = &self.distillation;
        require(d.iterations > 0, "distillation.iterations is 0; it must be at least 1".into());
        require(d.micro_batch > 0, "distillation.micro_batch is 0; it must be at least 1".into());
        require(
            d.global_batch > 0 && d.micro_batch > 0 && d.global_batch.is_multiple_of(d.micro_batch),
            format!(
                "distillation.global_batch ({}) is not a multiple of distillation.micro_batch ({})",
                d.global_batch, d.micro_batch
            ),
        );
        require(
            d.alpha.is_finite() && (0.0..=2.0).contains(&d.alpha),
            format!("distillation.alpha is {}; it must lie in [0, 2]", d.alpha),
        );
        require(
            d.fake_score_noise.mean.is_finite() && positive(d.fake_score_noise.std),
            "distillation.fake_score_noise needs a finite mean and a std > 0".into(),
        );
        let n = &d.generator_noise;
        require(
            positive(n.sigma_min) && n.sigma_max.is_finite() && n.sigma_min < n.sigma_max,
            format!(
                "distillation.generator_noise needs 0 < sigma_min < sigma_max; they are {} and {}",
                n.sigma_min, n.sigma_max
            ),
        );
        require(positive(n.rho), format!("distillation.generator_noise.rho is {}; it must be > 0", n.rho));
        require(
            n.u_max > 0.0 && n.u_max <= 1.0,
            format!("distillation.generator_noise.u_max is {}; it must lie in (0, 1]", n.u_max),
        );
        require(
            d.timesteps[0] <= d.timesteps[1],
            format!("distillation.timesteps are {:?}; the first must not exceed the last", d.timesteps),
        );
        require(
            positive(d.score_identity_weight),
            format!("distillation.score_identity_weight is {}; it must be > 0", d.score_identity_weight),
        );
        require(
            d.fake_score_updates > 0,
            "distillation.fake_score_updates is 0; it must be at least 1".into(),
        );
        require(
            d.augmentation.is_none_or(|p| (0.0..=1.0).contains(&p)),
            format!(
                "distillation.augmentation is {}; a probability lies in [0, 1]",
                d.augmentation.unwrap_or_default()
            ),
        );
        require(
            d.augmentation.is_none() || t.model.is_none(),
            "distillation.augmentation is for EDM networks that take augmentation labels".into(),
        );
        require(d.non_finite_limit > 0, "distillation.non_finite_limit is 0; it must be at least 1".into());

        let g = &self.guidance;
        require(
            g.scales().iter().all(|scale| scale.abs() <= 100.0),
            format!("guidance scales are {:?}; they must lie in [-100, 100]", g.scales()),
        );
        require(
            g.preset != GuidancePreset::AntiCfg || g.scale > 0.0,
            format!("guidance.scale is {}; anti-cfg needs a strength > 0", g.scale),
        );
        let dropout = g.condition_dropout.unwrap_or_default();
        require(
            (0.0..1.0).contains(&dropout),
            format!("guidance.condition_dropout is {dropout}; it must lie in [0, 1)"),
        );

        if let Some(a) = &self.adversarial {
            require(
                !a.data.is_empty(),
                "adversarial.data is missing: name the real samples, or leave the section out".into(),
            );
            require(a.limit != Some(0), "adversarial.limit is 0; it must be at least 1".into());
            for (name, weight) in [
                ("generator_weight", a.generator_weight),
                ("discriminator_weight", a.discriminator_weight),
                ("approximate_r1", a.approximate_r1),
                ("approximate_r1_sigma", a.approximate_r1_sigma),
            ] {
                require(
                    weight.is_finite() && weight >= 0.0,
                    format!("adversarial.{name} is {weight}; it must be at least 0"),
                );
            }
        }

        let o = &self.optimiser;
        for (name, bound) in [
            ("clip_norm", o.clip_norm),
            ("generator_clip_value", o.generator_clip_value),
            ("fake_score_clip_value", o.fake_score_clip_value),
        ] {
            require(
                bound.is_none_or(positive),
                format!("optimiser.{name} is {}; it must be > 0", bound.unwrap_or_default()),
            );
        }
        for (name, rate) in [
            ("generator_learning_rate", o.generator_learning_rate),
            ("fake_score_learning_rate", o.fake_score_learning_rate),
            ("epsilon", o.epsilon),
            ("ema_half_life_images", o.ema_half_life_images),
        ] {
            require(positive(rate), format!("optimiser.{name} is {rate}; it must be > 0"));
        }
        if let Some(decay) = &o.decay {
            let end = d.iterations * u64::from(d.global_batch);
            require(
                decay.start_images < decay.end_images,
                format!(
                    "optimiser.decay.end_images ({}) must lie behind start_images ({})",
                    decay.end_images, decay.start_images
                ),
            );
            require(
                (0.0..1.0).contains(&decay.end_factor),
                format!("optimiser.decay.end_factor is {}; it must lie in [0, 1)", decay.end_factor),
            );
            require(
                decay.end_factor > 0.0 || decay.end_images >= end,
                format!(
                    "optimiser.decay.end_images is {}, but the run sees {end} images (iterations × global_batch): nothing \
                     would be learned in the rest; move it, or leave something with optimiser.decay.end_factor",
                    decay.end_images
                ),
            );
        }
        for (name, betas) in [("betas", Some(o.betas)), ("generator_betas", o.generator_betas)] {
            let betas = betas.unwrap_or_default();
            require(
                betas.iter().all(|b| (0.0..1.0).contains(b)),
                format!("optimiser.{name} are {betas:?}; each must lie in [0, 1)"),
            );
        }

        require(self.checkpoint.every > 0, "checkpoint.every is 0; it must be at least 1".into());

        let e = &self.evaluation;
        require(
            e.features.is_some() == e.reference.is_some(),
            "evaluation.features and evaluation.reference go together: give both or neither".into(),
        );
        require(
            e.clip.is_none() || e.features.is_some(),
            "evaluation.clip needs evaluation.features and evaluation.reference: without them nothing is scored".into(),
        );
        require(
            e.clip.is_none() || self.teacher.model.is_some(),
            "evaluation.clip is for text-to-image models: it compares images with their prompts".into(),
        );
        require(
            e.prompts.is_none() || self.teacher.model.is_some(),
            "evaluation.prompts is for text-to-image models: others take none".into(),
        );
        require(
            e.prompts.as_ref().is_none_or(|prompts| !prompts.is_empty()),
            "evaluation.prompts is empty: name a file with prompts, or leave it out".into(),
        );
        require(
            e.prompts_column.is_none() || e.prompts.is_some(),
            "evaluation.prompts_column is the column of evaluation.prompts, which is not given; that of prompts.data is \
             prompts.column"
                .into(),
        );
        require(
            e.samples_per_prompt >= 1,
            "evaluation.samples_per_prompt is 0; it must be at least 1".into(),
        );
        let protocol = e.protocol();
        require(protocol.is_ok(), protocol.err().unwrap_or_default());
        require(e.teacher_steps >= 2, "evaluation.teacher_steps must be at least 2".into());
        require(
            e.teacher_guidance.is_finite() && (0.0..=100.0).contains(&e.teacher_guidance),
            format!("evaluation.teacher_guidance is {}; it must lie in [0, 100]", e.teacher_guidance),
        );
        require(
            (0.0..1.0).contains(&e.collapse_share),
            format!("evaluation.collapse_share is {}; it must lie in [0, 1)", e.collapse_share),
        );
        require(e.neighbours >= 1, "evaluation.neighbours must be at least 1".into());
        require(
            e.samples > e.neighbours,
            format!("evaluation.samples is {}; it must exceed evaluation.neighbours", e.samples),
        );

        let c = &self.cluster;
        require(
            c.min_workers >= 1 && c.min_workers <= c.max_workers,
            format!(
                "cluster needs 1 ≤ min_workers ≤ max_workers; they are {} and {}",
                c.min_workers, c.max_workers
            ),
        );
        if d.micro_batch > 0 {
            require(
                c.max_workers <= self.micro_batches(),
                format!(
                    "{} workers but only {} micro-batches per iteration (global_batch / micro_batch): lower \
                     distillation.micro_batch or use fewer workers",
                    c.max_workers,
                    self.micro_batches()
                ),
            );
        }
        require(
            c.failure_timeout_seconds.is_finite() && (0.1..=3600.0).contains(&c.failure_timeout_seconds),
            format!(
                "cluster.failure_timeout_seconds is {}; it must lie in [0.1, 3600]",
                c.failure_timeout_seconds
            ),
        );
        require(
            c.wait_timeout_seconds.is_finite() && c.wait_timeout_seconds >= c.failure_timeout_seconds,
            format!(
                "cluster.wait_timeout_seconds is {}; it must be at least failure_timeout_seconds ({})",
                c.wait_timeout_seconds, c.failure_timeout_seconds
            ),
        );
        if problems.is_empty() { Ok(()) } else { Err(LayerError::OutOfRange { problems }) }
    }

    /// The keys that decide the trajectory and in which `other` differs, with both values. A run may be resumed with more
    /// iterations, other evaluations, checkpoints or workers, but not with these changed.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let trajectory = |spec: &Self| {
            let mut spec = spec.clone();
            spec.distillation.iterations = 0;
            spec.distillation.non_finite_limit = 0;
            // The file may have moved; its content may not have changed.
            spec.teacher.weights = PathBuf::new();
            spec.teacher.model = spec.teacher.model.map(|_| String::new());
            if let Some(prompts) = &mut spec.prompts {
                // Whether there is a file counts: without one captions of real images are taken.
                prompts.data = if prompts.data.is_empty() { "" } else { "a file" }.to_owned();
                prompts.cache = None;
            }
            spec.generator.start_from = spec.generator.start_from.map(|_| PathBuf::new());
            if let Some(adversarial) = &mut spec.adversarial {
                adversarial.data.clear();
                adversarial.cache = None;
            }
            serde_json::json!({
                "teacher": spec.teacher,
                "prompts": spec.prompts,
                "generator": spec.generator,
                "distillation": spec.distillation,
                "guidance": spec.guidance,
                "adversarial": spec.adversarial,
                "optimiser": spec.optimiser,
                "bf16_weights": spec.memory.bf16_weights,
            })
        };
        let mut found = Vec::new();
        compare(&trajectory(self), &trajectory(other), "", &mut found);
        found
    }
}

fn compare(a: &serde_json::Value, b: &serde_json::Value, path: &str, found: &mut Vec<String>) {
    match (a, b) {
        (serde_json::Value::Object(a), serde_json::Value::Object(b)) => {
            for (key, value) in a {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                compare(value, b.get(key).unwrap_or(&serde_json::Value::Null), &path, found);
            }
        }
        _ if a != b => found.push(format!("{path}: {a} there, {b} here")),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid() -> RunSpec {
        let mut spec = RunSpec::default();
        spec.teacher.weights = "teacher.safetensors".into();
        spec
    }

    #[test]
    fn the_frozen_form_reads_back_the_same() {
        let mut spec = valid();
        spec.teacher.sha256 = Some("ab".into());
        spec.distillation.seed = 42;
        assert_eq!(RunSpec::from_toml(&spec.to_toml().unwrap()).unwrap(), spec);
    }

    #[test]
    fn a_finished_run_of_an_earlier_version_can_be_looked_at_but_not_gone_on_with() {
        let mut spec = valid();
        spec.adversarial = Some(AdversarialSpec { data: "real.tar".into(), ..AdversarialSpec::default() });
        let now = spec.to_toml().unwrap();
        let earlier =
            now.replace("[adversarial]", "[adversarial]\nstart_images = 5\nscore_identity_weight = 100.0");
        let earlier = earlier.replace("[optimiser]", "[optimiser]\nclip_value = 1.0");
        assert!(matches!(RunSpec::from_toml(&earlier), Err(LayerError::FormerKey { .. })));
        assert_eq!(RunSpec::of_finished_run(&earlier).unwrap(), spec);
        assert_eq!(RunSpec::of_finished_run(&now).unwrap(), spec);
        assert!(RunSpec::of_finished_run(&now.replace("seed", "sead")).is_err());
    }

    #[test]
    fn every_problem_is_listed_with_its_key() {
        let mut spec = valid();
        spec.distillation.global_batch = 100;
        spec.distillation.micro_batch = 64;
        spec.optimiser.generator_learning_rate = -1.0;
        spec.cluster.min_workers = 3;
        let error = spec.validate().unwrap_err().to_string();
        for key in ["global_batch (100)", "generator_learning_rate is -1", "min_workers"] {
            assert!(error.contains(key), "{error}");
        }
        assert!(RunSpec::default().validate().unwrap_err().to_string().contains("teacher.weights"));
    }

    #[test]
    fn learning_rates_fall_between_two_points() {
        let decay = DecaySpec { start_images: 100, end_images: 300, end_factor: 0.0 };
        let factors = [0, 100, 150, 200, 300, 400].map(|images| decay.factor(images));
        assert_eq!(factors, [1.0, 1.0, 0.75, 0.5, 0.0, 0.0]);
        let decay = DecaySpec { end_factor: 0.5, ..decay };
        assert_eq!([0, 200, 300, 400].map(|images| decay.factor(images)), [1.0, 0.75, 0.5, 0.5]);
    }

    #[test]
    fn what_the_adversarial_loss_is_shown_counts_but_not_where_it_lies() {
        let mut here = valid();
        here.adversarial =
            Some(AdversarialSpec { data: "/here/real.tar".into(), ..AdversarialSpec::default() });
        let mut there = here.clone();
        there.adversarial.as_mut().unwrap().data = "s3://there/real.tar".into();
        assert!(here.differences(&there).is_empty());
        there.adversarial.as_mut().unwrap().limit = Some(100);
        assert_eq!(here.differences(&there), ["adversarial.limit: null there, 100 here"]);
        there.adversarial = None;
        assert_eq!(there.differences(&here).len(), 1);
        assert_eq!(RunSpec::from_toml(&here.to_toml().unwrap()).unwrap(), here);
    }

    #[test]
    fn only_what_decides_the_trajectory_counts_as_a_difference() {
        let here = valid();
        let mut there = here.clone();
        there.distillation.iterations += 1;
        there.cluster.max_workers = 2;
        there.teacher.weights = "elsewhere".into();
        assert!(here.differences(&there).is_empty());
        there.distillation.seed = 9;
        there.teacher.sha256 = Some("other".into());
        let found = there.differences(&here);
        assert_eq!(
            found,
            ["distillation.seed: 9 there, 0 here", "teacher.sha256: \"other\" there, null here"]
        );
    }

    #[test]
    fn relative_paths_are_relative_to_their_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("run.toml");
        std::fs::write(&file, "[teacher]\nweights = 'a/t.safetensors'").unwrap();
        let spec = RunSpec::load(&file, &[]).unwrap();
        assert_eq!(spec.teacher.weights, folder.path().join("a/t.safetensors"));

        let text =
            "[teacher]\nmodel = 'model'\n[prompts]\ndata = 'p.txt'\n[evaluation]\nprompts = 'coco/val.txt'";
        std::fs::write(&file, text).unwrap();
        let prompts = |sets: &[String]| RunSpec::load(&file, sets).unwrap().evaluation.prompts.unwrap();
        assert_eq!(prompts(&[]), folder.path().join("coco/val.txt").display().to_string());
        assert_eq!(prompts(&["evaluation.prompts=s3://b/val.txt".into()]), "s3://b/val.txt");
    }

    #[test]
    fn the_protocol_of_images_has_the_size_that_it_needs() {
        let protocol = |images, image_size| {
            EvaluationSpec { images, image_size, ..EvaluationSpec::default() }.protocol()
        };
        use ImageTreatment::{AsMade, Patch, Resized};
        assert_eq!(protocol(AsMade, None), Ok(Protocol::AsMade));
        assert_eq!(protocol(Resized, Some(256)), Ok(Protocol::Resized(256)));
        assert_eq!(protocol(Patch, None), Ok(Protocol::Patch(299)));
        assert_eq!(protocol(Patch, Some(64)), Ok(Protocol::Patch(64)));
        for (images, size, says) in [
            (AsMade, Some(256), "\"as-made\", which changes no size"),
            (Resized, None, "evaluation.image_size"),
            (Resized, Some(0), "is 0"),
        ] {
            let error = protocol(images, size).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn prompts_of_an_evaluation_are_for_models_that_read() {
        let mut spec = valid();
        spec.evaluation.prompts = Some("coco.txt".into());
        spec.evaluation.prompts_column = Some("caption".into());
        spec.evaluation.samples_per_prompt = 0;
        spec.evaluation.image_size = Some(256);
        let error = spec.validate().unwrap_err().to_string();
        for key in ["evaluation.prompts is for text-to-image", "samples_per_prompt is 0", "image_size is 256"]
        {
            assert!(error.contains(key), "{error}");
        }
        spec.evaluation = EvaluationSpec { prompts_column: Some("x".into()), ..EvaluationSpec::default() };
        assert!(spec.validate().unwrap_err().to_string().contains("prompts_column"));
    }
}
