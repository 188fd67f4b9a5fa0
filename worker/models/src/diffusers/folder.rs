//! A model folder as downloaded from a hub: `model_index.json`, and a sub-folder for each part.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use serde_json::Value;
use tch::{Device, Kind};

use super::{
    autoencoder::{self, Autoencoder, AutoencoderConfig},
    denoiser::LatentDenoiser,
    schedule::{self, ScheduleConfig},
    text::{Reader, TextConditioner},
    text_encoder::{self, TextEncoder, TextEncoderConfig},
    tokenizer::Tokenizer,
    unet::{self, UNetConfig},
};
use crate::weights::{self, LoadError, Mapped, Named};

/// Supported pipelines. The last one's U-Net takes the guidance scale, which is [fixed](super::fix_guidance) first.
const PIPELINES: [&str; 3] =
    ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline"];
/// The text-to-image parts of a folder; others, such as a safety checker, are ignored.
const PARTS: [&str; 7] =
    ["scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae"];

/// A folder whose index has been read; the parts are read when they are needed.
#[derive(Clone, Debug)]
pub struct ModelFolder {
    path: PathBuf,
    /// Class of each part.
    parts: BTreeMap<String, String>,
    index: Value,
}

impl ModelFolder {
    /// Reads `model_index.json`.
    ///
    /// # Errors
    /// It is missing or malformed, of an unsupported pipeline, or lacks a part; a part's folder is missing.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let file = path.join("model_index.json");
        let failed = |problem: String| LoadError::Folder(problem).in_file(&file);
        if !file.exists() && path.join("config.json").is_file() {
            let problem = "is one part of a model: name the folder above it, which has a model_index.json";
            return Err(LoadError::Folder(problem.to_owned()).in_file(path));
        }
        let index = weights::json(&file)?;
        let class = index["_class_name"].as_str().unwrap_or_default();
        if !PIPELINES.contains(&class) {
            return Err(failed(format!("`_class_name` is {class:?}; supported: {}", PIPELINES.join(", "))));
        }
        let mut parts = BTreeMap::new();
        for part in PARTS {
            if let Some(class) = index[part][1].as_str() {
                if !path.join(part).is_dir() {
                    return Err(failed(format!(
                        "names {part:?}, but there is no folder of that name beside it"
                    )));
                }
                let supported = classes(part);
                if !supported.contains(&class) {
                    return Err(failed(format!(
                        "{part:?} is a {class}; supported: {}",
                        supported.join(", ")
                    )));
                }
                parts.insert(part.to_owned(), class.to_owned());
            }
        }
        let xl = class == PIPELINES[1];
        for part in PARTS.into_iter().filter(|part| xl || !part.ends_with("_2")) {
            if !parts.contains_key(part) {
                let mut problem = format!("a {class} needs {part:?}, which it does not name");
                if let Some(other) = index["transformer"][1].as_str().filter(|_| part == "unet") {
                    problem += &format!("; it names a \"transformer\", {other}, which is not supported");
                }
                return Err(failed(problem));
            }
        }
        if !xl {
            parts.retain(|part, _| !part.ends_with("_2"));
        }
        Ok(Self { path: path.to_owned(), parts, index })
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The content of the index.
    #[must_use]
    pub fn index(&self) -> &Value {
        &self.index
    }

    /// Whether it holds an SDXL model.
    #[must_use]
    pub fn is_xl(&self) -> bool {
        self.parts.contains_key("text_encoder_2")
    }

    /// The license that its model card names, `README.md`'s front matter, if there is one.
    #[must_use]
    pub fn license(&self) -> Option<String> {
        let card = std::fs::read_to_string(self.path().join("README.md")).ok()?;
        let matter = card.strip_prefix("---")?.split("\n---").next()?;
        let license = matter.lines().find_map(|line| line.strip_prefix("license:"))?;
        Some(license.trim().trim_matches(['"', '\'']).to_owned()).filter(|license| !license.is_empty())
    }

    /// Names of the parts that make it a text-to-image model, each a sub-folder.
    pub fn parts(&self) -> impl Iterator<Item = &str> {
        self.parts.keys().map(String::as_str)
    }

    /// The forward process that it was trained on.
    ///
    /// # Errors
    /// [`LoadError`], with the file.
    pub fn schedule(&self) -> Result<ScheduleConfig, LoadError> {
        self.config("scheduler", "scheduler_config.json", ScheduleConfig::parse)
    }

    /// The U-Net's architecture.
    ///
    /// # Errors
    /// [`LoadError`], with the file.
    pub fn unet_config(&self) -> Result<UNetConfig, LoadError> {
        self.config("unet", "config.json", UNetConfig::parse)
    }

    /// The autoencoder's architecture.
    ///
    /// # Errors
    /// [`LoadError`], with the file.
    pub fn autoencoder_config(&self) -> Result<AutoencoderConfig, LoadError> {
        self.config("vae", "config.json", AutoencoderConfig::parse)
    }

    /// A text encoder's architecture.
    ///
    /// # Errors
    /// [`LoadError`], with the file.
    pub fn text_config(&self, encoder: &str) -> Result<TextEncoderConfig, LoadError> {
        self.config(encoder, "config.json", TextEncoderConfig::parse)
    }

    /// Number of parameters of all text encoders, and tokens of a prompt.
    ///
    /// # Errors
    /// [`LoadError`], with the file.
    pub fn text_size(&self) -> Result<(i64, i64), LoadError> {
        let (mut size, mut tokens) = (0, 0);
        for encoder in self.parts().filter(|part| part.starts_with("text_encoder")) {
            let config = self.text_config(encoder)?;
            size += config.size(self.projects(encoder));
            tokens = config.max_position_embeddings;
        }
        Ok((size, tokens))
    }

    /// The U-Net, fp32.
    ///
    /// # Errors
    /// [`LoadError`]: every tensor that is missing, surplus or misshaped is named.
    pub fn denoiser(&self, device: Device) -> Result<LatentDenoiser, LoadError> {
        self.denoiser_of(Kind::Float, device)
    }

    /// The U-Net with weights of this data type.
    ///
    /// # Errors
    /// As [`denoiser`](Self::denoiser).
    pub fn denoiser_of(&self, kind: Kind, device: Device) -> Result<LatentDenoiser, LoadError> {
        let (config, schedule) = (self.unet_config()?, self.schedule()?);
        let (tensors, place) = self.weights("unet")?;
        LatentDenoiser::from_tensors(config, schedule, &tensors, (kind, device))
            .map_err(|e| e.in_file(&place))
    }

    /// The U-Net without weights in memory, as of [`LatentDenoiser::mapped`], and its weights.
    ///
    /// # Errors
    /// As [`denoiser`](Self::denoiser).
    pub fn mapped_denoiser(&self, device: Device) -> Result<(LatentDenoiser, Mapped), LoadError> {
        let (config, schedule) = (self.unet_config()?, self.schedule()?);
        let (tensors, place) = self.weights("unet")?;
        LatentDenoiser::mapped(config, schedule, tensors, device).map_err(|e| e.in_file(&place))
    }

    /// The autoencoder.
    ///
    /// # Errors
    /// As [`denoiser`](Self::denoiser).
    pub fn autoencoder(&self, device: Device) -> Result<Autoencoder, LoadError> {
        let config = self.autoencoder_config()?;
        let (tensors, place) = self.weights("vae")?;
        Autoencoder::from_tensors(config, tensors, device).map_err(|e| e.in_file(&place))
    }

    /// The text encoders with their tokenizers.
    ///
    /// # Errors
    /// As [`denoiser`](Self::denoiser); and a tokenizer that does not belong to the encoder.
    pub fn text(&self, device: Device) -> Result<TextConditioner, LoadError> {
        let mut readers = vec![self.reader("text_encoder", "tokenizer", device)?];
        if self.is_xl() {
            readers.push(self.reader("text_encoder_2", "tokenizer_2", device)?);
        }
        let zeros = self.index["force_zeros_for_empty_prompt"].as_bool().unwrap_or(true);
        Ok(TextConditioner::new(readers, zeros))
    }

    /// Whether a text encoder's pooled output is projected.
    fn projects(&self, encoder: &str) -> bool {
        self.parts[encoder] == text_encoder::CLASSES[1]
    }

    fn reader(&self, encoder: &str, tokenizer: &str, device: Device) -> Result<Reader, LoadError> {
        let projects = self.projects(encoder);
        let config = self.text_config(encoder)?;
        let folder = self.path.join(tokenizer);
        let positions = config.max_position_embeddings as usize;
        // As the pipelines do it.
        let tokens = Tokenizer::asked_length(&folder).map_or(positions, |asked| asked.min(positions));
        let tokenizer = Tokenizer::load(&folder, tokens.max(2))?;
        if tokenizer.vocabulary() > config.vocab_size {
            return Err(LoadError::Folder(format!(
                "has tokens up to {}, but {encoder} has {} rows for them: it is another encoder's tokenizer, or tokens were added to \
                 it and the encoder was not resized",
                tokenizer.vocabulary() - 1,
                config.vocab_size
            ))
            .in_file(&folder));
        }
        let (tensors, place) = self.weights(encoder)?;
        let encoder =
            TextEncoder::from_tensors(config, projects, tensors, device).map_err(|e| e.in_file(&place))?;
        Ok(Reader { tokenizer, encoder })
    }

    /// Checks that the parts fit together.
    ///
    /// # Errors
    /// Which parts do not fit together.
    pub fn check(&self, text: &TextConditioner) -> Result<(), LoadError> {
        let (unet, vae) = (self.unet_config()?, self.autoencoder_config()?);
        let mut problems = Vec::new();
        if vae.latent_channels != unet.in_channels {
            problems.push(format!(
                "the autoencoder's latents have {} channels, the U-Net takes {}",
                vae.latent_channels, unet.in_channels
            ));
        }
        if unet.in_channels != unet.out_channels {
            problems.push(format!(
                "the U-Net makes {} channels of {}: inpainting and image-to-image models are not supported",
                unet.out_channels, unet.in_channels
            ));
        }
        if unet.class_embedding().is_some() {
            problems.push(
                "the U-Net takes classes beside the text (`num_class_embeds` or `class_embed_type`), which a text-to-image \
                 pipeline does not give it"
                    .to_owned(),
            );
        }
        let widths: BTreeSet<i64> =
            (0..unet.block_out_channels.len()).map(|block| unet.cross_attention_dim.at(block)).collect();
        if widths != BTreeSet::from([text.width()]) {
            problems.push(format!(
                "the text's states are {} wide, the U-Net attends to {widths:?}",
                text.width()
            ));
        }
        match (text.pooled_width(), unet.takes_text_time()) {
            (Some(width), true) if width == unet.pooled_width() => {}
            (None, false) => {}
            (width, takes) => problems.push(format!(
                "the pooled text is {width:?} wide, the U-Net takes {}",
                if takes { format!("{}", unet.pooled_width()) } else { "none".to_owned() }
            )),
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(LoadError::Folder(problems.join("; ")).in_file(&self.path))
        }
    }

    /// The files of the model, as sorted paths relative to the folder: those of its parts, and the index. Weights in
    /// other formats than those that would be loaded are left out.
    ///
    /// # Errors
    /// [`LoadError::Unreadable`].
    pub fn files(&self) -> Result<Vec<PathBuf>, LoadError> {
        let mut files = BTreeSet::from([PathBuf::from("model_index.json")]);
        for part in self.parts() {
            let folder = self.path.join(part);
            let unreadable = |source| LoadError::Unreadable { path: folder.clone(), source };
            for entry in std::fs::read_dir(&folder).map_err(unreadable)? {
                let name = PathBuf::from(entry.map_err(unreadable)?.file_name());
                let is_config = name.extension().is_some_and(|e| e == "json" || e == "txt" || e == "model");
                if is_config && !name.to_string_lossy().contains(".index.") {
                    files.insert(Path::new(part).join(name));
                }
            }
            let Some(stem) = stem_of(part) else { continue };
            let found = find(&folder, stem)?;
            files.extend(found.files.into_iter().chain(found.index).map(|name| Path::new(part).join(name)));
        }
        Ok(files.into_iter().collect())
    }

    /// The files that hold a part's weights.
    pub(crate) fn weight_files(&self, part: &str) -> Result<Vec<PathBuf>, LoadError> {
        let folder = self.path.join(part);
        let found = find(&folder, stem_of(part).unwrap_or_default())?;
        Ok(found.files.into_iter().chain(found.index).map(|name| folder.join(name)).collect())
    }

    /// The name of a part's weights in one file.
    pub(crate) fn weight_name(part: &str) -> String {
        format!("{}.safetensors", stem_of(part).unwrap_or_default())
    }

    fn config<T>(
        &self,
        part: &str,
        name: &str,
        parse: impl FnOnce(&str) -> Result<T, super::ConfigError>,
    ) -> Result<T, LoadError> {
        let path = self.path.join(part).join(name);
        parse(&weights::text(&path)?).map_err(|e| LoadError::from(e).in_file(&path))
    }

    /// A part's tensors, and their file, for errors.
    pub(crate) fn weights(&self, part: &str) -> Result<(Named, PathBuf), LoadError> {
        let folder = self.path.join(part);
        let found = find(&folder, stem_of(part).unwrap_or_default())?;
        let mut tensors = Named::new();
        for name in &found.files {
            let path = folder.join(name);
            for (name, tensor) in weights::map(&path)? {
                if tensors.insert(name.clone(), tensor).is_some() {
                    return Err(LoadError::Folder(format!("{name} is in another file too")).in_file(&path));
                }
            }
        }
        let place = match &found.files[..] {
            [one] => folder.join(one),
            _ => folder,
        };
        Ok((tensors, place))
    }
}

/// The supported classes of a part.
fn classes(part: &str) -> &'static [&'static str] {
    match part {
        "scheduler" => &schedule::KNOWN,
        "text_encoder" | "text_encoder_2" => &text_encoder::CLASSES,
        "tokenizer" | "tokenizer_2" => &["CLIPTokenizer", "CLIPTokenizerFast"],
        "unet" => &[unet::config::CLASS],
        _ => &[autoencoder::CLASS],
    }
}

/// The name of a part's weights, without what follows a dot; `None` for parts without weights.
fn stem_of(part: &str) -> Option<&'static str> {
    match part {
        "unet" | "vae" => Some("diffusion_pytorch_model"),
        "text_encoder" | "text_encoder_2" => Some("model"),
        _ => None,
    }
}

/// The files that hold a part's weights.
struct Found {
    files: Vec<String>,
    index: Option<String>,
}

/// Finds weights in one file or in several with an index; in full precision first, then as the fp16 or bf16 variant.
fn find(folder: &Path, stem: &str) -> Result<Found, LoadError> {
    let exists = |name: &str| folder.join(name).is_file();
    for variant in ["", ".fp16", ".bf16"] {
        let single = format!("{stem}{variant}.safetensors");
        if exists(&single) {
            return Ok(Found { files: vec![single], index: None });
        }
        let indices = [
            format!("{stem}.safetensors.index{variant}.json"),
            format!("{stem}{variant}.safetensors.index.json"),
        ];
        if let Some(index) = indices.into_iter().find(|name| exists(name)) {
            let path = folder.join(&index);
            let failed = |problem: String| LoadError::Folder(problem).in_file(&path);
            let parsed = weights::json(&path)?;
            let map =
                parsed["weight_map"].as_object().ok_or_else(|| failed("has no `weight_map`".to_owned()))?;
            let files: BTreeSet<String> =
                map.values().filter_map(|file| file.as_str().map(str::to_owned)).collect();
            if let Some(missing) = files.iter().find(|file| !exists(file)) {
                return Err(failed(format!("names {missing}, which is not there")));
            }
            return Ok(Found { files: files.into_iter().collect(), index: Some(index) });
        }
    }
    let pickled = std::fs::read_dir(folder)
        .map_err(|source| LoadError::Unreadable { path: folder.to_owned(), source })?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .find(|name| [".bin", ".ckpt", ".pt"].iter().any(|end| name.ends_with(end)));
    let problem = match pickled {
        Some(name) => format!(
            "holds {name}, a pickle, which can run any code when it is read, and no {stem}.safetensors: download the safetensors \
             files, or convert a model that you trust with Python's `save_pretrained(…, safe_serialization=True)`"
        ),
        None => format!("holds no weights: {stem}.safetensors is missing"),
    };
    Err(LoadError::Folder(problem).in_file(folder))
}
