//! Checkpoints: the shards that the ranks write, and the manifest that commits them.
//!
//! A checkpoint exists when its manifest does.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt, stream};
use object_store::{Error as StoreError, ObjectMeta, ObjectStoreExt, WriteMultipart};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{Error, Run, digest::hexadecimal, layout};

/// Shards above this size are written in parts of it, in bytes: S3 requires parts of at least 5 MiB.
const PART: usize = 8 << 20;
/// Parts that are uploaded, or read, at a time: bounds the memory of it.
const PARTS_AT_ONCE: usize = 4;
/// The format that this code writes. Format 2 holds each network's own count of optimizer steps; in format 1, of
/// Potstill's first versions, both networks were assumed to have stepped in every iteration.
const VERSION: u32 = 2;
/// The oldest format whose averaged generator can be read. A run can be resumed from [`VERSION`] only.
const OLDEST: u32 = 1;

/// The content of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    version: u32,
    /// Completed iterations.
    pub iteration: u64,
    /// Whether the fake-score phase of the next iteration is done too: in an emergency a state is saved as it is.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fake_score_done: bool,
    /// The generation that wrote it.
    pub generation: u64,
    /// One shard of each rank; together they hold each tensor once.
    pub shards: Vec<Shard>,
}

/// The fields of a manifest that every format has.
#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

impl Manifest {
    /// The manifest of a checkpoint whose shards are all durable.
    #[must_use]
    pub fn new(iteration: u64, generation: u64, shards: Vec<Shard>) -> Self {
        Self { version: VERSION, iteration, fake_score_done: false, generation, shards }
    }
}

/// One shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shard {
    /// The rank that wrote it.
    pub rank: u32,
    /// Its key below the run's folder.
    pub key: String,
    /// Its length in bytes.
    pub bytes: u64,
    /// SHA-256 of its bytes, hexadecimal.
    pub sha256: String,
}

/// A shard that was written.
#[derive(Clone, Debug)]
pub struct Written {
    /// Its entry for the manifest.
    pub shard: Shard,
    /// The store's own name for this content, where it states one.
    pub e_tag: Option<String>,
}

impl Run {
    /// Writes a shard and returns its entry for the manifest. A large one is uploaded in parts; when that fails, the
    /// parts are removed.
    ///
    /// # Errors
    /// The store's error.
    pub async fn write_shard(&self, key: &str, rank: u32, bytes: Bytes) -> Result<Written, Error> {
        let sha256 = sha256(&bytes).await;
        let shard = Shard { rank, key: key.to_owned(), bytes: bytes.len() as u64, sha256 };
        let path = self.path(key);
        if bytes.len() <= PART {
            let put = || self.root().store().put(&path, bytes.clone().into());
            let e_tag = self.ask("write", key, shard.bytes, put).await?.e_tag;
            return Ok(Written { shard, e_tag });
        }
        // Retried as a whole, because the parts of a failed attempt are removed.
        let upload = async || {
            let mut parts =
                WriteMultipart::new_with_chunk_size(self.root().store().put_multipart(&path).await?, PART);
            let mut rest = bytes.clone();
            while !rest.is_empty() {
                if let Err(error) = parts.wait_for_capacity(PARTS_AT_ONCE).await {
                    parts.abort().await?;
                    return Err(error);
                }
                parts.put(rest.split_to(rest.len().min(PART)));
            }
            // It removes the parts when it fails. A missing upload may be a complete one: when an answer is lost, the
            // client repeats its request, and the store no longer knows the upload. So the upload starts again.
            parts.finish().await.map_err(|error| match error {
                StoreError::NotFound { .. } => {
                    StoreError::Generic { store: "multipart", source: error.into() }
                }
                error => error,
            })
        };
        let e_tag = self.ask("write", key, shard.bytes, upload).await?.e_tag;
        Ok(Written { shard, e_tag })
    }

    /// Checks that a shard is in the storage, as this process sees it, with the content that was written: its length, and
    /// either the store's own name for the content (`e_tag`, from the answer to the write) or its SHA-256. In a local folder
    /// that name says nothing about the content, so the file is read there.
    ///
    /// # Errors
    /// [`Error::Damaged`] when it is missing here, or is not what was written; otherwise the store's error.
    pub async fn confirm_shard(&self, shard: &Shard, e_tag: Option<&str>) -> Result<(), Error> {
        let found = self.found(shard).await?;
        if self.root().folder().is_none() && e_tag.is_some() && found.e_tag.as_deref() == e_tag {
            return Ok(());
        }
        self.read_shard_in_pieces(shard, |_| {}).await
    }

    /// Reads a shard and gives its pieces to `take`, in order; no more than a few are in memory. Its length is checked before, and
    /// its checksum after the last piece: what was made of the pieces counts only then.
    ///
    /// # Errors
    /// [`Error::Damaged`] when its content is not what was written, or it is missing; otherwise the store's error.
    pub async fn read_shard_in_pieces(
        &self,
        shard: &Shard,
        mut take: impl FnMut(&[u8]),
    ) -> Result<(), Error> {
        let damaged = |problem: String| Error::Damaged { place: self.describe(&shard.key), problem };
        let path = self.path(&shard.key);
        let length = self.found(shard).await?.size;
        let piece = |start: u64| {
            let range = start..length.min(start + PART as u64);
            let path = &path;
            async move {
                let size = range.end - range.start;
                let read = || self.root().store().get_range(path, range.clone());
                self.ask("read", &shard.key, size, read).await
            }
        };
        let starts = (0..length).step_by(PART);
        let mut pieces = std::pin::pin!(stream::iter(starts).map(piece).buffered(PARTS_AT_ONCE));
        let mut hasher = Sha256::new();
        while let Some(piece) = pieces.try_next().await? {
            hasher.update(&piece);
            take(&piece);
        }
        match hexadecimal(&hasher.finalize()) {
            found if found == shard.sha256 => Ok(()),
            found => Err(damaged(format!("its SHA-256 is {found}; {} was written", shard.sha256))),
        }
    }

    /// What the store says of a shard that has the length that was written.
    async fn found(&self, shard: &Shard) -> Result<ObjectMeta, Error> {
        let damaged = |problem: String| Error::Damaged { place: self.describe(&shard.key), problem };
        let path = self.path(&shard.key);
        match self.ask("look for", &shard.key, 0, || self.root().store().head(&path)).await {
            Ok(found) if found.size == shard.bytes => Ok(found),
            Ok(found) => Err(damaged(format!("it has {} bytes; {} were written", found.size, shard.bytes))),
            Err(Error::Store { source: StoreError::NotFound { .. }, .. }) => {
                Err(damaged("it is missing".to_owned()))
            }
            Err(error) => Err(error),
        }
    }

    /// Reads a shard whole and checks its length and its checksum.
    ///
    /// # Errors
    /// [`Error::Damaged`] when its content is not what was written, or it is missing; otherwise the store's error.
    pub async fn read_shard(&self, shard: &Shard) -> Result<Bytes, Error> {
        let mut bytes = BytesMut::with_capacity(usize::try_from(shard.bytes).unwrap_or_default());
        self.read_shard_in_pieces(shard, |piece| bytes.extend_from_slice(piece)).await?;
        Ok(bytes.freeze())
    }

    /// Writes a manifest, create-only, and returns its key: from then on the checkpoint exists.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`] when there is another one for this iteration; otherwise the store's error.
    pub async fn commit(&self, manifest: &Manifest) -> Result<String, Error> {
        let key = layout::manifest_key(manifest.iteration);
        let text = serde_json::to_vec_pretty(manifest).map_err(|e| self.unreadable(&key, &e))?;
        self.create(&key, text.into()).await?;
        Ok(key)
    }

    /// Iterations of the committed checkpoints, in order.
    ///
    /// # Errors
    /// The store's error.
    pub async fn checkpoints(&self) -> Result<Vec<u64>, Error> {
        let keys = self.list(layout::CHECKPOINTS).await?;
        Ok(keys.iter().filter_map(|(key, _)| layout::manifest_iteration(key)).collect())
    }

    /// The checkpoints that are complete, oldest first, and the errors of the others. Complete: the manifest can be
    /// read, and every shard exists in its length; the shards are not read.
    ///
    /// # Errors
    /// The store's error.
    pub async fn survey(&self) -> Result<(Vec<Manifest>, Vec<Error>), Error> {
        let sizes: BTreeMap<String, u64> = self.list(layout::CHECKPOINTS).await?.into_iter().collect();
        let (mut whole, mut damaged) = (Vec::new(), Vec::new());
        for iteration in sizes.keys().filter_map(|key| layout::manifest_iteration(key)) {
            match self.resumable_manifest(&layout::manifest_key(iteration)).await {
                Ok(manifest) => match self.missing(&manifest, &sizes) {
                    Some(problem) => damaged.push(problem),
                    None => whole.push(manifest),
                },
                Err(error @ Error::Damaged { .. }) => damaged.push(error),
                Err(error) => return Err(error),
            }
        }
        Ok((whole, damaged))
    }

    fn missing(&self, manifest: &Manifest, sizes: &BTreeMap<String, u64>) -> Option<Error> {
        manifest.shards.iter().find_map(|shard| {
            let problem = match sizes.get(&shard.key) {
                Some(size) if *size == shard.bytes => return None,
                Some(size) => format!("it has {size} bytes; {} were written", shard.bytes),
                None => "it is missing".to_owned(),
            };
            Some(Error::Damaged { place: self.describe(&shard.key), problem })
        })
    }

    /// What is wrong with a checkpoint, if something is: reads every byte of it, piece by piece.
    ///
    /// # Errors
    /// The store's error.
    pub async fn damage(&self, manifest_key: &str) -> Result<Option<Error>, Error> {
        let read = async {
            for shard in &self.manifest(manifest_key).await?.shards {
                self.confirm_shard(shard, None).await?;
            }
            Ok(())
        };
        match read.await {
            Ok(()) => Ok(None),
            Err(error @ Error::Damaged { .. }) => Ok(Some(error)),
            Err(error) => Err(error),
        }
    }

    /// Moves the manifest of a damaged checkpoint aside, so that its iteration can be committed again.
    ///
    /// # Errors
    /// The store's error.
    pub async fn set_aside(&self, iteration: u64) -> Result<(), Error> {
        let key = layout::manifest_key(iteration);
        if let Some(bytes) = self.get(&key).await? {
            self.put(&layout::damaged_manifest_key(iteration), bytes).await?;
        }
        self.delete(&key).await
    }

    /// Copies a checkpoint into another run, verified byte by byte; its manifest last.
    ///
    /// # Errors
    /// [`Error::Damaged`] names the object whose content is not what was written; otherwise a store's error.
    pub async fn copy_checkpoint(&self, iteration: u64, to: &Self) -> Result<Manifest, Error> {
        let manifest = self.manifest(&layout::manifest_key(iteration)).await?;
        for shard in &manifest.shards {
            let bytes = self.read_shard(shard).await?;
            to.write_shard(&shard.key, shard.rank, bytes).await?;
        }
        to.commit(&manifest).await?;
        Ok(manifest)
    }

    /// The manifest under a key, of a checkpoint from which a run can be resumed.
    ///
    /// # Errors
    /// As [`manifest`](Self::manifest), and [`Error::Format`] when an earlier version wrote it.
    pub async fn resumable_manifest(&self, key: &str) -> Result<Manifest, Error> {
        let manifest = self.manifest(key).await?;
        match manifest.version {
            VERSION => Ok(manifest),
            found => Err(self.other_format(key, found)),
        }
    }

    fn other_format(&self, key: &str, found: u32) -> Error {
        let place = self.describe(key);
        match found < VERSION {
            true => Error::Format {
                place,
                found,
                advice: format!(
                    "an earlier version of Potstill wrote it, and a run cannot be resumed from it, since it lacks what format {VERSION} \
                     holds of the optimizers; finish the run with that version, or export its generator (potstill export \
                     reads it) and start a new run with generator.start_from"
                ),
            },
            false => Error::Format {
                place,
                found,
                advice: format!(
                    "a newer version of Potstill wrote it; this one reads formats up to {VERSION}: use that version"
                ),
            },
        }
    }

    /// The manifest under a key, in any format whose averaged generator can be read.
    ///
    /// # Errors
    /// [`Error::Damaged`] when there is none, or it cannot be read; [`Error::Format`] when its format is unknown;
    /// otherwise the store's error.
    pub async fn manifest(&self, key: &str) -> Result<Manifest, Error> {
        let damaged =
            |problem: &str| Error::Damaged { place: self.describe(key), problem: problem.to_owned() };
        let bytes = self.get(key).await?.ok_or_else(|| damaged("it is missing"))?;
        let unreadable = |e| self.unreadable(key, &e);
        let VersionOnly { version } = serde_json::from_slice(&bytes).map_err(unreadable)?;
        if !(OLDEST..=VERSION).contains(&version) {
            return Err(self.other_format(key, version));
        }
        serde_json::from_slice(&bytes).map_err(unreadable)
    }

    fn unreadable(&self, key: &str, error: &serde_json::Error) -> Error {
        Error::Damaged { place: self.describe(key), problem: error.to_string() }
    }
}

/// Hashed in pieces, so that other tasks of this thread, such as heartbeats, run in between.
async fn sha256(bytes: &[u8]) -> String {
    let mut hasher = Sha256::new();
    for piece in bytes.chunks(PART) {
        hasher.update(piece);
        tokio::task::yield_now().await;
    }
    hexadecimal(&hasher.finalize())
}
