//! Dynamic loss scaling (1710.03740, section 3.2): fp16's small gradients are kept above 0 by a factor that grows while all
//! goes well and shrinks when something overflows.

use tch::{Device, Tensor, no_grad};

/// The factor to begin with.
const INITIAL: f64 = 65536.0;
/// Steps without overflow after which it doubles.
const GROWTH_INTERVAL: f64 = 2000.0;

/// Loss scales of the two networks as they lie in a run's state: [scale, steps since the last change] of the generator, then
/// of the fake score; fp32 `[4]`, beside the networks. Powers of two and small counts: fp32 holds them exactly.
pub struct LossScales {
    values: Tensor,
    dynamic: bool,
}

/// Whose scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// G_θ.
    Generator = 0,
    /// f_ψ.
    FakeScore = 1,
}

impl LossScales {
    /// Scales on a device that follow overflows, or that stay 1.
    #[must_use]
    pub fn new(dynamic: bool, device: Device) -> Self {
        let scale = if dynamic { INITIAL } else { 1.0 };
        let values = [scale as f32, 0.0, scale as f32, 0.0];
        Self { values: Tensor::from_slice(&values).to_device(device), dynamic }
    }

    /// The same, apart.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        Self { values: self.values.copy(), dynamic: self.dynamic }
    }

    /// The values, to be saved and sent; changed in place when they are taken from elsewhere.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// What a loss is multiplied with, and its gradient divided by.
    #[must_use]
    pub fn scale(&self, network: Network) -> f64 {
        self.values.double_value(&[2 * network as i64])
    }

    /// Takes note of a gradient. True: it is to be used; false: it overflowed, and the step is left out.
    #[must_use]
    pub fn accept(&mut self, network: Network, finite: bool) -> bool {
        if !self.dynamic {
            return true;
        }
        let at = 2 * network as i64;
        let (scale, steps) = (self.scale(network), self.values.double_value(&[at + 1]) + 1.0);
        let (scale, steps) = match finite {
            false => ((scale / 2.0).max(1.0), 0.0),
            true if steps >= GROWTH_INTERVAL => (scale * 2.0, 0.0),
            true => (scale, steps),
        };
        no_grad(|| {
            let _ = self.values.get(at).fill_(scale);
            let _ = self.values.get(at + 1).fill_(steps);
        });
        finite
    }

    /// Whether an overflow can still be answered by a smaller scale.
    #[must_use]
    pub fn can_shrink(&self, network: Network) -> bool {
        self.dynamic && self.scale(network) > 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_shrinks_with_overflows_and_grows_without() {
        let mut scales = LossScales::new(true, Device::Cpu);
        assert!(!scales.accept(Network::Generator, false));
        assert_eq!((scales.scale(Network::Generator), scales.scale(Network::FakeScore)), (32768.0, 65536.0));
        for _ in 0..2000 {
            assert!(scales.accept(Network::Generator, true));
        }
        assert_eq!(scales.scale(Network::Generator), 65536.0);
        for _ in 0..40 {
            assert!(!scales.accept(Network::FakeScore, false));
        }
        assert_eq!(scales.scale(Network::FakeScore), 1.0);
        assert!(!scales.can_shrink(Network::FakeScore) && scales.can_shrink(Network::Generator));
    }

    #[test]
    fn without_scaling_nothing_changes() {
        let mut scales = LossScales::new(false, Device::Cpu);
        assert!(scales.accept(Network::Generator, false), "what is not finite is repaired elsewhere");
        assert_eq!(scales.scale(Network::Generator), 1.0);
    }
}
