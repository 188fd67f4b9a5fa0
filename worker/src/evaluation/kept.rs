//! Features of finished chunks of an evaluation, kept in a folder so that an evaluation that was killed can continue.
//!
//! Each evaluation has a sub-folder of its own, named by a digest of everything that decides its samples and their
//! features, so that another evaluation cannot use them. It holds `evaluation.json`, which describes the evaluation,
//! and one file for each chunk.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use nix::fcntl::{Flock, FlockArg};
use potstill_models::weights::{self, Archive};
use potstill_storage::digest::hexadecimal;
use serde::Serialize;
use sha2::{Digest, Sha256};
use tch::{Device, Tensor};

/// The features of one chunk of N samples, on any device when it is written, on the host when it is read.
pub struct Finished {
    /// [N, D].
    pub features: Tensor,
    /// [N, classes].
    pub logits: Option<Tensor>,
    /// `[N]`.
    pub clip_scores: Option<Tensor>,
}

impl Finished {
    /// Features, logits, CLIP scores.
    pub fn parts(&self) -> [Option<&Tensor>; 3] {
        [Some(&self.features), self.logits.as_ref(), self.clip_scores.as_ref()]
    }

    /// On a device.
    pub fn on(&self, device: Device) -> Self {
        let on = |tensor: &Tensor| tensor.to_device(device);
        Self {
            features: on(&self.features),
            logits: self.logits.as_ref().map(on),
            clip_scores: self.clip_scores.as_ref().map(on),
        }
    }
}

/// See the module's documentation.
pub struct Kept {
    folder: PathBuf,
    /// Locked by the process that opened it.
    _lock: Option<Flock<File>>,
}

impl Kept {
    /// Opens the sub-folder of `folder` for the evaluation that `identity` describes; it is created if it does not
    /// exist. While this value exists no other process can open it.
    ///
    /// # Errors
    /// Another process has it open; the folder cannot be written.
    pub fn open(folder: &Path, identity: &impl Serialize) -> anyhow::Result<Self> {
        let identity = serde_json::to_string_pretty(identity)?;
        let name = hexadecimal(&Sha256::digest(&identity)[..8]);
        let folder = std::path::absolute(folder)?.join(name);
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let lock = File::create(folder.join("lock"))
            .with_context(|| format!("cannot write into {}", folder.display()))?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| {
            anyhow::anyhow!(
                "another process runs the evaluation in {}: wait for it ({error})",
                folder.display()
            )
        })?;
        let kept = Self { folder, _lock: Some(lock) };
        for entry in std::fs::read_dir(&kept.folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "partial") {
                std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        kept.put("evaluation.json", identity.as_bytes())?;
        Ok(kept)
    }

    /// A sub-folder that another process of the same evaluation has opened.
    pub fn join(folder: PathBuf) -> Self {
        Self { folder, _lock: None }
    }

    /// The sub-folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether a chunk is kept.
    pub fn has(&self, index: i64) -> bool {
        self.folder.join(name(index)).is_file()
    }

    /// Reads a chunk of `count` samples.
    ///
    /// # Errors
    /// Its file cannot be read, or is damaged.
    pub fn read(&self, index: i64, count: i64) -> anyhow::Result<Finished> {
        let path = self.folder.join(name(index));
        let advice =
            || format!("{} is damaged: delete it, so that its samples are made again", path.display());
        let mut tensors = Archive::read(&path).with_context(advice)?.tensors;
        let features = tensors.remove("features").with_context(advice)?;
        let finished = Finished {
            features,
            logits: tensors.remove("logits"),
            clip_scores: tensors.remove("clip_scores"),
        };
        ensure!(
            finished.parts().into_iter().flatten().all(|tensor| tensor.size().first() == Some(&count)),
            advice()
        );
        Ok(finished)
    }

    /// Writes a chunk; a file that exists is complete.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn write(&self, index: i64, finished: &Finished) -> anyhow::Result<()> {
        let host = |tensor: &Tensor| tensor.to_device(Device::Cpu).contiguous();
        let parts: Vec<(&str, Tensor)> = ["features", "logits", "clip_scores"]
            .into_iter()
            .zip(finished.parts())
            .filter_map(|(name, tensor)| Some((name, host(tensor?))))
            .collect();
        let named: Vec<(&str, &Tensor)> = parts.iter().map(|(name, tensor)| (*name, tensor)).collect();
        self.put(&name(index), &weights::archive(&named, &BTreeMap::new())?)
    }

    /// Writes under another name first, which no other process uses, and syncs to disk.
    fn put(&self, name: &str, bytes: &[u8]) -> anyhow::Result<()> {
        let path = self.folder.join(name);
        let partial = self.folder.join(format!("{name}.{}.partial", std::process::id()));
        let write = || {
            let mut file = File::create(&partial)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            std::fs::rename(&partial, &path)
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }
}

fn name(index: i64) -> String {
    format!("{index:06}.safetensors")
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    fn finished(value: f64) -> Finished {
        let full = |shape: &[i64]| Tensor::full(shape, value, (Kind::Float, Device::Cpu));
        Finished { features: full(&[3, 4]), logits: None, clip_scores: Some(full(&[3])) }
    }

    #[test]
    fn what_was_written_is_read_again_and_another_evaluation_does_not_see_it() {
        let folder = tempfile::tempdir().unwrap();
        let kept = Kept::open(folder.path(), &"one").unwrap();
        kept.write(7, &finished(0.1)).unwrap();
        std::fs::write(kept.folder().join("000008.safetensors.1.partial"), b"half").unwrap();
        let place = kept.folder().to_owned();
        drop(kept);
        let kept = Kept::open(folder.path(), &"one").unwrap();
        assert_eq!(kept.folder(), place);
        assert!(kept.has(7) && !kept.has(8));
        assert!(!place.join("000008.safetensors.1.partial").exists(), "unfinished files are removed");
        let read = kept.read(7, 3).unwrap();
        assert!(read.features == finished(0.1).features && read.logits.is_none());
        assert_eq!(read.clip_scores.unwrap().size(), [3]);
        let other = Kept::open(folder.path(), &"two").unwrap();
        assert!(!other.has(7));
    }

    #[test]
    fn two_processes_do_not_share_it_and_what_is_damaged_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let kept = Kept::open(folder.path(), &"one").unwrap();
        let error = format!("{:#}", Kept::open(folder.path(), &"one").err().unwrap());
        assert!(error.contains("another process"), "{error}");
        kept.write(0, &finished(1.0)).unwrap();
        assert!(format!("{:#}", kept.read(0, 4).err().unwrap()).contains("delete it"));
        let path = kept.folder().join("000000.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let error = format!("{:#}", kept.read(0, 3).err().unwrap());
        assert!(error.contains("000000.safetensors is damaged"), "{error}");
    }
}
