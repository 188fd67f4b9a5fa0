//! Model folders that are made from other files: from a model in one file, from a model and adapters that are added to it, or from one
//! that takes a guidance scale.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use potstill_models::{
    LoadError,
    diffusers::{
        ModelFolder,
        guided::{SCALE, fix_guidance, takes_guidance},
        merge,
        original::unpack,
    },
};
use potstill_spec::TeacherSpec;
use potstill_storage::digest::{hexadecimal, sha256_with};
use sha2::{Digest, Sha256};

use super::{cache::once, location::fetch_model};
use crate::process::work;

/// A text-to-image teacher on this machine.
pub struct TeacherFolder {
    /// Its folder in the layout of diffusers.
    pub path: PathBuf,
    /// SHA-256 of what it consists of, where that was computed.
    pub digest: Option<String>,
    /// What it was made of, if it was made: a folder, or a file.
    original: Option<PathBuf>,
}

impl TeacherFolder {
    /// An error of loading the folder, with the paths of the files that it was made of.
    pub fn named(&self, error: anyhow::Error) -> anyhow::Error {
        match &self.original {
            Some(original) => named(error, &self.path, original),
            None => error,
        }
    }
}

fn named(error: anyhow::Error, copy: &Path, original: &Path) -> anyhow::Error {
    match error.downcast::<LoadError>() {
        Ok(error) => error.of_original(copy, original).into(),
        Err(other) => other,
    }
}

/// Where the configurations of a made folder are from: of a model in one file they may be another folder's.
fn original<'a>(base: &'a Path, teacher: &'a TeacherSpec) -> &'a Path {
    teacher.config.as_deref().filter(|_| base.is_file()).unwrap_or(base)
}

/// The folder of a text-to-image teacher; fetched and made where it is not there. With `hash`, or where the specification has a
/// digest, its digest is computed; where the specification has one, they must be equal.
///
/// # Errors
/// It cannot be fetched, is not a model, or is another one.
pub fn teacher_folder(teacher: &TeacherSpec, hash: bool) -> anyhow::Result<TeacherFolder> {
    let location = teacher.model.as_deref().context("the run names no teacher.model")?;
    let base = fetch_model(location).with_context(|| format!("teacher.model {location}"))?;
    ensure!(
        base.is_file() || teacher.config.is_none(),
        "teacher.config is for a model in one file, and {} is a folder, which has its configurations: leave it out",
        base.display()
    );
    let additions = teacher.additions();
    let is_made = base.is_file() || takes_guidance(&base) || !additions.is_empty();
    let digest = match hash || is_made || teacher.sha256.is_some() {
        true => {
            let digest = sha256_with(&base, &additions);
            Some(digest.with_context(|| format!("cannot read {} or what is added to it", base.display()))?)
        }
        false => None,
    };
    if let (Some(expected), Some(found)) = (&teacher.sha256, &digest) {
        ensure!(
            found == expected,
            "the teacher {} has SHA-256 {found} on this machine, but the run was started with {expected}",
            base.display()
        );
    }
    let original = is_made.then(|| original(&base, teacher).to_owned());
    let path = match digest.as_deref().filter(|_| is_made) {
        None => base,
        Some(digest) => {
            // Another version of this program makes its own.
            let key = Sha256::digest(format!("{digest} {}", env!("CARGO_PKG_VERSION")));
            once(&hexadecimal(&key[..16]), |folder| make(&base, teacher, folder))
                .with_context(|| format!("teacher.model {location}"))?
        }
    };
    Ok(TeacherFolder { path, digest, original })
}

fn make(base: &Path, teacher: &TeacherSpec, folder: &Path) -> anyhow::Result<()> {
    compose(base, teacher, folder).map_err(|error| named(error, folder, original(base, teacher)))
}

fn compose(base: &Path, teacher: &TeacherSpec, folder: &Path) -> anyhow::Result<()> {
    tracing::info!(model = %base.display(), to = %folder.display(), "making the model's folder");
    std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    match base.is_file() {
        true => unpack(base, teacher.config.as_deref(), folder)?,
        false => copy(base, folder)?,
    }
    if takes_guidance(folder) {
        tracing::warn!(
            "the teacher takes a guidance scale as an input: it is used at {SCALE}, its pipeline's own"
        );
        fix_guidance(folder)?;
    }
    let loras: Vec<(PathBuf, f64)> =
        teacher.loras.iter().map(|lora| (lora.path.clone(), lora.scale)).collect();
    Ok(merge(folder, &loras)?)
}

/// Copies a model's folder; links lead to copies.
fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let mut files = ModelFolder::open(from)?.files()?;
    files.extend(from.join("README.md").is_file().then(|| "README.md".into()));
    for name in files {
        let path = to.join(&name);
        let copied = std::fs::create_dir_all(path.parent().unwrap_or(to))
            .and_then(|()| std::fs::copy(from.join(&name), &path).map(|_| ()));
        copied.with_context(|| format!("cannot write {}", path.display()))?;
        work::complete();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use potstill_spec::TeacherLora;
    use potstill_tests::tiny_model;

    use super::*;

    #[test]
    fn errors_of_a_folder_that_is_made_name_the_files_it_is_made_of() {
        let (model, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        tiny_model::write("sd15", model.path());
        let teacher = TeacherSpec::default();
        let refused = |place: &str, said: &str, error: anyhow::Error| {
            let error = format!("{error:#}");
            let place = model.path().join(place).display().to_string();
            assert!(error.contains(&place) && error.contains(said), "{error}");
            assert!(!error.contains(&cache.path().display().to_string()), "{error}");
        };
        // Its configuration has a guidance scale, its weights have none.
        let unet = model.path().join("unet/config.json");
        let mut config: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(&unet).unwrap()).unwrap();
        config["time_cond_proj_dim"] = 8.into();
        std::fs::write(&unet, config.to_string()).unwrap();
        assert!(takes_guidance(model.path()));
        let error = make(model.path(), &teacher, &cache.path().join("guided.partial")).unwrap_err();
        let weights = "unet/diffusion_pytorch_model.safetensors";
        refused(weights, "time_embedding.cond_proj.weight is missing", error);
        // Adapters are added to a U-Net that is none.
        config["time_cond_proj_dim"] = serde_json::Value::Null;
        config["act_fn"] = "mish".into();
        std::fs::write(&unet, config.to_string()).unwrap();
        let lora = TeacherLora { path: model.path().join("lora.safetensors"), scale: 1.0 };
        let adapted = TeacherSpec { loras: vec![lora], ..TeacherSpec::default() };
        let error = make(model.path(), &adapted, &cache.path().join("adapted.partial")).unwrap_err();
        refused("unet/config.json", "act_fn", error);
        // What is wrong with the other parts is found when the folder is loaded.
        let path = cache.path().join("loaded");
        let made =
            TeacherFolder { path: path.clone(), digest: None, original: Some(model.path().to_owned()) };
        copy(model.path(), &path).unwrap();
        std::fs::write(path.join("tokenizer/merges.txt"), "").unwrap();
        let error = ModelFolder::open(&path).unwrap().text(tch::Device::Cpu).err().unwrap();
        refused("tokenizer", "merges.txt is empty", made.named(error.into()));
    }
}
