//! What an exported file says of itself in its header.

use std::collections::BTreeMap;

use potstill_models::{ForwardProcess, diffusers::original::Family, process::DdpmPrediction};

use crate::model::student::{FOLDER_TIMES_KEY, Student};

/// Where a file comes from, and how it is used; `modelspec.*` are the keys of the Stability AI model metadata standard. `kind` is
/// appended to the architecture, such as `/lora` for adapters; `implementation` is the program whose names the tensors have.
///
/// # Errors
/// The teacher's configurations cannot be read.
pub fn header(
    student: &Student,
    kind: &str,
    implementation: &str,
) -> anyhow::Result<BTreeMap<String, String>> {
    let steps = student.times.len();
    let times: Vec<i64> = student.times.iter().map(|time| *time as i64).collect();
    let mut header = BTreeMap::new();
    let mut say = |key: &str, value: String| header.insert(key.to_owned(), value);
    say("format", "pt".to_owned());
    say("modelspec.sai_model_spec", "1.0.0".to_owned());
    say("modelspec.title", format!("{steps}-step generator by score identity distillation"));
    say("modelspec.usage_hint", format!("{steps} step(s) at the timesteps {times:?}, without guidance"));
    say("modelspec.implementation", implementation.to_owned());
    say("exported_by", format!("potstill export {}", env!("CARGO_PKG_VERSION")));
    say("exported_from", student.origin.clone());
    say(FOLDER_TIMES_KEY, serde_json::to_string(&times)?);
    if let Some(folder) = student.model.latent.as_ref().map(|latent| &latent.folder) {
        let predicts_v = matches!(
            student.model.network.process(),
            ForwardProcess::Ddpm { prediction: DdpmPrediction::V, .. }
        );
        let architecture = Family::of_folder(folder)?.architecture(predicts_v);
        say("modelspec.architecture", format!("{architecture}{kind}"));
        say("modelspec.prediction_type", if predicts_v { "v" } else { "epsilon" }.to_owned());
        if let Some(license) = folder.license() {
            say("modelspec.license", license);
        }
    }
    Ok(header)
}
