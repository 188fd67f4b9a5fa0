//! The adversarial loss with a few real samples (SiDA, 2410.14919; ALGORITHM §5): a Diffusion GAN (2206.02262) whose
//! discriminator is the fake score's own encoder, so that no network is added.
//!
//! Logits are the encoder's bottleneck, averaged over channels: a map of them per sample. Real and generated samples are
//! diffused to the same times with the same noise, and each keeps its own condition.

use potstill_models::Condition;
use tch::{Device, Kind, Tensor};

use crate::random::Stream;

/// Settings of the adversarial loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adversarial {
    /// λ_sid: weight of the score identity loss beside the adversarial one. SiDA: 100.
    pub score_identity_weight: f64,
    /// λ_adv of the generator. SiDA: 0.01.
    pub generator_weight: f64,
    /// λ_adv of the discriminator. SiDA: 1.
    pub discriminator_weight: f64,
    /// First iteration with the adversarial loss.
    pub start_iteration: u64,
    /// Weight of the approximate R1 penalty on real samples; 0: none.
    pub approximate_r1: f64,
    /// Standard deviation of that penalty's perturbation.
    pub approximate_r1_sigma: f64,
}

/// Logits are kept within ±10, as in SiDA.
const LARGEST_LOGIT: f64 = 10.0;

/// One number per sample: the mean over its map.
fn mean_map(x: &Tensor) -> Tensor {
    x.flatten(1, -1).mean_dim([1i64].as_slice(), false, Kind::Float)
}

/// The bottleneck [N, channels, height, width] as logits [N, height, width].
pub fn logits(bottleneck: &Tensor) -> Tensor {
    bottleneck.mean_dim([1i64].as_slice(), false, Kind::Float).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
}

/// The discriminator's loss ½·(BCE(real, 1) + BCE(fake, 0)), per sample, mean over the map.
pub fn discriminator_loss(real: &Tensor, fake: &Tensor) -> Tensor {
    // BCE of a logit l with target 1 is softplus(−l), with target 0 softplus(l).
    mean_map(&((-real).softplus() + fake.softplus())) * 0.5
}

/// The generator's loss BCE(fake, 1), per sample, mean over the map.
pub fn generator_loss(fake: &Tensor) -> Tensor {
    mean_map(&(-fake).softplus())
}

/// Approximate R1 (2501.08316): |D(x) − D(x + s·n)|², per sample, mean over the map. It stands in for the gradient penalty
/// without a second derivative.
pub fn approximate_r1(real: &Tensor, perturbed: &Tensor) -> Tensor {
    mean_map(&(real - perturbed).square())
}

/// Where real samples come from.
pub trait RealData {
    /// `count` samples drawn with replacement, fp32 [count, C, H, W] as the networks see them, with their own conditions.
    fn draw(&self, stream: &mut Stream, count: i64, device: Device) -> (Tensor, Condition);
}

/// Real images in memory.
pub struct RealSamples {
    /// u8 [M, C, H, W]; a value v stands for 2·v/white − 1.
    pixels: Tensor,
    white: f64,
    /// int64 `[M]`.
    labels: Tensor,
    classes: i64,
}

impl RealSamples {
    /// `pixels` u8 [M, C, H, W], `white` the value that stands for 1, `labels` int64 `[M]`; all on the host. The network knows
    /// so many `classes`; with 0 labels are not looked at.
    #[must_use]
    pub fn new(pixels: Tensor, white: f64, labels: Tensor, classes: i64) -> Self {
        Self { pixels, white, labels, classes }
    }

    /// Shape of one sample: C, H, W.
    #[must_use]
    pub fn sample_shape(&self) -> [i64; 3] {
        let size = self.pixels.size();
        [size[1], size[2], size[3]]
    }

    /// Number of samples.
    #[must_use]
    pub fn len(&self) -> i64 {
        self.pixels.size()[0]
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl RealData for RealSamples {
    fn draw(&self, stream: &mut Stream, count: i64, device: Device) -> (Tensor, Condition) {
        let indices = Tensor::from_slice(&stream.integers(count, self.len()));
        let pixels = self.pixels.index_select(0, &indices).to_device(device).to_kind(Kind::Float);
        let condition = match self.classes {
            0 => Condition::None,
            classes => {
                let labels = self.labels.index_select(0, &indices).one_hot(classes);
                Condition::Class(labels.to_kind(Kind::Float).to_device(device))
            }
        };
        (pixels * (2.0 / self.white) - 1.0, condition)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Purpose;

    fn map(values: &[f64]) -> Tensor {
        Tensor::from_slice(values).to_kind(Kind::Float).reshape([1, 1, values.len() as i64])
    }

    fn value(x: &Tensor) -> f64 {
        x.double_value(&[0])
    }

    #[test]
    fn losses_are_binary_cross_entropies() {
        let sigmoid = |l: f64| (1.0 + (-l).exp()).recip();
        let (real, fake) = ([0.5, -1.0], [2.0, -0.3]);
        let mean = |values: [f64; 2]| f64::midpoint(values[0], values[1]);
        let on_real = mean(real.map(|l| -sigmoid(l).ln()));
        let on_fake = mean(fake.map(|l| -(1.0 - sigmoid(l)).ln()));
        let expected = f64::midpoint(on_real, on_fake);
        assert!((value(&discriminator_loss(&map(&real), &map(&fake))) - expected).abs() < 1e-6);
        let expected = mean(fake.map(|l| -sigmoid(l).ln()));
        assert!((value(&generator_loss(&map(&fake))) - expected).abs() < 1e-6);
        assert!((value(&approximate_r1(&map(&real), &map(&fake))) - mean([2.25, 0.49])).abs() < 1e-6);
    }

    #[test]
    fn logits_average_channels_and_stay_bounded() {
        let bottleneck = Tensor::from_slice(&[1.0f32, 3.0, 50.0, 70.0]).reshape([1, 2, 1, 2]);
        let found: Vec<f32> = Vec::try_from(logits(&bottleneck).reshape([-1])).unwrap();
        assert_eq!(found, [10.0, 10.0]);
        let found: Vec<f32> = Vec::try_from(logits(&(bottleneck / -10.0)).reshape([-1])).unwrap();
        assert!((found[0] + 2.55).abs() < 1e-5 && (found[1] + 3.65).abs() < 1e-5, "{found:?}");
    }

    #[test]
    fn real_samples_come_with_their_own_labels() {
        let pixels = Tensor::from_slice(&[0u8, 16, 8]).reshape([3, 1, 1, 1]);
        let samples = RealSamples::new(pixels, 16.0, Tensor::from_slice(&[2i64, 0, 1]), 3);
        let draw = || {
            let mut stream = Stream::new(1, 2, Purpose::FakeScorePhase, 3, Device::Cpu);
            samples.draw(&mut stream, 200, Device::Cpu)
        };
        let (images, condition) = draw();
        let Condition::Class(labels) = condition else { panic!("classes were given") };
        let images: Vec<f32> = Vec::try_from(images.reshape([-1])).unwrap();
        let labels: Vec<i64> = Vec::try_from(labels.argmax(1, false)).unwrap();
        for (image, label) in images.iter().zip(&labels) {
            let expected = match *image {
                -1.0 => 2,
                1.0 => 0,
                0.0 => 1,
                other => panic!("{other} is no sample"),
            };
            assert_eq!(*label, expected, "{image}");
        }
        assert!((0..3).all(|label| labels.contains(&label)));
        assert!(draw().0.reshape([-1]).allclose(&Tensor::from_slice(&images), 0.0, 0.0, false));
    }
}
