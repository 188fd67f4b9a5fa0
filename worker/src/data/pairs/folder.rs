//! Captions of a folder of images: in a file beside each image, as kohya's scripts have them, or in a list, as Hugging Face's image
//! folders have it.

use std::collections::{HashMap, HashSet};

use anyhow::{Context, bail};
use bytes::Bytes;
use potstill_storage::Source;
use serde_json::Value;

use crate::data::{
    formats::{below, stem},
    prompt_file::parquet,
    tars,
    text::{self, decode, lines},
};

/// Files of a folder that are read at a time.
pub const FILES_AT_A_TIME: usize = 64;
/// Names of lists. Each holds an image's name, relative to its own folder, and a caption in each row.
const LISTS: [&str; 3] = ["metadata.csv", "metadata.jsonl", "metadata.parquet"];
const FILE: &str = "file_name";
/// Where a row may have its caption.
const CAPTIONS: [&str; 3] = ["text", "caption", "prompt"];

/// The captions of `images`, which are among `names`.
///
/// # Errors
/// A list that cannot be read, with its row, or one without a caption for any image where none has another. A file beside an
/// image that cannot be read is as none.
pub async fn captions(
    source: &Source,
    names: &[String],
    images: &[String],
) -> anyhow::Result<HashMap<String, Vec<String>>> {
    let mut captions: HashMap<String, Vec<String>> = HashMap::new();
    let ends_so = |name: &str| [".txt", ".caption"].iter().any(|end| name.to_lowercase().ends_with(end));
    let beside: Vec<String> = names.iter().filter(|name| ends_so(name)).cloned().collect();
    let by_stem: HashMap<&str, &String> = images.iter().map(|name| (stem(name), name)).collect();
    for files in beside.chunks(FILES_AT_A_TIME) {
        for (name, bytes) in files.iter().zip(source.read_all(files).await?) {
            let Some(image) = by_stem.get(stem(name)) else { continue };
            let text = decode(&bytes).map(|text| text.trim().to_owned()).unwrap_or_default();
            if !text.is_empty() {
                captions.insert((*image).clone(), vec![text]);
            }
        }
    }
    let images: HashSet<&str> = images.iter().map(String::as_str).collect();
    let mut useless = None;
    for list in names {
        let (folder, name) = list.rsplit_once('/').unwrap_or(("", list));
        let name = name.to_lowercase();
        if !LISTS.contains(&name.as_str()) {
            continue;
        }
        let rows = rows(&name, source.read(list).await?).with_context(|| list.clone())?;
        for (place, row) in rows {
            match listed(&row, folder, &images) {
                Ok((image, found)) => drop(captions.insert(image, found)),
                Err(problem) => drop(useless.get_or_insert_with(|| format!("{list}: {place}: {problem}"))),
            }
        }
    }
    match useless {
        Some(problem) if captions.is_empty() => bail!(problem),
        _ => Ok(captions),
    }
}

/// The rows of a list with their places.
fn rows(name: &str, bytes: Bytes) -> anyhow::Result<Vec<(String, Value)>> {
    let at = |index: usize| format!("row {index}");
    if name.ends_with(".parquet") {
        let wanted = [&CAPTIONS[..], &[FILE]].concat();
        let rows = parquet::objects(bytes, &wanted)?;
        return Ok(rows.into_iter().enumerate().map(|(index, row)| (at(index), row)).collect());
    }
    let text = decode(&bytes)?;
    if name.ends_with(".csv") {
        let text::Table { names, rows } = text::table(&text, b',')?;
        let object = |(index, record): (usize, anyhow::Result<csv::StringRecord>)| {
            let record = record.with_context(|| at(index))?;
            let fields = names.iter().zip(&record).map(|(name, field)| (name.clone(), Value::from(field)));
            Ok((at(index), Value::Object(fields.collect())))
        };
        return rows.into_iter().enumerate().map(object).collect();
    }
    lines(&text)
        .map(|(number, line)| {
            let place = format!("line {number}");
            let row = text::json(line.as_bytes()).with_context(|| format!("{place}: is not JSON"))?;
            Ok((place, row))
        })
        .collect()
}

/// The image of a row and its captions, or why it has none.
fn listed(row: &Value, folder: &str, images: &HashSet<&str>) -> Result<(String, Vec<String>), String> {
    let keys = || row.as_object().map(|row| row.keys().collect::<Vec<_>>()).unwrap_or_default();
    let file = row[FILE].as_str().ok_or_else(|| format!("has no {FILE}; its keys are {:?}", keys()))?;
    let image = below(folder, file);
    if !images.contains(image.as_str()) {
        return Err(format!("names {image}, which is no image here; a {FILE} is relative to its list"));
    }
    let mut found = CAPTIONS.iter().map(|key| tars::captions(&row[*key]));
    let found = found.find(|found| !found.is_empty());
    let found = found
        .ok_or_else(|| format!("has no caption under {}; its keys are {:?}", CAPTIONS.join(", "), keys()))?;
    Ok((image, found))
}
