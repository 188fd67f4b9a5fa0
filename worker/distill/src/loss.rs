//! The losses, as plain functions of tensors. Each returns one number per sample; the caller divides by the global
//! batch, which only it knows.

use potstill_models::ForwardProcess;
use tch::{Kind, Tensor};

/// Sums over everything but the batch: [N, …] → `[N]`.
fn sum_elements(x: &Tensor) -> Tensor {
    x.flatten(1, -1).sum_dim_intlist([1i64].as_slice(), false, Kind::Float)
}

/// The denoising loss `w(t)·|D − x|²`, per sample, summed over its elements; `weight` is
/// [`ForwardProcess::loss_weight`](potstill_models::ForwardProcess::loss_weight).
///
/// Trains the fake score on generated images, and a teacher on real ones. `denoised` and `clean` are [N, C, H, W], `weight`
/// is `[N]`.
pub fn denoising(denoised: &Tensor, clean: &Tensor, weight: &Tensor) -> Tensor {
    sum_elements(&(denoised - clean).square()) * weight
}

/// ω: the weight of a sample in the generator's loss, given its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weighting {
    /// 1 / max(mean|x_g − f_φ|, 1e-5) (2404.04057).
    ScoreIdentity,
    /// 1 − t, for flows (2509.25127's default).
    OneMinusT,
    /// 1 − t², for flows (2509.25127's code).
    OneMinusTSquared,
    /// 1/t, for flows (2509.25127's code).
    InverseT,
    /// 1/t², for flows (2509.25127's code).
    InverseTSquared,
    /// The process's signal-to-noise ratio.
    Snr,
    /// The square root of the process's signal-to-noise ratio.
    SqrtSnr,
}

impl Weighting {
    /// Whether it is defined on a process: some weightings need a flow's time, which is in [0, 1].
    #[must_use]
    pub fn fits(self, process: &ForwardProcess) -> bool {
        match self {
            Self::ScoreIdentity | Self::Snr | Self::SqrtSnr => true,
            Self::OneMinusT | Self::OneMinusTSquared | Self::InverseT | Self::InverseTSquared => {
                *process == ForwardProcess::Flow
            }
        }
    }

    /// ω, `[N]`; without gradient.
    pub fn weight(
        self,
        process: &ForwardProcess,
        time: &Tensor,
        generated: &Tensor,
        teacher: &Tensor,
    ) -> Tensor {
        let t = time.to_kind(Kind::Float).view([-1]);
        match self {
            Self::ScoreIdentity => score_identity_weight(generated, teacher),
            Self::OneMinusT => 1.0 - t,
            Self::OneMinusTSquared => 1.0 - t.square(),
            Self::InverseT => t.reciprocal(),
            Self::InverseTSquared => t.square().reciprocal(),
            Self::Snr => process.snr(time),
            Self::SqrtSnr => process.snr(time).sqrt(),
        }
    }
}

/// SiD's weight ω = 1 / max(mean|x_g − f_φ|, 1e-5) per sample (2404.04057, eq. 23). Takes no gradient.
pub fn score_identity_weight(generated: &Tensor, teacher: &Tensor) -> Tensor {
    tch::no_grad(|| {
        (generated - teacher)
            .abs()
            .flatten(1, -1)
            .mean_dim([1i64].as_slice(), false, Kind::Float)
            .clamp_min(1e-5)
            .reciprocal()
    })
}

/// The generator's score identity loss (2404.04057, eq. 23) per sample, summed over its elements: with δ = f_φ − f_ψ,
/// `ω · δ · [(f_φ − x_g) − α·δ]`.
///
/// The images are [N, C, H, W] and `weight`, ω, is `[N]`; gradients flow through each of the images into the generator.
pub fn score_identity(
    generated: &Tensor,
    teacher: &Tensor,
    fake_score: &Tensor,
    alpha: f64,
    weight: &Tensor,
) -> Tensor {
    let difference = teacher - fake_score;
    // The bracket, with fewer operations where terms cancel.
    let residual =
        if alpha == 1.0 { fake_score - generated } else { teacher - generated - &difference * alpha };
    sum_elements(&(difference * residual)) * weight
}
