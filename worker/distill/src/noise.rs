//! The laws of the noise level σ for EDM teachers (ALGORITHM §3).

use tch::{Device, Kind, Tensor};

use crate::random::Stream;

/// ln σ ~ N(mean, std²): EDM's training law (2206.00364, table 1), used where the fake score learns.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogNormal {
    /// Mean of ln σ.
    pub mean: f64,
    /// Standard deviation of ln σ.
    pub std: f64,
}

impl LogNormal {
    /// `count` noise levels, fp32 `[count]`.
    pub fn draw(&self, stream: &mut Stream, count: i64, device: Device) -> Tensor {
        let sigmas: Vec<f64> =
            stream.normal_scalars(count).iter().map(|z| (self.mean + self.std * z).exp()).collect();
        Tensor::from_slice(&sigmas).to_kind(Kind::Float).to_device(device)
    }
}

/// Karras spacing (2206.00364, eq. 5) at a random place: σ = (σ_max^{1/ρ} + (1−u)(σ_min^{1/ρ} − σ_max^{1/ρ}))^ρ with
/// u ~ U[0, u_max) (2404.04057): the generator phase's law.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Karras {
    /// σ at u = 0.
    pub sigma_min: f64,
    /// σ in the limit u → 1.
    pub sigma_max: f64,
    /// Spacing exponent.
    pub rho: f64,
    /// Upper end of u.
    pub u_max: f64,
}

impl Karras {
    /// σ at u.
    #[must_use]
    pub fn sigma(&self, u: f64) -> f64 {
        let (low, high) = (self.sigma_min.powf(1.0 / self.rho), self.sigma_max.powf(1.0 / self.rho));
        (high + (1.0 - u) * (low - high)).powf(self.rho)
    }

    /// `count` noise levels, fp32 `[count]`.
    pub fn draw(&self, stream: &mut Stream, count: i64, device: Device) -> Tensor {
        let sigmas: Vec<f64> = stream.uniform(count).iter().map(|u| self.sigma(u * self.u_max)).collect();
        Tensor::from_slice(&sigmas).to_kind(Kind::Float).to_device(device)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KARRAS: Karras = Karras { sigma_min: 0.002, sigma_max: 80.0, rho: 7.0, u_max: 0.8 };

    proptest! {
        #[test]
        fn karras_rises_from_sigma_min_to_sigma_max(a in 0.0f64..1.0, b in 0.0f64..1.0) {
            let (a, b) = (a.min(b), a.max(b));
            prop_assert!(KARRAS.sigma(a) <= KARRAS.sigma(b));
            prop_assert!(KARRAS.sigma(a) >= 0.002 * (1.0 - 1e-9) && KARRAS.sigma(b) <= 80.0);
        }
    }

    #[test]
    fn the_ends_are_exact() {
        assert!((KARRAS.sigma(0.0) - 0.002).abs() < 1e-12);
        assert!((KARRAS.sigma(1.0) - 80.0).abs() < 1e-9);
    }
}
