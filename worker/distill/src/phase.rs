//! One micro-batch of either phase of a SiD iteration (2404.04057, algorithm 1; docs/algorithm.md §3).
//!
//! Both return the loss **summed** over the micro-batch: the caller knows the global batch, by which it is divided. A
//! sample with a value that is not finite contributes 0 and is counted.

use potstill_models::{Condition, Denoiser, Mode};
use tch::{Kind, Tensor, no_grad};

use crate::{
    adversarial::{self, Terms},
    augmentation::Transforms,
    draws::{Draw, RealDraw},
    generator::generate,
    guidance::{self, Guidance},
    loss,
    settings::Settings,
};

/// One micro-batch's loss with its graph, and the values to be reported. All are scalars on the device, so that the
/// host does not wait for the device before the backward pass is queued.
pub struct MicroBatchLoss {
    /// Sum over samples of the complete loss; back-propagate this, scaled.
    pub loss: Tensor,
    /// Sum over samples of the denoising loss (fake-score phase) or the score identity loss (generator phase), unweighted;
    /// no graph.
    pub score_loss: Tensor,
    /// Sum over samples of the discriminator's or the generator's adversarial loss, unweighted; no graph.
    pub adversarial_loss: Option<Tensor>,
    /// Sum over samples of |f_φ − f_ψ|²; only in the generator phase.
    pub score_difference: Option<Tensor>,
    /// Number of samples that were left out because a value of theirs was not finite; int64.
    pub dropped: Tensor,
}

impl MicroBatchLoss {
    /// Applies a function to each value.
    #[must_use]
    pub fn map(&self, f: impl Fn(&Tensor) -> Tensor) -> Self {
        Self {
            loss: f(&self.loss),
            score_loss: f(&self.score_loss),
            adversarial_loss: self.adversarial_loss.as_ref().map(&f),
            score_difference: self.score_difference.as_ref().map(&f),
            dropped: f(&self.dropped),
        }
    }
}

/// Elements of a sample: the factor that makes a mean over a map a sum over elements.
fn elements(x: &Tensor) -> f64 {
    x.size()[1..].iter().product::<i64>() as f64
}

/// Samples as the fake score learns them, with their condition.
fn augmented(samples: Tensor, condition: &Condition, transforms: Option<&Transforms>) -> (Tensor, Condition) {
    match transforms {
        None => (samples, condition.shallow_clone()),
        Some(transforms) => {
            let (samples, labels) = transforms.apply(&samples);
            (samples, condition.shallow_clone().augmented(labels))
        }
    }
}

/// The fake-score phase: f_ψ learns to denoise the samples of G, and, in an adversarial run, to tell them from real
/// samples. `generator` gets no gradient.
pub fn fake_score(
    generator: &dyn Denoiser,
    fake_score: &dyn Denoiser,
    draw: &Draw,
    settings: &Settings,
) -> MicroBatchLoss {
    tch::manual_seed(draw.dropout_seed);
    // Without dropout: here the generator is a source of samples, not the network that trains.
    let generated = no_grad(|| {
        let from = draw.unroll.trained_from;
        generate(generator, &draw.latents, &draw.condition, &settings.times, from, Mode::Eval)
    });
    let (generated, finite) = finite_samples(&generated);
    let (generated, condition) = augmented(generated, &draw.condition, draw.augmentation.as_ref());
    let (process, mode) = (fake_score.process(), settings.training_mode);
    let noisy = process.add_noise(&generated, &draw.noise, &draw.time);
    let scale = settings.guidance.fake_score_training;
    let weight = process.loss_weight(&draw.time);
    let denoising = |denoised: &Tensor| loss::denoising(denoised, &generated, &weight);

    let Some((adversarial, real)) = settings.adversarial.as_ref().zip(draw.real.as_ref()) else {
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
    let RealDraw { samples, condition, augmentation, perturbation } = real;
    let (samples, condition) = augmented(samples.shallow_clone(), condition, augmentation.as_ref());
    let noisy_real = process.add_noise(&samples, &draw.noise, &draw.time);
    let logits = |x: &Tensor| adversarial::logits(&fake_score.encode(x, &draw.time, &condition, mode));
    let on_real = logits(&noisy_real);
    let elements = elements(&generated);
    let Terms { bce, losses } = adversarial.scaling.discriminator(
        &on_real,
        &adversarial::logits(&bottleneck),
        &weight,
        elements,
        &finite,
    );
    let mut losses = &score_losses + losses * adversarial.discriminator_weight;
    if let Some(noise) = perturbation {
        let shifted = &noisy_real + noise * adversarial.approximate_r1_sigma;
        let penalty = adversarial::approximate_r1(&on_real, &logits(&shifted));
        losses += penalty * (adversarial.approximate_r1 * elements);
    }
    let (loss, dropped) = sum_finite(&losses, &finite);
    MicroBatchLoss {
        loss,
        score_loss: sum_finite(&score_losses.detach(), &finite).0,
        adversarial_loss: Some(sum_finite(&bce.detach(), &finite).0),
        score_difference: None,
        dropped,
    }
}

/// The generator phase: G steps along the difference of the scores, and towards samples that the discriminator takes
/// for real once the adversarial term has joined. `teacher` and `fake_score` must be frozen: their weights get no
/// gradient, but gradients flow through their inputs into G.
pub fn generator(
    generator: &dyn Denoiser,
    fake_score: &dyn Denoiser,
    teacher: &dyn Denoiser,
    draw: &Draw,
    settings: &Settings,
    iteration: u64,
) -> MicroBatchLoss {
    tch::manual_seed(draw.dropout_seed);
    let (from, mode) = (draw.unroll.trained_from, settings.training_mode);
    let generated = generate(generator, &draw.latents, &draw.condition, &settings.times, from, mode);
    let (generated, finite) = finite_samples(&generated);
    let process = teacher.process();
    let noisy = process.add_noise(&generated, &draw.noise, &draw.time);
    let Guidance { teacher: teacher_scale, fake_score: fake_scale, .. } = settings.guidance;
    let (time, condition) = (&draw.time, &draw.condition);
    let real = guidance::denoise(teacher, &noisy, time, condition, teacher_scale, Mode::Eval);
    let joined = settings.schedule.adversarial_term_joined(iteration);
    let adversarial = settings.adversarial.as_ref().filter(|_| joined);
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
    let lambda = settings.score_identity_weight;
    let (losses, bce) = match adversarial.zip(bottleneck) {
        None => (&score_losses * lambda, None),
        Some((adversarial, bottleneck)) => {
            let logits = adversarial::logits(&bottleneck);
            let Terms { bce, losses } =
                adversarial.scaling.generator(&logits, &weight, elements(&generated), &finite);
            let losses = &score_losses * (0.5 * lambda) + losses * (0.5 * adversarial.generator_weight);
            (losses, Some(bce))
        }
    };
    let (loss, dropped) = sum_finite(&losses, &finite);
    MicroBatchLoss {
        loss,
        score_loss: sum_finite(&score_losses.detach(), &finite).0,
        adversarial_loss: bce.map(|bce| sum_finite(&bce.detach(), &finite).0),
        score_difference: Some(score_difference),
        dropped,
    }
}

/// The samples with non-finite ones replaced by 0, and which ones are finite, `[N]` bool. The shape is kept, so that
/// every rank runs the same graph.
fn finite_samples(x: &Tensor) -> (Tensor, Tensor) {
    let finite = x.isfinite().flatten(1, -1).all_dim(1, false);
    (x.where_scalarother(&finite.view([-1, 1, 1, 1]), 0.0), finite)
}

/// Sum of the finite losses of the finite samples, and the number of samples left out.
fn sum_finite(losses: &Tensor, finite: &Tensor) -> (Tensor, Tensor) {
    let finite = losses.isfinite().logical_and(finite);
    let loss = losses.where_scalarother(&finite, 0.0).sum(Kind::Float);
    (loss, finite.logical_not().sum(Kind::Int64))
}
