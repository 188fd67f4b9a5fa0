//! Counters of the two networks' optimizers: their own steps, and fp16's loss scale.
//!
//! Adam's bias correction (1412.6980, algorithm 1) counts the steps that **this** network has made, without iterations
//! in which it was frozen or its step was skipped. Dynamic loss scaling (1710.03740, section 3.2) keeps fp16's small
//! gradients above 0 by a factor that grows over steps without overflow and shrinks at an overflow.

use tch::{Tensor, no_grad};

/// The initial loss scale.
const INITIAL: f64 = 65536.0;
/// Steps without overflow after which it doubles.
const GROWTH_INTERVAL: f64 = 2000.0;

/// Numbers of each network: [loss scale, steps since it last changed, optimizer steps made].
const NUMBERS: i64 = 3;

/// The counters in a run's state: fp32 `[2, 3]` on the host, generator first.
///
/// Powers of two and counts below 2²⁴ are exact in fp32. A count stops at 2²⁴; Adam's bias correction is 1 long before.
pub struct Counters {
    values: Tensor,
    dynamic: bool,
}

/// The network whose counters are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// G_θ.
    Generator = 0,
    /// f_ψ.
    FakeScore = 1,
}

impl Counters {
    /// Shape of the values.
    pub const SHAPE: [i64; 2] = [2, NUMBERS];

    /// No steps; `dynamic`: loss scales that follow overflows, else they stay 1.
    #[must_use]
    pub fn new(dynamic: bool) -> Self {
        let scale = if dynamic { INITIAL } else { 1.0 };
        let network = [scale as f32, 0.0, 0.0];
        Self { values: Tensor::from_slice(&[network, network].concat()), dynamic }
    }

    /// A copy in memory of its own.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        Self { values: self.values.copy(), dynamic: self.dynamic }
    }

    /// The values, flat, to be saved and sent; changed in place when they come from a checkpoint or a peer.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    fn get(&self, network: Network, number: i64) -> f64 {
        self.values.double_value(&[NUMBERS * network as i64 + number])
    }

    fn set(&self, network: Network, number: i64, value: f64) {
        no_grad(|| {
            let _ = self.values.get(NUMBERS * network as i64 + number).fill_(value);
        });
    }

    /// The factor of a loss, by which its gradient is divided.
    #[must_use]
    pub fn scale(&self, network: Network) -> f64 {
        self.get(network, 0)
    }

    /// Updates the loss scale after a gradient. True: the gradient is to be used; false: it overflowed, and the step is
    /// skipped.
    #[must_use]
    pub fn accept(&mut self, network: Network, finite: bool) -> bool {
        if !self.dynamic {
            return true;
        }
        let (scale, steps) = (self.scale(network), self.get(network, 1) + 1.0);
        let (scale, steps) = match finite {
            false => ((scale / 2.0).max(1.0), 0.0),
            true if steps >= GROWTH_INTERVAL => (scale * 2.0, 0.0),
            true => (scale, steps),
        };
        self.set(network, 0, scale);
        self.set(network, 1, steps);
        finite
    }

    /// Whether a smaller scale could still avoid an overflow.
    #[must_use]
    pub fn can_shrink(&self, network: Network) -> bool {
        self.dynamic && self.scale(network) > 1.0
    }

    /// The number of steps of the network's optimizer.
    #[must_use]
    pub fn steps(&self, network: Network) -> u64 {
        self.get(network, 2) as u64
    }

    /// Counts one more step, and returns its number, from 1.
    pub fn count_step(&mut self, network: Network) -> u64 {
        let steps = self.steps(network) + 1;
        self.set(network, 2, steps as f64);
        steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_shrinks_with_overflows_and_grows_without() {
        let mut counters = Counters::new(true);
        assert!(!counters.accept(Network::Generator, false));
        assert_eq!(
            (counters.scale(Network::Generator), counters.scale(Network::FakeScore)),
            (32768.0, 65536.0)
        );
        for _ in 0..2000 {
            assert!(counters.accept(Network::Generator, true));
        }
        assert_eq!(counters.scale(Network::Generator), 65536.0);
        for _ in 0..40 {
            assert!(!counters.accept(Network::FakeScore, false));
        }
        assert_eq!(counters.scale(Network::FakeScore), 1.0);
        assert!(!counters.can_shrink(Network::FakeScore) && counters.can_shrink(Network::Generator));
    }

    #[test]
    fn without_scaling_nothing_changes() {
        let mut counters = Counters::new(false);
        assert!(counters.accept(Network::Generator, false), "what is not finite is repaired elsewhere");
        assert_eq!(counters.scale(Network::Generator), 1.0);
    }

    #[test]
    fn each_network_counts_its_own_steps() {
        let mut counters = Counters::new(true);
        assert_eq!([1, 2, 3].map(|_| counters.count_step(Network::FakeScore)), [1, 2, 3]);
        assert!(!counters.accept(Network::FakeScore, false));
        assert_eq!(counters.count_step(Network::Generator), 1);
        assert_eq!((counters.steps(Network::Generator), counters.steps(Network::FakeScore)), (1, 3));
        let apart = counters.duplicate();
        counters.count_step(Network::Generator);
        assert_eq!(apart.steps(Network::Generator), 1);
    }
}
