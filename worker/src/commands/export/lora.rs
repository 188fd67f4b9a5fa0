//! A student's adapters as one file.

use std::collections::BTreeMap;

use anyhow::Context;
use potstill_models::{
    lora::file::{Naming, named},
    weights::{Precision, archive_in},
};
use tch::Tensor;

use crate::model::student::{Adapters, FOLDER_TIMES_KEY, Student};

/// The file's bytes.
///
/// # Errors
/// The student has no adapters; numbers beyond the range of the data type.
pub fn bytes(student: &Student, naming: Naming, precision: Precision) -> anyhow::Result<Vec<u8>> {
    let Adapters { lora, network } = student.adapters.as_ref().with_context(|| {
        format!("{} holds whole networks: only a run with [lora] has adapters to write", student.origin)
    })?;
    let tensors = named(network.parameters(), lora, naming);
    let tensors: Vec<(&str, &Tensor)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    Ok(archive_in(precision, &tensors, &header(student)?)?)
}

/// Where it comes from, and how it is used; `modelspec.*` are the keys of the Stability AI model metadata standard.
fn header(student: &Student) -> anyhow::Result<BTreeMap<String, String>> {
    let folder = student.model.latent.as_ref().map(|latent| &latent.folder);
    let family = match folder {
        Some(folder) if folder.is_xl() => "stable-diffusion-xl-v1-base",
        _ => "stable-diffusion",
    };
    let steps = student.times.len();
    let times: Vec<i64> = student.times.iter().map(|time| *time as i64).collect();
    let pairs = [
        ("format", "pt".to_owned()),
        ("modelspec.sai_model_spec", "1.0.0".to_owned()),
        ("modelspec.architecture", format!("{family}/lora")),
        ("modelspec.implementation", "diffusers".to_owned()),
        ("modelspec.title", format!("{steps}-step generator by score identity distillation")),
        ("modelspec.usage_hint", format!("{steps} step(s) at the timesteps {times:?}, without guidance")),
        ("exported_by", format!("potstill export {}", env!("CARGO_PKG_VERSION"))),
        ("exported_from", student.origin.clone()),
        (FOLDER_TIMES_KEY, serde_json::to_string(&times)?),
    ];
    let mut header: BTreeMap<String, String> =
        pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    if let Some(license) = folder.and_then(|folder| folder.license()) {
        header.insert("modelspec.license".to_owned(), license);
    }
    Ok(header)
}
