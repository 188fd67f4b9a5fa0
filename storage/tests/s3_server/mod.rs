//! An S3 server in this process: `s3s` implements the protocol and checks the signatures, a map is the bucket. Unlike
//! the real one it can inject faults, and can make writes take effect at the same moment.

use std::{
    collections::BTreeMap,
    error::Error,
    mem,
    net::SocketAddr,
    ops::Bound,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::SystemTime,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::TryStreamExt;
use hyper::{
    Method, Request, Response, StatusCode, body::Incoming, header, server::conn::http1, service::service_fn,
};
use hyper_util::rt::TokioIo;
use potstill_storage::Root;
use s3s::{
    Body, S3, S3Request, S3Response, S3Result,
    auth::SimpleAuth,
    dto::*,
    s3_error,
    service::{S3Service, S3ServiceBuilder},
};
use tokio::{
    net::TcpListener,
    sync::Barrier,
    task::{JoinHandle, JoinSet},
};

const BUCKET: &str = "bucket";
/// Keys in one answer to a listing: few, so that listings take several answers.
const PAGE: usize = 3;
/// The least size in bytes of a part that is not the last, as in S3.
const LEAST_PART: usize = 5 << 20;

/// How the answer to a write that took effect is lost.
#[derive(Clone, Copy, Debug)]
pub enum Lost {
    /// It is replaced by 500 Internal Server Error.
    Replaced,
    /// The connection ends before it.
    CutOff,
}

/// The server with its bucket. It ends when this value is dropped.
pub struct Server {
    address: SocketAddr,
    bucket: Bucket,
    accepting: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        // And with it the connections that it has accepted.
        self.accepting.abort();
    }
}

impl Server {
    pub async fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let bucket = Bucket::default();
        let mut builder = S3ServiceBuilder::new(bucket.clone());
        builder.set_auth(SimpleAuth::from_single("id", "secret"));
        let accepting = tokio::spawn(accept(listener, Arc::new(builder.build()), bucket.clone()));
        Self { address, bucket, accepting }
    }

    /// The environment of a program that reaches the bucket.
    pub fn variables(&self) -> [(String, String); 5] {
        let endpoint = format!("http://{}", self.address);
        let variables = [
            ("AWS_ENDPOINT", endpoint.as_str()),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ACCESS_KEY_ID", "id"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
        ];
        variables.map(|(name, value)| (name.to_owned(), value.to_owned()))
    }

    /// A root in the bucket, opened by its URL as in use.
    pub fn root(&self) -> Root {
        Root::open_with(&format!("s3://{BUCKET}/some/where"), self.variables()).unwrap()
    }

    /// From now on overwrites where it should create only.
    pub fn ignore_conditions(&self) {
        self.bucket.0.ignores_conditions.store(true, Ordering::SeqCst);
    }

    /// From now on create-only writes take effect only when this many of them have arrived completely: at the same
    /// moment.
    pub fn let_meet(&self, writers: usize) {
        *lock(&self.bucket.0.meeting) = Some(Arc::new(Barrier::new(writers)));
    }

    /// Loses the next answer that confirms a create-only write or the end of a multipart upload.
    pub fn lose_an_answer(&self, how: Lost) {
        *lock(&self.bucket.0.losing) = Some(how);
    }

    /// Number of answers that were lost.
    pub fn answers_lost(&self) -> usize {
        self.bucket.0.lost.load(Ordering::SeqCst)
    }

    /// The objects in the bucket.
    pub fn keys(&self) -> Vec<String> {
        lock(&self.bucket.0.objects).keys().cloned().collect()
    }

    /// Number of multipart uploads that were neither completed nor aborted.
    pub fn open_uploads(&self) -> usize {
        lock(&self.bucket.0.uploads).len()
    }

    /// Replaces the content of the one object whose key ends with this.
    pub fn alter(&self, end_of_key: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut objects = lock(&self.bucket.0.objects);
        let mut found = objects.iter_mut().filter(|(key, _)| key.ends_with(end_of_key));
        let (Some((_, object)), None) = (found.next(), found.next()) else { panic!("not one {end_of_key}") };
        let mut bytes = object.bytes.to_vec();
        change(&mut bytes);
        *object = Object::new(bytes.into());
    }
}

async fn accept(listener: TcpListener, service: Arc<S3Service>, bucket: Bucket) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (service, bucket) = (service.clone(), bucket.clone());
        let answer = service_fn(move |request| answer(service.clone(), bucket.clone(), request));
        connections.spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), answer));
    }
}

/// An error ends the connection.
async fn answer(
    service: Arc<S3Service>,
    bucket: Bucket,
    request: Request<Incoming>,
) -> Result<Response<Body>, Box<dyn Error + Send + Sync>> {
    let completes = request.method() == Method::POST
        && request.uri().query().is_some_and(|query| query.contains("uploadId"));
    let confirms = completes || request.headers().contains_key(header::IF_NONE_MATCH);
    let mut response = service.call(request.map(Body::from)).await?;
    if completes {
        // s3s starts its answer too early; S3 first checks that there is such an upload.
        let body = response.body_mut().store_all_unlimited().await?;
        if String::from_utf8_lossy(&body).contains("NoSuchUpload") {
            *response.status_mut() = StatusCode::NOT_FOUND;
        }
    }
    if !(confirms && response.status().is_success()) {
        return Ok(response);
    }
    let losing = lock(&bucket.0.losing).take();
    bucket.0.lost.fetch_add(usize::from(losing.is_some()), Ordering::SeqCst);
    match losing {
        None => Ok(response),
        Some(Lost::Replaced) => {
            let status = StatusCode::INTERNAL_SERVER_ERROR;
            Ok(Response::builder().status(status).body(Body::empty())?)
        }
        Some(Lost::CutOff) => Err("the answer is lost".into()),
    }
}

fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap()
}

/// The one bucket. Clones share it.
#[derive(Clone, Default)]
struct Bucket(Arc<State>);

#[derive(Default)]
struct State {
    /// Under this lock a write and its condition are one step.
    objects: Mutex<BTreeMap<String, Object>>,
    /// Parts by number, of each upload by its id.
    uploads: Mutex<BTreeMap<String, BTreeMap<i32, Object>>>,
    /// The number of uploads so far, which names the next one.
    count: AtomicUsize,
    ignores_conditions: AtomicBool,
    meeting: Mutex<Option<Arc<Barrier>>>,
    losing: Mutex<Option<Lost>>,
    lost: AtomicUsize,
}

#[derive(Clone)]
struct Object {
    bytes: Bytes,
    tag: String,
    modified: SystemTime,
}

impl Object {
    #[expect(clippy::disallowed_methods, reason = "S3 answers with the time of an object")]
    fn new(bytes: Bytes) -> Self {
        // S3 guarantees only that different contents have different tags.
        let tag = format!("\"{:016x}-{}\"", hash(&bytes), bytes.len());
        Self { bytes, tag, modified: SystemTime::now() }
    }
}

fn hash(bytes: &[u8]) -> u64 {
    use std::hash::{DefaultHasher, Hasher};
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

async fn read(body: Option<StreamingBlob>) -> S3Result<Bytes> {
    let Some(body) = body else { return Ok(Bytes::new()) };
    let parts: Vec<Bytes> = body.try_collect().await.map_err(|_| s3_error!(IncompleteBody))?;
    Ok(parts.concat().into())
}

fn is_here(bucket: &str) -> S3Result<()> {
    if bucket == BUCKET { Ok(()) } else { Err(s3_error!(NoSuchBucket)) }
}

impl Bucket {
    fn object(&self, key: &str) -> S3Result<Object> {
        lock(&self.0.objects).get(key).cloned().ok_or_else(|| s3_error!(NoSuchKey))
    }

    async fn write(&self, key: String, bytes: Bytes, create: bool) -> S3Result<String> {
        let object = Object::new(bytes);
        let tag = object.tag.clone();
        let meeting = lock(&self.0.meeting).clone();
        if let Some(meeting) = meeting.filter(|_| create) {
            meeting.wait().await;
        }
        let create = create && !self.0.ignores_conditions.load(Ordering::SeqCst);
        let mut objects = lock(&self.0.objects);
        if create && objects.contains_key(&key) {
            return Err(s3_error!(PreconditionFailed));
        }
        objects.insert(key, object);
        Ok(tag)
    }
}

#[async_trait]
impl S3 for Bucket {
    async fn put_object(&self, request: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let PutObjectInput { bucket, key, body, if_none_match, .. } = request.input;
        is_here(&bucket)?;
        let tag = self.write(key, read(body).await?, if_none_match.as_deref() == Some("*")).await?;
        Ok(S3Response::new(PutObjectOutput { e_tag: Some(tag), ..Default::default() }))
    }

    async fn head_object(
        &self,
        request: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        is_here(&request.input.bucket)?;
        let object = self.object(&request.input.key)?;
        Ok(S3Response::new(HeadObjectOutput {
            content_length: Some(object.bytes.len() as i64),
            e_tag: Some(object.tag),
            last_modified: Some(object.modified.into()),
            ..Default::default()
        }))
    }

    async fn get_object(&self, request: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        is_here(&request.input.bucket)?;
        let object = self.object(&request.input.key)?;
        let length = object.bytes.len() as u64;
        let range = request.input.range.map(|range| range.check(length)).transpose();
        let range = range.map_err(|_| s3_error!(InvalidRange))?;
        let bytes = match &range {
            Some(range) => object.bytes.slice(range.start as usize..range.end as usize),
            None => object.bytes,
        };
        Ok(S3Response::new(GetObjectOutput {
            content_length: Some(bytes.len() as i64),
            content_range: range.map(|range| format!("bytes {}-{}/{length}", range.start, range.end - 1)),
            body: Some(StreamingBlob::from(Body::from(bytes))),
            e_tag: Some(object.tag),
            last_modified: Some(object.modified.into()),
            ..Default::default()
        }))
    }

    async fn list_objects_v2(
        &self,
        request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let ListObjectsV2Input { bucket, prefix, delimiter, continuation_token, start_after, .. } =
            request.input;
        is_here(&bucket)?;
        if delimiter.is_some() {
            return Err(s3_error!(NotImplemented));
        }
        let prefix = prefix.unwrap_or_default();
        // The last key of the previous answer.
        let after = continuation_token.or(start_after).map_or(Bound::Unbounded, Bound::Excluded);
        let objects = lock(&self.0.objects);
        let mut found = objects.range((after, Bound::Unbounded)).filter(|(key, _)| key.starts_with(&prefix));
        let page: Vec<_> = found.by_ref().take(PAGE).collect();
        let next = found.next().and(page.last()).map(|(key, _)| (*key).clone());
        let contents = page.into_iter().map(|(key, object)| s3s::dto::Object {
            key: Some(key.clone()),
            size: Some(object.bytes.len() as i64),
            e_tag: Some(object.tag.clone()),
            last_modified: Some(object.modified.into()),
            ..Default::default()
        });
        Ok(S3Response::new(ListObjectsV2Output {
            contents: Some(contents.collect()),
            is_truncated: Some(next.is_some()),
            next_continuation_token: next,
            ..Default::default()
        }))
    }

    async fn delete_object(
        &self,
        request: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        is_here(&request.input.bucket)?;
        lock(&self.0.objects).remove(&request.input.key);
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn delete_objects(
        &self,
        request: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        is_here(&request.input.bucket)?;
        let mut objects = lock(&self.0.objects);
        let deleted = request.input.delete.objects.into_iter().map(|object| {
            objects.remove(&object.key);
            DeletedObject { key: Some(object.key), ..Default::default() }
        });
        Ok(S3Response::new(DeleteObjectsOutput { deleted: Some(deleted.collect()), ..Default::default() }))
    }

    async fn create_multipart_upload(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let CreateMultipartUploadInput { bucket, key, .. } = request.input;
        is_here(&bucket)?;
        let id = self.0.count.fetch_add(1, Ordering::SeqCst).to_string();
        lock(&self.0.uploads).insert(id.clone(), BTreeMap::new());
        Ok(S3Response::new(CreateMultipartUploadOutput {
            bucket: Some(bucket),
            key: Some(key),
            upload_id: Some(id),
            ..Default::default()
        }))
    }

    async fn upload_part(
        &self,
        request: S3Request<UploadPartInput>,
    ) -> S3Result<S3Response<UploadPartOutput>> {
        let UploadPartInput { upload_id, part_number, body, .. } = request.input;
        let part = Object::new(read(body).await?);
        let tag = part.tag.clone();
        let mut uploads = lock(&self.0.uploads);
        uploads.get_mut(&upload_id).ok_or_else(|| s3_error!(NoSuchUpload))?.insert(part_number, part);
        Ok(S3Response::new(UploadPartOutput { e_tag: Some(tag), ..Default::default() }))
    }

    async fn complete_multipart_upload(
        &self,
        request: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let CompleteMultipartUploadInput { key, upload_id, multipart_upload, .. } = request.input;
        let mut parts = {
            let mut uploads = lock(&self.0.uploads);
            mem::take(uploads.get_mut(&upload_id).ok_or_else(|| s3_error!(NoSuchUpload))?)
        };
        let named = multipart_upload.and_then(|upload| upload.parts).unwrap_or_default();
        let mut bytes = Vec::new();
        for (n, part) in named.iter().enumerate() {
            let found = part.part_number.and_then(|number| parts.remove(&number));
            let found = found.filter(|found| part.e_tag.as_ref() == Some(&found.tag));
            let found = found.ok_or_else(|| s3_error!(InvalidPart))?;
            if found.bytes.len() < LEAST_PART && n + 1 < named.len() {
                return Err(s3_error!(EntityTooSmall));
            }
            bytes.extend_from_slice(&found.bytes);
        }
        let tag = self.write(key.clone(), bytes.into(), false).await?;
        lock(&self.0.uploads).remove(&upload_id);
        Ok(S3Response::new(CompleteMultipartUploadOutput {
            bucket: Some(BUCKET.to_owned()),
            key: Some(key),
            e_tag: Some(tag),
            ..Default::default()
        }))
    }

    async fn abort_multipart_upload(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        // A missing upload counts as aborted, as in S3's directory buckets.
        lock(&self.0.uploads).remove(&request.input.upload_id);
        Ok(S3Response::new(AbortMultipartUploadOutput::default()))
    }
}
