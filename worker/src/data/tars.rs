//! Tars in the WebDataset layout: files of one sample are adjacent and share a key, the name up to its first dot.

use std::{collections::BTreeMap, io::Read};

use anyhow::Context;

/// The files of one key.
#[derive(Default)]
pub struct Sample {
    /// Name and content of an image.
    pub image: Option<(String, Vec<u8>)>,
    /// From `.cls`, or `label` in `.json`.
    pub label: Option<i64>,
    /// From `.txt`, or `caption` or `prompt` in `.json`.
    pub caption: Option<String>,
}

/// The samples of a tar in the order of their keys. Files of other kinds are ignored.
///
/// # Errors
/// It is not a tar or is cut off; a class or a description that cannot be read, by name.
pub fn read(bytes: &[u8]) -> anyhow::Result<Vec<Sample>> {
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
                    Some(label.with_context(|| format!("{name} holds {text:?}, which is not a class"))?);
            }
            // A caption that cannot be read is a broken sample, as an image is.
            "txt" => sample.caption = String::from_utf8(content).ok().map(|text| text.trim().to_owned()),
            "json" => {
                let value: serde_json::Value =
                    serde_json::from_slice(&content).with_context(|| format!("{name} is not JSON"))?;
                sample.label = value["label"].as_i64().or(sample.label);
                let text = value["caption"].as_str().or(value["prompt"].as_str());
                sample.caption = text.map(str::to_owned).or(sample.caption.take());
            }
            _ if super::formats::is_image(&name) => sample.image = Some((name, content)),
            _ => {}
        }
    }
    Ok(samples.into_values().collect())
}
