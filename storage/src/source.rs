//! Objects that are only read, such as training data, on this machine or in an object store.

use std::{path::PathBuf, sync::Arc};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::{ObjectStore, ObjectStoreExt, local::LocalFileSystem, path::Path};

use tokio::io::AsyncWriteExt;

use crate::{
    Error, pieces,
    root::{Root, environment, shown},
};

/// One object, or a folder of objects, on a local path or in an object store. It is never written to.
#[derive(Clone, Debug)]
pub struct Source {
    store: Arc<dyn ObjectStore>,
    path: Path,
    location: String,
}

impl Source {
    /// Opens a path, or a URL of `file://`, `s3://`, `gs://` or `az://`, with credentials as for [`Root::open`].
    ///
    /// # Errors
    /// The location is not one of these, or a local path does not exist.
    pub fn open(location: &str) -> Result<Self, Error> {
        let bad = |problem: String| Error::BadUrl { url: shown(location), problem };
        let local = match location.strip_prefix("file://") {
            Some(path) => Some(PathBuf::from(path)),
            None if !location.contains("://") => Some(PathBuf::from(location)),
            None => None,
        };
        let Some(local) = local else {
            let (store, path) = Root::open_store(location, environment())?;
            return Ok(Self { store, path, location: location.to_owned() });
        };
        let absolute = local.canonicalize().map_err(|e| bad(e.to_string()))?;
        let path = Path::from_absolute_path(&absolute).map_err(|e| bad(e.to_string()))?;
        Ok(Self { store: Arc::new(LocalFileSystem::new()), path, location: location.to_owned() })
    }

    /// The location, as it was given.
    #[must_use]
    pub fn location(&self) -> &str {
        &self.location
    }

    /// The last component: the name of the file or folder.
    #[must_use]
    pub fn name(&self) -> &str {
        self.path.filename().unwrap_or_default()
    }

    /// The objects below it, as paths relative to it, sorted; if it is an object itself, the empty path.
    ///
    /// # Errors
    /// The store's error.
    pub async fn list(&self) -> Result<Vec<String>, Error> {
        let failed = |source| self.failed("list", source);
        match self.store.head(&self.path).await {
            Ok(_) => return Ok(vec![String::new()]),
            Err(object_store::Error::NotFound { .. }) => {}
            // A local folder is not an object; the listing finds its files.
            Err(object_store::Error::Generic { .. }) => {}
            Err(source) => return Err(failed(source)),
        }
        let mut names: Vec<String> = self
            .store
            .list(Some(&self.path))
            .map(|object| object.map(|o| self.relative(&o.location)))
            .try_collect()
            .await
            .map_err(failed)?;
        names.sort_unstable();
        Ok(names)
    }

    /// The content of one of the listed objects.
    ///
    /// # Errors
    /// The store's error.
    pub async fn read(&self, name: &str) -> Result<Bytes, Error> {
        let path = self.path_of(name);
        let got = self.store.get(&path).await.map_err(|source| self.failed("read", source))?;
        let bytes = got.bytes().await.map_err(|source| self.failed("read", source))?;
        pieces::count();
        Ok(bytes)
    }

    /// The beginning of one of the listed objects, enough to see what kind of file it is; the rest is not read.
    ///
    /// # Errors
    /// The store's error.
    pub async fn start(&self, name: &str) -> Result<Bytes, Error> {
        const ENOUGH: usize = 512;
        let failed = |source| self.failed("read", source);
        let mut pieces = self.store.get(&self.path_of(name)).await.map_err(failed)?.into_stream();
        let mut start = Vec::new();
        while start.len() < ENOUGH
            && let Some(piece) = pieces.try_next().await.map_err(failed)?
        {
            start.extend_from_slice(&piece);
        }
        Ok(start.into())
    }

    /// Copies one of the listed objects to a local file, piece by piece.
    ///
    /// # Errors
    /// The store's error; the file cannot be written.
    pub async fn read_to(&self, name: &str, to: &std::path::Path) -> Result<(), Error> {
        let path = self.path_of(name);
        let failed = |source| self.failed("read", source);
        let local = |source: std::io::Error| {
            failed(object_store::Error::Generic { store: "local file", source: source.into() })
        };
        let got = self.store.get(&path).await.map_err(failed)?;
        let mut file = tokio::fs::File::create(to).await.map_err(local)?;
        let mut pieces = got.into_stream();
        while let Some(piece) = pieces.try_next().await.map_err(failed)? {
            file.write_all(&piece).await.map_err(local)?;
            pieces::count();
        }
        file.sync_all().await.map_err(local)
    }

    fn path_of(&self, name: &str) -> Path {
        match name {
            "" => self.path.clone(),
            name => Path::from_iter(self.path.parts().chain(Path::from(name).parts())),
        }
    }

    /// The contents of several objects in the order of `names`, a few at a time.
    ///
    /// # Errors
    /// The store's error for the first object that fails.
    pub async fn read_all(&self, names: &[String]) -> Result<Vec<Bytes>, Error> {
        const AT_ONCE: usize = 16;
        futures::stream::iter(names).map(|name| self.read(name)).buffered(AT_ONCE).try_collect().await
    }

    fn relative(&self, path: &Path) -> String {
        path.as_ref()
            .strip_prefix(self.path.as_ref())
            .unwrap_or(path.as_ref())
            .trim_start_matches('/')
            .to_owned()
    }

    fn failed(&self, operation: &'static str, source: object_store::Error) -> Error {
        Error::Store { operation, place: self.location.clone(), source }
    }
}
