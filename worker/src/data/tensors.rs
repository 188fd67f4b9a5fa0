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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use safetensors::tensor::TensorView;

    use super::*;

    /// A file of images of 1×2×2 pixels, with labels of a type and the greatest value of a pixel.
    fn file(labels: &[u8], dtype: Dtype, pixel_max: Option<&str>) -> Vec<u8> {
        let pixels: Vec<u8> = (0..12).collect();
        let size = if dtype == Dtype::U8 { 1 } else { 8 };
        let tensors = [
            ("images", TensorView::new(Dtype::U8, vec![3, 1, 2, 2], &pixels).unwrap()),
            ("labels", TensorView::new(dtype, vec![labels.len() / size], labels).unwrap()),
        ];
        let metadata = pixel_max.map(|text| HashMap::from([("pixel_max".to_owned(), text.to_owned())]));
        safetensors::serialize(tensors, metadata).unwrap()
    }

    #[test]
    fn images_and_labels_of_one_safetensors_file_are_read_or_refused() {
        let dataset = parse(&file(&[7, 0, 9], Dtype::U8, Some("16"))).unwrap();
        assert_eq!(dataset.pixels.size(), [3, 1, 2, 2]);
        assert_eq!(Vec::<i64>::try_from(&dataset.labels).unwrap(), [7, 0, 9]);
        assert_eq!(dataset.white, 16.0);
        assert_eq!(dataset.pixels.int64_value(&[2, 0, 1, 1]), 11);
        for (bytes, said) in [
            (file(&[7, 0], Dtype::U8, Some("16")), "has 3 images but labels of shape [2]"),
            (file(&[0; 24], Dtype::I64, Some("16")), "must be u8"),
            (file(&[7, 0, 9], Dtype::U8, None), "lacks `pixel_max`"),
            (file(&[7, 0, 9], Dtype::U8, Some("white")), "which is not a number"),
            (file(&[7, 0, 9], Dtype::U8, Some("0")), "it must be > 0"),
            (b"images".to_vec(), "is not a safetensors file"),
        ] {
            let error = parse(&bytes).err().unwrap().to_string();
            assert!(error.contains(said), "{said}: {error}");
        }
    }
}
