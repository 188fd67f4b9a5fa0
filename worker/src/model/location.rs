//! The location of a model: a folder or a file on this machine, an object store, or the Hugging Face hub. A remote model is
//! copied to this machine once for all its processes.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use potstill_storage::{Source, digest::hexadecimal};
use sha2::{Digest, Sha256};

use super::cache::once;
use crate::process::work;

/// The files of a repository that belong to a model folder.
fn belongs(name: &str) -> bool {
    const PARTS: [&str; 7] =
        ["scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae"];
    let known = |name: &str| [".json", ".txt", ".safetensors"].iter().any(|end| name.ends_with(end));
    match name.split_once('/') {
        None => name == "model_index.json",
        // Weights without averaging are for further training.
        Some((part, file)) => {
            PARTS.contains(&part) && !file.contains('/') && !file.contains(".non_ema.") && known(file)
        }
    }
}

/// A model's folder, or its one file, on this machine. `location` is a path, a URL of an object store, or `owner/name` or
/// `owner/name@revision` on the hub.
///
/// # Errors
/// It is not there, and it cannot be fetched.
pub fn fetch_model(location: &str) -> anyhow::Result<PathBuf> {
    let path = Path::new(location.strip_prefix("file://").unwrap_or(location));
    if path.exists() {
        return Ok(path.to_owned());
    }
    if location.contains("://") && !location.starts_with("file://") {
        return from_store(location);
    }
    let hub = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains(['/', '\\', ':']);
    ensure!(
        location.split_once('/').is_some_and(|(owner, name)| hub(owner) && hub(name)),
        "there is no such folder or file; expected a folder with a model_index.json, a model in one .safetensors file, a URL of \
         either, or owner/name on the Hugging Face hub"
    );
    from_hub(location)
}

fn from_store(location: &str) -> anyhow::Result<PathBuf> {
    let name = hexadecimal(&Sha256::digest(location)[..16]);
    let is_file = location.ends_with(".safetensors");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    once(&if is_file { format!("{name}.safetensors") } else { name }, |place| {
        runtime.block_on(async {
            let source = Source::open(location)?;
            if is_file {
                tracing::info!(location, "copying the model");
                return Ok(source.read_to("", place).await?);
            }
            let names: Vec<String> = source.list().await?.into_iter().filter(|name| belongs(name)).collect();
            ensure!(
                names.iter().any(|name| name == "model_index.json"),
                "{location} holds no model_index.json"
            );
            for name in names {
                tracing::info!(name, "copying the model");
                let path = place.join(&name);
                std::fs::create_dir_all(path.parent().unwrap_or(place))?;
                source.read_to(&name, &path).await?;
            }
            Ok(())
        })
    })
}

fn from_hub(location: &str) -> anyhow::Result<PathBuf> {
    let advice =
        "cannot fetch it from the Hugging Face hub; where there is no network, name a folder on this machine";
    let api = hf_hub::api::sync::ApiBuilder::from_env().build().context(advice)?;
    let repository = match location.split_once('@') {
        Some((name, revision)) => {
            hf_hub::Repo::with_revision(name.to_owned(), hf_hub::RepoType::Model, revision.to_owned())
        }
        None => hf_hub::Repo::model(location.to_owned()),
    };
    let here = hf_hub::Cache::from_env().repo(repository.clone());
    let repository = api.repo(repository);
    let info = repository.info().context(advice)?;
    let names: Vec<String> =
        info.siblings.into_iter().map(|file| file.rfilename).filter(|name| belongs(name)).collect();
    // Of weights in full and in half precision, one is enough.
    let full = |name: &str| name.replace(".fp16", "");
    let wanted = names.iter().filter(|name| !name.contains(".fp16") || !names.contains(&full(name)));
    let mut folder = None;
    for name in wanted {
        let path = match here.get(name) {
            Some(path) => path,
            None => {
                tracing::info!(name, "fetching the model from the hub");
                let fetched = repository.download_with_progress(name, Pieces);
                fetched.with_context(|| format!("{name}: {advice}"))?
            }
        };
        if name == "model_index.json" {
            folder = path.parent().map(Path::to_owned);
        }
    }
    folder.with_context(|| format!("{location} on the hub holds no model_index.json"))
}

/// Counts the pieces of a download.
struct Pieces;

impl hf_hub::api::Progress for Pieces {
    fn init(&mut self, _bytes: usize, _name: &str) {}

    fn update(&mut self, _bytes: usize) {
        work::complete();
    }

    fn finish(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_text_to_image_model_needs_is_copied() {
        for name in [
            "model_index.json",
            "unet/config.json",
            "vae/diffusion_pytorch_model.safetensors",
            "tokenizer/merges.txt",
        ] {
            assert!(belongs(name), "{name}");
        }
        for name in [
            "README.md",
            "v1-5-pruned.safetensors",
            "safety_checker/model.safetensors",
            "unet/diffusion_pytorch_model.bin",
            "unet/diffusion_pytorch_model.non_ema.safetensors",
        ] {
            assert!(!belongs(name), "{name}");
        }
    }

    #[test]
    fn a_place_that_is_none_says_what_is_expected() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("missing").display().to_string();
        for location in [missing.as_str(), "model", "../up/model", &format!("file://{missing}")] {
            let error = fetch_model(location).unwrap_err().to_string();
            assert!(error.contains("model_index.json"), "{location}: {error}");
        }
    }
}
