//! Distillation whose result is known in closed form: a Gaussian teacher, on every forward process.
//!
//! Teacher and fake score are the ideal denoisers of Gaussians (the fake score's mean and covariance are its parameters), the
//! generator is affine: so the generator's distribution is a Gaussian, the fake score can learn it exactly, and the optimum of
//! SiD is the teacher's mean and covariance.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use potstill_distill::{
    adam::{Adam, AdamSettings},
    condition::Classes,
    draws::{Draws, NamedStreams},
    generator::{Matching, ddpm_times},
    gradient::Gradient,
    guidance::Guidance,
    loss::Weighting,
    noise_distribution::NoiseDistribution,
    phase,
    schedule::Schedule,
    settings::Settings,
};
use potstill_models::{Condition, Denoiser, ForwardProcess, Mode, Parameters, process::DdpmPrediction};
use tch::{Device, Kind, Tensor, no_grad};

const D: i64 = 2;

/// The denoiser that the two parameters, a vector and a matrix, represent.
#[derive(Clone, Copy)]
enum Role {
    /// E[x | x_t] of N(m, A·Aᵀ).
    Score,
    /// m + A·x_t, whatever the time.
    Affine,
}

struct Toy {
    role: Role,
    process: ForwardProcess,
    parameters: Parameters,
}

impl Toy {
    fn new(role: Role, process: ForwardProcess, mean: [f32; 2], matrix: [f32; 4]) -> Self {
        let (mean, matrix) = (Tensor::from_slice(&mean), Tensor::from_slice(&matrix).reshape([D, D]));
        let parameters = Parameters::from_named(&[("mean", mean), ("matrix", matrix)], true);
        Self { role, process, parameters }
    }

    fn with(&self, flat: Tensor, trainable: bool) -> Box<dyn Denoiser> {
        let parameters = self.parameters.over(flat, trainable);
        Box::new(Self { role: self.role, process: self.process.clone(), parameters })
    }
}

impl Denoiser for Toy {
    fn denoise_and_encode(&self, x_t: &Tensor, time: &Tensor, _: &Condition, _: Mode) -> (Tensor, Tensor) {
        let (mean, matrix) = (&self.parameters.leaves()[0], &self.parameters.leaves()[1]);
        let x = x_t.reshape([-1, D, 1]);
        let mean = mean.view([1, D, 1]);
        let x0 = match self.role {
            Role::Affine => matrix.matmul(&x) + mean,
            Role::Score => {
                let covariance = matrix.matmul(&matrix.transpose(0, 1)).unsqueeze(0);
                let (a, b) = self.process.coefficients(time);
                let (a, b) = (a.view([-1, 1, 1]), b.view([-1, 1, 1]));
                let noise = Tensor::eye(D, (Kind::Float, Device::Cpu)).unsqueeze(0) * b.square();
                let marginal = a.square() * &covariance + noise;
                let innovation = Tensor::linalg_solve(&marginal, &(x - &a * &mean), true);
                mean + (a * covariance).matmul(&innovation)
            }
        };
        (x0.reshape([-1, 1, 1, D]), x_t.shallow_clone())
    }
    fn encode(&self, x_t: &Tensor, _: &Tensor, _: &Condition, _: Mode) -> Tensor {
        x_t.shallow_clone()
    }
    fn process(&self) -> &ForwardProcess {
        &self.process
    }
    fn parameters(&self) -> &Parameters {
        &self.parameters
    }
    fn sample_shape(&self) -> [i64; 3] {
        [1, 1, D]
    }
    fn classes(&self) -> i64 {
        0
    }
    fn over(&self, flat: Tensor, trainable: bool) -> Box<dyn Denoiser> {
        self.with(flat, trainable)
    }
    fn config_json(&self) -> String {
        "{}".into()
    }
}

/// Mean and covariance of the affine generator's samples at `time`.
fn moments(generator: &dyn Denoiser, time: f64) -> (Tensor, Tensor) {
    let (mean, matrix) = (&generator.parameters().leaves()[0], &generator.parameters().leaves()[1]);
    let time = Tensor::from_slice(&[time as f32]);
    let matrix = matrix.detach() * generator.process().coefficients(&time).1.view([1, 1]);
    (mean.detach(), matrix.matmul(&matrix.transpose(0, 1)))
}

/// Distills the Gaussian N(m, A·Aᵀ); returns the relative errors of mean and covariance.
fn distil(
    process: ForwardProcess,
    time: f64,
    laws: [NoiseDistribution; 2],
    weighting: Weighting,
    alpha: f64,
) -> [f64; 2] {
    let (mean, matrix) = ([0.4, -0.2], [0.5, 0.0, 0.2, 0.3]);
    let teacher = Toy::new(Role::Score, process.clone(), mean, matrix).frozen();
    let fake = Toy::new(Role::Score, process.clone(), mean, matrix).duplicate();
    // Far from the teacher: shifted, smaller, rotated.
    let generator = Toy::new(Role::Affine, process, [-0.3, 0.5], [0.1, 0.05, -0.05, 0.15]).duplicate();
    let settings = Settings {
        seed: 4,
        micro_batch: 512,
        times: vec![time],
        matching: Matching::OneStep { weights: vec![1.0] },
        alpha,
        weighting,
        fake_score_times: laws[0],
        generator_times: laws[1],
        score_identity_weight: 1.0,
        guidance: Guidance::NONE,
        augmentation: None,
        adversarial: None,
        schedule: Schedule {
            global_batch: 512,
            generator_start_images: None,
            join_images: None,
            fake_score_updates: 1,
        },
        training_mode: Mode::Eval,
        device: Device::Cpu,
    };
    let frozen_fake = fake.frozen();
    let draws = NamedStreams::data_free(&settings, &Classes(0), teacher.as_ref());
    let (generator, fake) = (generator.as_ref(), fake.as_ref());
    let mut adams = [fake, generator].map(|network| Adam::new(network.parameters().flat(), true));
    const ITERATIONS: u64 = 4000;
    for iteration in 0..ITERATIONS {
        // Falls to 0 in the last two thirds, so that the end does not depend on the last batches.
        let factor = (1.5 * (1.0 - iteration as f64 / ITERATIONS as f64)).min(1.0).powi(2);
        let mut step = |network: &dyn Denoiser, index: usize, rate: f64| {
            let adam = AdamSettings { learning_rate: rate * factor, betas: [0.0, 0.999], epsilon: 1e-8 };
            let gradient = Gradient::repaired(vec![network.parameters().flat_grad() / 512.0]);
            adams[index].step(network.parameters().flat(), &gradient.slices[0], iteration + 1, &adam);
            network.parameters().zero_grad();
        };
        phase::fake_score(generator, fake, &draws.fake_score(iteration, 0), &settings).loss.backward();
        step(fake, 0, 2e-2);
        let teacher = teacher.as_ref();
        let draw = draws.generator(iteration, 0);
        phase::generator(generator, frozen_fake.as_ref(), teacher, &draw, &settings, iteration)
            .loss
            .backward();
        step(generator, 1, 5e-3);
    }
    let (found_mean, found) = no_grad(|| moments(generator, time));
    let wanted_mean = Tensor::from_slice(&mean);
    let matrix = Tensor::from_slice(&matrix).reshape([D, D]);
    let wanted = matrix.matmul(&matrix.transpose(0, 1));
    let relative = |a: &Tensor, b: &Tensor| ((a - b).norm() / b.norm()).double_value(&[]);
    [relative(&found_mean, &wanted_mean), relative(&found, &wanted)]
}

fn reached(name: &str, errors: [f64; 2]) {
    println!("{name}: mean {:.4}, covariance {:.4}", errors[0], errors[1]);
    assert!(errors.iter().all(|error| *error < 0.02), "{name}: {errors:?}");
}

#[test]
fn edm_reaches_the_teachers_gaussian() {
    let laws = [
        NoiseDistribution::LogNormal { mean: -1.2, std: 1.2 },
        NoiseDistribution::Karras { sigma_min: 0.002, sigma_max: 80.0, rho: 7.0, u_max: 0.8 },
    ];
    for alpha in [1.0, 1.2] {
        let process = ForwardProcess::Edm { sigma_data: 0.5 };
        reached("EDM", distil(process, 2.5, laws, Weighting::ScoreIdentity, alpha));
    }
}

#[test]
fn ddpm_reaches_the_teachers_gaussian_with_either_prediction() {
    let laws = [NoiseDistribution::Uniform { first: 20, last: 979 }; 2];
    for prediction in [DdpmPrediction::Epsilon, DdpmPrediction::V] {
        let alphas_cumprod = ForwardProcess::scaled_linear(0.00085, 0.012, 1000);
        let process = ForwardProcess::Ddpm { alphas_cumprod, prediction };
        let time = ddpm_times(625, 1)[0];
        reached("DDPM", distil(process, time, laws, Weighting::ScoreIdentity, 1.0));
    }
}

#[test]
fn flow_reaches_the_teachers_gaussian_with_either_weighting() {
    let laws = [NoiseDistribution::SID_DIT; 2];
    for weighting in [Weighting::ScoreIdentity, Weighting::OneMinusT] {
        reached("flow", distil(ForwardProcess::Flow, 1.0, laws, weighting, 1.0));
    }
}
