//! The root of the storage: the store, and the folder in it.

use std::{path::PathBuf, sync::Arc};

use bytes::Bytes;
use object_store::{
    Error as StoreError, ObjectStore, ObjectStoreExt, PutMode, local::LocalFileSystem, memory::InMemory,
    path::Path,
};
use url::Url;
use uuid::Uuid;

use crate::{Error, RunId, aws_profile, faults, new_file, patience::asked};

/// Environment variables with these prefixes configure the cloud stores, as with those stores' own tools.
const CREDENTIALS: [&str; 3] = ["AWS_", "GOOGLE_", "AZURE_"];

/// Schemes of stores.
const SCHEMES: [&str; 4] = ["s3", "gs", "az", "memory"];
/// What a location may be.
const WANTED: &str = "use a path, or a URL of file://, s3://, gs://, az:// or memory://";

/// A location for messages: of a URL neither password, query nor fragment.
pub(crate) fn shown(location: &str) -> String {
    if !location.contains("://") {
        return location.to_owned();
    }
    let Ok(mut url) = Url::parse(location) else {
        // The credentials in it cannot be told from the rest.
        let plain = location.split(['?', '#']).next().unwrap_or_default();
        return plain.rsplit('@').next().unwrap_or_default().to_owned();
    };
    if url.password().is_none() && url.query().is_none() && url.fragment().is_none() {
        return location.to_owned();
    }
    // It fails for URLs that cannot have one.
    let _ = url.set_password(None);
    url.set_query(None);
    url.set_fragment(None);
    url.to_string()
}

/// A variable as the stores' clients take it, which end the process where one cannot be sent: without spaces and line ends around it,
/// as secrets that were made with an editor have them; none where it is empty.
fn usable(name: String, value: &str) -> Result<Option<(String, String)>, String> {
    let value = value.trim();
    if value.chars().any(char::is_control) {
        return Err(format!("the variable {name} has a line end or another control character inside"));
    }
    if name.contains("ENDPOINT") && !value.is_empty() && !value.contains("://") {
        return Err(format!("the variable {name} is {value:?}; an endpoint begins with https:// or http://"));
    }
    Ok((!value.is_empty()).then(|| (name.to_ascii_lowercase(), value.to_owned())))
}

/// Refuses a URL with credentials: locations are stored with the run, sent to workers and shown.
fn without_credentials(location: &str, url: &Url) -> Result<(), Error> {
    if url.password().is_none() && url.query().is_none() {
        return Ok(());
    }
    let problem = "it has a password or a query, where credentials would be saved and shown; give them in the environment \
                   variables that the store's own tools take"
        .to_owned();
    Err(Error::BadUrl { url: shown(location), problem })
}

/// The folder that holds all runs.
#[derive(Clone, Debug)]
pub struct Root {
    store: Arc<dyn ObjectStore>,
    /// The folder, relative to the store's own root.
    prefix: Path,
    url: String,
    /// The folder on this machine, where the store is local.
    folder: Option<PathBuf>,
}

/// The environment of this process. Variables that are not UTF-8 are ignored.
pub fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

impl Root {
    /// Opens a path, or a URL of `file://`, `s3://`, `gs://`, `az://` or `memory://`. A local folder is created, and
    /// everything written to it is synced to disk. Credentials for the cloud stores come from their usual environment
    /// variables, and for S3 also from a profile of AWS's shared files. The content of `memory://` is visible to this value
    /// and its clones only.
    ///
    /// # Errors
    /// The URL is not one of a supported store, or the folder cannot be created.
    pub fn open(location: &str) -> Result<Self, Error> {
        Self::open_with(location, environment())
    }

    /// [`open`](Self::open) of a storage that is only read: a local folder must exist.
    ///
    /// # Errors
    /// As for [`open`](Self::open); there is no such folder.
    pub fn open_existing(location: &str) -> Result<Self, Error> {
        let local = location.strip_prefix("file://").unwrap_or(location);
        if !local.contains("://") && !std::path::Path::new(local).is_dir() {
            let problem = "there is no such folder".to_owned();
            return Err(Error::BadUrl { url: shown(location), problem });
        }
        Self::open(location)
    }

    /// [`open`](Self::open) with other variables than the process's environment.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_with(
        location: &str,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, Error> {
        let bad = |problem: String| Error::BadUrl { url: shown(location), problem };
        if !location.contains("://") {
            let scheme = location.split_once(':').map(|(scheme, _)| scheme.to_lowercase());
            if scheme.is_some_and(|scheme| [&SCHEMES[..], &["file"]].concat().contains(&scheme.as_str())) {
                return Err(bad(format!("a URL has two slashes behind its scheme; {WANTED}")));
            }
            if location.starts_with("~/") || location == "~" {
                return Err(bad(
                    "~ stands for a home only where the shell sees it; write the whole path".to_owned()
                ));
            }
            return Self::local(std::path::absolute(location).map_err(|e| bad(e.to_string()))?, location);
        }
        let url = Url::parse(location).map_err(|e| bad(format!("{e}; {WANTED}")))?;
        if url.scheme() == "file" {
            let folder = url
                .to_file_path()
                .map_err(|()| bad(format!("it is not a path of this machine; {WANTED}")))?;
            return Self::local(folder, location);
        }
        let (store, prefix) = Self::open_store(location, variables)?;
        // In az:// the user name before the host may be the container.
        let container = match (url.scheme(), url.username()) {
            ("az", name) if !name.is_empty() => format!("{name}@"),
            _ => String::new(),
        };
        let host = url.host_str().unwrap_or_default();
        let shown = format!("{}://{container}{host}{}", url.scheme(), url.path());
        Ok(Self { store: faults::wrapped(store).map_err(bad)?, prefix, url: shown, folder: None })
    }

    /// The store of a URL of `s3://`, `gs://`, `az://` or `memory://`, and the path in it.
    pub(crate) fn open_store(
        location: &str,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<(Arc<dyn ObjectStore>, Path), Error> {
        let bad = |problem: String| Error::BadUrl { url: shown(location), problem };
        // The cloud clients use the process's own TLS provider; an error means that one is installed already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let url = Url::parse(location).map_err(|e| bad(format!("{e}; {WANTED}")))?;
        without_credentials(location, &url)?;
        let scheme = url.scheme();
        // object_store supports more schemes, but in some of them part of the location is where `url` does not keep it.
        if !SCHEMES.contains(&scheme) {
            return Err(bad(format!("the scheme {scheme}:// is not known; {WANTED}")));
        }
        if url.port().is_some() {
            let problem = "the name behind the scheme is a bucket and has no port; the address of a store goes into AWS_ENDPOINT_URL";
            return Err(bad(problem.to_owned()));
        }
        if scheme != "az" && !url.username().is_empty() {
            return Err(bad(
                "it has a user before the bucket: credentials go into environment variables".to_owned()
            ));
        }
        if url.fragment().is_some() {
            return Err(bad("it has a #, which no name in a store has in a URL".to_owned()));
        }
        if scheme != "memory" && url.host_str().is_none_or(str::is_empty) {
            return Err(bad(format!("it names no bucket; {WANTED}")));
        }
        if scheme == "memory" {
            if url.host_str().is_some_and(|host| !host.is_empty()) {
                return Err(bad(format!("there are no machines in memory; {WANTED}")));
            }
            let path = Path::parse(url.path()).map_err(|e| bad(e.to_string()))?;
            return Ok((Arc::new(InMemory::new()), path));
        }
        let variables: Vec<(String, String)> = match scheme {
            "s3" => aws_profile::with_profile(variables).map_err(bad)?.into_iter().collect(),
            _ => variables.into_iter().collect(),
        };
        let options = variables
            .into_iter()
            .filter(|(name, _)| CREDENTIALS.iter().any(|prefix| name.starts_with(prefix)))
            .filter_map(|(name, value)| usable(name, &value).transpose())
            .collect::<Result<Vec<_>, _>>()
            .map_err(bad)?;
        let (store, path) = object_store::parse_url_opts(&url, options).map_err(|e| bad(e.to_string()))?;
        Ok((store.into(), path))
    }

    fn local(folder: PathBuf, location: &str) -> Result<Self, Error> {
        let bad = |problem: String| Error::BadUrl { url: shown(location), problem };
        std::fs::create_dir_all(&folder)
            .map_err(|e| bad(format!("cannot create {}: {e}", folder.display())))?;
        let folder = folder.canonicalize().map_err(|e| bad(e.to_string()))?;
        let store =
            LocalFileSystem::new_with_prefix(&folder).map_err(|e| bad(e.to_string()))?.with_fsync(true);
        let url = Url::from_file_path(&folder).map_err(|()| bad("it is not an absolute path".to_owned()))?;
        Ok(Self {
            store: faults::wrapped(Arc::new(store)).map_err(bad)?,
            prefix: Path::default(),
            url: url.to_string(),
            folder: Some(folder),
        })
    }

    /// A root in a store that the caller has opened.
    #[must_use]
    pub fn in_store(store: Arc<dyn ObjectStore>, url: &str) -> Self {
        Self { store, prefix: Path::default(), url: url.to_owned(), folder: None }
    }

    /// Its URL, without credentials; [`open`](Self::open) accepts it.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Checks that the store can be written to and that it honors "create if absent". Errors that may pass are tried again,
    /// as for every operation.
    ///
    /// # Errors
    /// [`Error::Store`] where it cannot be written, [`Error::NotConditional`] where it ignores the condition.
    pub async fn probe(&self) -> Result<(), Error> {
        let path = self.prefix.clone().join("runs").join(format!(".probe-{}", Uuid::new_v4()));
        let place = self.describe(&path);
        let create = || async {
            match self.put_new(&path, "probe".into()).await {
                Ok(()) => Ok(true),
                Err(StoreError::AlreadyExists { .. } | StoreError::Precondition { .. }) => Ok(false),
                Err(error) => Err(error),
            }
        };
        // No other process writes to this path: where the object exists already, the answer to an earlier attempt was lost.
        asked("write to", 0, &place, create).await?;
        let again = asked("write to", 0, &place, create).await;
        // The probe's object is removed in any case. One that cannot be removed does no harm.
        if let Err(error) = self.store.delete(&path).await {
            tracing::debug!(%place, %error, "the probe could not be removed");
        }
        match again? {
            false => Ok(()),
            true => Err(Error::NotConditional { url: self.url.clone() }),
        }
    }

    /// By how many seconds the store's clock is ahead of this machine's; a request's time makes it uncertain by as much.
    ///
    /// # Errors
    /// [`Error::Store`] where it cannot be written or read.
    #[expect(clippy::disallowed_methods, reason = "the wall clock is what is asked about")]
    pub async fn clock_skew(&self) -> Result<f64, Error> {
        let path = self.prefix.clone().join("runs").join(format!(".probe-{}", Uuid::new_v4()));
        let place = self.describe(&path);
        let put = || async { self.store.put(&path, "probe".into()).await.map(drop) };
        asked("write to", 0, &place, put).await?;
        let now = std::time::SystemTime::now();
        let head = asked("read", 0, &place, || self.store.head(&path)).await;
        if let Err(error) = self.store.delete(&path).await {
            tracing::debug!(%place, %error, "the probe could not be removed");
        }
        let written = std::time::SystemTime::from(head?.last_modified);
        Ok(match written.duration_since(now) {
            Ok(ahead) => ahead.as_secs_f64(),
            Err(behind) => -behind.duration().as_secs_f64(),
        })
    }

    /// Writes an object that must not exist.
    ///
    /// # Errors
    /// The store's error: [`StoreError::AlreadyExists`] or [`StoreError::Precondition`] where it exists.
    pub(crate) async fn put_new(&self, path: &Path, bytes: Bytes) -> Result<(), StoreError> {
        let put = self.store.put_opts(path, bytes.clone().into(), PutMode::Create.into()).await;
        let Some(folder) = &self.folder else { return put.map(drop) };
        match put {
            Err(error) if new_file::lacks_links(&error) => {
                let file = folder.join(path.as_ref());
                tokio::task::spawn_blocking(move || new_file::create(&file, &bytes, new_file::SHARED)).await?
            }
            other => other.map(drop),
        }
    }

    /// The folder on this machine, where the store is local.
    pub(crate) fn folder(&self) -> Option<&std::path::Path> {
        self.folder.as_deref()
    }

    pub(crate) fn store(&self) -> &dyn ObjectStore {
        self.store.as_ref()
    }

    pub(crate) fn path_of_run(&self, id: &RunId) -> Path {
        self.prefix.clone().join("runs").join(id.to_string())
    }

    /// Path or URL of an object, for messages.
    pub(crate) fn describe(&self, path: &Path) -> String {
        match &self.folder {
            Some(folder) => folder.join(path.as_ref()).display().to_string(),
            None => {
                let below = path.as_ref().strip_prefix(self.prefix.as_ref()).unwrap_or(path.as_ref());
                format!("{}/{}", self.url.trim_end_matches('/'), below.trim_start_matches('/'))
            }
        }
    }
}
