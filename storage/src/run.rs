//! One run's folder: plain reads and writes, and the create-only write for commits.

use std::{future::Future, path::PathBuf};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{Error as StoreError, ObjectStoreExt, path::Path};

use crate::{Error, Root, RunId, layout, patience::asked};

/// A run's folder. Keys are relative to it.
#[derive(Clone, Debug)]
pub struct Run {
    root: Root,
    id: RunId,
    folder: Path,
}

impl Root {
    /// The folder of a run, which may not exist yet.
    #[must_use]
    pub fn run(&self, id: &RunId) -> Run {
        let folder = self.path_of_run(id);
        Run { root: self.clone(), id: id.clone(), folder }
    }
}

impl Run {
    /// The run's id.
    #[must_use]
    pub fn id(&self) -> &RunId {
        &self.id
    }

    pub(crate) fn root(&self) -> &Root {
        &self.root
    }

    pub(crate) fn path(&self, key: &str) -> Path {
        key.split('/').filter(|part| !part.is_empty()).fold(self.folder.clone(), |path, part| path.join(part))
    }

    /// Path or URL of an object, for messages; of the folder for an empty key.
    #[must_use]
    pub fn describe(&self, key: &str) -> String {
        self.root.describe(&self.path(key))
    }

    /// The path of an object on this machine, where the store is a folder.
    #[must_use]
    pub fn local(&self, key: &str) -> Option<PathBuf> {
        Some(self.root.folder()?.join(self.path(key).as_ref()))
    }

    /// [`asked`] about an object of this run.
    pub(crate) async fn ask<T, F: Future<Output = Result<T, StoreError>>>(
        &self,
        operation: &'static str,
        key: &str,
        bytes: u64,
        question: impl FnMut() -> F,
    ) -> Result<T, Error> {
        asked(operation, bytes, &self.describe(key), question).await
    }

    /// An object's content; `None` when there is none.
    ///
    /// # Errors
    /// The store's error.
    pub async fn get(&self, key: &str) -> Result<Option<Bytes>, Error> {
        let path = self.path(key);
        let read = async || self.root.store().get(&path).await?.bytes().await;
        match self.ask("read", key, 0, read).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(Error::Store { source: StoreError::NotFound { .. }, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes an object, replacing an older one: for pictures and metrics, not for commits.
    ///
    /// # Errors
    /// The store's error.
    pub async fn put(&self, key: &str, bytes: Bytes) -> Result<(), Error> {
        let path = self.path(key);
        let size = bytes.len() as u64;
        self.ask("write", key, size, || self.root.store().put(&path, bytes.clone().into())).await?;
        Ok(())
    }

    /// Writes an object that must not exist. When the store says that it does, or gives no clear answer, the object is
    /// read back: a repeated request can report our own write as a conflict.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`] when it exists with another content; otherwise the store's error.
    pub async fn create(&self, key: &str, bytes: Bytes) -> Result<(), Error> {
        let path = self.path(key);
        let put = || self.root.put_new(&path, bytes.clone());
        let Err(error) = self.ask("write", key, bytes.len() as u64, put).await else { return Ok(()) };
        let conflict = matches!(
            &error,
            Error::Store { source: StoreError::AlreadyExists { .. } | StoreError::Precondition { .. }, .. }
        );
        match self.get(key).await {
            Ok(Some(found)) if found == bytes => Ok(()),
            Ok(Some(_)) => Err(Error::AlreadyExists { place: self.describe(key) }),
            _ if conflict => Err(Error::AlreadyExists { place: self.describe(key) }),
            _ => Err(error),
        }
    }

    /// The SHA-256 of the run's teacher, hexadecimal, where a worker has [kept](Self::keep_teacher) it.
    ///
    /// # Errors
    /// The store's error; [`Error::Damaged`] when it is not UTF-8.
    pub async fn teacher(&self) -> Result<Option<String>, Error> {
        let Some(bytes) = self.get(layout::TEACHER).await? else { return Ok(None) };
        let text = String::from_utf8(bytes.into()).map_err(|error| Error::Damaged {
            place: self.describe(layout::TEACHER),
            problem: error.to_string(),
        })?;
        Ok(Some(text.trim().to_owned()))
    }

    /// Writes the SHA-256 of a teacher of which the coordinator has no copy, unless the run has one. Returns the run's.
    ///
    /// # Errors
    /// As [`teacher`](Self::teacher).
    pub async fn keep_teacher(&self, sha256: &str) -> Result<String, Error> {
        match self.create(layout::TEACHER, format!("{sha256}\n").into()).await {
            Ok(()) => Ok(sha256.to_owned()),
            Err(Error::AlreadyExists { place }) => {
                self.teacher().await?.ok_or(Error::AlreadyExists { place })
            }
            Err(error) => Err(error),
        }
    }

    /// Removes an object; a missing one counts as removed.
    ///
    /// # Errors
    /// The store's error.
    pub(crate) async fn delete(&self, key: &str) -> Result<(), Error> {
        let path = self.path(key);
        match self.ask("remove", key, 0, || self.root.store().delete(&path)).await {
            Err(Error::Store { source: StoreError::NotFound { .. }, .. }) => Ok(()),
            other => other,
        }
    }

    /// Keys and lengths of the objects in a folder, in order.
    ///
    /// # Errors
    /// The store's error.
    pub async fn list(&self, folder: &str) -> Result<Vec<(String, u64)>, Error> {
        self.list_after(folder, None).await
    }

    /// [`list`](Self::list) of the objects that come after a key, which need not exist.
    pub(crate) async fn list_after(
        &self,
        folder: &str,
        after: Option<&str>,
    ) -> Result<Vec<(String, u64)>, Error> {
        let (path, after) = (self.path(folder), after.map(|key| self.path(key)));
        let listing = || match &after {
            None => self.root.store().list(Some(&path)).try_collect::<Vec<_>>(),
            Some(after) => self.root.store().list_with_offset(Some(&path), after).try_collect::<Vec<_>>(),
        };
        let objects = self.ask("list", folder, 0, listing).await?;
        let strip = |path: &Path| {
            let parts = path.prefix_match(&self.folder)?;
            Some(parts.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/"))
        };
        let mut keys: Vec<_> =
            objects.iter().filter_map(|object| Some((strip(&object.location)?, object.size))).collect();
        keys.sort_unstable();
        Ok(keys)
    }

    /// Whether an object exists.
    ///
    /// # Errors
    /// The store's error.
    pub(crate) async fn exists(&self, key: &str) -> Result<bool, Error> {
        let path = self.path(key);
        match self.ask("look for", key, 0, || self.root.store().head(&path)).await {
            Ok(_) => Ok(true),
            Err(Error::Store { source: StoreError::NotFound { .. }, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Writes the run's specification, which is fixed from then on.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`] when the run has another one.
    pub async fn freeze(&self, run_toml: &str) -> Result<(), Error> {
        self.create(layout::SPECIFICATION, Bytes::copy_from_slice(run_toml.as_bytes())).await
    }

    /// The frozen specification; `None` when there is no such run.
    ///
    /// # Errors
    /// The store's error; [`Error::Damaged`] when it is not UTF-8.
    pub async fn specification(&self) -> Result<Option<String>, Error> {
        let Some(bytes) = self.get(layout::SPECIFICATION).await? else { return Ok(None) };
        let text = String::from_utf8(bytes.into()).map_err(|e| Error::Damaged {
            place: self.describe(layout::SPECIFICATION),
            problem: e.to_string(),
        })?;
        Ok(Some(text))
    }
}
