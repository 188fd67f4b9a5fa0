//! The adversarial loss with a few real samples (SiDA, 2410.14919; docs/algorithm.md §5): a Diffusion GAN (2206.02262) whose
//! discriminator is the fake score's own encoder, so that no network is added.
//!
//! Logits are the encoder's bottleneck, averaged over channels: a map of them per sample. Real and generated samples
//! are diffused to the same times with the same noise, and each keeps its own condition. All inputs of the
//! discriminator besides the sample (class, text, SDXL's size and crop) must have the same distribution for both, or it
//! tells them apart by these.

use potstill_models::Condition;
use potstill_torch_ext::upload;
use tch::{Device, Kind, Tensor};

use crate::random::Stream;

/// Settings of the adversarial loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adversarial {
    /// How the binary cross entropies become losses.
    pub scaling: Scaling,
    /// λ_adv of the generator. SiDA: 0.01; SiD-DiT: 1.
    pub generator_weight: f64,
    /// λ_D of the discriminator. SiDA and SiD-DiT: 1.
    pub discriminator_weight: f64,
    /// Weight of the approximate R1 penalty on real samples; 0: none.
    pub approximate_r1: f64,
    /// Standard deviation of that penalty's perturbation.
    pub approximate_r1_sigma: f64,
}

/// The two published ways to scale binary cross entropies (BCE) beside losses that are sums over elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scaling {
    /// SiDA's code (2410.14919): the BCE is averaged over positions **and** the samples of a micro-batch. The discriminator's is
    /// weighted with each sample's weight of the denoising loss, the generator's with ω and C·H·W. Only the generator's logits
    /// are kept within ±10.
    Sida,
    /// SiD-DiT's code (2509.25127): the BCE is averaged over each sample's positions and multiplied with C·H·W; the
    /// discriminator's has no other weight, the generator's ω. All logits are kept within ±10.
    SidDit,
}

/// The bound of clamped logits: they are kept within ± this.
const LARGEST_LOGIT: f64 = 10.0;

/// One number per sample: the mean over its map.
fn mean_map(x: &Tensor) -> Tensor {
    x.flatten(1, -1).mean_dim([1i64].as_slice(), false, Kind::Float)
}

/// The bottleneck [N, channels, height, width] as logits [N, height, width].
pub fn logits(bottleneck: &Tensor) -> Tensor {
    bottleneck.mean_dim([1i64].as_slice(), false, Kind::Float)
}

fn clamped(logits: &Tensor) -> Tensor {
    logits.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
}

/// The losses of a micro-batch's samples.
pub struct Terms {
    /// ½·(BCE(real, 1) + BCE(fake, 0)) or BCE(fake, 1), mean over each sample's map, unweighted, `[N]`.
    pub bce: Tensor,
    /// Each sample's contribution to the summed loss, `[N]`, without λ.
    pub losses: Tensor,
}

/// The mean over the samples that count, repeated for each sample: SiDA weights this mean. `finite`, bool `[N]`:
/// samples that count.
fn mean_of_batch(bce: &Tensor, finite: &Tensor) -> Tensor {
    let count = finite.sum(Kind::Float).clamp_min(1.0);
    (bce.where_scalarother(finite, 0.0).sum(Kind::Float) / count).expand_as(bce)
}

impl Scaling {
    /// The discriminator's loss ½·(BCE(real, 1) + BCE(fake, 0)) of logits [N, height, width]; `weight` `[N]` is the denoising
    /// loss's, `elements` C·H·W, `finite` bool `[N]`: samples that count.
    pub fn discriminator(
        self,
        real: &Tensor,
        fake: &Tensor,
        weight: &Tensor,
        elements: f64,
        finite: &Tensor,
    ) -> Terms {
        // BCE of a logit l with target 1 is softplus(−l), with target 0 softplus(l).
        let of = |real: &Tensor, fake: &Tensor| mean_map(&((-real).softplus() + fake.softplus())) * 0.5;
        match self {
            Self::Sida => {
                let bce = of(real, fake);
                let losses = mean_of_batch(&bce, &bce.isfinite().logical_and(finite)) * weight;
                Terms { bce, losses }
            }
            Self::SidDit => {
                let bce = of(&clamped(real), &clamped(fake));
                let losses = &bce * elements;
                Terms { bce, losses }
            }
        }
    }

    /// The generator's loss BCE(fake, 1) of logits [N, height, width]; `weight` `[N]` is ω, `elements` C·H·W, `finite`
    /// bool `[N]`: samples that count.
    pub fn generator(self, fake: &Tensor, weight: &Tensor, elements: f64, finite: &Tensor) -> Terms {
        let bce = mean_map(&(-clamped(fake)).softplus());
        let each = match self {
            Self::Sida => mean_of_batch(&bce, &bce.isfinite().logical_and(finite)),
            Self::SidDit => bce.shallow_clone(),
        };
        let losses = each * weight * elements;
        Terms { bce, losses }
    }
}

/// Approximate R1 (2501.08316): |D(x) − D(x + s·n)|², per sample, mean over the map. It replaces the gradient penalty
/// and needs no second derivative.
pub fn approximate_r1(real: &Tensor, perturbed: &Tensor) -> Tensor {
    mean_map(&(real - perturbed).square())
}

/// A source of real samples.
pub trait RealData {
    /// `count` samples drawn with replacement, fp32 [count, C, H, W] as the networks see them, with their own conditions.
    fn draw(&self, stream: &mut Stream, count: i64, device: Device) -> (Tensor, Condition);

    /// The conditions alone of `count` samples drawn with replacement.
    fn conditions(&self, stream: &mut Stream, count: i64, device: Device) -> Condition;
}

/// Real images in memory.
pub struct RealSamples {
    /// u8 [M, C, H, W]; a value v means 2·v/white − 1.
    pixels: Tensor,
    white: f64,
    /// int64 `[M]`.
    labels: Tensor,
    classes: i64,
}

impl RealSamples {
    /// `pixels` u8 [M, C, H, W], `white` the value of 1, `labels` int64 `[M]`; all on the host. The network has
    /// `classes` classes; with 0 labels are ignored.
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

    /// Whether there are no samples.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn classes_of(&self, indices: &Tensor, device: Device) -> Condition {
        match self.classes {
            0 => Condition::None,
            classes => {
                let labels = self.labels.index_select(0, indices).one_hot(classes);
                Condition::Class(upload(&labels.to_kind(Kind::Float), device))
            }
        }
    }
}

impl RealData for RealSamples {
    fn draw(&self, stream: &mut Stream, count: i64, device: Device) -> (Tensor, Condition) {
        let indices = Tensor::from_slice(&stream.integers(count, self.len()));
        let pixels = upload(&self.pixels.index_select(0, &indices), device).to_kind(Kind::Float);
        (pixels * (2.0 / self.white) - 1.0, self.classes_of(&indices, device))
    }

    fn conditions(&self, stream: &mut Stream, count: i64, device: Device) -> Condition {
        self.classes_of(&Tensor::from_slice(&stream.integers(count, self.len())), device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Purpose;

    /// Two samples of maps of two positions, and their losses in both scalings, by the formulas.
    #[test]
    fn losses_are_binary_cross_entropies_scaled_as_published() {
        let sigmoid = |l: f64| (1.0 + (-l).exp()).recip();
        let (real, fake) = ([[0.5, -1.0], [12.0, 0.1]], [[2.0, -0.3], [-14.0, 0.7]]);
        let maps = |x: [[f64; 2]; 2]| Tensor::from_slice(&x.concat()).to_kind(Kind::Float).reshape([2, 1, 2]);
        let weight = Tensor::from_slice(&[3.0f32, 0.5]);
        let (elements, all) = (16.0, Tensor::from_slice(&[true, true]));
        let mean = |values: [f64; 2]| f64::midpoint(values[0], values[1]);
        let clamp = |x: [f64; 2]| x.map(|l: f64| l.clamp(-10.0, 10.0));
        let near = |found: &Tensor, expected: [f64; 2]| {
            for (index, expected) in (0..).zip(expected) {
                let found = found.double_value(&[index]);
                assert!((found / expected - 1.0).abs() < 1e-5, "{found} {expected}");
            }
        };
        let d = |real: [f64; 2], fake: [f64; 2]| {
            f64::midpoint(mean(real.map(|l| -sigmoid(l).ln())), mean(fake.map(|l| -(1.0 - sigmoid(l)).ln())))
        };
        let g = |fake: [f64; 2]| mean(clamp(fake).map(|l| -sigmoid(l).ln()));

        let terms = Scaling::SidDit.discriminator(&maps(real), &maps(fake), &weight, elements, &all);
        let each = [0, 1].map(|i| d(clamp(real[i]), clamp(fake[i])));
        near(&terms.bce, each);
        near(&terms.losses, each.map(|bce| bce * elements));
        let terms = Scaling::SidDit.generator(&maps(fake), &weight, elements, &all);
        near(&terms.losses, [g(fake[0]) * 3.0 * elements, g(fake[1]) * 0.5 * elements]);

        let terms = Scaling::Sida.discriminator(&maps(real), &maps(fake), &weight, elements, &all);
        let of_batch = mean([0, 1].map(|i| d(real[i], fake[i])));
        near(&terms.losses, [of_batch * 3.0, of_batch * 0.5]);
        let terms = Scaling::Sida.generator(&maps(fake), &weight, elements, &all);
        let of_batch = mean(fake.map(g));
        near(&terms.losses, [of_batch * 3.0 * elements, of_batch * 0.5 * elements]);
        // A sample that is left out counts in no mean.
        let first = Tensor::from_slice(&[true, false]);
        let terms = Scaling::Sida.generator(&maps(fake), &weight, elements, &first);
        near(&terms.losses, [g(fake[0]) * 3.0 * elements, g(fake[0]) * 0.5 * elements]);

        let penalty = approximate_r1(&maps(real), &maps(fake));
        near(&penalty, [mean([2.25, 0.49]), mean([676.0, 0.36])]);
    }

    #[test]
    fn logits_average_channels() {
        let bottleneck = Tensor::from_slice(&[1.0f32, 3.0, 50.0, 70.0]).reshape([1, 2, 1, 2]);
        let found: Vec<f32> = Vec::try_from(logits(&bottleneck).reshape([-1])).unwrap();
        assert_eq!(found, [25.5, 36.5]);
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
