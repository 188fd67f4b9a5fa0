//! Forward processes: how data become noise, and the native predictions of networks.
//!
//! All of them have the form `x_t = a(t)·x + b(t)·n` with n ~ N(0, 1) (docs/algorithm.md §1). Distillation and sampling
//! are written once, in terms of a and b; a network's native prediction is converted to x0 at its interface.

use std::{
    fmt,
    ops::Deref,
    sync::{Arc, Mutex, PoisonError},
};

use potstill_torch_ext::upload;
use tch::{Device, Kind, Tensor};

/// ᾱ of each timestep, falling, within (0, 1]. Clones share the copy on the device that uses it.
#[derive(Clone)]
pub struct Alphas {
    values: Arc<[f64]>,
    on_device: Arc<Mutex<Option<Tensor>>>,
}

impl Alphas {
    /// fp64 `[timesteps]`. Kept from the first call on.
    fn on(&self, device: Device) -> Tensor {
        let mut kept = self.on_device.lock().unwrap_or_else(PoisonError::into_inner);
        match kept.as_ref().filter(|kept| kept.device() == device) {
            Some(kept) => kept.shallow_clone(),
            None => kept.insert(upload(&Tensor::from_slice(&self.values), device)).shallow_clone(),
        }
    }
}

impl From<Vec<f64>> for Alphas {
    fn from(values: Vec<f64>) -> Self {
        Self { values: values.into(), on_device: Arc::default() }
    }
}

impl Deref for Alphas {
    type Target = [f64];

    fn deref(&self) -> &[f64] {
        &self.values
    }
}

impl fmt::Debug for Alphas {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.values.fmt(formatter)
    }
}

impl PartialEq for Alphas {
    fn eq(&self, other: &Self) -> bool {
        self.values == other.values
    }
}

/// A forward process and the native prediction of the networks trained on it.
#[derive(Clone, Debug, PartialEq)]
pub enum ForwardProcess {
    /// x_t = x + σ·n, time is σ; networks predict x0 through their preconditioning (2206.00364).
    Edm {
        /// Standard deviation of the data that the preconditioning assumes.
        sigma_data: f64,
    },
    /// x_t = √ᾱ·x + √(1−ᾱ)·n, time is the index into ᾱ (2006.11239).
    Ddpm {
        /// ᾱ of each timestep.
        alphas_cumprod: Alphas,
        /// The native prediction of the network.
        prediction: DdpmPrediction,
    },
    /// x_t = (1−t)·x + t·n, time in [0, 1]; networks predict the velocity v = n − x (2209.03003).
    Flow,
}

/// Native predictions on a DDPM process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DdpmPrediction {
    /// The noise n.
    Epsilon,
    /// v = √ᾱ·n − √(1−ᾱ)·x (2202.00512).
    V,
    /// x itself.
    Sample,
}

impl ForwardProcess {
    /// ᾱ of the "scaled linear" schedule of Stable Diffusion (2112.10752's code): β_i = (√β_first + i/(T−1)·(√β_last −
    /// √β_first))², ᾱ_t = Π (1 − β_i).
    #[must_use]
    pub fn scaled_linear(beta_first: f64, beta_last: f64, timesteps: usize) -> Alphas {
        let (first, last) = (beta_first.sqrt(), beta_last.sqrt());
        let share = |i: usize| i as f64 / (timesteps.max(2) - 1) as f64;
        let mut product = 1.0;
        let alphas = (0..timesteps).map(|i| {
            product *= 1.0 - (first + share(i) * (last - first)).powi(2);
            product
        });
        alphas.collect::<Vec<_>>().into()
    }

    /// Copies to a device what is needed there, now instead of at the first use.
    #[must_use]
    pub fn prepared(self, device: Device) -> Self {
        if let Self::Ddpm { alphas_cumprod, .. } = &self {
            let _ = alphas_cumprod.on(device);
        }
        self
    }

    /// a(t) and b(t), fp32, each [N, 1, 1, 1], for `time` `[N]`. A DDPM time is rounded to its index.
    pub fn coefficients(&self, time: &Tensor) -> (Tensor, Tensor) {
        let t = time.to_kind(Kind::Float).view([-1, 1, 1, 1]);
        match self {
            Self::Edm { .. } => (t.ones_like(), t),
            Self::Ddpm { alphas_cumprod, .. } => {
                // The roots are taken in fp64: 1 − ᾱ loses digits at small t.
                let table = alphas_cumprod.on(t.device());
                let index = time.round().to_kind(Kind::Int64).clamp(0, alphas_cumprod.len() as i64 - 1);
                let alpha = table.index_select(0, &index.view([-1])).view([-1, 1, 1, 1]);
                let fp32 = |x: Tensor| x.to_kind(Kind::Float);
                let rest: Tensor = 1.0 - &alpha;
                (fp32(alpha.sqrt()), fp32(rest.sqrt()))
            }
            Self::Flow => (1.0 - &t, t),
        }
    }

    /// x_t = a·x + b·n for `x` and `noise` [N, C, H, W] and `time` `[N]`.
    ///
    /// ```
    /// use potstill_models::ForwardProcess;
    /// use tch::Tensor;
    ///
    /// let x = Tensor::from(2.0f32).view([1, 1, 1, 1]);
    /// let noise = Tensor::from(1.0f32).view([1, 1, 1, 1]);
    /// let time = Tensor::from_slice(&[0.25f32]);
    /// let x_t = ForwardProcess::Flow.add_noise(&x, &noise, &time);
    /// assert_eq!(x_t.double_value(&[0, 0, 0, 0]), 0.75 * 2.0 + 0.25);
    /// ```
    pub fn add_noise(&self, x: &Tensor, noise: &Tensor, time: &Tensor) -> Tensor {
        match self {
            Self::Edm { .. } => x + noise * time.view([-1, 1, 1, 1]),
            _ => {
                let (a, b) = self.coefficients(time);
                a * x + b * noise
            }
        }
    }

    /// What a generator begins with: `noise` [N, C, H, W] at the level of `time`. At a DDPM process's last timestep it is the noise
    /// itself, as it is for pipelines that begin there, and as if nothing were left of the image.
    ///
    /// On Stable Diffusion's schedule the level would be 0.9977.
    pub fn begin(&self, noise: &Tensor, time: f64) -> Tensor {
        match self {
            Self::Ddpm { alphas_cumprod, .. } if time == (alphas_cumprod.len() - 1) as f64 => {
                noise.shallow_clone()
            }
            _ => {
                let time = Tensor::full([noise.size()[0]], time, (Kind::Float, noise.device()));
                self.add_noise(&noise.zeros_like(), noise, &time)
            }
        }
    }

    /// Signal-to-noise ratio a²/b², `[N]`.
    pub fn snr(&self, time: &Tensor) -> Tensor {
        let (a, b) = self.coefficients(time);
        (a / b).square().view([-1])
    }

    /// x0 from a native prediction at (x_t, time).
    pub fn to_x0(&self, native: &Tensor, x_t: &Tensor, time: &Tensor) -> Tensor {
        let (a, b) = self.coefficients(time);
        match self {
            Self::Edm { .. } | Self::Ddpm { prediction: DdpmPrediction::Sample, .. } => {
                native.shallow_clone()
            }
            Self::Ddpm { prediction: DdpmPrediction::Epsilon, .. } => (x_t - b * native) / a,
            Self::Ddpm { prediction: DdpmPrediction::V, .. } => a * x_t - b * native,
            Self::Flow => x_t - b * native,
        }
    }

    /// The native prediction for `x0` at (x_t, time): the inverse of [`to_x0`](Self::to_x0).
    pub fn to_native(&self, x0: &Tensor, x_t: &Tensor, time: &Tensor) -> Tensor {
        let (a, b) = self.coefficients(time);
        match self {
            Self::Edm { .. } | Self::Ddpm { prediction: DdpmPrediction::Sample, .. } => x0.shallow_clone(),
            Self::Ddpm { prediction: DdpmPrediction::Epsilon, .. } => (x_t - a * x0) / b,
            Self::Ddpm { prediction: DdpmPrediction::V, .. } => (a * x_t - x0) / b,
            Self::Flow => (x_t - x0) / b,
        }
    }

    /// The native prediction of a perfect network for `x` diffused with `noise`.
    pub fn target(&self, x: &Tensor, noise: &Tensor, time: &Tensor) -> Tensor {
        let (a, b) = self.coefficients(time);
        match self {
            Self::Edm { .. } | Self::Ddpm { prediction: DdpmPrediction::Sample, .. } => x.shallow_clone(),
            Self::Ddpm { prediction: DdpmPrediction::Epsilon, .. } => noise.shallow_clone(),
            Self::Ddpm { prediction: DdpmPrediction::V, .. } => a * noise - b * x,
            Self::Flow => noise - x,
        }
    }

    /// The weight w(t), `[N]`, with which w·|x0 − x|² is the family's training loss of its native prediction:
    ///
    /// - EDM: λ(σ) = (σ² + σ_d²)/(σ·σ_d)² (2206.00364, table 1)
    /// - DDPM-ε: |ε_ψ − n|², so w = a²/b² = snr
    /// - DDPM-v: |v_ψ − v|²·snr/(snr + 1), so again snr
    /// - DDPM-x0: |x_ψ − x|², so w = 1
    /// - flow: |v_ψ − v|², so w = 1/t²
    pub fn loss_weight(&self, time: &Tensor) -> Tensor {
        match self {
            Self::Edm { sigma_data } => {
                let sigma = time.to_kind(Kind::Float).view([-1]);
                (sigma.square() + sigma_data * sigma_data) / (sigma * *sigma_data).square()
            }
            Self::Ddpm { prediction: DdpmPrediction::Sample, .. } => {
                time.to_kind(Kind::Float).view([-1]).ones_like()
            }
            Self::Ddpm { .. } => self.snr(time),
            Self::Flow => time.to_kind(Kind::Float).view([-1]).square().reciprocal(),
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    const OPTIONS: (Kind, Device) = (Kind::Float, Device::Cpu);

    /// Each process with times from its whole range.
    fn processes() -> Vec<(ForwardProcess, Tensor)> {
        let alphas_cumprod = ForwardProcess::scaled_linear(0.00085, 0.012, 1000);
        let ddpm = |prediction| ForwardProcess::Ddpm { alphas_cumprod: alphas_cumprod.clone(), prediction };
        let steps = Tensor::from_slice(&[1.0f32, 20.0, 312.0, 625.0, 979.0]);
        vec![
            (ForwardProcess::Edm { sigma_data: 0.5 }, Tensor::from_slice(&[0.002f32, 0.1, 1.0, 2.5, 80.0])),
            (ddpm(DdpmPrediction::Epsilon), steps.copy()),
            (ddpm(DdpmPrediction::V), steps.copy()),
            (ddpm(DdpmPrediction::Sample), steps),
            (ForwardProcess::Flow, Tensor::from_slice(&[0.01f32, 0.2, 0.5, 0.9, 1.0])),
        ]
    }

    fn ramp(from: f64, to: f64) -> Tensor {
        Tensor::linspace(from, to, 5 * 2 * 3 * 3, OPTIONS).reshape([5, 2, 3, 3])
    }

    fn apart(a: &Tensor, b: &Tensor) -> f64 {
        let largest = (a - b).abs().max().double_value(&[]);
        largest / b.abs().max().double_value(&[]).max(1.0)
    }

    #[test]
    fn native_predictions_and_x0_are_two_faces_of_one_thing() {
        let (x, noise) = (ramp(-1.0, 1.0), ramp(1.5, -2.0).sin());
        for (process, time) in processes() {
            let x_t = process.add_noise(&x, &noise, &time);
            let target = process.target(&x, &noise, &time);
            // Where almost no signal is left (large DDPM times), x0 is a small difference of large numbers.
            assert!(apart(&process.to_x0(&target, &x_t, &time), &x) < 2e-5, "{process:?}");
            // At flow's t = 1, EDM's least σ and DDPM's first step, the inverse is as accurate as its inputs.
            let native = process.to_native(&x, &x_t, &time);
            assert!(apart(&native, &target) < 2e-4, "{process:?}");
            let there = process.to_native(&process.to_x0(&noise, &x_t, &time), &x_t, &time);
            assert!(apart(&there, &noise) < 2e-4, "{process:?}");
        }
    }

    #[test]
    fn without_noise_it_is_the_data_and_at_the_end_it_is_noise() {
        let (x, noise) = (ramp(-1.0, 1.0), ramp(1.0, -1.0));
        let at = |time: f32| Tensor::full([5], f64::from(time), OPTIONS);
        let edm = ForwardProcess::Edm { sigma_data: 0.5 };
        assert!(apart(&edm.add_noise(&x, &noise, &at(0.0)), &x) < 1e-7);
        assert!(apart(&ForwardProcess::Flow.add_noise(&x, &noise, &at(0.0)), &x) < 1e-7);
        assert!(apart(&ForwardProcess::Flow.add_noise(&x, &noise, &at(1.0)), &noise) < 1e-7);
        let ddpm = &processes()[1].0;
        assert!(ddpm.begin(&noise, 999.0).equal(&noise));
        assert!(apart(&ddpm.begin(&noise, 979.0), &(&noise * 0.99711)) < 1e-4);
        assert!(edm.begin(&noise, 2.5).equal(&(&noise * 2.5)));
        let (_, time) = &processes()[1];
        let (a, b) = processes()[1].0.coefficients(time);
        let length = a.square() + b.square();
        assert!(apart(&length, &length.ones_like()) < 1e-6, "DDPM preserves variance");
    }

    #[test]
    fn the_scaled_linear_schedule_is_stable_diffusions() {
        let alphas = ForwardProcess::scaled_linear(0.00085, 0.012, 1000);
        // Values of the public scheduler's table.
        assert!((alphas[0] - 0.99915).abs() < 1e-9);
        assert!((alphas[999] - 0.004_660_1).abs() < 1e-6, "{}", alphas[999]);
        assert!(alphas.is_sorted_by(|a, b| a > b));
    }

    #[test]
    fn the_weight_turns_an_error_of_x0_into_the_familys_loss() {
        let (x, noise) = (ramp(-1.0, 1.0), ramp(2.0, -2.0).cos());
        let guess = &x + ramp(0.3, -0.1);
        let sum =
            |x: Tensor| x.square().flatten(1, -1).sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
        for (process, time) in processes() {
            let x_t = process.add_noise(&x, &noise, &time);
            let native = sum(process.to_native(&guess, &x_t, &time) - process.to_native(&x, &x_t, &time));
            let snr = process.snr(&time);
            let expected = match &process {
                ForwardProcess::Edm { .. } => {
                    let s = &time;
                    native * (s.square() + 0.25) / (s * 0.5).square()
                }
                ForwardProcess::Ddpm { prediction: DdpmPrediction::V, .. } => native * (&snr / (&snr + 1.0)),
                _ => native,
            };
            let found = sum(&guess - &x) * process.loss_weight(&time);
            let relative = ((&found - &expected) / &expected).abs().max().double_value(&[]);
            assert!(relative < 2e-3, "{process:?}: {relative}");
        }
    }
}
