//! Models that are copied or made once for all processes of this machine.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use anyhow::Context;

use super::lock;

/// The file or folder of this name in the cache, which `make` makes under another path if it is not there.
///
/// # Errors
/// That of `make`; the cache cannot be written.
pub fn once(name: &str, make: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<PathBuf> {
    let place = folder()?.join(name);
    let parent = place.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let lock = place.with_extension("lock");
    let lock = File::create(&lock).with_context(|| format!("cannot create {}", lock.display()))?;
    let _held = lock::exclusive(lock, &place)?;
    if place.exists() {
        return Ok(place);
    }
    let partial = place.with_extension("partial");
    // What a process that died has left, and what is not complete after an error.
    remove(&partial)?;
    if let Err(error) = make(&partial) {
        remove(&partial)?;
        return Err(error);
    }
    // What has its final name is complete.
    std::fs::rename(&partial, &place)
        .with_context(|| format!("cannot rename {} to {}", partial.display(), place.display()))?;
    Ok(place)
}

fn folder() -> anyhow::Result<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache")))
        .context("no place for a copy: set XDG_CACHE_HOME or HOME")?;
    Ok(base.join("potstill/models"))
}

fn remove(path: &Path) -> anyhow::Result<()> {
    let removed = match path.is_dir() {
        true => std::fs::remove_dir_all(path),
        false if path.exists() => std::fs::remove_file(path),
        false => Ok(()),
    };
    removed.with_context(|| format!("cannot remove {}", path.display()))
}
