//! Reads images of common formats from folders and from tars.

use anyhow::{Context, bail, ensure};
use potstill_spec::Protocol;
use potstill_storage::Source;
use tch::Tensor;

use super::{
    dataset::Dataset,
    formats::{self, FORMATS, Foreign, decoded},
    tally::Tally,
    tars,
};
use crate::{data::protocol::Picture, process::work};

/// The requirements on images.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    /// Channels, height and width after the treatment.
    pub shape: [i64; 3],
    /// Number of classes; 0: labels are not needed.
    pub classes: i64,
    pub protocol: Protocol,
}

/// Files of a folder without images whose beginnings are read.
const LOOKED_AT: usize = 16;

/// What a folder without images holds instead, if one of its first files tells, for the end of a message.
pub(super) async fn instead(source: &Source, names: &[String]) -> anyhow::Result<String> {
    for name in names.iter().take(LOOKED_AT) {
        if let Some(kind) = Foreign::of(&source.start(name).await?) {
            return Ok(format!("; {name} {kind}"));
        }
    }
    Ok(String::new())
}

/// Reads a folder with one sub-folder per class. `names` are without hidden ones.
pub(super) async fn from_folder(
    source: &Source,
    names: &[String],
    wanted: Wanted,
) -> anyhow::Result<Dataset> {
    let labelled = names.iter().any(|name| name == "dataset.json");
    let files = names;
    let names = formats::images(files);
    if names.is_empty() {
        bail!(
            "holds no images: expected a .safetensors or .tar file, a folder of .tar files, or a folder with one sub-folder of \
             {FORMATS:?} images per class{}",
            instead(source, files).await?
        );
    }
    if wanted.classes > 0 {
        ensure!(
            !labelled,
            "has its classes in dataset.json, which is not read: put the images of each class into a sub-folder of their own"
        );
        if let Some(flat) = names.iter().find(|name| !name.contains('/')) {
            bail!("{flat} lies in no sub-folder, so its class is not known: each class has a sub-folder");
        }
        if let Some(deep) = names.iter().find(|name| name.matches('/').count() > 1) {
            bail!(
                "{deep} lies in a sub-folder of a sub-folder: name the folder whose sub-folders are the classes"
            );
        }
    }
    let folder = |name: &str| name.split_once('/').map(|(folder, _)| folder.to_owned());
    let classes: Vec<Option<String>> = names.iter().map(|name| folder(name)).collect();
    let mut known: Vec<&String> = classes.iter().flatten().collect();
    known.sort_unstable();
    known.dedup();
    let numbered = known.iter().all(|name| name.parse::<u32>().is_ok());
    ensure!(
        wanted.classes == 0 || numbered || known.len() as i64 == wanted.classes,
        "has {} sub-folders, such as {:?}, for {} classes: give all classes a sub-folder, or name the sub-folders by the numbers of \
         their classes",
        known.len(),
        known[0],
        wanted.classes
    );
    let mut collected = Collected::new(wanted);
    // In batches, so that the files' bytes are not all in memory beside their pixels.
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

/// Reads images with a `.cls` or `.json` file under the same key. A network without classes needs neither.
pub(super) async fn from_tars(source: &Source, tars: &[String], wanted: Wanted) -> anyhow::Result<Dataset> {
    let mut collected = Collected::new(wanted);
    for tar in tars {
        let bytes = source.read(tar).await?;
        let file = if tar.is_empty() { source.name() } else { tar };
        for sample in tars::read(bytes).with_context(|| format!("tar {file:?}"))? {
            let Some(image) = sample.image else { continue };
            let label = if wanted.classes > 0 { sample.label } else { Ok(None) };
            match image.and_then(|image| Ok((image, label?))) {
                Ok(((name, _), None)) if wanted.classes > 0 => {
                    collected.tally.broken(format!("{file}: {name}: has no label (.cls, or label in .json)"));
                }
                Ok(((name, image), label)) => {
                    collected.add(&format!("{file}: {name}"), &image, label.unwrap_or(0));
                }
                Err(problem) => collected.tally.broken(format!("{file}: {problem}")),
            }
        }
    }
    collected.finish()
}

/// Images decoded so far.
struct Collected {
    wanted: Wanted,
    pixels: Vec<u8>,
    labels: Vec<i64>,
    tally: Tally,
}

impl Collected {
    fn new(wanted: Wanted) -> Self {
        Self { wanted, pixels: Vec::new(), labels: Vec::new(), tally: Tally::default() }
    }

    fn add(&mut self, name: &str, bytes: &[u8], label: i64) {
        match self.decode(bytes) {
            Ok(pixels) => {
                self.pixels.extend(pixels);
                self.labels.push(label);
            }
            Err(error) => self.tally.broken(format!("{name}: {error:#}")),
        }
        work::complete();
    }

    /// Reorders the bytes from pixels to channels, as tensors have them.
    fn decode(&self, bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
        let [channels, height, width] = self.wanted.shape;
        let image = decoded(bytes)?;
        let size = [image.height(), image.width()].map(|side| side as usize);
        let bytes = match channels {
            1 => image.into_luma8().into_raw(),
            3 => image.into_rgb8().into_raw(),
            other => bail!("cannot make {other} channels of an image file"),
        };
        let channels = channels as usize;
        let picture = Picture { bytes, channels, height: size[0], width: size[1] };
        let picture = picture.after(self.wanted.protocol)?;
        ensure!(
            [picture.height as i64, picture.width as i64] == [height, width],
            "is {}×{}, but the network makes {height}×{width} (height × width)",
            picture.height,
            picture.width
        );
        Ok((0..channels).flat_map(|c| picture.bytes.iter().skip(c).step_by(channels).copied()).collect())
    }

    fn finish(self) -> anyhow::Result<Dataset> {
        let good = self.labels.len();
        self.tally.judge(good, "images")?;
        let [channels, height, width] = self.wanted.shape;
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
    use std::path::Path;

    use super::*;
    use crate::data::{
        Shape,
        read::tests::{png_of, tar},
    };

    const SHAPE: Shape = Shape { sample: [3, 2, 2], classes: 12 };

    fn png(red: u8) -> Vec<u8> {
        png_of(2, 2, |x, _| [red, 0, if x == 1 { 255 } else { 0 }])
    }

    fn load(location: &Path) -> anyhow::Result<Dataset> {
        Dataset::load(location.to_str().unwrap(), SHAPE)
    }

    fn load_for(location: &Path, classes: i64) -> anyhow::Result<Dataset> {
        Dataset::load(location.to_str().unwrap(), Shape { classes, ..SHAPE })
    }

    fn labels(dataset: &Dataset) -> Vec<i64> {
        Vec::try_from(&dataset.labels).unwrap()
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
        write(".ipynb_checkpoints/a.png", &png(3));
        write("__MACOSX/cats/c.png", &png(3));
        let found = load_for(folder.path(), 3).unwrap();
        assert_eq!(labels(&found), [0, 1, 2], "names go in order: 10, 2, cats; hidden folders are none");
        let error = format!("{:#}", load(folder.path()).err().unwrap());
        assert!(error.contains("3 sub-folders") && error.contains("12 classes"), "{error}");

        write("cats/broken.png", b"no PNG");
        assert_eq!(load_for(folder.path(), 3).unwrap().len(), 3, "one broken image is left out");
        write("cats/small.png", &png_of(1, 2, |_, _| [0, 0, 0]));
        let error = format!("{:#}", load_for(folder.path(), 3).err().unwrap());
        assert!(error.contains("2 of 5 images") && error.contains("2×1"), "{error}");
    }

    #[test]
    fn a_folder_whose_classes_are_not_known_is_refused() {
        for (names, part) in [
            (&["train/0/a.png", "train/1/b.png"][..], "sub-folder of a sub-folder"),
            (&["a.png", "1/b.png"], "lies in no sub-folder"),
            (&["00000/a.png", "00000/b.png", "dataset.json"], "dataset.json"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            for name in names {
                let path = folder.path().join(name);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, png(7)).unwrap();
            }
            let error = format!("{:#}", load(folder.path()).err().unwrap());
            assert!(error.contains(part), "{names:?}: {error}");
            assert!(load_for(folder.path(), 0).is_ok(), "{names:?}: without classes it does not matter");
        }
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
                ("train/0002.seg.txt", b"unknown files are ignored"),
                ("train/0002.png", &png(255)),
                ("train/0002.json", br#"{"label": 7, "caption": "seven"}"#),
            ],
        );
        assert_eq!(labels(&load(&first).unwrap()), [3, 7]);
        tar(&second, &[("0.png", &png(9)), ("1.png", &png(8)), ("0.json", b"broken"), ("1.seg.json", b"{}")]);
        assert_eq!(load_for(&second, 0).unwrap().images().size()[0], 2, "labels that are not needed");
        tar(&second, &[("x.png", &png(9)), ("x.cls", b"1")]);
        let both = load(folder.path()).unwrap();
        assert_eq!(labels(&both), [3, 7, 1]);
        assert_eq!(labels(&both.limit(2)), [3, 7]);

        tar(
            &second,
            &[
                ("x.png", &png(9)),
                ("x.cls", b"1"),
                ("x.txt", b"caf\xe9"),
                ("y.png", &png(9)),
                ("y.cls", b"0"),
            ],
        );
        assert_eq!(labels(&load(&second).unwrap()), [1, 0], "captions do not matter here");
        tar(&second, &[("x.png", &png(9)), ("x.cls", b"one"), ("y.png", &png(9)), ("y.cls", b"two")]);
        let error = format!("{:#}", load(&second).err().unwrap());
        assert!(error.contains("x.cls") && error.contains("one"), "{error}");
        tar(&second, &[("x.png", &png(9)), ("x.cls", b"12"), ("y.png", &png(1)), ("y.cls", b"1")]);
        let error = format!("{:#}", load(&second).err().unwrap());
        assert!(error.contains("label 12 of image 0"), "{error}");
        tar(
            &second,
            &[
                ("x.png", &png(9)),
                ("x.json", br#"{"label": "3"}"#),
                ("y.png", &png(1)),
                ("y.json", br#"{"label": 4.0}"#),
            ],
        );
        assert_eq!(labels(&load(&second).unwrap()), [3, 4]);
        for nothing in [&b"{}"[..], br#"{"label": null}"#, br#"{"label": "cat"}"#] {
            tar(&second, &[("x.png", &png(9)), ("x.json", nothing), ("y.png", &png(1)), ("y.json", nothing)]);
            let error = format!("{:#}", load(&second).err().unwrap());
            assert!(error.contains("2 of 2 images") && error.contains("label"), "{error}");
        }
        std::fs::write(&second, b"no tar at all").unwrap();
        assert!(load(&second).is_err());
    }

    #[test]
    fn images_of_any_size_are_brought_to_the_one_that_is_scored() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.tar");
        // The middle is red.
        let wide = png_of(16, 8, |x, _| if (4..12).contains(&x) { [255, 0, 0] } else { [0, 0, 255] });
        let high = png_of(4, 12, |_, y| if (4..8).contains(&y) { [255, 0, 0] } else { [0, 0, 255] });
        tar(&path, &[("a.png", &wide), ("b.png", &high)]);
        for protocol in [Protocol::Resized(2), Protocol::Patch(2)] {
            let images = Dataset::load_reference(path.to_str().unwrap(), SHAPE, protocol).unwrap().images();
            assert_eq!(images.size(), [2, 3, 2, 2]);
            let mean = |channel| images.select(1, channel).mean(tch::Kind::Float).double_value(&[]);
            assert!(mean(0) == 1.0 && mean(2) == -1.0, "{protocol:?}: {} {}", mean(0), mean(2));
        }
        tar(&path, &[("a.png", &wide), ("b.png", &high), ("c.png", &high)]);
        let shape = Shape { sample: [3, 6, 6], classes: 12 };
        let load = |protocol| Dataset::load_reference(path.to_str().unwrap(), shape, protocol);
        let error = format!("{:#}", load(Protocol::Patch(6)).err().unwrap());
        assert!(error.contains("b.png") && error.contains("12×4"), "{error}");
        assert!(load(Protocol::AsMade).is_err());
    }

    #[test]
    fn what_holds_no_images_says_what_it_wants() {
        let folder = tempfile::tempdir().unwrap();
        let error = format!("{:#}", load(folder.path()).err().unwrap());
        assert!(error.contains("holds no images") && error.contains("sub-folder"), "{error}");
        let error = format!("{:#}", load(&folder.path().join("nowhere")).err().unwrap());
        assert!(error.contains("nowhere"), "{error}");
    }

    const ZIP: &[u8] = b"PK\x03\x04\x14\0\0\0\x08\0";

    #[test]
    fn tars_are_known_by_their_content() {
        let folder = tempfile::tempdir().unwrap();
        let plain = folder.path().join("plain");
        tar(&plain, &[("BM0001.png", &png(0)), ("BM0001.cls", b"3"), ("b.png", &png(1)), ("b.cls", b"4")]);
        let bytes = std::fs::read(&plain).unwrap();
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut gz, &bytes).unwrap();
        let gz = gz.finish().unwrap();
        let zst = zstd::encode_all(&bytes[..], 1).unwrap();
        for (name, bytes) in
            [("a.tar", &gz), ("b.tar", &zst), ("c.tar.gz", &bytes), ("d.tar.gz", &zst), ("e.data", &gz)]
        {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(labels(&load(&path).unwrap()), [3, 4], "{name}");
        }
        for name in ["plain", "e.data"] {
            assert!(load(&folder.path().join(name)).is_ok(), "{name}");
            std::fs::remove_file(folder.path().join(name)).unwrap();
        }
        assert_eq!(load(folder.path()).unwrap().len(), 8, "a folder of them");
    }

    #[test]
    fn what_is_given_instead_of_images_is_called_what_it_is() {
        let bitmap = [&b"BM\x46\0\0\0\0\0\0\0"[..], &[0; 60]].concat();
        for (name, content, parts) in [
            ("a.zip", ZIP, ["zip archive", "unpack it"]),
            ("a.tar", ZIP, ["zip archive", "unpack it"]),
            ("a.rar", b"Rar!\x1a\x07\x01\0", ["RAR archive", "unpack it"]),
            ("a.7z", b"7z\xbc\xaf\x27\x1c\0\x04", ["7z archive", "unpack it"]),
            ("a.tar.xz", b"\xfd7zXZ\0\0\x04", ["compressed with xz", "gzip or zstd"]),
            ("a.tar.bz2", b"BZh91AY&SY\0", ["compressed with bzip2", "gzip or zstd"]),
            ("a.gif", b"GIF89a\x01\0\x01\0", ["GIF image", "convert it"]),
            ("a.png", b"GIF89a\x01\0\x01\0", ["GIF image", "convert it"]),
            ("a.bmp", &bitmap, ["BMP image", "convert it"]),
            ("a.tif", b"II*\0\x08\0\0\0", ["TIFF image", "convert it"]),
            ("a.TIFF", b"MM\0*\0\0\0\x08", ["TIFF image", "convert it"]),
            ("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0", ["HEIC image", "convert it"]),
            ("a.heif", b"\0\0\0\x18ftyphevc\0\0\0\0", ["HEIC image", "convert it"]),
            ("a.avif", b"\0\0\0\x18ftypavif\0\0\0\0", ["AVIF image", "convert it"]),
            ("a.jxl", b"\xff\x0a\xfa\x1f", ["JPEG XL image", "convert it"]),
            ("a.JXL", b"\0\0\0\x0cJXL \r\n\x87\n", ["JPEG XL image", "convert it"]),
            ("a.jp2", b"\0\0\0\x0cjP  \r\n\x87\n", ["JPEG 2000 image", "convert it"]),
            ("a.psd", b"8BPS\0\x01", ["Photoshop image", "convert it"]),
            ("a.tar.lz4", b"\x04\x22\x4d\x18", ["compressed with lz4", "gzip or zstd"]),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join(name);
            std::fs::write(&file, content).unwrap();
            let image = folder.path().join("image.tar");
            // As a data set, in a folder, and in a tar.
            let mut errors = vec![
                format!("{:#}", load_for(&file, 0).err().unwrap()),
                format!("{:#}", load_for(folder.path(), 0).err().unwrap()),
            ];
            if !tars::is_tar(name) {
                tar(&image, &[(name, content)]);
                errors.push(format!("{:#}", load_for(&image, 0).err().unwrap()));
            }
            for error in errors {
                assert!(
                    parts.iter().all(|part| error.contains(part)) && error.contains(name),
                    "{name}: {error}"
                );
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.png");
        std::fs::write(&file, png(1)).unwrap();
        let error = format!("{:#}", load(&file).err().unwrap());
        assert!(error.contains("is one image"), "{error}");
        for name in ["b.png", "a.gif"] {
            std::fs::write(folder.path().join(name), png(2)).unwrap();
        }
        std::fs::write(folder.path().join("a.gif"), b"GIF89a\x01\0\x01\0").unwrap();
        assert_eq!(load_for(folder.path(), 0).unwrap().len(), 2, "a preview beside an image is passed over");
    }
}
