//! The K-step generator (2505.12674; ALGORITHM §2): D_0 = 0; step i adds noise of level σ_i to D_i and denoises it. One step
//! is SiD's `G(z) = f_θ(σ_init·z, σ_init)` (2404.04057, eq. 8).

use potstill_models::{Condition, Denoiser, Mode};
use tch::{Device, Kind, Tensor, no_grad};

use crate::random::{Purpose, Stream};

/// Which outputs are trained to match the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Matching {
    /// One step in each iteration, chosen uniformly; gradients flow through that step alone. The matched distribution is
    /// then the uniform mixture of all steps' outputs.
    UniformStep,
    /// The last step; gradients flow through all (2406.01561).
    FinalStep,
}

/// How far an iteration runs the generator. The same for all ranks and for both phases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unroll {
    /// Steps to run: 1 to K.
    pub steps: usize,
    /// The first step that gradients flow through, from 0.
    pub trained_from: usize,
}

impl Unroll {
    /// The unroll of an iteration of a generator of `steps` steps.
    #[must_use]
    pub fn of(matching: Matching, steps: usize, seed: u64, iteration: u64) -> Self {
        match matching {
            Matching::FinalStep => Self { steps, trained_from: 0 },
            Matching::UniformStep => {
                let mut stream = Stream::new(seed, iteration, Purpose::Iteration, 0, Device::Cpu);
                let last = stream.integers(1, steps as i64)[0] as usize;
                Self { steps: last + 1, trained_from: last }
            }
        }
    }
}

/// Runs the generator: one step for each of `noises`, each N(0, 1) of shape [N, C, H, W], at the first of `sigmas`. Steps
/// before `trained_from` run without gradient and without dropout.
///
/// There must be at least one noise, and not more than noise levels.
pub fn generate(
    generator: &dyn Denoiser,
    noises: &[Tensor],
    condition: &Condition,
    sigmas: &[f64],
    trained_from: usize,
    mode: Mode,
) -> Tensor {
    let step = |denoised: Option<&Tensor>, noise: &Tensor, sigma: f64, mode: Mode| {
        let time = Tensor::full([noise.size()[0]], sigma, (Kind::Float, noise.device()));
        let noise = noise * sigma;
        let noisy = match denoised {
            Some(denoised) => denoised + noise,
            None => noise,
        };
        generator.denoise(&noisy, &time, condition, mode)
    };
    let mut denoised: Option<Tensor> = None;
    for (index, (noise, sigma)) in noises.iter().zip(sigmas).enumerate() {
        denoised = Some(if index < trained_from {
            no_grad(|| step(denoised.as_ref(), noise, *sigma, Mode::Eval))
        } else {
            step(denoised.as_ref(), noise, *sigma, mode)
        });
    }
    denoised.expect("a generator has at least one step")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_is_chosen_equally_often_and_by_the_iteration_alone() {
        let mut counts = [0; 4];
        for iteration in 0..4000 {
            let unroll = Unroll::of(Matching::UniformStep, 4, 1, iteration);
            assert_eq!(unroll, Unroll::of(Matching::UniformStep, 4, 1, iteration));
            assert_eq!(unroll.trained_from + 1, unroll.steps, "gradients flow through the last step run");
            counts[unroll.trained_from] += 1;
        }
        assert!(counts.iter().all(|count| (900..1100).contains(count)), "{counts:?}");
        assert_eq!(Unroll::of(Matching::FinalStep, 4, 1, 0), Unroll { steps: 4, trained_from: 0 });
        assert_eq!(Unroll::of(Matching::UniformStep, 1, 1, 0), Unroll { steps: 1, trained_from: 0 });
    }
}
