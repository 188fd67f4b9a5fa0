//! Reads images from one safetensors file.

use anyhow::{Context, bail, ensure};
use safetensors::{Dtype, SafeTensors, tensor::Metadata};
use tch::{Kind, Tensor};

use super::dataset::Dataset;

pub(super) fn parse(bytes: &[u8]) -> anyhow::Result<Dataset> {
    let file = SafeTensors::deserialize(bytes).context("is not a safetensors file, or it is truncated")?;
    let (_, header) = SafeTensors::read_metadata(bytes)?;
    let white = pixel_max(&header)?;

    let images = file.tensor("images").context("lacks `images`")?;
    let labels = file.tensor("labels").context("lacks `labels`")?;
    let [n, _, _, _] = images.shape() else {
        bail!("`images` has shape {:?}; expected [N, C, H, W]", images.shape());
    };
    ensure!(images.dtype() == Dtype::U8 && labels.dtype() == Dtype::U8, "`images` and `labels` must be u8");
    ensure!(labels.shape() == [*n], "has {n} images but labels of shape {:?}", labels.shape());
    let shape: Vec<i64> = images.shape().iter().map(|d| *d as i64).collect();
    Ok(Dataset {
        pixels: Tensor::from_data_size(images.data(), &shape, Kind::Uint8),
        white,
        labels: Tensor::from_data_size(labels.data(), &[*n as i64], Kind::Uint8).to_kind(Kind::Int64),
    })
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
