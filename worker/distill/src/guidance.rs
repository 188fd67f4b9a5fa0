//! Guidance (2207.12598; docs/algorithm.md §4): the prediction at scale κ is `u + κ·(c − u)`, u unconditional, c conditional.

use potstill_models::{Condition, Denoiser, Mode};
use tch::Tensor;

/// The three guidance scales, which trade alignment against diversity.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Guidance {
    /// κ₁: the fake score while it trains. The loss is that of the guided prediction; gradients flow through both
    /// halves.
    pub fake_score_training: f64,
    /// κ₂ = κ₃: the fake score in the generator's loss.
    pub fake_score: f64,
    /// κ₄: the teacher.
    pub teacher: f64,
    /// Share of the fake score's samples that are generated and learned without their condition where the fake score is
    /// guided, so that it learns the unconditional score. SiD-LSG: 0.1; SiD-DiT: 0.
    pub condition_dropout: f64,
}

impl Guidance {
    /// No guidance: SiD as published (2404.04057).
    pub const NONE: Self =
        Self { fake_score_training: 1.0, fake_score: 1.0, teacher: 1.0, condition_dropout: 0.0 };

    /// Share of the fake score's samples to make and learn without condition: none where it is not guided (κ₁ = κ₂ = 1), and
    /// none where it learns nothing but the unconditional score of conditional samples (κ₁ = 0).
    ///
    /// ```
    /// use potstill_distill::guidance::Guidance;
    ///
    /// let lsg = Guidance { fake_score_training: 1.5, fake_score: 1.5, teacher: 1.5, condition_dropout: 0.1 };
    /// assert_eq!(lsg.dropped_share(), 0.1);
    /// assert_eq!(Guidance { fake_score_training: 0.0, ..lsg }.dropped_share(), 0.0);
    /// ```
    #[must_use]
    pub fn dropped_share(&self) -> f64 {
        let unguided = self.fake_score_training == 1.0 && self.fake_score == 1.0;
        if unguided || self.fake_score_training == 0.0 { 0.0 } else { self.condition_dropout }
    }
}

/// The prediction at scale κ. At κ = 1 and κ = 0 only the half that is needed is computed; otherwise both run as one
/// batch of twice the size.
pub fn denoise(
    network: &dyn Denoiser,
    x_t: &Tensor,
    time: &Tensor,
    condition: &Condition,
    scale: f64,
    mode: Mode,
) -> Tensor {
    if scale == 0.0 {
        return network.denoise(x_t, time, &condition.dropped(), mode);
    }
    denoise_and_encode(network, x_t, time, condition, scale, mode).0
}

/// [`denoise`], and the bottleneck of the **conditional** half: a discriminator's logits keep the condition whatever κ is
/// (2505.12674). At κ = 0 the conditional half runs through the encoder only.
pub fn denoise_and_encode(
    network: &dyn Denoiser,
    x_t: &Tensor,
    time: &Tensor,
    condition: &Condition,
    scale: f64,
    mode: Mode,
) -> (Tensor, Tensor) {
    if scale == 1.0 {
        return network.denoise_and_encode(x_t, time, condition, mode);
    }
    let Some(both) = condition.doubled() else {
        return network.denoise_and_encode(x_t, time, condition, mode);
    };
    if scale == 0.0 {
        let unconditional = network.denoise(x_t, time, &condition.dropped(), mode);
        return (unconditional, network.encode(x_t, time, condition, mode));
    }
    let twice = |x: &Tensor| Tensor::cat(&[x, x], 0);
    let (denoised, bottleneck) = network.denoise_and_encode(&twice(x_t), &twice(time), &both, mode);
    let halves = denoised.chunk(2, 0);
    let guided = &halves[0] + (&halves[1] - &halves[0]) * scale;
    (guided, bottleneck.chunk(2, 0).swap_remove(1))
}
