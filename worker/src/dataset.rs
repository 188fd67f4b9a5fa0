//! Real images in one safetensors file: `images` u8 [N, C, H, W], `labels` u8 `[N]`, and in the metadata `pixel_max`, the
//! value that stands for white. Pixels become x = 2·v/pixel_max − 1, in [−1, 1].

use std::path::Path;

use anyhow::{Context, ensure};
use safetensors::{Dtype, SafeTensors, tensor::Metadata};
use tch::{Kind, Tensor};

/// Images and their classes, on the host.
pub struct Dataset {
    /// fp32 [N, C, H, W] in [−1, 1].
    pub images: Tensor,
    /// int64 `[N]`.
    pub labels: Tensor,
}

impl Dataset {
    /// Reads the file and checks that it has images of `sample_shape` (C, H, W) and labels below `classes` (0: labels are
    /// not looked at).
    ///
    /// # Errors
    /// What does not fit, with the file's path.
    pub fn load(path: &Path, sample_shape: [i64; 3], classes: i64) -> anyhow::Result<Self> {
        Self::parse(path, sample_shape, classes).with_context(|| format!("image file {}", path.display()))
    }

    fn parse(path: &Path, sample_shape: [i64; 3], classes: i64) -> anyhow::Result<Self> {
        let bytes = std::fs::read(path).context("cannot be read")?;
        let file =
            SafeTensors::deserialize(&bytes).context("is not a safetensors file, or it is truncated")?;
        let (_, header) = SafeTensors::read_metadata(&bytes)?;
        let white = pixel_max(&header)?;

        let images = file.tensor("images").context("lacks `images`")?;
        let labels = file.tensor("labels").context("lacks `labels`")?;
        let [n, channels, height, width] = images.shape() else {
            anyhow::bail!("`images` has shape {:?}; expected [N, C, H, W]", images.shape());
        };
        ensure!(
            images.dtype() == Dtype::U8 && labels.dtype() == Dtype::U8,
            "`images` and `labels` must be u8"
        );
        let found = [*channels as i64, *height as i64, *width as i64];
        ensure!(
            found == sample_shape,
            "has images of {found:?}, but the network makes {sample_shape:?} (C, H, W)"
        );
        ensure!(labels.shape() == [*n], "has {n} images but labels of shape {:?}", labels.shape());
        ensure!(*n > 1, "has {n} images; at least 2 are needed");
        if classes > 0
            && let Some((index, label)) =
                labels.data().iter().enumerate().find(|(_, l)| i64::from(**l) >= classes)
        {
            anyhow::bail!(
                "label {label} of image {index} is out of range: the network knows classes 0 to {}",
                classes - 1
            );
        }

        let shape: Vec<i64> = images.shape().iter().map(|d| *d as i64).collect();
        let pixels = Tensor::from_data_size(images.data(), &shape, Kind::Uint8).to_kind(Kind::Float);
        Ok(Self {
            images: pixels * (2.0 / white) - 1.0,
            labels: Tensor::from_data_size(labels.data(), &[*n as i64], Kind::Uint8).to_kind(Kind::Int64),
        })
    }

    /// How many images there are.
    pub fn len(&self) -> i64 {
        self.images.size()[0]
    }
}

fn pixel_max(header: &Metadata) -> anyhow::Result<f64> {
    let text = header
        .metadata()
        .as_ref()
        .and_then(|m| m.get("pixel_max"))
        .context("lacks `pixel_max` in its metadata")?;
    let value: f64 =
        text.parse().with_context(|| format!("has pixel_max {text:?}, which is not a number"))?;
    ensure!(value > 0.0, "has pixel_max {value}; it must be > 0");
    Ok(value)
}
