//! Adam (1412.6980) over a network's flat parameter vector, in one pass, whatever the number of layers.

use std::ops::Range;

use potstill_torch_ext::{AdamStep, step_adam};
use tch::Tensor;

use crate::host;

/// Settings of [`Adam`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamSettings {
    /// Step size.
    pub learning_rate: f64,
    /// Decay of the first and second moment. SiD: 0 and 0.999.
    pub betas: [f64; 2],
    /// Added to the square root of the second moment.
    pub epsilon: f64,
}

/// First and second moments of one network, fp32, flat.
pub struct Adam {
    /// First moment. There is none where its decay is 0: it would be the gradient.
    pub exp_avg: Option<Tensor>,
    /// Second moment.
    pub exp_avg_sq: Tensor,
}

impl Adam {
    /// Zero moments for a flat parameter vector.
    #[must_use]
    pub fn new(parameters: &Tensor, first_moment: bool) -> Self {
        Self { exp_avg: first_moment.then(|| parameters.zeros_like()), exp_avg_sq: parameters.zeros_like() }
    }

    /// One step, in place. `step` counts from 1; the correction of the bias with it is libtorch's (`potstill_adam` in
    /// `worker/torch-ext/shim`). The gradient may be on a GPU where parameters and moments are on the host: then it comes
    /// in pieces.
    ///
    /// # Panics
    /// Without a first moment whose decay is not 0, or with a gradient of another shape: an error of the program.
    pub fn step(&mut self, parameters: &Tensor, gradient: &Tensor, step: u64, settings: &AdamSettings) {
        match parameters.device() == gradient.device() {
            true => self.step_part(&(0..parameters.numel() as i64), parameters, gradient, step, settings),
            false => host::for_each_piece(gradient, host::PIECE, |range, piece| {
                self.step_part(&range, parameters, piece, step, settings);
            }),
        }
    }

    fn step_part(
        &self,
        range: &Range<i64>,
        parameters: &Tensor,
        gradient: &Tensor,
        step: u64,
        settings: &AdamSettings,
    ) {
        let AdamSettings { learning_rate, betas, epsilon } = *settings;
        let numbers = AdamStep { step, learning_rate, betas, epsilon };
        let part = |vector: &Tensor| host::part(vector, range);
        let (parameters, first, second) =
            (part(parameters), self.exp_avg.as_ref().map(part), part(&self.exp_avg_sq));
        if let Err(error) = step_adam(&parameters, gradient, first.as_ref(), &second, numbers) {
            panic!("{error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The algorithm as published (1412.6980, algorithm 1), for one number.
    fn by_the_book(gradients: &[[f64; 2]], settings: &AdamSettings) -> Vec<f64> {
        let [beta1, beta2] = settings.betas;
        let (mut x, mut m, mut v) = (vec![1.0, -2.0], [0.0; 2], [0.0; 2]);
        for (index, gradient) in gradients.iter().enumerate() {
            let t = index as i32 + 1;
            for i in 0..2 {
                m[i] = beta1 * m[i] + (1.0 - beta1) * gradient[i];
                v[i] = beta2 * v[i] + (1.0 - beta2) * gradient[i] * gradient[i];
                let (m_hat, v_hat) = (m[i] / (1.0 - beta1.powi(t)), v[i] / (1.0 - beta2.powi(t)));
                x[i] -= settings.learning_rate * m_hat / (v_hat.sqrt() + settings.epsilon);
            }
        }
        x
    }

    #[test]
    fn steps_are_those_of_the_algorithm() {
        let gradients = [[0.5, -1.0], [2.0, 0.25], [-0.1, 3.0], [0.0, 1e-3]];
        for (betas, in_pieces) in [([0.0, 0.999], false), ([0.9, 0.99], false), ([0.9, 0.99], true)] {
            let settings = AdamSettings { learning_rate: 0.1, betas, epsilon: 1e-8 };
            let x = Tensor::from_slice(&[1.0, -2.0]);
            let mut adam = Adam::new(&x, betas[0] != 0.0);
            for (index, gradient) in gradients.iter().enumerate() {
                let (gradient, step) = (Tensor::from_slice(gradient), index as u64 + 1);
                match in_pieces {
                    false => adam.step(&x, &gradient, step, &settings),
                    true => host::for_each_piece(&gradient, 1, |range, piece| {
                        adam.step_part(&range, &x, piece, step, &settings);
                    }),
                }
            }
            let found = Vec::<f64>::try_from(x).unwrap();
            for (found, expected) in found.iter().zip(by_the_book(&gradients, &settings)) {
                assert!((found - expected).abs() < 1e-12, "{found} {expected}");
            }
        }
    }
}
