//! Images from files of common formats, in folders and in tars.

use std::collections::BTreeMap;

use anyhow::{Context, bail, ensure};
use potstill_storage::Source;
use tch::Tensor;

use super::Dataset;

const FORMATS: [&str; 4] = ["png", "jpg", "jpeg", "webp"];
/// A broken image is left out and counted; one in so many may be broken.
const ONE_BROKEN_IN: usize = 100;

fn is_image(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, extension)| FORMATS.contains(&extension.to_lowercase().as_str()))
}

/// One sub-folder per class.
pub(super) async fn from_folder(
    source: &Source,
    names: &[String],
    shape: [i64; 3],
) -> anyhow::Result<Dataset> {
    let names: Vec<String> = names.iter().filter(|name| is_image(name)).cloned().collect();
    ensure!(
        !names.is_empty(),
        "holds no images: expected a .safetensors or .tar file, a folder of .tar files, or a folder with one sub-folder of \
         {FORMATS:?} images per class"
    );
    let folder = |name: &str| name.split_once('/').map(|(folder, _)| folder.to_owned());
    let classes: Vec<Option<String>> = names.iter().map(|name| folder(name)).collect();
    let mut known: Vec<&String> = classes.iter().flatten().collect();
    known.sort_unstable();
    known.dedup();
    let numbered = known.iter().all(|name| name.parse::<u32>().is_ok());
    let mut collected = Collected::new(shape);
    // In slices, so that the files' bytes are not all in memory beside their pixels.
    for (names, classes) in names.chunks(256).zip(classes.chunks(256)) {
        for ((name, class), bytes) in names.iter().zip(classes).zip(source.read_all(names).await?) {
            let label = match class {
                None => 0,
                Some(class) if numbered => class.parse().unwrap_or(i64::MAX),
                Some(class) => known.binary_search(&class).unwrap_or(usize::MAX) as i64,
            };
            collected.add(name, &bytes, label);
        }
    }
    collected.finish()
}

/// Images with `.cls` or `.json` beside them under the same key. A sample without either is of class 0, which a network
/// without classes does not look at.
pub(super) async fn from_tars(source: &Source, tars: &[String], shape: [i64; 3]) -> anyhow::Result<Dataset> {
    let mut collected = Collected::new(shape);
    for tar in tars {
        let bytes = source.read(tar).await?;
        read_tar(&bytes, &mut collected).with_context(|| format!("tar {tar:?}"))?;
    }
    collected.finish()
}

/// What a tar holds under one key.
#[derive(Default)]
struct Sample {
    image: Option<(String, Vec<u8>)>,
    label: Option<i64>,
}

fn read_tar(bytes: &[u8], collected: &mut Collected) -> anyhow::Result<()> {
    use std::io::Read;
    let mut samples: BTreeMap<String, Sample> = BTreeMap::new();
    let mut archive = tar::Archive::new(bytes);
    for entry in archive.entries().context("is not a tar")? {
        let mut entry = entry.context("is damaged")?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let name = entry.path().context("has a member whose name cannot be read")?.display().to_string();
        // The key ends at the first dot of the file's name, not of its folders'.
        let file = name.rfind('/').map_or(0, |slash| slash + 1);
        let Some(dot) = name[file..].find('.') else { continue };
        let (key, extension) = (name[..file + dot].to_owned(), name[file + dot + 1..].to_lowercase());
        let mut content = Vec::new();
        entry.read_to_end(&mut content).with_context(|| format!("member {name} is cut off"))?;
        let sample = samples.entry(key).or_default();
        match extension.as_str() {
            "cls" => {
                let text = String::from_utf8_lossy(&content);
                let label = text.trim().parse();
                sample.label =
                    Some(label.with_context(|| format!("{name} holds {text:?}, which is no class"))?);
            }
            "json" => {
                let value: serde_json::Value =
                    serde_json::from_slice(&content).with_context(|| format!("{name} is not JSON"))?;
                sample.label = value["label"].as_i64().or(sample.label);
            }
            _ if is_image(&name) => sample.image = Some((name, content)),
            _ => {}
        }
    }
    for sample in samples.into_values() {
        if let Some((name, image)) = sample.image {
            collected.add(&name, &image, sample.label.unwrap_or(0));
        }
    }
    Ok(())
}

/// Decoded images so far.
struct Collected {
    shape: [i64; 3],
    pixels: Vec<u8>,
    labels: Vec<i64>,
    broken: Vec<String>,
}

impl Collected {
    fn new(shape: [i64; 3]) -> Self {
        Self { shape, pixels: Vec::new(), labels: Vec::new(), broken: Vec::new() }
    }

    fn add(&mut self, name: &str, bytes: &[u8], label: i64) {
        match self.decode(bytes) {
            Ok(pixels) => {
                self.pixels.extend(pixels);
                self.labels.push(label);
            }
            Err(error) => self.broken.push(format!("{name}: {error:#}")),
        }
    }

    /// Channel by channel, as tensors have it.
    fn decode(&self, bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
        let [channels, height, width] = self.shape;
        let image = image::load_from_memory(bytes)?;
        ensure!(
            (i64::from(image.height()), i64::from(image.width())) == (height, width),
            "is {}×{}, but the network makes {height}×{width} (height × width)",
            image.height(),
            image.width()
        );
        match channels {
            1 => Ok(image.into_luma8().into_raw()),
            3 => {
                let interleaved = image.into_rgb8().into_raw();
                Ok((0..3).flat_map(|c| interleaved.iter().skip(c).step_by(3).copied()).collect())
            }
            other => bail!("cannot make {other} channels of an image file"),
        }
    }

    fn finish(self) -> anyhow::Result<Dataset> {
        let (good, broken) = (self.labels.len(), self.broken.len());
        let shown = self.broken.iter().take(3).cloned().collect::<Vec<_>>().join("; ");
        ensure!(
            broken <= good.div_ceil(ONE_BROKEN_IN),
            "{broken} of {} images cannot be used: {shown}",
            good + broken
        );
        if broken > 0 {
            tracing::warn!(broken, good, "images that cannot be used are left out: {shown}");
        }
        let [channels, height, width] = self.shape;
        let n = good as i64;
        Ok(Dataset {
            pixels: Tensor::from_slice(&self.pixels).reshape([n, channels, height, width]),
            white: 255.0,
            labels: Tensor::from_slice(&self.labels),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Cursor, path::Path};

    use image::{ImageFormat, RgbImage};

    use super::*;
    use crate::dataset::Shape;

    const SHAPE: Shape = Shape { sample: [3, 2, 2], classes: 12 };

    fn png(red: u8) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        RgbImage::from_fn(2, 2, |x, _| image::Rgb([red, 0, if x == 1 { 255 } else { 0 }]))
            .write_to(&mut bytes, ImageFormat::Png)
            .unwrap();
        bytes.into_inner()
    }

    fn load(location: &Path) -> anyhow::Result<Dataset> {
        Dataset::load(location.to_str().unwrap(), SHAPE)
    }

    fn labels(dataset: &Dataset) -> Vec<i64> {
        Vec::try_from(&dataset.labels).unwrap()
    }

    fn tar(path: &Path, members: &[(&str, &[u8])]) {
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

    #[test]
    fn sub_folders_are_classes() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        };
        write("2/a.png", &png(20));
        write("10/b.png", &png(255));
        write("readme.txt", b"not an image");
        let data = load(folder.path()).unwrap();
        assert_eq!(labels(&data), [10, 2], "numbers are themselves");
        let images = data.images();
        assert_eq!(images.size(), [2, 3, 2, 2]);
        let first: Vec<f32> = Vec::try_from(images.get(0).reshape([-1])).unwrap();
        assert_eq!(first, [1., 1., 1., 1., -1., -1., -1., -1., -1., 1., -1., 1.], "channel by channel");

        write("cats/c.png", &png(3));
        assert_eq!(labels(&load(folder.path()).unwrap()), [0, 1, 2], "names go in order: 10, 2, cats");

        write("cats/broken.png", b"no PNG");
        assert_eq!(load(folder.path()).unwrap().len(), 3, "one broken image is left out");
        write("cats/small.png", &{
            let mut bytes = Cursor::new(Vec::new());
            RgbImage::new(1, 2).write_to(&mut bytes, ImageFormat::Png).unwrap();
            bytes.into_inner()
        });
        let error = format!("{:#}", load(folder.path()).err().unwrap());
        assert!(error.contains("2 of 5 images") && error.contains("2×1"), "{error}");
    }

    #[test]
    fn tars_follow_the_webdataset_layout() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("000.tar"), folder.path().join("001.tar"));
        tar(
            &first,
            &[
                ("train/0001.cls", b"3\n"),
                ("train/0001.png", &png(0)),
                ("train/0002.seg.txt", b"what is not known is passed over"),
                ("train/0002.png", &png(255)),
                ("train/0002.json", br#"{"label": 7, "caption": "seven"}"#),
            ],
        );
        assert_eq!(labels(&load(&first).unwrap()), [3, 7]);
        tar(&second, &[("x.png", &png(9)), ("x.cls", b"1")]);
        let both = load(folder.path()).unwrap();
        assert_eq!(labels(&both), [3, 7, 1]);
        assert_eq!(labels(&both.limit(2)), [3, 7]);

        tar(&second, &[("x.png", &png(9)), ("x.cls", b"one")]);
        let error = format!("{:#}", load(&second).err().unwrap());
        assert!(error.contains("x.cls") && error.contains("one"), "{error}");
        tar(&second, &[("x.png", &png(9)), ("x.cls", b"12"), ("y.png", &png(1))]);
        let error = format!("{:#}", load(&second).err().unwrap());
        assert!(error.contains("label 12 of image 0"), "{error}");
        std::fs::write(&second, b"no tar at all").unwrap();
        assert!(load(&second).is_err());
    }

    #[test]
    fn what_holds_no_images_says_what_it_wants() {
        let folder = tempfile::tempdir().unwrap();
        let error = format!("{:#}", load(folder.path()).err().unwrap());
        assert!(error.contains("holds no images") && error.contains("sub-folder"), "{error}");
        let error = format!("{:#}", load(&folder.path().join("nowhere")).err().unwrap());
        assert!(error.contains("nowhere"), "{error}");
    }
}
