//! Files of adapters, as public tools write and read them.
//!
//! Read are the names of PEFT (`unet.<module>.lora_A.weight`), of diffusers before it (`….lora.down.weight`) and of kohya's
//! scripts (`lora_unet_<module with _>.lora_down.weight` and `.alpha`). α is that of kohya's `.alpha`, or of diffusers'
//! metadata, or the rank.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use tch::{Kind, Tensor, no_grad};

use super::{
    DOWN, Lora, UP,
    weights::{is_meant, shapes},
};
use crate::parameters::Parameters;

/// Whose names a file has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// PEFT's, which diffusers loads.
    Peft,
    /// kohya's, which diffusers, ComfyUI and others load.
    Kohya,
}

/// Key of the metadata in which diffusers keeps α.
const ADAPTER_METADATA: &str = "lora_adapter_metadata";
/// What stands before a U-Net's modules in kohya's names.
const KOHYA: &str = "lora_unet_";
/// Endings of A's and of B's names.
const DOWNS: [&str; 4] =
    [".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight", ".lora_down.weight"];
const UPS: [&str; 4] = [".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight", ".lora_up.weight"];
const ALPHA: &str = ".alpha";
/// Beginnings of the names of adapters of text encoders.
const TEXT: [&str; 2] = ["text_encoder", "lora_te"];

/// Why adapters do not fit a network.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum LoraFileError {
    /// A name of another kind of file.
    #[error("{name} is not the name of an adapter: expected those of PEFT or kohya's scripts")]
    Name {
        /// The name.
        name: String,
    },
    /// It adapts a text encoder.
    #[error(
        "{name} adapts a text encoder, which is not supported: leave the adapters of text encoders out of the file"
    )]
    Text {
        /// The name.
        name: String,
    },
    /// A layer that the network does not have: the file is for another one.
    #[error("it adapts {module}, which this network does not have: it is for another base")]
    Module {
        /// The layer.
        module: String,
    },
    /// A or B of another shape than the layer needs.
    #[error(
        "{module}: A is {down:?} and B {up:?}, and the layer's weight is {weight:?}: it is for another base"
    )]
    Shape {
        /// The layer.
        module: String,
        /// Shape of A.
        down: Vec<i64>,
        /// Shape of B.
        up: Vec<i64>,
        /// Shape of the weight.
        weight: Vec<i64>,
    },
    /// A without B, or B without A.
    #[error("{module} has only one half of its adapter")]
    Half {
        /// The layer.
        module: String,
    },
    /// Adapters of other layers or of another rank than the run's.
    #[error("{module}: the file has {found}, and [lora] asks for {wanted}")]
    Other {
        /// The layer.
        module: String,
        /// What the file has there.
        found: String,
        /// What the run has there.
        wanted: String,
    },
    /// There is nothing in it.
    #[error("it holds no adapters")]
    Empty,
}

/// The adapter of one layer.
#[derive(Debug)]
pub struct Update {
    /// The layer.
    pub module: String,
    /// A, fp32.
    pub down: Tensor,
    /// B, fp32.
    pub up: Tensor,
    /// α/r.
    pub scale: f64,
}

/// The adapters of a file for a network with these parameters.
///
/// # Errors
/// [`LoraFileError`]: what does not fit is named.
pub fn parse(
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
    of: &Parameters,
) -> Result<Vec<Update>, LoraFileError> {
    let weights: BTreeMap<&str, &[i64]> = of
        .entries()
        .iter()
        .filter(|entry| entry.shape.len() > 1)
        .filter_map(|entry| Some((entry.name.strip_suffix(".weight")?, entry.shape.as_slice())))
        .collect();
    let underscored: BTreeMap<String, &str> =
        weights.keys().map(|module| (module.replace('.', "_"), *module)).collect();
    let module_of = |stem: &str| match stem.strip_prefix(KOHYA) {
        Some(module) => {
            underscored.get(module).map_or_else(|| module.to_owned(), |module| (*module).to_owned())
        }
        None => stem.strip_prefix("unet.").unwrap_or(stem).to_owned(),
    };
    let (mut downs, mut ups, mut alphas) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for (name, tensor) in tensors {
        if TEXT.iter().any(|beginning| name.starts_with(beginning)) {
            return Err(LoraFileError::Text { name: name.clone() });
        }
        let stem = |endings: &[&str]| endings.iter().find_map(|ending| name.strip_suffix(ending));
        let tensor = tensor.detach().to_kind(Kind::Float);
        if let Some(stem) = stem(&DOWNS) {
            downs.insert(module_of(stem), tensor);
        } else if let Some(stem) = stem(&UPS) {
            ups.insert(module_of(stem), tensor);
        } else if let Some(stem) = stem(&[ALPHA]).filter(|_| tensor.numel() == 1) {
            alphas.insert(module_of(stem), tensor.reshape([1]).double_value(&[0]));
        } else {
            return Err(LoraFileError::Name { name: name.clone() });
        }
    }
    let settings = metadata.get(ADAPTER_METADATA).and_then(|text| serde_json::from_str::<Value>(text).ok());
    let modules: BTreeSet<String> = downs.keys().chain(ups.keys()).chain(alphas.keys()).cloned().collect();
    let mut updates = Vec::new();
    for module in modules {
        let (Some(down), Some(up)) = (downs.remove(&module), ups.remove(&module)) else {
            return Err(LoraFileError::Half { module });
        };
        let Some(weight) = weights.get(module.as_str()) else { return Err(LoraFileError::Module { module }) };
        let rank = down.size().first().copied().unwrap_or(0);
        let (wanted_down, wanted_up) = shapes(weight, rank);
        if down.size() != wanted_down || up.size() != wanted_up || rank == 0 {
            let (down, up, weight) = (down.size(), up.size(), weight.to_vec());
            return Err(LoraFileError::Shape { module, down, up, weight });
        }
        let stated = || settings.as_ref().and_then(|settings| stated_alpha(settings, &module));
        let alpha = alphas.get(&module).copied().or_else(stated).unwrap_or(rank as f64);
        updates.push(Update { module, down, up, scale: alpha / rank as f64 });
    }
    if updates.is_empty() { Err(LoraFileError::Empty) } else { Ok(updates) }
}

/// α of a module by diffusers' metadata: that of its own pattern, or the common one.
fn stated_alpha(settings: &Value, module: &str) -> Option<f64> {
    let patterns = settings["unet.alpha_pattern"].as_object().into_iter().flatten();
    let own = patterns.into_iter().find(|(name, _)| is_meant(module, name)).map(|(_, alpha)| alpha);
    own.unwrap_or(&settings["unet.lora_alpha"]).as_f64()
}

/// Fills adapters, the parameters of a network that has some by `lora`, with those of a file.
///
/// # Errors
/// [`LoraFileError::Other`] where the file has adapters of other layers or ranks.
pub fn fill(updates: &[Update], lora: &Lora, parameters: &Parameters) -> Result<(), LoraFileError> {
    let of: BTreeMap<&str, &Update> = updates.iter().map(|update| (update.module.as_str(), update)).collect();
    let mut used = BTreeSet::new();
    for entry in parameters.entries() {
        let down = entry.name.strip_suffix(DOWN);
        let stem = down.or_else(|| entry.name.strip_suffix(UP)).unwrap_or(&entry.name);
        let module = stem.trim_end_matches('.');
        let Some(update) = of.get(module) else {
            return Err(other(module, "no adapter", &format!("rank {}", lora.rank)));
        };
        let values = match down {
            Some(_) => update.down.shallow_clone(),
            None => &update.up * (update.scale / lora.scale()),
        };
        if values.size() != entry.shape {
            let found = format!("rank {}", update.down.size()[0]);
            return Err(other(module, &found, &format!("rank {}", lora.rank)));
        }
        used.insert(module);
        let mut place = parameters.flat().narrow(0, entry.offset, entry.numel());
        no_grad(|| place.copy_(&values.reshape([-1])));
    }
    match of.keys().find(|module| !used.contains(*module)) {
        Some(module) => Err(other(module, "an adapter", "none")),
        None => Ok(()),
    }
}

fn other(module: &str, found: &str, wanted: &str) -> LoraFileError {
    LoraFileError::Other { module: module.to_owned(), found: found.to_owned(), wanted: wanted.to_owned() }
}

/// Adapters under the names of a public tool. B is multiplied by α/r, so that every reader uses them alike,
/// whether or not it looks for α.
#[must_use]
pub fn named(parameters: &Parameters, lora: &Lora, naming: Naming) -> Vec<(String, Tensor)> {
    let mut tensors = Vec::new();
    for (entry, leaf) in parameters.entries().iter().zip(parameters.leaves()) {
        let (stem, is_down) = match (entry.name.strip_suffix(DOWN), entry.name.strip_suffix(UP)) {
            (Some(stem), _) => (stem, true),
            (_, Some(stem)) => (stem, false),
            _ => continue,
        };
        let module = stem.trim_end_matches('.');
        let values = leaf.detach().to_kind(Kind::Float);
        let values = if is_down { values } else { values * lora.scale() };
        match naming {
            Naming::Peft => tensors.push((format!("unet.{}", entry.name), values)),
            Naming::Kohya => {
                let module = format!("{KOHYA}{}", module.replace('.', "_"));
                let half = if is_down { "lora_down" } else { "lora_up" };
                tensors.push((format!("{module}.{half}.weight"), values));
                if is_down {
                    tensors.push((format!("{module}{ALPHA}"), Tensor::from(lora.rank as f32)));
                }
            }
        }
    }
    tensors
}
