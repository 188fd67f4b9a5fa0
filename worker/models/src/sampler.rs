//! Deterministic samplers of the probability-flow ODE: EDM's for EDM networks, DDIM for any process.

use tch::{Kind, Tensor, no_grad};

use crate::{
    denoiser::{Condition, Denoiser, Mode},
    process::ForwardProcess,
};

/// Settings of [`heun`]; the defaults are those of 2206.00364, table 1, with the 18 steps used for CIFAR-10.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heun {
    /// Number of noise levels above 0; at least 2.
    pub steps: u64,
    /// Least noise level above 0.
    pub sigma_min: f64,
    /// Initial noise level.
    pub sigma_max: f64,
    /// Exponent of the noise levels' spacing (2206.00364, eq. 5): the greater, the denser near σ_min.
    pub rho: f64,
}

impl Default for Heun {
    fn default() -> Self {
        Self { steps: 18, sigma_min: 0.002, sigma_max: 80.0, rho: 7.0 }
    }
}

impl Heun {
    /// Network evaluations per sample: two per step, and one in the last, which ends at σ = 0.
    #[must_use]
    pub fn evaluations(&self) -> u64 {
        2 * self.steps - 1
    }

    /// The noise levels from σ_max to σ_min and then 0 (2206.00364, eq. 5).
    fn noise_levels(&self, [least, greatest]: [f64; 2]) -> Vec<f64> {
        let first = self.sigma_max.min(greatest).powf(self.rho.recip());
        let last = self.sigma_min.max(least).powf(self.rho.recip());
        let share = |i: u64| i as f64 / (self.steps - 1) as f64;
        (0..self.steps).map(|i| (first + share(i) * (last - first)).powf(self.rho)).chain([0.0]).collect()
    }
}

/// Solves the probability-flow ODE from σ_max to 0 with Heun's method (2206.00364, algorithm 1).
///
/// `z` [N, C, H, W] is N(0, 1); the result is fp32 of that shape. No gradients are recorded. The state is fp64, as in the
/// official sampler: between σ = 80 and 0 the steps would otherwise lose what fp32 cannot hold beside the noise.
/// Noise levels stay within the network's [`time_range`](Denoiser::time_range).
///
/// # Panics
/// With fewer than 2 steps.
pub fn heun(network: &dyn Denoiser, z: &Tensor, condition: &Condition, settings: &Heun) -> Tensor {
    assert!(settings.steps >= 2, "{} steps: Heun's method needs at least 2", settings.steps);
    no_grad(|| {
        let levels = settings.noise_levels(network.time_range());
        let slope = |x: &Tensor, sigma: f64| {
            let time = Tensor::full([1], sigma, (Kind::Float, z.device()));
            let denoised = network.denoise(x, &time, condition, Mode::Eval).to_kind(Kind::Double);
            (x - denoised) / sigma
        };
        let mut x = z.to_kind(Kind::Double) * levels[0];
        for pair in levels.windows(2) {
            let (from, to) = (pair[0], pair[1]);
            let step = to - from;
            let slope_from = slope(&x, from);
            let euler = &x + &slope_from * step;
            x = if to > 0.0 { &x + (slope_from + slope(&euler, to)) * (0.5 * step) } else { euler };
        }
        x.to_kind(Kind::Float)
    })
}

/// DDIM (2010.02502, eq. 12 with η = 0) over falling `times` of a process: x0 and the noise are predicted at each time
/// and combined at the next; after the last time, x0 is the result. `predict` gives x0 for a noisy sample and a time
/// `[1]`, guided or not.
///
/// `z` [N, C, H, W] is N(0, 1); the result is fp32 of that shape. No gradients are recorded.
///
/// # Panics
/// Without times.
pub fn ddim(
    process: &ForwardProcess,
    z: &Tensor,
    times: &[f64],
    predict: impl Fn(&Tensor, &Tensor) -> Tensor,
) -> Tensor {
    assert!(!times.is_empty(), "a sampler needs at least one time");
    let at = |time: f64| Tensor::full([1], time, (Kind::Float, z.device()));
    no_grad(|| {
        let mut x = match process {
            // The process preserves variance, so its noisiest samples are approximated by N(0, 1).
            ForwardProcess::Ddpm { .. } => z.shallow_clone(),
            _ => process.coefficients(&at(times[0])).1 * z,
        };
        for (index, time) in times.iter().enumerate() {
            let x0 = predict(&x, &at(*time));
            let Some(next) = times.get(index + 1) else { return x0 };
            let (a, b) = process.coefficients(&at(*time));
            let noise = (&x - a * &x0) / b;
            x = process.add_noise(&x0, &noise, &at(*next));
        }
        unreachable!("the last time returns")
    })
}

/// `steps` timesteps of a DDPM process of `timesteps`, spread evenly and one above each multiple: the "leading" spacing with
/// an offset of 1 that Stable Diffusion's samplers use.
#[must_use]
pub fn leading_timesteps(timesteps: usize, steps: usize) -> Vec<f64> {
    (0..steps).rev().map(|i| (i * (timesteps / steps) + 1).min(timesteps - 1) as f64).collect()
}
