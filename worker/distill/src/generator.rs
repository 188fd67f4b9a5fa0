//! The K-step generator (2505.12674; docs/algorithm.md §2): D_0 = 0; step i diffuses D_i to time t_i and denoises it. One step on
//! EDM's process is SiD's `G(z) = f_θ(σ_init·z, σ_init)` (2404.04057, eq. 8).

use potstill_models::{Condition, Denoiser, Mode};
use tch::{Device, Kind, Tensor, no_grad};

use crate::random::{Purpose, Stream};

/// The outputs that are trained to match the data.
#[derive(Clone, Debug, PartialEq)]
pub enum Matching {
    /// One step in each iteration, chosen with these weights; gradients flow through that step alone. The matched
    /// distribution is then the mixture of all steps' outputs with the same weights: equal weights are the published
    /// uniform-step matching.
    OneStep {
        /// One weight for each step.
        weights: Vec<f64>,
    },
    /// The last step; gradients flow through all steps (2406.01561).
    FinalStep,
}

/// The generator's steps in one iteration, the same for all ranks and for both phases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unroll {
    /// Steps to run: 1 to K.
    pub steps: usize,
    /// The first step through which gradients flow, from 0.
    pub trained_from: usize,
}

impl Unroll {
    /// The unroll of an iteration of a generator of `steps` steps.
    #[must_use]
    pub fn of(matching: &Matching, steps: usize, seed: u64, iteration: u64) -> Self {
        match matching {
            Matching::FinalStep => Self { steps, trained_from: 0 },
            Matching::OneStep { weights } => {
                let mut stream = Stream::new(seed, iteration, Purpose::Iteration, 0, Device::Cpu);
                let mut left = stream.uniform(1)[0] * weights.iter().sum::<f64>();
                // The first step whose cumulative weight exceeds the drawn number. Rounding can leave a small rest to
                // the last.
                let last = weights.iter().position(|weight| {
                    left -= weight;
                    left < 0.0
                });
                let last = last.unwrap_or(steps - 1);
                Self { steps: last + 1, trained_from: last }
            }
        }
    }
}

/// t_i = ⌊t_init·(1 − i/K)⌋: the timesteps of a K-step generator on a DDPM process (2406.01561: t_init = 625).
#[must_use]
pub fn ddpm_times(initial: u32, steps: u32) -> Vec<f64> {
    // In integers, so that nothing is rounded before the floor.
    let (initial, steps) = (u64::from(initial), u64::from(steps));
    (0..steps).map(|i| (initial * (steps - i) / steps) as f64).collect()
}

/// t_i = t_init/999·(1 − i/K): the times of a K-step generator on a flow (2509.25127: t_init = 999, so 1 − i/K).
#[must_use]
pub fn flow_times(initial: u32, steps: u32) -> Vec<f64> {
    let first = f64::from(initial) / 999.0;
    (0..steps).map(|i| first * (1.0 - f64::from(i) / f64::from(steps))).collect()
}

/// Runs the generator: one step for each of `noises`, each N(0, 1) of shape [N, C, H, W], at the first of `times`. Steps
/// before `trained_from` run without gradient and without dropout.
///
/// There must be at least one noise, and not more than times.
pub fn generate(
    generator: &dyn Denoiser,
    noises: &[Tensor],
    condition: &Condition,
    times: &[f64],
    trained_from: usize,
    mode: Mode,
) -> Tensor {
    let step = |denoised: Option<&Tensor>, noise: &Tensor, time: f64, mode: Mode| {
        let process = generator.process();
        let times = Tensor::full([noise.size()[0]], time, (Kind::Float, noise.device()));
        let noisy = match denoised {
            Some(denoised) => process.add_noise(denoised, noise, &times),
            None => process.begin(noise, time),
        };
        generator.denoise(&noisy, &times, condition, mode)
    };
    let mut denoised: Option<Tensor> = None;
    for (index, (noise, time)) in noises.iter().zip(times).enumerate() {
        denoised = Some(if index < trained_from {
            no_grad(|| step(denoised.as_ref(), noise, *time, Mode::Eval))
        } else {
            step(denoised.as_ref(), noise, *time, mode)
        });
    }
    denoised.expect("a generator has at least one step")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grids_are_the_published_ones() {
        assert_eq!(ddpm_times(625, 4), [625.0, 468.0, 312.0, 156.0]);
        assert_eq!(ddpm_times(625, 1), [625.0]);
        assert_eq!(flow_times(999, 4), [1.0, 0.75, 0.5, 0.25]);
    }

    fn uniform(steps: usize) -> Matching {
        Matching::OneStep { weights: vec![1.0; steps] }
    }

    #[test]
    fn steps_are_chosen_by_weight() {
        let matching = Matching::OneStep { weights: vec![1.0, 0.0, 3.0] };
        let mut counts = [0; 3];
        for iteration in 0..4000 {
            counts[Unroll::of(&matching, 3, 1, iteration).trained_from] += 1;
        }
        assert!((900..1100).contains(&counts[0]) && counts[1] == 0, "{counts:?}");
    }

    #[test]
    fn every_step_is_chosen_equally_often_and_by_the_iteration_alone() {
        let mut counts = [0; 4];
        for iteration in 0..4000 {
            let unroll = Unroll::of(&uniform(4), 4, 1, iteration);
            assert_eq!(unroll, Unroll::of(&uniform(4), 4, 1, iteration));
            assert_eq!(unroll.trained_from + 1, unroll.steps, "gradients flow through the last step run");
            counts[unroll.trained_from] += 1;
        }
        assert!(counts.iter().all(|count| (900..1100).contains(count)), "{counts:?}");
        assert_eq!(Unroll::of(&Matching::FinalStep, 4, 1, 0), Unroll { steps: 4, trained_from: 0 });
        assert_eq!(Unroll::of(&uniform(1), 1, 1, 0), Unroll { steps: 1, trained_from: 0 });
    }
}
