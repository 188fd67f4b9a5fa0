//! Tars in the WebDataset layout: files of one sample are adjacent and share a key, the name up to its first dot.

use std::{
    collections::{BTreeMap, HashMap},
    io::Read,
};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use serde_json::Value;

use super::{
    compressed,
    formats::{FORMATS, Foreign, below, is_image, no_set},
    text,
};

/// The files of one key. What cannot be read is an error only where it is needed.
#[derive(Debug)]
pub struct Sample {
    /// Name and content of the image, if there is one; an error where several could be meant.
    pub image: Option<Result<(String, Vec<u8>), String>>,
    /// From `.cls`, or `label` in `.json`.
    pub label: Result<Option<i64>, String>,
    /// From `.txt` or `.caption`, or `caption`, `prompt` or `text` in `.json`: one, or several to choose from.
    pub captions: Result<Vec<String>, String>,
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

/// The samples of a tar in the order of their keys. Files of other kinds are ignored. Whether it is compressed its content says.
///
/// # Errors
/// It is not a tar, is cut off, or holds archives instead of images.
pub fn read(bytes: Bytes) -> anyhow::Result<Vec<Sample>> {
    let bytes = compressed::unpacked(bytes)?;
    if let Some(problem) = no_set(&bytes) {
        bail!(problem);
    }
    // Two blocks of zeros are its end; a writer that was stopped between two members has not written them.
    ensure!(
        bytes.len() >= 512 && bytes[bytes.len() - 512..].iter().all(|byte| *byte == 0),
        "is no tar, or is cut off"
    );
    let (mut members, mut links) = (Members::new(), Vec::new());
    let mut archive = tar::Archive::new(&bytes[..]);
    // Tars that were appended to each other.
    archive.set_ignore_zeros(true);
    let (mut inner, mut archive_in_it) = (None, None);
    for entry in archive.entries().context("is not a tar")? {
        let mut entry = entry.context("is damaged or cut off")?;
        let kind = entry.header().entry_type();
        if kind.is_dir() {
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
        if kind.is_hard_link() || kind.is_symlink() {
            let target = entry.link_name().ok().flatten().map(|target| target.display().to_string());
            let target = target.with_context(|| format!("member {name} is a link to nothing"))?;
            links.push(Link { folder: kind.is_symlink().then_some(file), key, name, target });
            continue;
        }
        if !kind.is_file() {
            ensure!(!belongs(&name), "member {name} is no plain file, but {kind:?}: pack it as one");
            continue;
        }
        let mut content = Vec::new();
        entry.read_to_end(&mut content).with_context(|| format!("member {name} is cut off"))?;
        if let Some(kind @ (Foreign::Archive(_) | Foreign::Compressed(_))) = Foreign::of(&content) {
            archive_in_it.get_or_insert_with(|| (name.clone(), kind));
        }
        // A file that is there twice has its last content, as when it is unpacked.
        members.entry(key).or_default().insert(name, content);
    }
    follow(links, &mut members)?;
    let samples: Vec<Sample> = members.into_values().map(sample).collect();
    match (inner, archive_in_it) {
        _ if samples.iter().any(|sample| sample.image.is_some()) => Ok(samples),
        (Some(inner), _) => bail!("holds tars, such as {inner}: unpack it, and name the folder of them"),
        (None, Some((name, kind))) => bail!("holds no images but {name}, which {kind}"),
        (None, None) => Ok(samples),
    }
}

/// The contents of files by key and name.
type Members = BTreeMap<String, BTreeMap<String, Vec<u8>>>;

/// A member that is a link.
struct Link {
    key: String,
    name: String,
    /// The length of the folder in its name, to which the target is relative; `None` for a hard link, whose target is a member.
    folder: Option<usize>,
    target: String,
}

/// Adds what the links stand for.
///
/// # Errors
/// That is not in the tar.
fn follow(links: Vec<Link>, members: &mut Members) -> anyhow::Result<()> {
    if links.is_empty() {
        return Ok(());
    }
    let files = members.values().flatten().map(|(name, content)| (below("", name), content.clone()));
    let files: HashMap<String, Vec<u8>> = files.collect();
    for Link { key, name, folder, target } in links {
        let place = below(folder.map_or("", |length| &name[..length]), &target);
        match files.get(&place) {
            Some(content) => {
                members.entry(key).or_default().entry(name).or_insert_with(|| content.clone());
            }
            None if belongs(&name) => {
                bail!(
                    "member {name} is a link to {target}, which is no file of this tar: pack it with --dereference"
                )
            }
            None => {}
        }
    }
    Ok(())
}

/// Whether a file of this name is a part of a sample.
fn belongs(name: &str) -> bool {
    is_image(name) || TEXTS.contains(&extension(name).as_str())
}

/// Endings of a sample's files beside the image.
const TEXTS: [&str; 4] = ["cls", "txt", "caption", "json"];
/// Why a file that looks like a part of a sample is none.
const KEYS: &str = "a key ends at the first dot of a file's name, so a name needs to have no other dot than that of its ending";

/// What comes behind the key's dot, in lower case.
fn extension(name: &str) -> String {
    let file = name.rsplit('/').next().unwrap_or(name);
    file.split_once('.').map_or(String::new(), |(_, extension)| extension.to_lowercase())
}

/// A sample from the files of its key. Of several files that say the same thing a `.json` that says it counts more, whatever
/// the order.
fn sample(files: BTreeMap<String, Vec<u8>>) -> Sample {
    let mut sample = Sample { image: None, label: Ok(None), captions: Ok(vec![]) };
    let (mut images, mut others) = (Vec::new(), Vec::new());
    let (mut description, mut stray) = (None, None);
    for (name, content) in files {
        let place = |error: anyhow::Error| format!("{name} {error:#}");
        match extension(&name).as_str() {
            "cls" => sample.label = class(&content).map(Some).map_err(place),
            "txt" | "caption" => sample.captions = caption(&content).map_err(place),
            "json" => description = Some(described(&content).map_err(place)),
            known if FORMATS.contains(&known) => images.push((name, content)),
            // Beside an image there may be others made from it: a mask, depths, a preview.
            _ if is_image(&name) => others.push((name, content)),
            unknown if unknown.rsplit('.').next().is_some_and(|last| TEXTS.contains(&last)) => {
                stray = Some(name)
            }
            _ => {}
        }
    }
    match description {
        Some(Ok((label, captions))) => {
            sample.label = label.map_or(sample.label, |label| Ok(Some(label)));
            sample.captions = if captions.is_empty() { sample.captions } else { Ok(captions) };
        }
        Some(Err(problem)) => {
            sample.label = Err(problem.clone());
            sample.captions = Err(problem);
        }
        None => {}
    }
    if let Some(name) = stray {
        let problem = |what: &str| format!("its image has no {what}, and {name} is not read as one: {KEYS}");
        if matches!(&sample.captions, Ok(none) if none.is_empty()) {
            sample.captions = Err(problem("caption"));
        }
        if matches!(sample.label, Ok(None)) {
            sample.label = Err(problem("label"));
        }
    }
    let mut images = if images.is_empty() { others } else { images };
    sample.image = match images.len() {
        0 | 1 => images.pop().map(Ok),
        _ => {
            let names: Vec<&str> = images.iter().map(|(name, _)| name.as_str()).collect();
            Some(Err(format!("there are several images under one key: {} ({KEYS})", names.join(", "))))
        }
    };
    sample
}

fn class(content: &[u8]) -> anyhow::Result<i64> {
    let text = String::from_utf8_lossy(content);
    text.trim().parse().with_context(|| format!("holds {text:?}, which is not a class"))
}

fn caption(content: &[u8]) -> anyhow::Result<Vec<String>> {
    let text = text::decode(content)?;
    Ok(Some(text.trim().to_owned()).filter(|text| !text.is_empty()).into_iter().collect())
}

/// Label and captions of a description.
fn described(content: &[u8]) -> anyhow::Result<(Option<i64>, Vec<String>)> {
    let value = text::json(content).context("is not JSON")?;
    ensure!(value.is_object(), "is not a JSON object");
    let mut found = ["caption", "prompt", "text"].iter().map(|key| captions(&value[*key]));
    let label = match &value["label"] {
        Value::Null => None,
        label => Some(
            text::whole(label).with_context(|| format!("has the label {label}, which is no whole number"))?,
        ),
    };
    Ok((label, found.find(|all| !all.is_empty()).unwrap_or_default()))
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
        read(std::fs::read(path).unwrap().into())
    }

    fn images(samples: &[Sample]) -> Vec<&str> {
        samples.iter().map(|sample| sample.image.as_ref().unwrap().as_ref().unwrap().0.as_str()).collect()
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
        assert_eq!(images(&read_members(members).unwrap()), ["0.jpg", "1.JPG", "2.512.png"]);
        let samples = read_members(&[("0.jpg", b""), ("0.png", b""), ("0.txt", b"a")]).unwrap();
        let problem = samples[0].image.as_ref().unwrap().as_ref().unwrap_err();
        assert!(problem.contains("0.jpg, 0.png"), "{problem}");
        let samples =
            read_members(&[("0.jpg", b"1"), ("0.txt", b"a"), ("0.jpg", b"2"), ("0.txt", b"b")]).unwrap();
        assert_eq!(samples[0].image.as_ref().unwrap().as_ref().unwrap().1, b"2", "the last one counts");
        assert_eq!(samples[0].captions, Ok(vec!["b".to_owned()]));
    }

    #[test]
    fn captions_and_labels_come_from_many_places_and_what_is_broken_is_so_by_itself() {
        let none: (Option<&[&str]>, Option<Option<i64>>) = (None, None);
        for (name, content, (captions, label)) in [
            ("0.txt", &b"\xef\xbb\xbf a \n"[..], (Some(&["a"][..]), Some(None))),
            ("0.caption", b"a", (Some(&["a"]), Some(None))),
            ("0.json", br#"{"caption": "a"}"#, (Some(&["a"]), Some(None))),
            ("0.json", br#"{"text": "a", "similarity": NaN}"#, (Some(&["a"]), Some(None))),
            ("0.json", b"\xef\xbb\xbf{\"prompt\": \"a\", \"label\": 3}", (Some(&["a"]), Some(Some(3)))),
            ("0.json", br#"{"caption": ["a", " ", "b"]}"#, (Some(&["a", "b"]), Some(None))),
            ("0.json", br#"{"caption": null}"#, (Some(&[]), Some(None))),
            ("0.json", b"", none),
            ("0.json", br#"["a"]"#, none),
            ("0.txt", b"caf\xe9", (None, Some(None))),
            ("0.cls", b"one", (Some(&[]), None)),
            ("0.cls", b"1", (Some(&[]), Some(Some(1)))),
            ("0.5.txt", b"a", none),
            ("0.5.bin", b"a", (Some(&[]), Some(None))),
        ] {
            let samples = read_members(&[("0.png", b""), (name, content)]).unwrap();
            let found = samples[0].captions.as_ref().ok();
            let expected: Option<Vec<String>> =
                captions.map(|all| all.iter().map(|one| (*one).to_owned()).collect());
            assert_eq!(found, expected.as_ref(), "{name}: {:?}", samples[0]);
            assert_eq!(samples[0].label.as_ref().ok(), label.as_ref(), "{name}");
        }
        let both =
            read_members(&[("0.png", b""), ("0.txt", b"a"), ("0.json", br#"{"caption": null}"#)]).unwrap();
        assert_eq!(both[0].captions, Ok(vec!["a".to_owned()]));
        let named = read_members(&[("img_0.5.png", b""), ("img_0.5.txt", b"a")]).unwrap();
        let problem = named[0].captions.as_ref().unwrap_err();
        assert!(
            problem.contains("no caption, and img_0.5.txt is not read") && problem.contains("first dot"),
            "{problem}"
        );
    }

    #[test]
    fn a_tar_of_tars_is_called_that() {
        let error = read_members(&[("0.tar", b""), ("1.tar.gz", b"")]).unwrap_err().to_string();
        assert!(error.contains("holds tars, such as 0.tar"), "{error}");
        assert!(is_tar("a/0.TAR") && is_tar("x.tgz") && !is_tar("a/._0.tar") && !is_tar("x.zip"));
    }

    #[test]
    fn all_parts_and_links_of_a_tar_are_read_and_one_without_its_end_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = |members: &[(&str, &[u8])]| {
            let path = folder.path().join("a.tar");
            crate::data::read::tests::tar(&path, members);
            std::fs::read(path).unwrap()
        };
        let (first, second) =
            (bytes(&[("0.png", b"x"), ("0.txt", b"a")]), bytes(&[("1.png", b"y"), ("1.txt", b"b")]));
        let both = read([&first[..], &second].concat().into()).unwrap();
        assert_eq!(images(&both), ["0.png", "1.png"]);

        let mut builder = tar::Builder::new(Vec::new());
        let mut add = |name: &str, content: &[u8], target: Option<&str>| {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            match target {
                Some(target) => {
                    header.set_entry_type(tar::EntryType::Link);
                    builder.append_link(&mut header, name, target).unwrap();
                }
                None => builder.append_data(&mut header, name, content).unwrap(),
            }
        };
        add("0.png", b"x", None);
        add("1.png", b"", Some("0.png"));
        let linked = read(builder.into_inner().unwrap().into()).unwrap();
        assert_eq!(linked[1].image.as_ref().unwrap().as_ref().unwrap().1, b"x");

        // Members are not unpacked, so that a name that leads out of a folder is a name.
        let symbolic = |target: &str| {
            let mut builder = tar::Builder::new(Vec::new());
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            builder.append_link(&mut header, "set/1.png", target).unwrap();
            let mut header = tar::Header::new_gnu();
            header.set_size(1);
            header.as_gnu_mut().unwrap().name[..12].copy_from_slice(b"/store/0.png");
            header.set_cksum();
            builder.append(&header, &b"x"[..]).unwrap();
            read(builder.into_inner().unwrap().into())
        };
        let linked = symbolic("../store/0.png").unwrap();
        let found: Vec<_> =
            linked.iter().map(|sample| sample.image.as_ref().unwrap().as_ref().unwrap()).collect();
        assert_eq!(
            found,
            [&("/store/0.png".to_owned(), b"x".to_vec()), &("set/1.png".to_owned(), b"x".to_vec())]
        );
        let error = symbolic("/elsewhere/0.png").unwrap_err().to_string();
        assert!(
            error.contains("set/1.png is a link to /elsewhere/0.png") && error.contains("--dereference"),
            "{error}"
        );

        // Cut between two members.
        let error = read(first[..1024].to_vec().into()).unwrap_err().to_string();
        assert!(error.contains("is cut off"), "{error}");
    }

    #[test]
    fn compressed_tars_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tar");
        crate::data::read::tests::tar(&path, &[("0.png", b""), ("0.txt", b"a")]);
        let plain = std::fs::read(path).unwrap();
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut gz, &plain).unwrap();
        let gz = gz.finish().unwrap();
        for bytes in [gz, zstd::encode_all(&plain[..], 1).unwrap(), plain] {
            assert_eq!(images(&read(bytes.into()).unwrap()), ["0.png"]);
        }
    }
}
