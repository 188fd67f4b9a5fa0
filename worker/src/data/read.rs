//! Reads images with their classes, from one of:
//! - a safetensors file: `images` u8 [N, C, H, W], `labels` u8 `[N]`, and in the metadata `pixel_max`, the value of
//!   white;
//! - a folder with one sub-folder of images (PNG, JPEG, WebP) per class: the class is the sub-folder's name if all names
//!   are numbers, else its index in the sorted order;
//! - a tar in the WebDataset layout, compressed or not, or a folder of such: an image and a `.cls` or `.json` (`{"label": 3}`)
//!   under one key.
//!
//! Pixels become x = 2·v/white − 1, in [−1, 1].

use anyhow::{Context, bail};
use potstill_spec::Protocol;
use potstill_storage::Source;

use super::{
    dataset::{Dataset, Shape},
    formats::{is_hidden, is_image, no_set},
    images, tars, tensors,
};

impl Dataset {
    /// Reads all images at `location`, a path or a URL, with their labels where the model has classes, and checks that they fit
    /// the model.
    ///
    /// # Errors
    /// An image or a label does not fit, with its place; a label is missing.
    pub fn load(location: &str, shape: Shape) -> anyhow::Result<Self> {
        Self::load_as(location, shape, shape.classes, Protocol::AsMade)
    }

    /// [`load`](Self::load) of images whose labels do not matter, with a treatment that brings them to the size of `shape`;
    /// before it they may have any size that the treatment accepts.
    ///
    /// # Errors
    /// An image or a label that is there does not fit; images that are too small for the treatment.
    pub fn load_reference(location: &str, shape: Shape, protocol: Protocol) -> anyhow::Result<Self> {
        Self::load_as(location, shape, 0, protocol)
    }

    fn load_as(location: &str, shape: Shape, classes: i64, protocol: Protocol) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let read = runtime.block_on(Self::read(location, shape, classes, protocol));
        read.with_context(|| format!("images at {location}"))
    }

    async fn read(location: &str, shape: Shape, classes: i64, protocol: Protocol) -> anyhow::Result<Self> {
        let source = Source::open(location)?;
        let mut names = source.list().await?;
        names.retain(|name| !is_hidden(name));
        let wanted = images::Wanted { shape: shape.sample, classes, protocol };
        let dataset = match source.name().rsplit_once('.').map(|(_, extension)| extension) {
            Some("safetensors") => tensors::parse(&source.read("").await?)?.after(protocol)?,
            // A file, whatever its name.
            _ if names == [""] => {
                if let Some(problem) = no_set(&source.start("").await?) {
                    bail!(problem);
                }
                images::from_tars(&source, &names, wanted).await?
            }
            _ if names.iter().any(|name| tars::is_tar(name)) && !names.iter().any(|name| is_image(name)) => {
                let tars: Vec<String> = names.into_iter().filter(|name| tars::is_tar(name)).collect();
                images::from_tars(&source, &tars, wanted).await?
            }
            _ => images::from_folder(&source, &names, wanted).await?,
        };
        dataset.check(shape)?;
        Ok(dataset)
    }
}

#[cfg(test)]
pub(super) mod tests {
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
