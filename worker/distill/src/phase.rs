//! One micro-batch of either phase of a SiD iteration (2404.04057, algorithm 1; ALGORITHM §3).
//!
//! Both return the loss **summed** over the micro-batch: what to divide by is known to the caller, who knows the global
//! batch. A sample in which something is not finite contributes 0 and is counted.

use potstill_models::{Condition, Denoiser, Mode};
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
    adversarial::{self, Adversarial, RealData},
    condition::Conditions,
    generator::{Matching, Unroll, generate},
    guidance::{self, Guidance},
    loss::{self, Weighting},
    random::{Purpose, Stream},
    time::TimeLaw,
};

/// What decides a micro-batch besides the networks.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Decides every random number.
    pub seed: u64,
    /// Samples per micro-batch.
    pub micro_batch: i64,
    /// Time of each of the generator's steps.
    pub times: Vec<f64>,
    /// Which of its outputs are matched.
    pub matching: Matching,
    /// α of the generator loss.
    pub alpha: f64,
    /// ω of the generator loss.
    pub weighting: Weighting,
    /// Law of the times at which the fake score learns.
    pub fake_score_times: TimeLaw,
    /// Law of the times at which the generator phase compares scores.
    pub generator_times: TimeLaw,
    /// Scales of the predictions.
    pub guidance: Guidance,
    /// The adversarial loss, if there is one.
    pub adversarial: Option<Adversarial>,
    /// Dropout on or off in the network that trains.
    pub training_mode: Mode,
    /// Where the networks are.
    pub device: Device,
}

impl Settings {
    fn unroll(&self, iteration: u64) -> Unroll {
        Unroll::of(&self.matching, self.times.len(), self.seed, iteration)
    }

    /// The adversarial loss, once it has started.
    fn adversarial(&self, iteration: u64) -> Option<&Adversarial> {
        self.adversarial.as_ref().filter(|a| iteration >= a.start_iteration)
    }
}

/// One micro-batch's loss with its graph, and what is to be reported of it. All are scalars on the device, so that
/// nothing waits for the device before the backward pass is queued.
pub struct MicroBatchLoss {
    /// Sum over samples of the whole loss; back-propagate this, scaled.
    pub loss: Tensor,
    /// Sum over samples of the denoising loss (fake-score phase) or the score identity loss (generator phase), unweighted;
    /// no graph.
    pub score_loss: Tensor,
    /// Sum over samples of the discriminator's or the generator's adversarial loss, unweighted; no graph.
    pub adversarial_loss: Option<Tensor>,
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
    time: Tensor,
    noise: Tensor,
}

impl Draw {
    fn new(
        stream: &mut Stream,
        network: &dyn Denoiser,
        conditions: &dyn Conditions,
        settings: &Settings,
        steps: usize,
        law: TimeLaw,
    ) -> Self {
        let n = settings.micro_batch;
        let [channels, height, width] = network.sample_shape();
        let shape = [n, channels, height, width];
        let condition = conditions.draw(stream, n, settings.device);
        let draw = Self {
            condition,
            latents: (0..steps).map(|_| stream.normal(&shape)).collect(),
            time: law.draw(stream, n, settings.device),
            noise: stream.normal(&shape),
        };
        stream.seed_dropout();
        draw
    }
}

/// Which samples keep their condition, fp32 [N, 1] of 0 and 1, where guidance asks to drop some.
fn kept_conditions(stream: &mut Stream, settings: &Settings) -> Option<Tensor> {
    let share = settings.guidance.dropped_share();
    (share > 0.0).then(|| {
        let kept: Vec<f32> =
            stream.uniform(settings.micro_batch).iter().map(|u| f32::from(u8::from(*u >= share))).collect();
        Tensor::from_slice(&kept).to_device(settings.device).unsqueeze(1)
    })
}

/// The condition of the samples that keep theirs.
fn keep(condition: &Condition, kept: Option<&Tensor>) -> Condition {
    match kept {
        Some(kept) => condition.kept(kept),
        None => condition.shallow_clone(),
    }
}

/// Elements of a sample: what a loss that is a mean over a map is scaled by, beside one that is a sum over elements (2509.25127's
/// code; SiDA's scales the discriminator's by the denoising loss's weight instead, which small noise levels dominate).
fn elements(x: &Tensor) -> f64 {
    x.size()[1..].iter().product::<i64>() as f64
}

/// The fake-score phase: f_ψ learns to denoise what G makes, and to tell it from `real` once the adversarial loss has
/// started. `generator` takes no gradient.
pub fn fake_score(
    generator: &dyn Denoiser,
    fake_score: &dyn Denoiser,
    conditions: &dyn Conditions,
    real: Option<&dyn RealData>,
    settings: &Settings,
    iteration: u64,
    micro_batch: u32,
) -> MicroBatchLoss {
    let purpose = Purpose::FakeScorePhase;
    let mut stream = Stream::new(settings.seed, iteration, purpose, micro_batch, settings.device);
    let unroll = settings.unroll(iteration);
    let draw =
        Draw::new(&mut stream, fake_score, conditions, settings, unroll.steps, settings.fake_score_times);
    // Without dropout: here the generator is a source of samples, not the network that trains.
    let generated = no_grad(|| {
        generate(generator, &draw.latents, &draw.condition, &settings.times, unroll.trained_from, Mode::Eval)
    });
    let (generated, finite) = finite_samples(&generated);
    let (process, mode) = (fake_score.process(), settings.training_mode);
    let noisy = process.add_noise(&generated, &draw.noise, &draw.time);
    let kept = kept_conditions(&mut stream, settings);
    let condition = keep(&draw.condition, kept.as_ref());
    let scale = settings.guidance.fake_score_training;
    let weight = process.loss_weight(&draw.time);
    let denoising = |denoised: &Tensor| loss::denoising(denoised, &generated, &weight);

    let Some((settings_of, real)) = settings.adversarial(iteration).zip(real) else {
        let denoised = guidance::denoise(fake_score, &noisy, &draw.time, &condition, scale, mode);
        let (loss, dropped) = sum_finite(&denoising(&denoised), &finite);
        return MicroBatchLoss {
            score_loss: loss.detach(),
            loss,
            adversarial_loss: None,
            score_difference: None,
            dropped,
        };
    };
    let (denoised, bottleneck) =
        guidance::denoise_and_encode(fake_score, &noisy, &draw.time, &condition, scale, mode);
    let score_losses = denoising(&denoised);
    let (samples, own) = real.draw(&mut stream, settings.micro_batch, settings.device);
    // At κ₁ = 0 the generated samples' logits keep every condition, so the real ones' do too.
    let own = if scale == 0.0 { own } else { keep(&own, kept.as_ref()) };
    let noisy_real = process.add_noise(&samples, &draw.noise, &draw.time);
    let logits = |x: &Tensor| adversarial::logits(&fake_score.encode(x, &draw.time, &own, mode));
    let on_real = logits(&noisy_real);
    let adversarial_losses = adversarial::discriminator_loss(&on_real, &adversarial::logits(&bottleneck));
    let mut adversarial_total = &adversarial_losses * settings_of.discriminator_weight;
    if settings_of.approximate_r1 > 0.0 {
        let shift = stream.normal(&noisy_real.size()) * settings_of.approximate_r1_sigma;
        let penalty = adversarial::approximate_r1(&on_real, &logits(&(&noisy_real + shift)));
        adversarial_total += penalty * settings_of.approximate_r1;
    }
    let losses = &score_losses + adversarial_total * elements(&generated);
    let (loss, dropped) = sum_finite(&losses, &finite);
    MicroBatchLoss {
        loss,
        score_loss: sum_finite(&score_losses.detach(), &finite).0,
        adversarial_loss: Some(sum_finite(&adversarial_losses.detach(), &finite).0),
        score_difference: None,
        dropped,
    }
}

/// The generator phase: G steps along the difference of the scores, and towards what the discriminator takes for real once
/// the adversarial loss has started. `teacher` and `fake_score` must be frozen: their weights take no gradient, but
/// gradients flow through their inputs into G.
pub fn generator(
    generator: &dyn Denoiser,
    fake_score: &dyn Denoiser,
    teacher: &dyn Denoiser,
    conditions: &dyn Conditions,
    settings: &Settings,
    iteration: u64,
    micro_batch: u32,
) -> MicroBatchLoss {
    let purpose = Purpose::GeneratorPhase;
    let mut stream = Stream::new(settings.seed, iteration, purpose, micro_batch, settings.device);
    let unroll = settings.unroll(iteration);
    let draw =
        Draw::new(&mut stream, generator, conditions, settings, unroll.steps, settings.generator_times);
    let (from, mode) = (unroll.trained_from, settings.training_mode);
    let generated = generate(generator, &draw.latents, &draw.condition, &settings.times, from, mode);
    let (generated, finite) = finite_samples(&generated);
    let process = teacher.process();
    let noisy = process.add_noise(&generated, &draw.noise, &draw.time);
    let Guidance { teacher: teacher_scale, fake_score: fake_scale, .. } = settings.guidance;
    let (time, condition) = (&draw.time, &draw.condition);
    let real = guidance::denoise(teacher, &noisy, time, condition, teacher_scale, Mode::Eval);
    let adversarial = settings.adversarial(iteration);
    let (fake, bottleneck) = match adversarial {
        None => (guidance::denoise(fake_score, &noisy, time, condition, fake_scale, Mode::Eval), None),
        Some(_) => {
            let (fake, bottleneck) =
                guidance::denoise_and_encode(fake_score, &noisy, time, condition, fake_scale, Mode::Eval);
            (fake, Some(bottleneck))
        }
    };
    let weight = settings.weighting.weight(process, time, &generated, &real);
    let score_losses = loss::score_identity(&generated, &real, &fake, settings.alpha, &weight);
    let score_difference = no_grad(|| {
        let squares =
            (&real - &fake).square().flatten(1, -1).sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
        sum_finite(&squares, &finite).0
    });
    let Some((adversarial, bottleneck)) = adversarial.zip(bottleneck) else {
        let (loss, dropped) = sum_finite(&score_losses, &finite);
        return MicroBatchLoss {
            score_loss: loss.detach(),
            loss,
            adversarial_loss: None,
            score_difference: Some(score_difference),
            dropped,
        };
    };
    let adversarial_losses = adversarial::generator_loss(&adversarial::logits(&bottleneck));
    let losses = &score_losses * (0.5 * adversarial.score_identity_weight)
        + &adversarial_losses * &weight * (0.5 * adversarial.generator_weight * elements(&generated));
    let (loss, dropped) = sum_finite(&losses, &finite);
    MicroBatchLoss {
        loss,
        score_loss: sum_finite(&score_losses.detach(), &finite).0,
        adversarial_loss: Some(sum_finite(&adversarial_losses.detach(), &finite).0),
        score_difference: Some(score_difference),
        dropped,
    }
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
