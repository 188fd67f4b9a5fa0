//! Captions of a folder of images: in a file beside each image, as kohya's scripts have them, or in `metadata.jsonl`, as Hugging
//! Face's image folders do.

use std::collections::HashMap;

use anyhow::Context;
use potstill_storage::Source;

use crate::data::{
    formats::is_image,
    tars,
    text::{self, decode, lines},
};

/// Files of a folder that are read at a time.
pub const FILES_AT_A_TIME: usize = 64;
const LIST: &str = "metadata.jsonl";

/// The captions of the images among `names`.
///
/// # Errors
/// A list that cannot be read, with its line. A file beside an image that cannot be read is as none.
pub async fn captions(source: &Source, names: &[String]) -> anyhow::Result<HashMap<String, Vec<String>>> {
    let mut captions: HashMap<String, Vec<String>> = HashMap::new();
    let beside: Vec<String> = names
        .iter()
        .filter(|name| [".txt", ".caption"].iter().any(|end| name.ends_with(end)))
        .cloned()
        .collect();
    let images: HashMap<&str, &String> =
        names.iter().filter(|name| is_image(name)).map(|name| (stem(name), name)).collect();
    for files in beside.chunks(FILES_AT_A_TIME) {
        for (name, bytes) in files.iter().zip(source.read_all(files).await?) {
            let Some(image) = images.get(stem(name)) else { continue };
            let text = decode(&bytes).map(|text| text.trim().to_owned()).unwrap_or_default();
            if !text.is_empty() {
                captions.insert((*image).clone(), vec![text]);
            }
        }
    }
    for list in names.iter().filter(|name| name.rsplit('/').next() == Some(LIST)) {
        let folder = list.strip_suffix(LIST).unwrap_or_default();
        let bytes = source.read(list).await?;
        for (number, line) in lines(&decode(&bytes).with_context(|| list.clone())?) {
            let row =
                text::json(line.as_bytes()).with_context(|| format!("{list}: line {number}: is not JSON"))?;
            let Some(file) = row["file_name"].as_str() else { continue };
            let found = ["text", "caption", "prompt"].iter().map(|key| tars::captions(&row[*key]));
            if let Some(found) = found.into_iter().find(|found| !found.is_empty()) {
                captions.insert(format!("{folder}{file}"), found);
            }
        }
    }
    Ok(captions)
}

/// A name without its extension.
fn stem(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(stem, _)| stem)
}
