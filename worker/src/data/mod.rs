//! Real images with their classes, in memory: what a teacher learns from, what scores compare with, and what the adversarial
//! loss shows its discriminator.
//!
//! They come from one of:
//! - a safetensors file: `images` u8 [N, C, H, W], `labels` u8 `[N]`, and in the metadata `pixel_max`, the value that stands
//!   for white;
//! - a folder with one sub-folder of images (PNG, JPEG, WebP) per class: the sub-folder's name if all of them are numbers,
//!   else its place in the sorted order;
//! - a tar in the WebDataset layout, or a folder of such: an image and a `.cls` or `.json` (`{"label": 3}`) under one key.
//!
//! Pixels become x = 2·v/white − 1, in [−1, 1].

mod formats;
mod images;
pub mod pairs;
pub mod prompt_file;
pub mod protocol;
mod tars;
mod tensors;

use anyhow::{Context, ensure};
use potstill_distill::adversarial::RealSamples;
use potstill_spec::Protocol;
use potstill_storage::Source;
use tch::{Kind, Tensor};

/// Images and their classes, on the host.
pub struct Dataset {
    /// u8 [N, C, H, W].
    pixels: Tensor,
    white: f64,
    /// int64 `[N]`.
    pub labels: Tensor,
}

/// Images that are brought to another size at a time.
const BATCH: i64 = 100;

/// Of what a network needs.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Channels, height, width.
    pub sample: [i64; 3],
    /// Labels must lie below this; 0: they are not looked at.
    pub classes: i64,
}

impl Dataset {
    /// Reads everything at `location`, a path or a URL, and checks that it fits.
    ///
    /// # Errors
    /// What does not fit, with the place.
    pub fn load(location: &str, shape: Shape) -> anyhow::Result<Self> {
        Self::load_as(location, shape, Protocol::AsMade)
    }

    /// [`load`](Self::load) of images that a protocol brings to the size of `shape`; before it they may be of any
    /// size that it takes.
    ///
    /// # Errors
    /// As `load`; images that are too small for the protocol.
    pub fn load_as(location: &str, shape: Shape, protocol: Protocol) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let read = runtime.block_on(Self::read(location, shape, protocol));
        read.with_context(|| format!("images at {location}"))
    }

    async fn read(location: &str, shape: Shape, protocol: Protocol) -> anyhow::Result<Self> {
        let source = Source::open(location)?;
        let names = source.list().await?;
        let wanted = images::Wanted { shape: shape.sample, protocol };
        let dataset = match source.name().rsplit_once('.').map(|(_, extension)| extension) {
            Some("safetensors") => tensors::parse(&source.read("").await?)?.after(protocol)?,
            Some("tar") => images::from_tars(&source, &[String::new()], wanted).await?,
            _ if !names.is_empty() && names.iter().all(|name| name.ends_with(".tar")) => {
                images::from_tars(&source, &names, wanted).await?
            }
            _ => images::from_folder(&source, &names, wanted).await?,
        };
        dataset.check(shape)?;
        Ok(dataset)
    }

    /// The images as a protocol wants them.
    fn after(self, protocol: Protocol) -> anyhow::Result<Self> {
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

    fn check(&self, shape: Shape) -> anyhow::Result<()> {
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
                    "label {} of image {index} is out of range: the network knows classes 0 to {}",
                    self.labels.int64_value(&[*index]),
                    shape.classes - 1
                );
            }
        }
        Ok(())
    }

    /// Keeps `count` images, spread evenly over the whole, if there are more.
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

    /// How many images there are.
    pub fn len(&self) -> i64 {
        self.pixels.size()[0]
    }

    /// All images, fp32 [N, C, H, W] in [−1, 1].
    pub fn images(&self) -> Tensor {
        self.pixels.to_kind(Kind::Float) * (2.0 / self.white) - 1.0
    }

    /// All images, so many at a time, each batch as [`images`](Self::images): many large ones do not fit in memory as
    /// fp32.
    pub fn batches(&self, size: i64) -> impl Iterator<Item = Tensor> {
        let pixels = self.pixels.split(size, 0);
        let scale = 2.0 / self.white;
        pixels.into_iter().map(move |batch| batch.to_kind(Kind::Float) * scale - 1.0)
    }

    /// For the adversarial loss.
    pub fn into_real_samples(self, classes: i64) -> RealSamples {
        RealSamples::new(self.pixels, self.white, self.labels, classes)
    }
}

/// Counts what is broken among many files: it is left out, until there is too much of it.
#[derive(Default)]
struct Tally {
    broken: usize,
    /// The first few, for people.
    shown: Vec<String>,
}

/// One in so many may be broken.
const ONE_BROKEN_IN: usize = 100;
/// So many of them are shown.
const SHOWN: usize = 3;

impl Tally {
    /// One more, and what is wrong with it.
    fn broken(&mut self, what: String) {
        self.broken += 1;
        if self.shown.len() < SHOWN {
            self.shown.push(what);
        }
    }

    /// Reports what is broken beside so many `good` ones.
    ///
    /// # Errors
    /// It is too much.
    fn judge(&self, good: usize) -> anyhow::Result<()> {
        let (broken, shown) = (self.broken, self.shown.join("; "));
        ensure!(
            broken <= good.div_ceil(ONE_BROKEN_IN),
            "{broken} of {} images cannot be used: {shown}",
            good + broken
        );
        if broken > 0 {
            tracing::warn!(broken, good, "images that cannot be used are left out: {shown}");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Cursor, path::Path};

    use image::{ImageFormat, RgbImage};

    /// A picture as a PNG's bytes.
    pub fn png_of(width: u32, height: u32, pixel: impl Fn(u32, u32) -> [u8; 3]) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        RgbImage::from_fn(width, height, |x, y| image::Rgb(pixel(x, y)))
            .write_to(&mut bytes, ImageFormat::Png)
            .unwrap();
        bytes.into_inner()
    }

    /// Writes a tar.
    pub fn tar(path: &Path, members: &[(&str, &[u8])]) {
        let mut builder = tar::Builder::new(std::fs::File::create(path).unwrap());
        for (name, content) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            header.set_cksum();
            builder.append_data(&mut header, name, *content).unwrap();
        }
        builder.finish().unwrap();
    }
}
