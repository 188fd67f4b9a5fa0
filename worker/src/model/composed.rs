//! Model folders that are made from other files: from a model in one file, from a model and adapters that are added to it, or from one
//! that takes a guidance scale.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use potstill_models::diffusers::{
    ModelFolder,
    guided::{SCALE, fix_guidance, takes_guidance},
    merge, original,
};
use potstill_spec::TeacherSpec;
use potstill_storage::digest::{hexadecimal, sha256_with};
use sha2::{Digest, Sha256};

use super::{cache::once, location::fetch_model};

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
    let path = match digest.as_deref().filter(|_| is_made) {
        None => base,
        Some(digest) => {
            // Another version of this program makes its own.
            let key = Sha256::digest(format!("{digest} {}", env!("CARGO_PKG_VERSION")));
            once(&hexadecimal(&key[..16]), |folder| make(&base, teacher, folder))
                .with_context(|| format!("teacher.model {location}"))?
        }
    };
    Ok(TeacherFolder { path, digest })
}

fn make(base: &Path, teacher: &TeacherSpec, folder: &Path) -> anyhow::Result<()> {
    tracing::info!(model = %base.display(), to = %folder.display(), "making the model's folder");
    std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    match base.is_file() {
        true => original::unpack(base, teacher.config.as_deref(), folder)?,
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
    }
    Ok(())
}
