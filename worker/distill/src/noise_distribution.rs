//! The noise distributions: the distributions of the diffusion time at which scores are learned and compared
//! (docs/algorithm.md §3).

use potstill_torch_ext::upload;
use tch::{Device, Kind, Tensor};

use crate::random::Stream;

/// A distribution of times of one family of forward processes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NoiseDistribution {
    /// EDM: ln σ ~ N(mean, std²), its training distribution (2206.00364, table 1).
    LogNormal {
        /// Mean of ln σ.
        mean: f64,
        /// Standard deviation of ln σ.
        std: f64,
    },
    /// EDM: Karras spacing (2206.00364, eq. 5) at a random position, σ = (σ_max^{1/ρ} + (1−u)(σ_min^{1/ρ} −
    /// σ_max^{1/ρ}))^ρ with u ~ U[0, u_max) (2404.04057).
    Karras {
        /// σ at u = 0.
        sigma_min: f64,
        /// σ in the limit u → 1.
        sigma_max: f64,
        /// Spacing exponent.
        rho: f64,
        /// Upper end of u.
        u_max: f64,
    },
    /// DDPM: t ~ U{first, …, last} (2406.01561: 20 to 979).
    Uniform {
        /// Least timestep.
        first: i64,
        /// Greatest timestep.
        last: i64,
    },
    /// Flow matching: t = sigmoid(N(mean, std²)) (2509.25127: ln 2, 1.6).
    LogitNormal {
        /// Mean of the logit.
        mean: f64,
        /// Standard deviation of the logit.
        std: f64,
    },
}

impl NoiseDistribution {
    /// The distribution in both phases on a flow: t = sigmoid(N(ln 2, 1.6²)) (2509.25127).
    pub const SID_DIT: Self = Self::LogitNormal { mean: std::f64::consts::LN_2, std: 1.6 };

    /// `count` times, fp32 `[count]`.
    pub fn draw(&self, stream: &mut Stream, count: i64, device: Device) -> Tensor {
        let numbers = match *self {
            Self::LogNormal { .. } | Self::LogitNormal { .. } => stream.normal_scalars(count),
            Self::Karras { .. } => stream.uniform(count),
            Self::Uniform { first, last } => {
                stream.integers(count, last - first + 1).iter().map(|t| *t as f64).collect()
            }
        };
        upload(&self.times(&numbers), device)
    }

    /// The times for given random numbers, fp32 on the host: numbers from N(0, 1) for the normal distributions, from
    /// U[0, 1) for Karras spacing, from U{0, …, last − first} for the uniform one.
    pub fn times(&self, numbers: &[f64]) -> Tensor {
        let times: Vec<f64> = match *self {
            Self::LogNormal { mean, std } => numbers.iter().map(|z| (mean + std * z).exp()).collect(),
            Self::Karras { sigma_min, sigma_max, rho, u_max } => {
                let (low, high) = (sigma_min.powf(rho.recip()), sigma_max.powf(rho.recip()));
                let sigma = |u: f64| (high + (1.0 - u * u_max) * (low - high)).powf(rho);
                numbers.iter().map(|u| sigma(*u)).collect()
            }
            Self::Uniform { first, .. } => numbers.iter().map(|t| first as f64 + t).collect(),
            Self::LogitNormal { mean, std } => {
                numbers.iter().map(|z| (1.0 + (-(mean + std * z)).exp()).recip()).collect()
            }
        };
        Tensor::from_slice(&times).to_kind(Kind::Float)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Purpose;

    fn sorted(law: NoiseDistribution) -> Vec<f32> {
        let mut stream = Stream::new(3, 0, Purpose::Evaluation, 0, Device::Cpu);
        let mut times = Vec::<f32>::try_from(law.draw(&mut stream, 20_000, Device::Cpu)).unwrap();
        times.sort_by(f32::total_cmp);
        times
    }

    /// Value below which a share of the times lies.
    fn quantile(times: &[f32], share: f64) -> f64 {
        f64::from(times[(share * times.len() as f64) as usize])
    }

    #[test]
    fn quantiles_are_those_of_the_laws() {
        let near = |found: f64, expected: f64| {
            assert!((found / expected - 1.0).abs() < 0.05, "{found} and {expected}");
        };
        let t = sorted(NoiseDistribution::LogNormal { mean: -1.2, std: 1.2 });
        near(quantile(&t, 0.5), (-1.2f64).exp());
        near(quantile(&t, 0.841_344_7), 1.0);

        let (sigma_min, sigma_max, rho) = (0.002, 80.0, 7.0);
        let t = sorted(NoiseDistribution::Karras { sigma_min, sigma_max, rho, u_max: 0.8 });
        let at = |u: f64| {
            let (low, high) = (0.002f64.powf(1.0 / 7.0), 80f64.powf(1.0 / 7.0));
            (low + u * (high - low)).powi(7)
        };
        near(quantile(&t, 0.5), at(0.4));
        near(f64::from(t[0]), 0.002);
        assert!(f64::from(t[t.len() - 1]) < at(0.8));

        let t = sorted(NoiseDistribution::Uniform { first: 20, last: 979 });
        assert_eq!((t[0], t[t.len() - 1]), (20.0, 979.0));
        near(quantile(&t, 0.25), 20.0 + 0.25 * 960.0);
        assert!(t.iter().all(|t| t.fract() == 0.0));

        let t = sorted(NoiseDistribution::LogitNormal { mean: std::f64::consts::LN_2, std: 1.6 });
        near(quantile(&t, 0.5), 2.0 / 3.0);
        assert!(t[0] > 0.0 && t[t.len() - 1] < 1.0);
    }
}
