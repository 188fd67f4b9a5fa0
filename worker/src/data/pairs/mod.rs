//! Images with captions, from tars in the WebDataset layout or folders of images: the real samples for the discriminator of
//! a text-to-image model. Each image is scaled until it covers the model's size, and the center is cut out.

mod folder;

use anyhow::{Context, bail, ensure};
use image::{DynamicImage, imageops::FilterType};
use potstill_distill::random::{Purpose, Stream};
use potstill_storage::Source;
use tch::{Device, Kind, Tensor};

use super::{
    formats::{self, decoded, is_hidden, no_set},
    images::instead,
    tally::Tally,
    tars,
};
use crate::process::work;

/// One image of the model's size with its caption.
pub struct Pair {
    /// The image file's content: it is decoded again at each use, since many decoded images would not fit in memory.
    encoded: Vec<u8>,
    /// The caption.
    pub caption: String,
}

/// Reads the pairs at `location`: a tar, a folder of tars, or a folder of images with their captions beside them or in a
/// list, `metadata.csv`, `.jsonl` or `.parquet`. With `limit` only this many, spread evenly over all. Of several captions of
/// an image one is drawn, by `seed`.
///
/// # Errors
/// There are none, or more than one in a hundred is broken; with the first of these.
pub fn load(location: &str, limit: Option<u64>, seed: u64) -> anyhow::Result<Vec<Pair>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(read(location, limit, seed)).with_context(|| format!("image-text pairs at {location}"))
}

async fn read(location: &str, limit: Option<u64>, seed: u64) -> anyhow::Result<Vec<Pair>> {
    let source = Source::open(location)?;
    let mut names = source.list().await?;
    names.retain(|name| !is_hidden(name));
    if names == [""]
        && let Some(problem) = no_set(&source.start("").await?)
    {
        bail!(problem);
    }
    let images = formats::images(&names);
    let mut collected = Collected { seed, ..Collected::default() };
    let tars: Vec<&String> = names.iter().filter(|name| name.is_empty() || tars::is_tar(name)).collect();
    if tars.is_empty() && images.is_empty() {
        bail!(
            "holds neither tars nor images: expected WebDataset's layout, an image and a .txt (or a .json with \"caption\") under \
             one key, or a folder of images with a .txt beside each{}",
            instead(&source, &names).await?
        );
    }
    for name in &tars {
        let bytes = source.read(name).await?;
        let file = if name.is_empty() { source.name() } else { name.as_str() };
        for sample in tars::read(bytes).with_context(|| format!("tar {file:?}"))? {
            let Some(image) = sample.image else { continue };
            match image.and_then(|image| Ok((image, sample.captions?))) {
                Ok(((name, encoded), captions)) => {
                    collected.add(&format!("{file}: {name}"), encoded, captions);
                }
                Err(problem) => collected.tally.broken(format!("{file}: {problem}")),
            }
        }
    }
    if tars.is_empty() {
        let mut captions = folder::captions(&source, &names, &images).await?;
        // A few at a time, in the order of their names.
        for names in images.chunks(folder::FILES_AT_A_TIME) {
            for (name, encoded) in names.iter().zip(source.read_all(names).await?) {
                let captions = captions.remove(name).unwrap_or_default();
                collected.add(name, encoded.to_vec(), captions);
            }
        }
    }
    let Collected { mut pairs, tally, .. } = collected;
    tally.judge(pairs.len(), "images")?;
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

/// The pairs so far.
#[derive(Default)]
struct Collected {
    seed: u64,
    pairs: Vec<Pair>,
    tally: Tally,
}

impl Collected {
    fn add(&mut self, place: &str, encoded: Vec<u8>, captions: Vec<String>) {
        match self.pair(encoded, captions) {
            Ok(pair) => self.pairs.push(pair),
            Err(error) => self.tally.broken(format!("{place}: {error:#}")),
        }
        work::complete();
    }

    fn pair(&self, encoded: Vec<u8>, mut captions: Vec<String>) -> anyhow::Result<Pair> {
        let caption = match captions.len() {
            0 => bail!("has no caption that can be read"),
            1 => captions.remove(0),
            several => {
                let index = self.pairs.len() as u32;
                let mut stream = Stream::new(self.seed, 0, Purpose::Captions, index, Device::Cpu);
                captions.remove(stream.integers(1, several as i64)[0] as usize)
            }
        };
        // Decoded once now, so that broken images are found before training.
        decoded(&encoded)?;
        Ok(Pair { encoded, caption })
    }
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
        let image = formats::upright(&self.encoded)?.into_rgb8();
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
        load(path.to_str().unwrap(), None, 0)
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
    fn folders_of_images_have_their_captions_beside_them_or_in_a_list() {
        let picture = png_of(4, 4, |_, _| [9, 9, 9]);
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, content: &[u8]| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        };
        let captions = || -> Vec<String> {
            let pairs = load(folder.path().to_str().unwrap(), None, 0).unwrap();
            pairs.into_iter().map(|pair| pair.caption).collect()
        };
        for name in ["10_cat/a.png", "10_cat/b.png", "c.png"] {
            write(name, &picture);
        }
        write("10_cat/a.txt", b"first");
        write("10_cat/b.caption", b"second");
        write("c.txt", b"third");
        assert_eq!(captions(), ["first", "second", "third"]);
        write("metadata.jsonl", b"{\"file_name\": \"c.png\", \"text\": \"listed\"}\n");
        assert_eq!(captions(), ["first", "second", "listed"], "a list counts more");
        write("d.png", &picture);
        assert_eq!(captions().len(), 3, "one of four is left out");
        write("e.png", &picture);
        let error = load(folder.path().to_str().unwrap(), None, 0).err().unwrap();
        assert!(format!("{error:#}").contains("d.png: has no caption"), "{error:#}");
    }

    #[test]
    fn captions_have_endings_in_either_case_and_hidden_images_are_none() {
        let picture = png_of(4, 4, |_, _| [9, 9, 9]);
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in [
            ("a.png", &picture[..]),
            ("a.TXT", b"first"),
            ("B.PNG", &picture),
            ("B.Caption", b"second"),
            ("._a.png", b"macOS"),
            ("__MACOSX/._a.png", b"macOS"),
            (".ipynb_checkpoints/a-checkpoint.png", &picture),
        ] {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        let pairs = load(folder.path().to_str().unwrap(), None, 0).unwrap();
        assert_eq!(pairs.iter().map(|pair| pair.caption.as_str()).collect::<Vec<_>>(), ["second", "first"]);
    }

    /// A Parquet file with two columns of texts.
    fn parquet_of(columns: [(&str, [&str; 2]); 2]) -> Vec<u8> {
        use ::parquet::{
            data_type::{ByteArray, ByteArrayType},
            file::writer::SerializedFileWriter,
            schema::parser::parse_message_type,
        };
        let fields = columns.map(|(name, _)| format!("required binary {name} (UTF8);")).concat();
        let schema = parse_message_type(&format!("message m {{ {fields} }}")).unwrap();
        let mut bytes = Vec::new();
        let mut writer = SerializedFileWriter::new(&mut bytes, schema.into(), Default::default()).unwrap();
        let mut rows = writer.next_row_group().unwrap();
        for (_, texts) in columns {
            let mut column = rows.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&texts.map(ByteArray::from), None, None).unwrap();
            column.close().unwrap();
        }
        rows.close().unwrap();
        writer.close().unwrap();
        bytes
    }

    #[test]
    fn lists_of_captions_are_tables_json_lines_or_parquet() {
        let picture = png_of(4, 4, |_, _| [9, 9, 9]);
        let with = |list: &str, content: &[u8]| -> anyhow::Result<Vec<String>> {
            let folder = tempfile::tempdir().unwrap();
            for name in ["train/a.png", "train/deep/b.png", list] {
                let path = folder.path().join(name);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, if name == list { content } else { &picture }).unwrap();
            }
            let pairs = load(folder.path().to_str().unwrap(), None, 0)?;
            Ok(pairs.into_iter().map(|pair| pair.caption).collect())
        };
        let parquet =
            parquet_of([("file_name", ["a.png", "./deep/b.png"]), ("text", ["one, \"two\"", "three"])]);
        let json = "{\"file_name\": \"./a.png\", \"text\": \"one, \\\"two\\\"\"}\n\
                    {\"file_name\": \"deep\\\\b.png\", \"caption\": [\"three\"]}\n";
        for (list, content) in [
            ("train/metadata.csv", &b"file_name,text\n./a.png,\"one, \"\"two\"\"\"\ndeep/b.png,three\n"[..]),
            (
                "metadata.csv",
                b"text,file_name\n\"one, \"\"two\"\"\",./train/a.png\nthree,train\\deep\\b.png\n",
            ),
            ("train/deep/Metadata.CSV", b"file_name,text\n../a.png,\"one, \"\"two\"\"\"\nb.png,three\n"),
            ("train/metadata.jsonl", json.as_bytes()),
            ("train/metadata.parquet", &parquet),
        ] {
            assert_eq!(with(list, content).unwrap(), ["one, \"two\"", "three"], "{list}");
        }
        for (list, content, parts) in [
            ("metadata.csv", &b"file_name,text\na.png,x\n"[..], ["metadata.csv: row 0", "names a.png"]),
            ("train/metadata.csv", b"file_name,title\na.png,x\n", ["no caption under", "\"title\""]),
            ("train/metadata.csv", b"image,text\na.png,x\n", ["no file_name", "\"image\""]),
            ("train/metadata.csv", b"file_name,text\na.png,x, y\n", ["row 0", "3 fields"]),
            ("train/metadata.csv", b"file_name,text\na.png,\"x\ndeep/b.png,y\n", ["row 0", "not closed"]),
            ("train/metadata.jsonl", b"nothing\n", ["train/metadata.jsonl", "line 1: is not JSON"]),
            ("train/metadata.parquet", b"nothing", ["train/metadata.parquet", "is not Parquet"]),
        ] {
            let error = format!("{:#}", with(list, content).unwrap_err());
            assert!(parts.iter().all(|part| error.contains(part)), "{list}: {error}");
        }
    }

    #[test]
    fn of_several_captions_one_is_drawn_by_the_seed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.tar");
        let picture = png_of(4, 4, |_, _| [9, 9, 9]);
        let description = br#"{"caption": ["a", "b", "c"]}"#;
        let names: Vec<[String; 2]> =
            (0..30).map(|i| [format!("{i:02}.png"), format!("{i:02}.json")]).collect();
        let members: Vec<(&str, &[u8])> = names
            .iter()
            .flat_map(|[image, json]| [(image.as_str(), &picture[..]), (json.as_str(), &description[..])])
            .collect();
        tar(&path, &members);
        let drawn = |seed| -> Vec<String> {
            load(path.to_str().unwrap(), None, seed).unwrap().into_iter().map(|pair| pair.caption).collect()
        };
        assert_eq!(drawn(1), drawn(1));
        assert_ne!(drawn(1), drawn(2));
        for caption in ["a", "b", "c"] {
            assert!(drawn(1).iter().any(|one| one == caption));
        }
    }

    #[test]
    fn what_is_cut_off_is_not_trained_on() {
        let mut jpeg = std::io::Cursor::new(Vec::new());
        let noisy = image::RgbImage::from_fn(64, 64, |x, y| {
            image::Rgb([(x * y) as u8, (x ^ y) as u8, (x * 7) as u8])
        });
        noisy.write_to(&mut jpeg, image::ImageFormat::Jpeg).unwrap();
        let jpeg = jpeg.into_inner();
        decoded(&jpeg).unwrap();
        assert!(decoded(&jpeg[..jpeg.len() / 2]).is_err());
        assert!(decoded(&jpeg[..jpeg.len() - 2]).is_err());
        // A preview inside has a mark of the end, too; and something may be appended.
        let preview = [&[0xff, 0xe1][..], &(2 + jpeg.len() as u16).to_be_bytes(), &jpeg].concat();
        let with = |end: usize| [&jpeg[..2], &preview, &jpeg[2..end]].concat();
        decoded(&with(jpeg.len())).unwrap();
        assert!(decoded(&with(jpeg.len() / 2)).is_err());
        decoded(&[&jpeg[..], b"appended"].concat()).unwrap();
        let png = png_of(64, 64, |x, y| [(x * y) as u8, (x ^ y) as u8, 0]);
        assert!(decoded(&png[..png.len() - 12]).is_err() && decoded(&png).is_ok());
        assert!(decoded(b"").is_err());
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
        let limited = load(path.to_str().unwrap(), Some(10), 0).unwrap();
        assert_eq!(limited.len(), 10);

        let broken: [(&str, &[u8]); 5] = [
            ("a.png", &good),
            ("a.txt", b"grey"),
            ("b.png", &good),
            ("b.txt", b"\xff\xfe"),
            ("c.png", &good),
        ];
        let error = format!("{:#}", load_tar(&path, &broken).err().unwrap());
        assert!(error.contains("2 of 3") && error.contains("c.png: has no caption"), "{error}");
        let error =
            format!("{:#}", load(folder.path().join("none").to_str().unwrap(), None, 0).err().unwrap());
        assert!(error.contains("none"), "{error}");
    }
}
