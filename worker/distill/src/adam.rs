//! Adam (1412.6980) over a network's flat parameter vector: a handful of tensor operations a step, whatever the number
//! of layers.

use tch::{Tensor, no_grad};

/// Settings of [`Adam`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamSettings {
    /// Step size.
    pub learning_rate: f64,
    /// Decay of the first and second moment. SiD: 0 and 0.999.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub epsilon: f64,
}

/// First and second moments of one network, fp32, flat.
pub struct Adam {
    /// First moment.
    pub exp_avg: Tensor,
    /// Second moment.
    pub exp_avg_sq: Tensor,
}

impl Adam {
    /// Zero moments for a flat parameter vector.
    #[must_use]
    pub fn new(parameters: &Tensor) -> Self {
        Self { exp_avg: parameters.zeros_like(), exp_avg_sq: parameters.zeros_like() }
    }

    /// One step, in place. `step` counts from 1 (bias correction).
    pub fn step(&mut self, parameters: &Tensor, gradient: &Tensor, step: u64, settings: &AdamSettings) {
        let [beta1, beta2] = settings.betas;
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        no_grad(|| {
            let _ = self.exp_avg.lerp_(gradient, 1.0 - beta1);
            let _ = self.exp_avg_sq.lerp_(&gradient.square(), 1.0 - beta2);
            let mut denominator = self.exp_avg_sq.sqrt();
            let _ = denominator.g_div_scalar_(correction(beta2).sqrt());
            let _ = denominator.g_add_scalar_(settings.epsilon);
            let mut update = &self.exp_avg / denominator;
            let _ = update.g_mul_scalar_(settings.learning_rate / correction(beta1));
            let _ = parameters.shallow_clone().g_sub_(&update);
        });
    }
}
