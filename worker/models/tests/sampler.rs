//! Tests Heun's method on a distribution whose ODE has a known solution.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::sync::atomic::{AtomicU64, Ordering};

use common::small;
use potstill_models::{
    Condition, Denoiser, EdmNetwork, ForwardProcess, Mode, Parameters,
    process::DdpmPrediction,
    sampler::{Heun, ddim, heun},
};
use tch::{Device, Kind, Tensor};

/// The ideal denoiser of N(0, std²), and how often it was called.
struct Gaussian {
    std: f64,
    process: ForwardProcess,
    range: [f64; 2],
    calls: AtomicU64,
}

impl Denoiser for Gaussian {
    fn denoise_and_encode(&self, x_t: &Tensor, time: &Tensor, _: &Condition, mode: Mode) -> (Tensor, Tensor) {
        assert_eq!(mode, Mode::Eval);
        self.calls.fetch_add(1, Ordering::Relaxed);
        let least = time.to_kind(Kind::Double).double_value(&[0]);
        // Times come in fp32.
        assert!((self.range[0] * (1.0 - 1e-6)..=self.range[1] * (1.0 + 1e-6)).contains(&least));
        let variance = self.std * self.std;
        let (a, b) = self.process.coefficients(time);
        let denoised = x_t * (&a * variance / (a.square() * variance + b.square()));
        (denoised, x_t.shallow_clone())
    }

    fn encode(&self, x_t: &Tensor, _: &Tensor, _: &Condition, _: Mode) -> Tensor {
        x_t.shallow_clone()
    }

    fn process(&self) -> &ForwardProcess {
        &self.process
    }

    fn parameters(&self) -> &Parameters {
        unimplemented("parameters")
    }

    fn sample_shape(&self) -> [i64; 3] {
        [1, 2, 2]
    }

    fn classes(&self) -> i64 {
        0
    }

    fn time_range(&self) -> [f64; 2] {
        self.range
    }

    fn over(&self, _: Tensor, _: bool) -> Box<dyn Denoiser> {
        unimplemented("over")
    }

    fn config_json(&self) -> String {
        unimplemented("config_json")
    }
}

fn unimplemented(what: &str) -> ! {
    panic!("the sampler must not call {what}")
}

/// Largest relative error of samples of N(0, 0.5²) against the ODE's solution.
fn error(settings: &Heun, range: [f64; 2]) -> f64 {
    let process = ForwardProcess::Edm { sigma_data: 0.5 };
    let network = Gaussian { std: 0.5, process, range, calls: AtomicU64::new(0) };
    let z = Tensor::randn([3, 1, 2, 2], (Kind::Float, Device::Cpu));
    let samples = heun(&network, &z, &Condition::None, settings);
    assert_eq!(network.calls.into_inner(), settings.evaluations());
    assert_eq!((samples.size(), samples.kind()), (z.size(), Kind::Float));
    // dx/dσ = σ·x/(s² + σ²) keeps x/√(s² + σ²).
    let start = settings.sigma_max.min(range[1]);
    let expected = &z * (start * 0.5 / (0.25 + start * start).sqrt());
    ((samples - &expected) / expected).abs().max().double_value(&[])
}

#[test]
fn a_gaussian_is_sampled_with_second_order() {
    let unlimited = [0.0, f64::INFINITY];
    assert_eq!(Heun::default().evaluations(), 35);
    let errors: Vec<f64> = [16, 32, 64]
        .iter()
        .map(|steps| error(&Heun { steps: *steps, ..Default::default() }, unlimited))
        .collect();
    assert!(errors[0] < 0.1, "{errors:?}");
    assert!(errors.windows(2).all(|pair| pair[1] < pair[0] / 3.0), "{errors:?}");
}

/// The same Gaussian, four processes: DDIM's samples approach the ODE's solution, x/√(a²s² + b²) = const, in all of them.
#[test]
fn a_gaussian_is_sampled_on_every_process() {
    let alphas_cumprod = ForwardProcess::scaled_linear(0.00085, 0.012, 1000);
    let ddpm = |prediction| ForwardProcess::Ddpm { alphas_cumprod: alphas_cumprod.clone(), prediction };
    let falling = |from: f64, to: f64, count: usize| -> Vec<f64> {
        (0..count).map(|i| from + (to - from) * i as f64 / (count - 1) as f64).collect()
    };
    let sigmas: Vec<f64> = falling(80f64.powf(1.0 / 7.0), 0.002f64.powf(1.0 / 7.0), 400)
        .iter()
        .map(|root| root.powi(7))
        .collect();
    let timesteps = falling(999.0, 0.0, 500).iter().map(|t| t.round()).collect::<Vec<_>>();
    let z = Tensor::randn([64, 1, 2, 2], (Kind::Float, Device::Cpu));
    for (process, times) in [
        (ForwardProcess::Edm { sigma_data: 0.5 }, sigmas),
        (ddpm(DdpmPrediction::Epsilon), timesteps.clone()),
        (ddpm(DdpmPrediction::V), timesteps),
        (ForwardProcess::Flow, falling(1.0, 0.002, 400)),
    ] {
        let start = Tensor::from_slice(&[times[0] as f32]);
        let (a, b) = process.coefficients(&start);
        let spread: Tensor = (a.square() * 0.25 + b.square()).sqrt();
        let expected = &z * (b * 0.5 / spread);
        let name = format!("{:?}", std::mem::discriminant(&process));
        let network = Gaussian { std: 0.5, process, range: [0.0, f64::INFINITY], calls: AtomicU64::new(0) };
        let samples = ddim(network.process(), &z, &times, |x, time| {
            network.denoise(x, time, &Condition::None, Mode::Eval)
        });
        let error = ((samples - &expected).norm() / expected.norm()).double_value(&[]);
        assert!(error < 0.02, "{name}: {error}");
        assert_eq!(network.calls.into_inner() as usize, times.len());
    }
}

/// One noise level for all samples, each with its own class.
#[test]
fn a_class_conditional_network_is_sampled() {
    let network = EdmNetwork::initialise(small(), 0, Device::Cpu).unwrap();
    let z = Tensor::randn([3, 2, 8, 8], (Kind::Float, Device::Cpu));
    let settings = Heun { steps: 3, ..Default::default() };
    let samples =
        heun(&network, &z, &Condition::Class(Tensor::eye(3, (Kind::Float, Device::Cpu))), &settings);
    assert_eq!(samples.size(), z.size());
    assert!(!samples.requires_grad() && bool::try_from(samples.isfinite().all()).unwrap());
    let second = Condition::Class(Tensor::from_slice(&[0.0f32, 1.0, 0.0]).view([1, 3]));
    let alone = heun(&network, &z.narrow(0, 1, 1), &second, &settings);
    assert!(alone.allclose(&samples.narrow(0, 1, 1), 1e-4, 1e-4, false));
}

#[test]
fn noise_levels_stay_within_the_network() {
    assert!(error(&Heun { steps: 64, ..Default::default() }, [0.01, 10.0]) < 0.01);
}

#[test]
#[should_panic(expected = "needs at least 2")]
fn one_step_is_no_schedule() {
    error(&Heun { steps: 1, ..Default::default() }, [0.0, f64::INFINITY]);
}
