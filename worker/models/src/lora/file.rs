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
/// What stands before the layers of each part in kohya's names. Those with two text encoders count them.
const KOHYA_PARTS: [(&str, &str); 4] = [
    (KOHYA, UNET),
    ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
];

/// Why adapters do not fit a network.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum LoraFileError {
    /// A name of another kind of file.
    #[error("{name} is not the name of an adapter: expected those of PEFT or kohya's scripts")]
    Name {
        /// The name.
        name: String,
    },
    /// It adapts a text encoder where only the U-Net has adapters, or one that the model does not have.
    #[error(
        "{name} adapts a text encoder that has no adapters here: leave those of text encoders out of the file"
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
    /// The part of the model.
    pub part: &'static str,
    /// The layer.
    pub module: String,
    /// A, fp32.
    pub down: Tensor,
    /// B, fp32.
    pub up: Tensor,
    /// α/r.
    pub scale: f64,
}

/// The layers of one part of a model, by the names that files of adapters use.
#[derive(Debug)]
pub struct Layers {
    part: &'static str,
    /// Shapes of the weights.
    weights: BTreeMap<String, Vec<i64>>,
    /// By their names, or those of another layout, with _ for each dot: kohya's scripts write these.
    underscored: BTreeMap<String, String>,
}

/// The U-Net's name in files.
pub(crate) const UNET: &str = "unet";

impl Layers {
    /// Those of a part (`unet`, `text_encoder`, `text_encoder_2`) with these tensors.
    #[must_use]
    pub fn new<'a>(part: &'static str, tensors: impl Iterator<Item = (&'a str, &'a [i64])>) -> Self {
        let weights: BTreeMap<String, Vec<i64>> = tensors
            .filter(|(_, shape)| shape.len() > 1)
            .filter_map(|(name, shape)| Some((name.strip_suffix(".weight")?.to_owned(), shape.to_vec())))
            .collect();
        let underscored = weights.keys().map(|module| (module.replace('.', "_"), module.clone())).collect();
        Self { part, weights, underscored }
    }

    /// The same with other names for some of the layers.
    pub(crate) fn also<'a>(mut self, others: impl Iterator<Item = (String, &'a str)>) -> Self {
        self.underscored.extend(others.map(|(other, module)| (other.replace('.', "_"), module.to_owned())));
        self
    }

    /// Names of the layers.
    pub(crate) fn modules(&self) -> impl Iterator<Item = &str> {
        self.weights.keys().map(String::as_str)
    }

    fn module(&self, name: &Stem) -> String {
        match name {
            Stem::Dotted(name) => (*name).to_owned(),
            Stem::Underscored(name) => {
                self.underscored.get(*name).cloned().unwrap_or_else(|| (*name).to_owned())
            }
        }
    }
}

/// A layer's name in a file.
enum Stem<'a> {
    Dotted(&'a str),
    Underscored(&'a str),
}

/// Part and layer of a name without its ending. Text encoders' layers are named without `text_model`.
fn located(stem: &str) -> (&'static str, Stem<'_>) {
    for (prefix, part) in KOHYA_PARTS {
        if let Some(layer) = stem.strip_prefix(prefix) {
            return (part, Stem::Underscored(layer.strip_prefix("text_model_").unwrap_or(layer)));
        }
    }
    for part in ["text_encoder_2", "text_encoder", UNET] {
        if let Some(layer) = stem.strip_prefix(part).and_then(|rest| rest.strip_prefix('.')) {
            return (part, Stem::Dotted(layer.strip_prefix("text_model.").unwrap_or(layer)));
        }
    }
    (UNET, Stem::Dotted(stem))
}

/// The adapters of a file for these parts of a model.
///
/// # Errors
/// [`LoraFileError`]: what does not fit is named.
pub fn parse(
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
    parts: &[Layers],
) -> Result<Vec<Update>, LoraFileError> {
    let (mut downs, mut ups, mut alphas) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for (name, tensor) in tensors {
        let ending = |endings: &[&str]| endings.iter().find_map(|ending| name.strip_suffix(ending));
        let (stem, half) = match (ending(&DOWNS), ending(&UPS), ending(&[ALPHA])) {
            (Some(stem), ..) => (stem, Half::Down),
            (_, Some(stem), _) => (stem, Half::Up),
            (.., Some(stem)) if tensor.numel() == 1 => (stem, Half::Alpha),
            _ => return Err(LoraFileError::Name { name: name.clone() }),
        };
        let (part, stem) = located(stem);
        let Some(layers) = parts.iter().find(|layers| layers.part == part) else {
            return Err(LoraFileError::Text { name: name.clone() });
        };
        let layer = (layers.part, layers.module(&stem));
        let tensor = tensor.detach().to_kind(Kind::Float);
        match half {
            Half::Down => drop(downs.insert(layer, tensor)),
            Half::Up => drop(ups.insert(layer, tensor)),
            Half::Alpha => drop(alphas.insert(layer, tensor.reshape([1]).double_value(&[0]))),
        }
    }
    let settings = metadata.get(ADAPTER_METADATA).and_then(|text| serde_json::from_str::<Value>(text).ok());
    let found: BTreeSet<(&str, String)> =
        downs.keys().chain(ups.keys()).chain(alphas.keys()).cloned().collect();
    let mut updates = Vec::new();
    for layer in found {
        let (part, module) = layer.clone();
        let (Some(down), Some(up)) = (downs.remove(&layer), ups.remove(&layer)) else {
            return Err(LoraFileError::Half { module });
        };
        let weight = parts.iter().find(|layers| layers.part == part).and_then(|it| it.weights.get(&module));
        let Some(weight) = weight else { return Err(LoraFileError::Module { module }) };
        let rank = down.size().first().copied().unwrap_or(0);
        let (wanted_down, wanted_up) = shapes(weight, rank);
        if rank == 0 || !same(&down, &wanted_down) || !same(&up, &wanted_up) {
            let (down, up, weight) = (down.size(), up.size(), weight.clone());
            return Err(LoraFileError::Shape { module, down, up, weight });
        }
        let stated = || settings.as_ref().and_then(|settings| stated_alpha(settings, part, &module));
        let alpha = alphas.get(&layer).copied().or_else(stated).unwrap_or(rank as f64);
        let (down, up) = (down.reshape(wanted_down), up.reshape(wanted_up));
        updates.push(Update { part, module, down, up, scale: alpha / rank as f64 });
    }
    if updates.is_empty() { Err(LoraFileError::Empty) } else { Ok(updates) }
}

/// What a tensor of a file is.
enum Half {
    Down,
    Up,
    Alpha,
}

/// Whether a tensor has the shape, apart from trailing dimensions of 1: some programs write 1×1 convolutions for linear layers.
fn same(tensor: &Tensor, shape: &[i64]) -> bool {
    let size = tensor.size();
    let long = size.len().max(shape.len());
    (0..long).all(|i| size.get(i).unwrap_or(&1) == shape.get(i).unwrap_or(&1))
}

/// α of a module by diffusers' metadata: that of its own pattern, or the common one.
fn stated_alpha(settings: &Value, part: &str, module: &str) -> Option<f64> {
    let patterns = settings[format!("{part}.alpha_pattern")].as_object().into_iter().flatten();
    let own = patterns.into_iter().find(|(name, _)| is_meant(module, name)).map(|(_, alpha)| alpha);
    own.unwrap_or(&settings[format!("{part}.lora_alpha")]).as_f64()
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
