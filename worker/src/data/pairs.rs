//! Images with captions, from tars in the WebDataset layout: the real samples for the discriminator of a text-to-image
//! model. Each image is scaled until it covers the model's size, and the center is cut out.

use anyhow::{Context, ensure};
use image::{DynamicImage, imageops::FilterType};
use potstill_storage::Source;
use tch::{Kind, Tensor};

use super::{tally::Tally, tars};

/// One image of the model's size with its caption.
pub struct Pair {
    /// The image file's content: it is decoded again at each use, since many decoded images would not fit in memory.
    encoded: Vec<u8>,
    /// The caption.
    pub caption: String,
}

/// Reads the pairs at `location`, a tar or a folder of tars. With `limit` only this many, spread evenly over all.
///
/// # Errors
/// There are none, or more than one in a hundred is broken; with the first of these.
pub fn load(location: &str, limit: Option<u64>) -> anyhow::Result<Vec<Pair>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(read(location, limit)).with_context(|| format!("image-text pairs at {location}"))
}

async fn read(location: &str, limit: Option<u64>) -> anyhow::Result<Vec<Pair>> {
    let source = Source::open(location)?;
    let names = match source.name().ends_with(".tar") {
        true => vec![String::new()],
        false => source.list().await?.into_iter().filter(|name| name.ends_with(".tar")).collect(),
    };
    ensure!(
        !names.is_empty(),
        "holds no tars: expected WebDataset's layout, an image and a .txt (or a .json with \"caption\") under one key"
    );
    let (mut pairs, mut tally) = (Vec::new(), Tally::default());
    for name in names {
        let bytes = source.read(&name).await?;
        let samples = tars::read(&bytes).with_context(|| format!("tar {name:?}"))?;
        for sample in samples {
            let Some((name, encoded)) = sample.image else { continue };
            match pair(encoded, sample.caption) {
                Ok(pair) => pairs.push(pair),
                Err(error) => tally.broken(format!("{name}: {error:#}")),
            }
        }
    }
    tally.judge(pairs.len())?;
    ensure!(pairs.len() > 1, "holds {} images; at least 2 are needed", pairs.len());
    if let Some(limit) = limit.and_then(|limit| usize::try_from(limit).ok()).filter(|l| *l < pairs.len()) {
        let count = pairs.len();
        let chosen: Vec<usize> = (0..limit).map(|i| i * count / limit).collect();
        let mut index = 0;
        pairs.retain(|_| {
            index += 1;
            chosen.binary_search(&(index - 1)).is_ok()
        });
    }
    Ok(pairs)
}

fn pair(encoded: Vec<u8>, caption: Option<String>) -> anyhow::Result<Pair> {
    let caption = caption.filter(|text| !text.is_empty()).context("has no caption that can be read")?;
    // Decoded once now, so that broken images are found before training.
    let image = image::load_from_memory(&encoded)?;
    ensure!(image.height() > 0 && image.width() > 0, "is empty");
    Ok(Pair { encoded, caption })
}

/// Top and left of the center of an image that was scaled to cover `sides`, and its scaled height and width.
fn cover(original: [i64; 2], sides: [i64; 2]) -> ([i64; 2], [i64; 2]) {
    let scale = (0..2).map(|axis| sides[axis] as f64 / original[axis] as f64).fold(0.0, f64::max);
    let scaled = [0, 1].map(|axis| ((original[axis] as f64 * scale).round() as i64).max(sides[axis]));
    ([0, 1].map(|axis| (scaled[axis] - sides[axis]) / 2), scaled)
}

impl Pair {
    /// The file's content.
    pub fn encoded(&self) -> &[u8] {
        &self.encoded
    }

    /// The image, fp32 [3, height, width] in [−1, 1].
    ///
    /// # Errors
    /// It cannot be decoded, although it could when it was loaded.
    pub fn image(&self, sides: [i64; 2]) -> anyhow::Result<Tensor> {
        let image = image::load_from_memory(&self.encoded)?.into_rgb8();
        let [height, width] = [i64::from(image.height()), i64::from(image.width())];
        let ([top, left], [scaled_height, scaled_width]) = cover([height, width], sides);
        let image = DynamicImage::ImageRgb8(image)
            .resize_exact(scaled_width as u32, scaled_height as u32, FilterType::Lanczos3)
            .crop_imm(left as u32, top as u32, sides[1] as u32, sides[0] as u32)
            .into_rgb8();
        let pixels = Tensor::from_slice(image.as_raw()).reshape([sides[0], sides[1], 3]);
        Ok(pixels.permute([2, 0, 1]).to_kind(Kind::Float).contiguous() / 127.5 - 1.0)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::data::read::tests::{png_of, tar};

    fn load_tar(path: &Path, members: &[(&str, &[u8])]) -> anyhow::Result<Vec<Pair>> {
        tar(path, members);
        load(path.to_str().unwrap(), None)
    }

    #[test]
    fn images_are_scaled_and_their_middle_is_cut_out() {
        assert_eq!(cover([4, 4], [4, 4]), ([0, 0], [4, 4]));
        assert_eq!(cover([8, 16], [4, 4]), ([0, 2], [4, 8]));
        assert_eq!(cover([3, 2], [4, 4]), ([1, 0], [6, 4]));
        let folder = tempfile::tempdir().unwrap();
        let wide = png_of(16, 8, |x, _| if (4..12).contains(&x) { [255, 0, 0] } else { [0, 0, 255] });
        let members: [(&str, &[u8]); 4] = [
            ("a.png", &wide),
            ("a.txt", b" a red square \n"),
            ("b.jpg.png", &wide),
            ("b.json", br#"{"caption": "another"}"#),
        ];
        let pairs = load_tar(&folder.path().join("x.tar"), &members).unwrap();
        assert_eq!(pairs.iter().map(|p| p.caption.as_str()).collect::<Vec<_>>(), ["a red square", "another"]);
        let image = pairs[0].image([4, 4]).unwrap();
        assert_eq!(image.size(), [3, 4, 4]);
        let red = image.get(0).mean(Kind::Float).double_value(&[]);
        let blue = image.get(2).mean(Kind::Float).double_value(&[]);
        assert!(red > 0.7 && blue < -0.7, "the middle is red: {red} {blue}");
    }

    #[test]
    fn broken_members_are_counted_and_too_many_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.tar");
        let good = png_of(4, 4, |_, _| [9, 9, 9]);
        let mut members: Vec<(String, &[u8])> = Vec::new();
        for index in 0..200 {
            members.push((format!("{index:03}.png"), &good));
            members.push((format!("{index:03}.txt"), b"grey"));
        }
        members[0].1 = b"no picture";
        let named: Vec<(&str, &[u8])> = members.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
        assert_eq!(load_tar(&path, &named).unwrap().len(), 199);
        let limited = load(path.to_str().unwrap(), Some(10)).unwrap();
        assert_eq!(limited.len(), 10);

        let broken: [(&str, &[u8]); 5] = [
            ("a.png", &good),
            ("a.txt", b"grey"),
            ("b.png", &good),
            ("b.txt", b"\xff\xfe"),
            ("c.png", &good),
        ];
        let error = format!("{:#}", load_tar(&path, &broken).err().unwrap());
        assert!(error.contains("2 of 3") && error.contains("b.png: has no caption"), "{error}");
        let error = format!("{:#}", load(folder.path().join("none").to_str().unwrap(), None).err().unwrap());
        assert!(error.contains("none"), "{error}");
    }
}
