//! Tars in the WebDataset layout: files of one sample are adjacent and share a key, the name up to its first dot.

use std::{collections::BTreeMap, io::Read};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use serde_json::Value;

use super::{
    compressed,
    formats::{FORMATS, is_image},
    text,
};

/// The files of one key.
#[derive(Debug, Default)]
pub struct Sample {
    /// Name and content of an image.
    pub image: Option<(String, Vec<u8>)>,
    /// From `.cls`, or `label` in `.json`.
    pub label: Option<i64>,
    /// From `.txt` or `.caption`, or `caption`, `prompt` or `text` in `.json`: one, or several to choose from.
    pub captions: Vec<String>,
    /// What is wrong with it.
    pub broken: Option<String>,
}

/// Endings of tars.
const ENDINGS: [&str; 4] = [".tar", ".tar.gz", ".tgz", ".tar.zst"];

/// Whether a file's name is that of a tar. The hidden twins that macOS adds to each file are none.
pub fn is_tar(name: &str) -> bool {
    let lower = name.to_lowercase();
    !is_hidden_twin(name) && ENDINGS.iter().any(|ending| lower.ends_with(ending))
}

fn is_hidden_twin(name: &str) -> bool {
    name.rsplit('/').next().is_some_and(|file| file.starts_with("._"))
}

/// The samples of a tar in the order of their keys. Files of other kinds are ignored.
///
/// # Errors
/// It is not a tar, is cut off, or holds tars.
pub fn read(name: &str, bytes: Bytes) -> anyhow::Result<Vec<Sample>> {
    let (_, bytes) = compressed::opened(&name.to_lowercase().replace(".tgz", ".tar.gz"), bytes)?;
    let mut members: BTreeMap<String, BTreeMap<String, Vec<u8>>> = BTreeMap::new();
    let mut archive = tar::Archive::new(&bytes[..]);
    let mut inner = None;
    for entry in archive.entries().context("is not a tar")? {
        let mut entry = entry.context("is damaged or cut off")?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let name = entry.path().context("has a member whose name cannot be read")?.display().to_string();
        if is_hidden_twin(&name) {
            continue;
        }
        if is_tar(&name) {
            inner.get_or_insert(name);
            continue;
        }
        // The key ends at the first dot of the file's name, not of its folders'.
        let file = name.rfind('/').map_or(0, |slash| slash + 1);
        let Some(dot) = name[file..].find('.') else { continue };
        let key = name[..file + dot].to_owned();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).with_context(|| format!("member {name} is cut off"))?;
        // A file that is there twice has its last content, as when it is unpacked.
        members.entry(key).or_default().insert(name, content);
    }
    let samples: Vec<Sample> = members.into_values().map(sample).collect();
    match inner {
        Some(inner) if samples.iter().all(|sample| sample.image.is_none()) => {
            bail!("holds tars, such as {inner}: unpack it, and name the folder of them")
        }
        _ => Ok(samples),
    }
}

/// What comes behind the key's dot, in lower case.
fn extension(name: &str) -> String {
    let file = name.rsplit('/').next().unwrap_or(name);
    file.split_once('.').map_or(String::new(), |(_, extension)| extension.to_lowercase())
}

/// A sample from the files of its key.
fn sample(files: BTreeMap<String, Vec<u8>>) -> Sample {
    let mut sample = Sample::default();
    let (mut images, mut others) = (Vec::new(), Vec::new());
    for (name, content) in files {
        let extension = extension(&name);
        let known = match extension.as_str() {
            "cls" => class(&content).map(|label| sample.label = Some(label)),
            "txt" | "caption" => caption(&content).map(|text| sample.captions = text.into_iter().collect()),
            "json" => described(&content, &mut sample),
            _ if FORMATS.contains(&extension.as_str()) => {
                images.push((name, content));
                continue;
            }
            // Beside an image there may be others made from it: a mask, depths, a preview.
            _ if is_image(&name) => {
                others.push((name, content));
                continue;
            }
            _ => continue,
        };
        if let Err(error) = known {
            sample.broken.get_or_insert_with(|| format!("{name} {error:#}"));
        }
    }
    let mut images = if images.is_empty() { others } else { images };
    if images.len() > 1 {
        let names: Vec<&str> = images.iter().map(|(name, _)| name.as_str()).collect();
        sample.broken = Some(format!("there are several images under one key: {}", names.join(", ")));
    }
    sample.image = images.drain(..).next();
    sample
}

fn class(content: &[u8]) -> anyhow::Result<i64> {
    let text = String::from_utf8_lossy(content);
    text.trim().parse().with_context(|| format!("holds {text:?}, which is not a class"))
}

fn caption(content: &[u8]) -> anyhow::Result<Option<String>> {
    let text = text::decode(content)?;
    Ok(Some(text.trim().to_owned()).filter(|text| !text.is_empty()))
}

/// Takes label and captions from a description. A caption file beside it counts where it has none.
fn described(content: &[u8], sample: &mut Sample) -> anyhow::Result<()> {
    let value = text::json(content).context("is not JSON")?;
    ensure!(value.is_object(), "is not a JSON object");
    sample.label = value["label"].as_i64().or(sample.label);
    let found =
        ["caption", "prompt", "text"].iter().map(|key| captions(&value[*key])).find(|all| !all.is_empty());
    if let Some(found) = found {
        sample.captions = found;
    }
    Ok(())
}

/// The captions in a value: a text, or a list of such.
pub fn captions(value: &Value) -> Vec<String> {
    let texts: Vec<&Value> = match value {
        Value::Array(values) => values.iter().collect(),
        value => vec![value],
    };
    let texts = texts.into_iter().filter_map(Value::as_str).map(|text| text.trim().to_owned());
    texts.filter(|text| !text.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_members(members: &[(&str, &[u8])]) -> anyhow::Result<Vec<Sample>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tar");
        crate::data::read::tests::tar(&path, members);
        read("a.tar", std::fs::read(path).unwrap().into())
    }

    fn images(samples: &[Sample]) -> Vec<&str> {
        samples.iter().filter_map(|sample| sample.image.as_ref()).map(|(name, _)| name.as_str()).collect()
    }

    #[test]
    fn the_image_of_a_key_is_the_one_that_is_called_so() {
        let members: &[(&str, &[u8])] = &[
            ("0.jpg", b""),
            ("0.mask.png", b""),
            ("0.txt", b"a"),
            ("1.seg.png", b""),
            ("1.JPG", b""),
            ("2.512.png", b""),
            ("._0.jpg", b"twin"),
            ("set/._2.png", b"twin"),
        ];
        let samples = read_members(members).unwrap();
        assert_eq!(images(&samples), ["0.jpg", "1.JPG", "2.512.png"]);
        assert!(samples.iter().all(|sample| sample.broken.is_none()));
        let samples = read_members(&[("0.jpg", b""), ("0.png", b""), ("0.txt", b"a")]).unwrap();
        assert!(samples[0].broken.as_ref().unwrap().contains("0.jpg, 0.png"));
        let samples =
            read_members(&[("0.jpg", b"1"), ("0.txt", b"a"), ("0.jpg", b"2"), ("0.txt", b"b")]).unwrap();
        assert_eq!(samples[0].image.as_ref().unwrap().1, b"2", "the last one counts");
        assert_eq!((&samples[0].captions[..], samples[0].broken.is_none()), (&["b".to_owned()][..], true));
    }

    #[test]
    fn captions_come_from_many_places_and_a_broken_one_is_one_broken_sample() {
        for (name, content, expected) in [
            ("0.txt", &b"\xef\xbb\xbf a \n"[..], Some(&["a"][..])),
            ("0.caption", b"a", Some(&["a"])),
            ("0.json", br#"{"caption": "a"}"#, Some(&["a"])),
            ("0.json", br#"{"text": "a", "similarity": NaN}"#, Some(&["a"])),
            ("0.json", b"\xef\xbb\xbf{\"prompt\": \"a\"}", Some(&["a"])),
            ("0.json", br#"{"caption": ["a", " ", "b"]}"#, Some(&["a", "b"])),
            ("0.json", br#"{"caption": null}"#, Some(&[])),
            ("0.json", b"", None),
            ("0.json", br#"["a"]"#, None),
            ("0.txt", b"caf\xe9", None),
            ("0.cls", b"one", None),
        ] {
            let samples = read_members(&[("0.png", b""), (name, content)]).unwrap();
            assert_eq!(samples[0].broken.is_none(), expected.is_some(), "{name}: {:?}", samples[0].broken);
            assert_eq!(samples[0].captions, expected.unwrap_or_default(), "{name}");
        }
        let both =
            read_members(&[("0.png", b""), ("0.txt", b"a"), ("0.json", br#"{"caption": null}"#)]).unwrap();
        assert_eq!(both[0].captions, ["a"]);
    }

    #[test]
    fn a_tar_of_tars_is_called_that() {
        let error = read_members(&[("0.tar", b""), ("1.tar.gz", b"")]).unwrap_err().to_string();
        assert!(error.contains("holds tars, such as 0.tar"), "{error}");
        assert!(is_tar("a/0.TAR") && is_tar("x.tgz") && !is_tar("a/._0.tar") && !is_tar("x.zip"));
    }
}
