//! A store that injects faults on demand, and helpers of the storage tests.

#![allow(dead_code, reason = "each test file uses some of it")]

use std::{
    path::Path as File,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use async_trait::async_trait;
use futures::{FutureExt, stream::BoxStream};
use object_store::{
    CopyOptions, Error as StoreError, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
    memory::InMemory, path::Path,
};
use potstill_storage::{Root, Run, RunId};

/// The fault of a [`Faulty`] store.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// A write takes effect, and its answer is an error.
    AnswerLost,
    /// A write takes effect, the store's client repeats it, and reports the first attempt as a conflict.
    WriteRepeated,
    /// A write has no effect, and its answer is an error.
    WriteFails,
    /// The bucket does not exist.
    BucketGone,
    /// "Create if absent" overwrites.
    Unconditional,
    /// This part of a multipart upload fails, counted from 0.
    PartFails(usize),
    /// All parts of a multipart upload are stored, but they cannot be joined to one object.
    CompleteFails,
}

/// A store with a fault.
#[derive(Debug)]
pub struct Faulty {
    inner: Arc<dyn ObjectStore>,
    fault: Fault,
    aborted: Arc<AtomicUsize>,
}

impl Faulty {
    pub fn new(inner: Arc<dyn ObjectStore>, fault: Fault) -> Arc<Self> {
        Arc::new(Self { inner, fault, aborted: Arc::default() })
    }

    /// Number of multipart uploads that were aborted.
    pub fn aborted(&self) -> usize {
        self.aborted.load(Ordering::SeqCst)
    }
}

impl std::fmt::Display for Faulty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Faulty({:?}, {})", self.fault, self.inner)
    }
}

fn failure() -> StoreError {
    StoreError::Generic { store: "faulty", source: "503 Service Unavailable".into() }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        mut options: PutOptions,
    ) -> Result<PutResult> {
        let path = location.to_string();
        match self.fault {
            Fault::WriteFails => return Err(failure()),
            Fault::BucketGone => return Err(StoreError::NotFound { path, source: "NoSuchBucket".into() }),
            Fault::Unconditional => options.mode = PutMode::Overwrite,
            _ => {}
        }
        let result = self.inner.put_opts(location, payload, options).await?;
        match self.fault {
            Fault::AnswerLost => Err(failure()),
            Fault::WriteRepeated => Err(StoreError::AlreadyExists { path, source: "412".into() }),
            _ => Ok(result),
        }
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let inner = self.inner.put_multipart_opts(location, options).await?;
        Ok(Box::new(Upload { inner, parts: 0, fault: self.fault, aborted: self.aborted.clone() }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        if let Fault::BucketGone = self.fault {
            let gone = StoreError::NotFound { path: String::new(), source: "NoSuchBucket".into() };
            return Box::pin(futures::stream::iter([Err(gone)]));
        }
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[derive(Debug)]
struct Upload {
    inner: Box<dyn MultipartUpload>,
    parts: usize,
    fault: Fault,
    aborted: Arc<AtomicUsize>,
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let fails = matches!(self.fault, Fault::PartFails(part) if part == self.parts);
        self.parts += 1;
        if fails { async { Err(failure()) }.boxed() } else { self.inner.put_part(data) }
    }

    async fn complete(&mut self) -> Result<PutResult> {
        match self.fault {
            Fault::CompleteFails => Err(failure()),
            // S3's answer where a lifecycle rule has removed the upload: NoSuchUpload.
            Fault::BucketGone => {
                Err(StoreError::NotFound { path: String::new(), source: "NoSuchUpload".into() })
            }
            _ => self.inner.complete().await,
        }
    }

    async fn abort(&mut self) -> Result<()> {
        self.aborted.fetch_add(1, Ordering::SeqCst);
        self.inner.abort().await
    }
}

/// A run in a store.
pub fn run_in(store: Arc<dyn ObjectStore>) -> Run {
    run(&Root::in_store(store, "mem://test"))
}

/// The run "one" below a root.
pub fn run(root: &Root) -> Run {
    root.run(&id())
}

/// A new run in memory.
pub fn run_in_memory() -> Run {
    run_in(Arc::new(InMemory::new()))
}

/// A root in a local folder.
pub fn root_at(folder: &File) -> Root {
    Root::open(folder.to_str().unwrap()).unwrap()
}

pub fn id() -> RunId {
    "one".parse().unwrap()
}

/// The files below a folder.
pub fn files_below(folder: &File) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(files_below(&path)) } else { files.push(path) }
    }
    files
}
