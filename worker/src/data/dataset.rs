//! Real images with their classes, in memory: the training data of a teacher, the reference of metrics, and the real
//! samples of the adversarial loss.

use anyhow::ensure;
use potstill_distill::adversarial::RealSamples;
use potstill_spec::Protocol;
use tch::{Kind, Tensor};

use super::protocol;

/// Images and their classes, on the host.
pub struct Dataset {
    /// u8 [N, C, H, W].
    pub(super) pixels: Tensor,
    pub(super) white: f64,
    /// int64 `[N]`.
    pub labels: Tensor,
}

/// Images that are treated at a time.
const BATCH: i64 = 100;

/// The images that a network needs.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Channels, height, width.
    pub sample: [i64; 3],
    /// Number of classes, above all labels; 0: labels are ignored.
    pub classes: i64,
}

impl Dataset {
    /// The treatment of the images.
    pub(super) fn after(self, protocol: Protocol) -> anyhow::Result<Self> {
        if protocol == Protocol::AsMade {
            return Ok(self);
        }
        let bytes = |batch: Tensor| -> anyhow::Result<Tensor> {
            let images = protocol::apply(protocol, &batch)?;
            Ok(((images + 1.0) * 127.5).round().to_kind(Kind::Uint8))
        };
        let pixels = self.batches(BATCH).map(bytes).collect::<anyhow::Result<Vec<_>>>()?;
        Ok(Self { pixels: Tensor::cat(&pixels, 0), white: 255.0, labels: self.labels })
    }

    pub(super) fn check(&self, shape: Shape) -> anyhow::Result<()> {
        let size = self.pixels.size();
        ensure!(
            size[1..] == shape.sample,
            "has images of {:?}, but the network makes {:?} (C, H, W)",
            &size[1..],
            shape.sample
        );
        ensure!(size[0] > 1, "has {} images; at least 2 are needed", size[0]);
        if shape.classes > 0 {
            let outside = self.labels.lt(0).logical_or(&self.labels.ge(shape.classes));
            if let Some(index) = Vec::<i64>::try_from(outside.nonzero().reshape([-1]))?.first() {
                anyhow::bail!(
                    "label {} of image {index} is out of range: the network has classes 0 to {}",
                    self.labels.int64_value(&[*index]),
                    shape.classes - 1
                );
            }
        }
        Ok(())
    }

    /// Keeps `count` images, spread evenly over all, if there are more.
    pub fn limit(self, count: u64) -> Self {
        let n = self.len();
        let count = i64::try_from(count).unwrap_or(n).min(n);
        let indices: Vec<i64> = (0..count).map(|i| i * n / count).collect();
        let indices = Tensor::from_slice(&indices);
        Self {
            pixels: self.pixels.index_select(0, &indices),
            white: self.white,
            labels: self.labels.index_select(0, &indices),
        }
    }

    /// The number of images.
    pub fn len(&self) -> i64 {
        self.pixels.size()[0]
    }

    /// All images, fp32 [N, C, H, W] in [−1, 1].
    pub fn images(&self) -> Tensor {
        self.pixels.to_kind(Kind::Float) * (2.0 / self.white) - 1.0
    }

    /// All images, in batches of the given size, each as [`images`](Self::images): many large ones do not fit in memory
    /// as fp32.
    pub fn batches(&self, size: i64) -> impl Iterator<Item = Tensor> {
        let pixels = self.pixels.split(size, 0);
        let scale = 2.0 / self.white;
        pixels.into_iter().map(move |batch| batch.to_kind(Kind::Float) * scale - 1.0)
    }

    /// A micro-batch of real samples for the adversarial loss.
    pub fn into_real_samples(self, classes: i64) -> RealSamples {
        RealSamples::new(self.pixels, self.white, self.labels, classes)
    }
}
