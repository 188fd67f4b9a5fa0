//! Adapters (LoRA) added to the weights of a model's folder.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use tch::{Kind, no_grad};

use super::{ModelFolder, text_encoder};
use crate::{
    lora::{
        file::{self, Layers},
        weights::product,
    },
    weights::{self, Archive, LoadError, Named, SaveError, Stored},
};

const PARTS: [&str; 3] = ["unet", "text_encoder", "text_encoder_2"];

/// Adds the adapters of each file, times its scale, to the weights in a model's folder; changed weights are stored as fp32. Names
/// are those of PEFT and of kohya's scripts, for the U-Net and the text encoders.
///
/// # Errors
/// A file that is not one of adapters, or is for another model: the first layer that does not fit is named. The folder cannot be
/// written.
pub fn merge(folder: &Path, loras: &[(PathBuf, f64)]) -> Result<(), LoadError> {
    let model = ModelFolder::open(folder)?;
    let mut tensors: BTreeMap<&str, Named> = BTreeMap::new();
    let mut layers = Vec::new();
    for part in PARTS.into_iter().filter(|part| model.parts().any(|has| has == *part)) {
        let (mut found, _) = model.weights(part)?;
        if part != "unet" {
            found = text_encoder::present(found);
        }
        let shapes: Vec<(String, Vec<i64>)> =
            found.iter().map(|(name, stored)| (name.clone(), stored.shape())).collect();
        let named = shapes.iter().map(|(name, shape)| (name.as_str(), shape.as_slice()));
        layers.push(match part {
            "unet" => model.unet_config()?.layers_of(named),
            text => Layers::new(text, named),
        });
        tensors.insert(part, found);
    }
    let mut changed = BTreeSet::new();
    for (path, scale) in loras {
        let archive = Archive::read(path)?;
        let updates = file::parse(&archive.tensors, &archive.metadata, &layers)
            .map_err(|error| LoadError::from(error).in_file(path))?;
        for update in updates {
            let name = format!("{}.weight", update.module);
            let Some(stored) = tensors.get_mut(update.part).and_then(|part| part.get_mut(&name)) else {
                continue;
            };
            let added = product(&update.down, &update.up) * (update.scale * scale);
            let sum =
                no_grad(|| stored.tensor().to_kind(Kind::Float) + added.view(stored.shape().as_slice()));
            *stored = Stored::Memory(sum);
            changed.insert(update.part);
        }
    }
    for part in changed {
        if let Some(tensors) = tensors.remove(part) {
            model.replace(part, tensors)?;
        }
    }
    Ok(())
}

impl ModelFolder {
    /// Writes a part's tensors in the place of those that it has.
    pub(super) fn replace(&self, part: &str, tensors: Named) -> Result<(), LoadError> {
        let folder = self.path().join(part);
        let old: Vec<PathBuf> = self.weight_files(part)?;
        let named: Named = match part {
            "unet" => tensors,
            _ => tensors.into_iter().map(|(name, stored)| (text_encoder::in_files(name), stored)).collect(),
        };
        let new = folder.join("new.safetensors");
        weights::write(&new, &named, None, &BTreeMap::from([("format".to_owned(), "pt".to_owned())]))?;
        let done = old.iter().try_for_each(std::fs::remove_file);
        let done = done.and_then(|()| std::fs::rename(&new, folder.join(Self::weight_name(part))));
        Ok(done.map_err(|source| SaveError::Unwritable { path: folder, source })?)
    }
}
