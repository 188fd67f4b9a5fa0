//! The treatment of images before they are compared: see [`Protocol`].

use anyhow::{Context, bail, ensure};
use fast_image_resize::{
    FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer,
    images::{Image, ImageRef},
};
use potstill_spec::Protocol;
use tch::{Kind, Tensor};

/// One image in 8 bits: rows from the top, the channels of a pixel side by side.
pub struct Picture {
    /// `height · width · channels` values.
    pub bytes: Vec<u8>,
    pub channels: usize,
    pub height: usize,
    pub width: usize,
}

/// Channels, height and width of images of `shape` after the treatment.
///
/// # Errors
/// They are smaller than the patch, or have no pixels.
pub fn shape_after(protocol: Protocol, shape: [i64; 3]) -> anyhow::Result<[i64; 3]> {
    let [channels, height, width] = shape;
    match protocol {
        Protocol::AsMade => Ok(shape),
        Protocol::Resized(size) => Ok([channels, size.into(), size.into()]),
        Protocol::Patch(size) => {
            ensure!(
                height.min(width) >= size.into(),
                "evaluation.images = \"patch\" cuts {size}×{size} out of each image, but images here are {height}×{width} \
                 (height × width): set a smaller evaluation.image_size, or evaluation.images = \"resized\""
            );
            Ok([channels, size.into(), size.into()])
        }
    }
}

/// Applies a treatment to images [N, C, H, W] in [−1, 1]; the result is fp32 in [−1, 1]. Before images are resized they
/// are rounded to 8 bits, as in the files that other evaluations read.
///
/// # Errors
/// As [`shape_after`]; images of other than 1 or 3 channels cannot be resized.
pub fn apply(protocol: Protocol, images: &Tensor) -> anyhow::Result<Tensor> {
    let [count, channels, height, width] = images.size()[..] else {
        bail!("images have shape {:?}; expected [N, C, H, W]", images.size());
    };
    let [_, new_height, new_width] = shape_after(protocol, [channels, height, width])?;
    match protocol {
        Protocol::AsMade => Ok(images.shallow_clone()),
        Protocol::Patch(_) => {
            let [top, left] = [margin(height, new_height), margin(width, new_width)];
            Ok(images.narrow(2, top, new_height).narrow(3, left, new_width).contiguous())
        }
        Protocol::Resized(_) => {
            let bytes = ((images + 1.0) * 127.5).round().clamp(0.0, 255.0).to_kind(Kind::Uint8);
            let bytes = Vec::<u8>::try_from(bytes.permute([0, 2, 3, 1]).contiguous().reshape([-1]))?;
            let mut resized = Vec::with_capacity((count * channels * new_height * new_width) as usize);
            for one in bytes.chunks((height * width * channels) as usize) {
                let picture = Picture {
                    bytes: one.to_vec(),
                    channels: channels as usize,
                    height: height as usize,
                    width: width as usize,
                };
                resized.extend(picture.after(protocol)?.bytes);
            }
            let resized = Tensor::from_slice(&resized).reshape([count, new_height, new_width, channels]);
            let resized = resized.permute([0, 3, 1, 2]).to_device(images.device());
            Ok(resized.to_kind(Kind::Float).contiguous() / 127.5 - 1.0)
        }
    }
}

impl Picture {
    /// The image after the treatment.
    ///
    /// # Errors
    /// As [`apply`].
    pub fn after(self, protocol: Protocol) -> anyhow::Result<Self> {
        let shape = [self.channels, self.height, self.width].map(|size| size as i64);
        shape_after(protocol, shape)?;
        match protocol {
            Protocol::AsMade => Ok(self),
            Protocol::Patch(size) => Ok(self.centre(size as usize)),
            Protocol::Resized(size) => {
                let side = self.height.min(self.width);
                self.centre(side).resized(size)
            }
        }
    }

    /// The centered square with sides of `side` pixels.
    fn centre(self, side: usize) -> Self {
        if self.height == side && self.width == side {
            return self;
        }
        let [top, left] = [self.height, self.width].map(|length| margin(length as i64, side as i64) as usize);
        let row = self.width * self.channels;
        let bytes = (top..top + side)
            .flat_map(|y| {
                let first = y * row + left * self.channels;
                &self.bytes[first..first + side * self.channels]
            })
            .copied()
            .collect();
        Self { bytes, channels: self.channels, height: side, width: side }
    }

    /// Resized to a square with Pillow's algorithm: Lanczos, a = 3, widened by the scale where it shrinks.
    fn resized(self, size: u32) -> anyhow::Result<Self> {
        let side = size as usize;
        if self.height == side && self.width == side {
            return Ok(self);
        }
        let kind = match self.channels {
            1 => PixelType::U8,
            3 => PixelType::U8x3,
            other => bail!("images of {other} channels cannot be resized; only gray and RGB ones can"),
        };
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Lanczos3));
        let scaled = |bytes: &[u8], from: [u32; 2], to: [u32; 2]| -> anyhow::Result<Vec<u8>> {
            let source = ImageRef::new(from[0], from[1], bytes, kind)?;
            let mut target = Image::new(to[0], to[1], kind);
            Resizer::new().resize(&source, &mut target, &options)?;
            Ok(target.into_vec())
        };
        let [width, height] = [self.width as u32, self.height as u32];
        // Rows first, as Pillow: between the passes values are rounded to 8 bits, so the order changes the result.
        let narrow = scaled(&self.bytes, [width, height], [size, height]).context("cannot be resized")?;
        let bytes = scaled(&narrow, [size, height], [size, size]).context("cannot be resized")?;
        Ok(Self { bytes, channels: self.channels, height: side, width: side })
    }
}

/// Pixels before the central `size` of `length`; half of an odd remainder is rounded to even, as in torchvision's
/// `center_crop`.
fn margin(length: i64, size: i64) -> i64 {
    ((length - size) as f64 / 2.0).round_ties_even() as i64
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use potstill_models::weights::Archive;

    use super::*;

    #[test]
    fn images_are_resized_and_cut_as_pillow_does_it() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/pillow.safetensors");
        let fixture = Archive::read(&path).unwrap();
        let cases: Vec<&String> = fixture.tensors.keys().filter(|name| name.ends_with(".image")).collect();
        assert_eq!(cases.len(), 4);
        for name in cases {
            // [H, W, C]
            let image = &fixture.tensors[name];
            let case = name.trim_end_matches(".image");
            for (kind, protocol) in
                [("resized", Protocol::Resized as fn(u32) -> Protocol), ("patch", Protocol::Patch)]
            {
                let Some(expected) = fixture.tensors.get(&format!("{case}.{kind}")) else { continue };
                let protocol = protocol(expected.size()[0] as u32);
                let float = |x: &Tensor| x.to_kind(Kind::Float) / 127.5 - 1.0;
                let images = float(image).permute([2, 0, 1]).unsqueeze(0);
                let found = apply(protocol, &Tensor::cat(&[&images, &images], 0)).unwrap();
                let expected = float(expected).permute([2, 0, 1]).unsqueeze(0);
                assert_eq!(found.size()[1..], expected.size()[1..], "{case}, {kind}");
                let levels = ((found - expected).abs().max() * 127.5).double_value(&[]);
                // Both round twice, after rows and after columns.
                assert!(levels <= if kind == "patch" { 1e-3 } else { 1.001 }, "{case}, {kind}: {levels}");
            }
        }
    }

    #[test]
    fn what_is_smaller_than_a_patch_is_refused() {
        let images = Tensor::zeros([1, 3, 20, 30], (Kind::Float, tch::Device::Cpu));
        assert_eq!(apply(Protocol::Patch(20), &images).unwrap().size(), [1, 3, 20, 20]);
        let error = apply(Protocol::Patch(21), &images).unwrap_err().to_string();
        assert!(error.contains("21×21") && error.contains("20×30"), "{error}");
        let four = Tensor::zeros([1, 4, 20, 30], (Kind::Float, tch::Device::Cpu));
        assert!(apply(Protocol::Resized(8), &four).unwrap_err().to_string().contains("4 channels"));
    }
}
