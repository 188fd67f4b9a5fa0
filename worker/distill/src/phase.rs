//! One micro-batch of either phase of a SiD iteration (2404.04057, algorithm 1; ALGORITHM §3).
//!
//! Both return the loss **summed** over the micro-batch: what to divide by is known to the caller, who knows the global
//! batch. A sample in which something is not finite contributes 0 and is counted.

use potstill_models::{Condition, Denoiser, Mode};
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
    generator::{Matching, Unroll, generate},
    guidance::{self, Guidance},
    loss,
    noise::{Karras, LogNormal},
    random::{Purpose, Stream},
};

/// What decides a micro-batch besides the networks.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Decides every random number.
    pub seed: u64,
    /// Samples per micro-batch.
    pub micro_batch: i64,
    /// Noise level of each of the generator's steps.
    pub sigmas: Vec<f64>,
    /// Which of its outputs are matched.
    pub matching: Matching,
    /// α of the generator loss.
    pub alpha: f64,
    /// σ_data of the teacher's preconditioning, which also weighs the fake score's loss.
    pub sigma_data: f64,
    /// Noise law of the fake-score phase.
    pub fake_score_noise: LogNormal,
    /// Noise law of the generator phase.
    pub generator_noise: Karras,
    /// Scales of the predictions.
    pub guidance: Guidance,
    /// Dropout on or off in the network that trains.
    pub training_mode: Mode,
    /// Where the networks are.
    pub device: Device,
}

impl Settings {
    fn unroll(&self, iteration: u64) -> Unroll {
        Unroll::of(self.matching, self.sigmas.len(), self.seed, iteration)
    }
}

/// One micro-batch's loss with its graph, and what is to be reported of it. All are scalars on the device, so that
/// nothing waits for the device before the backward pass is queued.
pub struct MicroBatchLoss {
    /// Sum over samples; back-propagate this, scaled.
    pub loss: Tensor,
    /// Sum over samples of |f_φ − f_ψ|²; only in the generator phase.
    pub score_difference: Option<Tensor>,
    /// How many samples were left out because something in them was not finite; int64.
    pub dropped: Tensor,
}

/// The random numbers of one micro-batch, in the order in which they are drawn.
struct Draw {
    condition: Condition,
    /// One for each step of the generator that is run.
    latents: Vec<Tensor>,
    sigma: Tensor,
    noise: Tensor,
}

impl Draw {
    fn new(
        stream: &mut Stream,
        network: &dyn Denoiser,
        settings: &Settings,
        steps: usize,
        law: impl FnOnce(&mut Stream) -> Tensor,
    ) -> Self {
        let n = settings.micro_batch;
        let [channels, height, width] = network.sample_shape();
        let shape = [n, channels, height, width];
        let condition = draw_condition(stream, n, network.classes(), settings.device);
        let draw = Self {
            condition,
            latents: (0..steps).map(|_| stream.normal(&shape)).collect(),
            sigma: law(stream),
            noise: stream.normal(&shape),
        };
        stream.seed_dropout();
        draw
    }

    /// x + σ·n
    fn diffuse(&self, x: &Tensor) -> Tensor {
        x + &self.noise * self.sigma.view([-1, 1, 1, 1])
    }
}

/// Uniform classes for `n` samples; no condition where the network knows no classes.
pub fn draw_condition(stream: &mut Stream, n: i64, classes: i64, device: Device) -> Condition {
    if classes == 0 {
        return Condition::None;
    }
    let labels = Tensor::from_slice(&stream.integers(n, classes));
    Condition::Class(labels.one_hot(classes).to_kind(Kind::Float).to_device(device))
}

/// The condition with a share of its samples made unconditional, where guidance asks for that.
fn drop_conditions(stream: &mut Stream, condition: &Condition, settings: &Settings) -> Condition {
    let Condition::Class(labels) = condition else { return Condition::None };
    let share = settings.guidance.dropped_share();
    if share == 0.0 {
        return Condition::Class(labels.shallow_clone());
    }
    let kept: Vec<f32> =
        stream.uniform(settings.micro_batch).iter().map(|u| f32::from(u8::from(*u >= share))).collect();
    Condition::Class(labels * Tensor::from_slice(&kept).to_device(settings.device).unsqueeze(1))
}

/// The fake-score phase: f_ψ learns to denoise what G makes. `generator` takes no gradient.
pub fn fake_score(
    generator: &dyn Denoiser,
    fake_score: &dyn Denoiser,
    settings: &Settings,
    iteration: u64,
    micro_batch: u32,
) -> MicroBatchLoss {
    let purpose = Purpose::FakeScorePhase;
    let mut stream = Stream::new(settings.seed, iteration, purpose, micro_batch, settings.device);
    let unroll = settings.unroll(iteration);
    let draw = Draw::new(&mut stream, fake_score, settings, unroll.steps, |s| {
        settings.fake_score_noise.draw(s, settings.micro_batch, settings.device)
    });
    // Without dropout: here the generator is a source of samples, not the network that trains.
    let generated = no_grad(|| {
        generate(generator, &draw.latents, &draw.condition, &settings.sigmas, unroll.trained_from, Mode::Eval)
    });
    let (generated, finite) = finite_samples(&generated);
    let Guidance { fake_score_training: scale, .. } = settings.guidance;
    let (noisy, mode) = (draw.diffuse(&generated), settings.training_mode);
    let condition = drop_conditions(&mut stream, &draw.condition, settings);
    let denoised = guidance::denoise(fake_score, &noisy, &draw.sigma, &condition, scale, mode);
    let losses = loss::denoising(&denoised, &generated, &draw.sigma, settings.sigma_data);
    let (loss, dropped) = sum_finite(&losses, &finite);
    MicroBatchLoss { loss, score_difference: None, dropped }
}

/// The generator phase: G steps along the difference of the scores. `teacher` and `fake_score` must be frozen: their
/// weights take no gradient, but gradients flow through their inputs into G.
pub fn generator(
    generator: &dyn Denoiser,
    fake_score: &dyn Denoiser,
    teacher: &dyn Denoiser,
    settings: &Settings,
    iteration: u64,
    micro_batch: u32,
) -> MicroBatchLoss {
    let purpose = Purpose::GeneratorPhase;
    let mut stream = Stream::new(settings.seed, iteration, purpose, micro_batch, settings.device);
    let unroll = settings.unroll(iteration);
    let draw = Draw::new(&mut stream, generator, settings, unroll.steps, |s| {
        settings.generator_noise.draw(s, settings.micro_batch, settings.device)
    });
    let (from, mode) = (unroll.trained_from, settings.training_mode);
    let generated = generate(generator, &draw.latents, &draw.condition, &settings.sigmas, from, mode);
    let (generated, finite) = finite_samples(&generated);
    let noisy = draw.diffuse(&generated);
    let guided = |network: &dyn Denoiser, scale: f64| {
        guidance::denoise(network, &noisy, &draw.sigma, &draw.condition, scale, Mode::Eval)
    };
    let real = guided(teacher, settings.guidance.teacher);
    let fake = guided(fake_score, settings.guidance.fake_score);
    let losses = loss::score_identity(&generated, &real, &fake, settings.alpha);
    let (loss, dropped) = sum_finite(&losses, &finite);
    let score_difference = no_grad(|| {
        let squares =
            (&real - &fake).square().flatten(1, -1).sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
        sum_finite(&squares, &finite).0
    });
    MicroBatchLoss { loss, score_difference: Some(score_difference), dropped }
}

/// The samples with those that are not finite replaced by 0, and which ones are finite, `[N]` bool. The shape stays, so
/// that every rank runs the same graph whatever it drops.
fn finite_samples(x: &Tensor) -> (Tensor, Tensor) {
    let finite = x.isfinite().flatten(1, -1).all_dim(1, false);
    (x.where_scalarother(&finite.view([-1, 1, 1, 1]), 0.0), finite)
}

/// Sum of the finite losses of the finite samples, and how many samples that leaves out.
fn sum_finite(losses: &Tensor, finite: &Tensor) -> (Tensor, Tensor) {
    let finite = losses.isfinite().logical_and(finite);
    let loss = losses.where_scalarother(&finite, 0.0).sum(Kind::Float);
    (loss, finite.logical_not().sum(Kind::Int64))
}
