//! Model folders that are made from other files: from a model in one file, or from a model and adapters that are added to it. They
//! are made once for all processes of this machine.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use nix::fcntl::{Flock, FlockArg};
use potstill_models::diffusers::{ModelFolder, merge, original};
use potstill_spec::TeacherSpec;
use potstill_storage::digest::{hexadecimal, sha256_with};
use sha2::{Digest, Sha256};

use super::location::{cache, fetch_model};

/// A text-to-image teacher on this machine.
pub struct TeacherFolder {
    /// Its folder in the layout of diffusers.
    pub path: PathBuf,
    /// SHA-256 of what it consists of, where that was computed.
    pub digest: Option<String>,
}

/// The folder of a text-to-image teacher; fetched and made where it is not there. With `hash`, or where the specification has a
/// digest, its digest is computed; where the specification has one, they must be equal.
///
/// # Errors
/// It cannot be fetched, is not a model, or is another one.
pub fn teacher_folder(teacher: &TeacherSpec, hash: bool) -> anyhow::Result<TeacherFolder> {
    let location = teacher.model.as_deref().context("the run names no teacher.model")?;
    let base = fetch_model(location).with_context(|| format!("teacher.model {location}"))?;
    let additions = teacher.additions();
    let is_made = base.is_file() || !additions.is_empty();
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
    let path = match digest.as_deref().filter(|_| is_made) {
        None => base,
        Some(digest) => {
            let loras: Vec<(PathBuf, f64)> =
                teacher.loras.iter().map(|lora| (lora.path.clone(), lora.scale)).collect();
            once(digest, |folder| make(&base, teacher.config.as_deref(), &loras, folder))
                .with_context(|| format!("teacher.model {location}"))?
        }
    };
    Ok(TeacherFolder { path, digest })
}

fn make(base: &Path, config: Option<&Path>, loras: &[(PathBuf, f64)], folder: &Path) -> anyhow::Result<()> {
    tracing::info!(model = %base.display(), to = %folder.display(), "making the model's folder");
    if base.is_file() {
        let assumed = original::unpack(base, config, folder)?;
        if assumed.prediction {
            tracing::warn!(
                model = %base.display(),
                "a Stable Diffusion 2 model in one file does not say what it predicts: v is assumed; for one that predicts the \
                 noise (…-base, 512 pixels), name a folder of its configurations as teacher.config"
            );
        }
    } else {
        copy(base, folder)?;
    }
    merge(folder, loras)?;
    Ok(())
}

/// Copies a model's folder; links lead to copies.
fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let model = ModelFolder::open(from)?;
    let mut files = model.files()?;
    files.extend(from.join("README.md").is_file().then(|| "README.md".into()));
    for name in files {
        let path = to.join(&name);
        std::fs::create_dir_all(path.parent().unwrap_or(to))?;
        std::fs::copy(from.join(&name), &path).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The folder in the cache for something with this digest, which `make` makes if it is not there. Another version of this program
/// makes its own.
fn once(digest: &str, make: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<PathBuf> {
    let key = Sha256::digest(format!("{digest} {}", env!("CARGO_PKG_VERSION")));
    let folder = cache()?.join(hexadecimal(&key[..16]));
    let parent = folder.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let lock = File::create(folder.with_extension("lock"))?;
    let _held = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
    if folder.is_dir() {
        return Ok(folder);
    }
    let partial = folder.with_extension("partial");
    if partial.exists() {
        std::fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))?;
    }
    std::fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    if let Err(error) = make(&partial) {
        // Nothing that is not complete is kept.
        let _ = std::fs::remove_dir_all(&partial);
        return Err(error);
    }
    // A folder under its final name is complete.
    std::fs::rename(&partial, &folder)
        .with_context(|| format!("cannot rename {} to {}", partial.display(), folder.display()))?;
    Ok(folder)
}
