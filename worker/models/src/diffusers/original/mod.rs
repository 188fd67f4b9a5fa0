//! Models as one `.safetensors` file in the original layout of Stable Diffusion 1.x, 2.x and SDXL: read into a folder in
//! diffusers' layout, and written.
//!
//! A single file holds tensors and no configuration. [`Family`] recognizes it by names and shapes and knows the
//! configurations; those of a model of another size are taken from a folder.

mod families;
pub(super) mod names;
pub(super) mod vocabulary;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use tch::{Device, Kind, Tensor};

pub use self::families::Family;
use self::{
    families::{AUTOENCODER, Prediction, Text, UNET, is_passed_over},
    names::{Form, Place},
};
use super::{AutoencoderConfig, ModelFolder, TextEncoderConfig, UNetConfig, autoencoder, text_encoder};
use crate::weights::{self, LoadError, Named, Precision, SaveError, Stored};

/// One part of a model: its tensors' names and shapes in diffusers' layout, and their places in the original one.
struct Part {
    /// Its folder.
    folder: &'static str,
    /// What stands before its names in the original layout.
    prefix: &'static str,
    tensors: Vec<(String, Vec<i64>, Place)>,
}

/// The files of a folder that say how a model is built.
struct Configurations {
    unet: UNetConfig,
    autoencoder: AutoencoderConfig,
    texts: Vec<(Text, TextEncoderConfig)>,
}

/// Reads a model of one file into a new folder in diffusers' layout. Weights keep their data types. `configurations` is a
/// folder in that layout whose configurations and tokenizers are taken; by default they are those of the recognized family.
///
/// # Errors
/// A file of an unknown kind, a pickle; tensors that are missing, misshaped or left over are named.
pub fn unpack(file: &Path, configurations: Option<&Path>, folder: &Path) -> Result<(), LoadError> {
    let tensors = weights::map(file)?;
    let metadata = weights::metadata(file)?;
    let family = Family::of(&tensors).map_err(|what| {
        LoadError::Foreign(format!("is not a model of SD 1.x, SD 2.x or SDXL in one file: {what}"))
            .in_file(file)
    })?;
    let unwritable = |source| SaveError::Unwritable { path: folder.to_owned(), source };
    match configurations {
        Some(from) => copy_configurations(&ModelFolder::open(from)?, folder)?,
        None => {
            let (prediction, stated) = family.prediction(&tensors, &metadata);
            if !stated {
                tracing::warn!(
                    model = %file.display(),
                    "a Stable Diffusion 2 model in one file does not say what it predicts: v is assumed; for one that predicts the \
                     noise (…-base, 512 pixels), name a folder of its configurations as teacher.config"
                );
            }
            let zero_snr = tensors.contains_key("ztsnr") && prediction == Prediction::V;
            for (name, content) in family.configurations(prediction, zero_snr) {
                let path = folder.join(&name);
                std::fs::create_dir_all(path.parent().unwrap_or(folder)).map_err(unwritable)?;
                std::fs::write(&path, format!("{content:#}\n")).map_err(unwritable)?;
                if name.starts_with("tokenizer") {
                    vocabulary::write(path.parent().unwrap_or(folder)).map_err(unwritable)?;
                }
            }
        }
    }
    if let Some(license) = metadata.get("modelspec.license") {
        std::fs::write(folder.join("README.md"), format!("---\nlicense: {license}\n---\n"))
            .map_err(unwritable)?;
    }
    let known = Configurations::read(&ModelFolder::open(folder)?, family)?;
    let (mut used, mut problems, mut files) = (BTreeSet::new(), Vec::new(), Vec::new());
    for part in known.parts()? {
        let mut found = Named::new();
        for (name, shape, place) in part.tensors {
            let original = format!("{}{}", part.prefix, place.name);
            match tensors.get(&original).map(|stored| taken(stored, place.form, &shape)) {
                Some(Ok(stored)) => {
                    found.insert(name, stored);
                }
                Some(Err(problem)) => problems.push(format!("{original} {problem}")),
                None => problems.push(format!("{original} is missing")),
            }
            used.insert(original);
        }
        files.push((folder.join(part.folder).join(ModelFolder::weight_name(part.folder)), found));
    }
    let layers: Vec<(Text, i64)> =
        known.texts.iter().map(|(text, config)| (*text, config.num_hidden_layers)).collect();
    let surplus = tensors.keys().filter(|name| !used.contains(*name) && !is_passed_over(name, &layers));
    problems.extend(surplus.map(|name| format!("{name} is not part of such a model")));
    if !problems.is_empty() {
        return Err(LoadError::Tensors { problems }.in_file(file));
    }
    for (path, tensors) in files {
        weights::write(&path, &tensors, None, &BTreeMap::from([("format".to_owned(), "pt".to_owned())]))?;
    }
    Ok(())
}

/// The tensor of diffusers' layout, without a copy where its values are in one piece.
fn taken(stored: &Stored, form: Form, shape: &[i64]) -> Result<Stored, String> {
    let found = stored.shape();
    let wanted = |shape: &[i64]| format!("has shape {found:?}, expected {shape:?}");
    let trimmed = |shape: &[i64]| -> Vec<i64> {
        let end = shape.iter().rposition(|side| *side != 1).map_or(0, |last| last + 1);
        shape[..end].to_vec()
    };
    match form {
        Form::Same if trimmed(&found) == trimmed(shape) => Ok(stored.reshaped(shape)),
        Form::Same => Err(wanted(shape)),
        Form::Transposed => {
            let turned: Vec<i64> = shape.iter().rev().copied().collect();
            if found != turned {
                return Err(wanted(&turned));
            }
            Ok(Stored::Memory(stored.tensor().transpose(0, 1).contiguous()))
        }
        Form::Third(index) => {
            let mut whole = shape.to_vec();
            whole[0] *= 3;
            if found != whole {
                return Err(wanted(&whole));
            }
            let rows = shape[0] as usize;
            Ok(stored.rows(index * rows..(index + 1) * rows))
        }
    }
}

fn copy_configurations(from: &ModelFolder, to: &Path) -> Result<(), LoadError> {
    for name in from.files()?.into_iter().filter(|name| !is_weights(name)) {
        let path = to.join(&name);
        let copied = std::fs::create_dir_all(path.parent().unwrap_or(to))
            .and_then(|()| std::fs::copy(from.path().join(&name), &path).map(|_| ()));
        copied.map_err(|source| SaveError::Unwritable { path, source })?;
    }
    Ok(())
}

fn is_weights(name: &Path) -> bool {
    let text = name.to_string_lossy();
    text.ends_with(".safetensors") || text.contains(".index.")
}

impl Configurations {
    fn read(folder: &ModelFolder, family: Family) -> Result<Self, LoadError> {
        let mut texts = Vec::new();
        for text in family.texts() {
            if !folder.parts().any(|part| part == text.part) {
                return Err(LoadError::Folder(format!(
                    "is for another family of models: it has no {}",
                    text.part
                ))
                .in_file(folder.path()));
            }
            texts.push((text, folder.text_config(text.part)?));
        }
        Ok(Self { unet: folder.unet_config()?, autoencoder: folder.autoencoder_config()?, texts })
    }

    fn parts(&self) -> Result<Vec<Part>, LoadError> {
        let part =
            |folder, prefix, declared: Vec<(String, Vec<i64>)>, place: &dyn Fn(&str) -> Option<Place>| {
                let mut tensors = Vec::with_capacity(declared.len());
                for (name, shape) in declared {
                    let Some(place) = place(&name) else {
                        return Err(LoadError::Folder(format!(
                            "{folder} has {name}, for which the original layout has no name"
                        )));
                    };
                    tensors.push((name, shape, place));
                }
                Ok(Part { folder, prefix, tensors })
            };
        let levels = self.autoencoder.block_out_channels.len();
        let mut parts = vec![
            part("unet", UNET, self.unet.tensors()?, &|name| names::unet(&self.unet, name))?,
            part("vae", AUTOENCODER, self.autoencoder.tensors()?, &|name| names::autoencoder(levels, name))?,
        ];
        for (text, config) in &self.texts {
            let declared = config.tensors(text.part == "text_encoder_2");
            let mut one = part(text.part, text.prefix, declared, &|name| text.place(name))?;
            for (name, ..) in &mut one.tensors {
                *name = text_encoder::in_files(std::mem::take(name));
            }
            parts.push(one);
        }
        Ok(parts)
    }
}

/// Writes a model as one file in the original layout: the parts of a folder, its U-Net replaced by `unet`, whose names are
/// diffusers'. Everything is written in one data type.
///
/// # Errors
/// A part cannot be read, or has tensors without a name in that layout; numbers beyond the data type's range, before anything is
/// written; the file cannot be written.
pub fn pack(
    folder: &ModelFolder,
    unet: Vec<(String, Tensor)>,
    precision: Precision,
    metadata: &BTreeMap<String, String>,
    file: &Path,
) -> Result<(), LoadError> {
    let family = Family::of_folder(folder)?;
    let known = Configurations::read(folder, family)?;
    let mut unet = Some(unet);
    let mut written = Named::new();
    for part in known.parts()? {
        let mut found: Named = match part.folder {
            "unet" => {
                let unet = unet.take().unwrap_or_default();
                unet.into_iter().map(|(name, tensor)| (name, Stored::Memory(tensor))).collect()
            }
            "vae" => autoencoder::present(folder.weights("vae")?.0),
            text => {
                let present = text_encoder::present(folder.weights(text)?.0);
                present.into_iter().map(|(name, stored)| (text_encoder::in_files(name), stored)).collect()
            }
        };
        let mut thirds: BTreeMap<String, [Tensor; 3]> = BTreeMap::new();
        for (name, shape, place) in part.tensors {
            let stored = found.remove(&name).ok_or_else(|| {
                LoadError::Folder(format!("{name} is missing")).in_file(&folder.path().join(part.folder))
            })?;
            let original = format!("{}{}", part.prefix, place.name);
            match place.form {
                Form::Third(index) => thirds.entry(original).or_default()[index] = stored.tensor(),
                Form::Transposed => {
                    let turned = stored.tensor().transpose(0, 1).contiguous();
                    written.insert(original, Stored::Memory(turned));
                }
                Form::Same => {
                    // The original autoencoder's attention consists of convolutions.
                    let convolution =
                        part.folder == "vae" && original.contains(".attn_1.") && shape.len() == 2;
                    let shape = if convolution { [&shape[..], &[1, 1]].concat() } else { shape };
                    written.insert(original, stored.reshaped(&shape));
                }
            }
        }
        written
            .extend(thirds.into_iter().map(|(name, three)| (name, Stored::Memory(Tensor::cat(&three, 0)))));
    }
    for (text, config) in known.texts.iter().filter(|(text, _)| text.open && text.part == "text_encoder") {
        // SD 2.x does not use its encoder's projection, and diffusers' folders do not keep it; but programs take the width of
        // the states from its shape. The identity stands for it.
        let identity = Tensor::eye(config.hidden_size, (Kind::Float, Device::Cpu));
        written.insert(format!("{}text_projection", text.prefix), Stored::Memory(identity));
    }
    Ok(weights::write(file, &written, Some(precision), metadata)?)
}
