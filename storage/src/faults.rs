//! Storage that injects faults, for tests of the code that uses it.
//!
//! `POTSTILL_STORAGE_FAULTS=seed=7,error=0.02,delay=0.05,hang=0.001,lost=0.02,short=0.01,flip=0.01` in the environment
//! of a debug build: the share of operations that fail without effect; wait for up to a second; never answer; take
//! effect and then fail; read too few bytes; read a wrong bit. The seed and the operation's number decide which ones.
//! `silent_while=FILE`: while this file exists, no operation that begins is ever answered.

use std::{
    fmt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use object_store::{
    CopyOptions, Error as StoreError, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload,
    ObjectMeta, ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
    path::Path,
};

/// Environment variable with the faults.
const VARIABLE: &str = "POTSTILL_STORAGE_FAULTS";
const LONGEST_DELAY: Duration = Duration::from_secs(1);

/// The share of operations with each fault.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rates {
    seed: u64,
    error: f64,
    delay: f64,
    hang: f64,
    lost: f64,
    short: f64,
    flip: f64,
    silent_while: Option<PathBuf>,
}

impl Rates {
    fn parse(text: &str) -> std::result::Result<Self, String> {
        let mut rates = Self::default();
        for pair in text.split(',') {
            let bad = || {
                format!(
                    "{VARIABLE}: {pair:?} is not seed=…, error=…, delay=…, hang=…, lost=…, short=…, flip=… or silent_while=…"
                )
            };
            let (name, value) = pair.split_once('=').ok_or_else(bad)?;
            if name == "seed" {
                rates.seed = value.parse().map_err(|_| bad())?;
                continue;
            }
            if name == "silent_while" {
                rates.silent_while = Some(value.into());
                continue;
            }
            let rate = value.parse().ok().filter(|rate| (0.0..=1.0).contains(rate)).ok_or_else(bad)?;
            *match name {
                "error" => &mut rates.error,
                "delay" => &mut rates.delay,
                "hang" => &mut rates.hang,
                "lost" => &mut rates.lost,
                "short" => &mut rates.short,
                "flip" => &mut rates.flip,
                _ => return Err(bad()),
            } = rate;
        }
        Ok(rates)
    }
}

/// Wraps a store if the environment asks for it.
///
/// # Errors
/// An error in the variable.
pub fn wrapped(store: Arc<dyn ObjectStore>) -> std::result::Result<Arc<dyn ObjectStore>, String> {
    match std::env::var(VARIABLE) {
        Ok(text) if cfg!(debug_assertions) => {
            tracing::warn!(faults = text, "this storage injects faults");
            Ok(Arc::new(Faulty::new(store, Rates::parse(&text)?)))
        }
        _ => Ok(store),
    }
}

/// A store that injects faults.
#[derive(Debug)]
pub struct Faulty {
    inner: Arc<dyn ObjectStore>,
    faults: Arc<Faults>,
}

/// The rates of faults, and the number of operations so far, which decides where they are injected.
#[derive(Debug)]
struct Faults {
    rates: Rates,
    operations: AtomicU64,
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "faulty {}", self.inner)
    }
}

/// Numbers in [0, 1) for one operation.
struct Dice(u64);

impl Dice {
    /// SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
    fn roll(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

fn failure(what: &'static str) -> StoreError {
    StoreError::Generic { store: "faulty", source: what.into() }
}

impl Faulty {
    pub fn new(inner: Arc<dyn ObjectStore>, rates: Rates) -> Self {
        Self { inner, faults: Arc::new(Faults { rates, operations: AtomicU64::new(0) }) }
    }
}

impl Faults {
    /// Injects the faults that come before an operation.
    async fn before(&self) -> Result<Dice> {
        let number = self.operations.fetch_add(1, Ordering::Relaxed);
        let mut dice = Dice(self.rates.seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ number);
        if dice.roll() < self.rates.delay {
            tokio::time::sleep(LONGEST_DELAY.mul_f64(dice.roll())).await;
        }
        let silent = self.rates.silent_while.as_ref().is_some_and(|file| file.exists());
        if dice.roll() < self.rates.hang || silent {
            std::future::pending::<()>().await;
        }
        if dice.roll() < self.rates.error {
            return Err(failure("503 Service Unavailable"));
        }
        Ok(dice)
    }

    /// Injects the faults of the answer to an operation that had its effect.
    fn after<T>(&self, dice: &mut Dice, answer: T) -> Result<T> {
        if dice.roll() < self.rates.lost {
            Err(failure("connection reset before the answer"))
        } else {
            Ok(answer)
        }
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let mut dice = self.faults.before().await?;
        let result = self.inner.put_opts(location, payload, options).await?;
        self.faults.after(&mut dice, result)
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let _ = self.faults.before().await?;
        let inner = self.inner.put_multipart_opts(location, options).await?;
        Ok(Box::new(Upload { inner, faults: self.faults.clone() }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let mut dice = self.faults.before().await?;
        let result = self.inner.get_opts(location, options).await?;
        let (short, flip) = (dice.roll() < self.faults.rates.short, dice.roll() < self.faults.rates.flip);
        if !(short || flip) {
            return Ok(result);
        }
        let (meta, range, attributes) =
            (result.meta.clone(), result.range.clone(), result.attributes.clone());
        let extensions = result.extensions.clone();
        let mut bytes = result.bytes().await?.to_vec();
        if short {
            bytes.truncate((bytes.len() as f64 * dice.roll()) as usize);
        }
        let at = (bytes.len() as f64 * dice.roll()) as usize;
        if let Some(byte) = bytes.get_mut(at).filter(|_| flip) {
            *byte ^= 1;
        }
        let payload = GetResultPayload::Stream(futures::stream::iter([Ok(Bytes::from(bytes))]).boxed());
        Ok(GetResult { payload, meta, range, attributes, extensions })
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let faults = self.faults.clone();
        let before = move |location| {
            let faults = faults.clone();
            async move { faults.before().await.and(location) }
        };
        self.inner.delete_stream(locations.then(before).boxed())
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (faults, listed) = (self.faults.clone(), self.inner.list(prefix));
        futures::stream::once(async move { faults.before().await.map(|_| listed) }).try_flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let _ = self.faults.before().await?;
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        let _ = self.faults.before().await?;
        self.inner.copy_opts(from, to, options).await
    }
}

/// A multipart upload to a store that injects faults.
#[derive(Debug)]
struct Upload {
    inner: Box<dyn MultipartUpload>,
    faults: Arc<Faults>,
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (faults, part) = (self.faults.clone(), self.inner.put_part(data));
        Box::pin(async move {
            let mut dice = faults.before().await?;
            part.await?;
            faults.after(&mut dice, ())
        })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let mut dice = self.faults.before().await?;
        let result = self.inner.complete().await?;
        self.faults.after(&mut dice, result)
    }

    async fn abort(&mut self) -> Result<()> {
        let _ = self.faults.before().await?;
        self.inner.abort().await
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use object_store::memory::InMemory;

    use super::*;
    use crate::{
        Error, Root, Run,
        checkpoint::{Manifest, Written},
        layout,
        retention::Policy,
    };

    /// A run in a store that injects faults, and the same run without them.
    fn runs(rates: &str) -> (Run, Run) {
        let inner = Arc::new(InMemory::new());
        let faulty = Faulty::new(inner.clone(), Rates::parse(rates).unwrap());
        let run = |store| Root::in_store(store, "mem://test").run(&"one".parse().unwrap());
        (run(Arc::new(faulty)), run(inner))
    }

    fn run(rates: &str) -> Run {
        runs(rates).0
    }

    #[test]
    fn rates_are_read_or_refused_by_name() {
        let rates = Rates::parse("seed=7,error=0.5,flip=1").unwrap();
        assert_eq!(rates, Rates { seed: 7, error: 0.5, flip: 1.0, ..Rates::default() });
        for bad in ["error", "error=2", "colour=0.1", "seed=x"] {
            assert!(Rates::parse(bad).unwrap_err().contains(bad), "{bad}");
        }
    }

    /// Under all faults, an object that is reported to exist exists, with the bytes that were written.
    #[tokio::test(start_paused = true)]
    async fn a_success_is_one_and_a_failure_says_where() {
        let (mut failed, mut created) = (0, 0);
        for seed in 0..150 {
            let rates = format!("seed={seed},error=0.3,delay=0.2,hang=0.02,lost=0.3,short=0.1,flip=0.1");
            let (run, truth) = runs(&rates);
            let bytes = Bytes::from(vec![seed as u8; 1000]);
            match run.create("journal/a", bytes.clone()).await {
                Ok(()) => {
                    created += 1;
                    let again = run.create("journal/a", "other".into()).await;
                    assert!(again.is_err(), "{seed}: another content took its place");
                    assert_eq!(truth.get("journal/a").await.unwrap(), Some(bytes.clone()), "{seed}");
                }
                Err(error) => {
                    failed += 1;
                    assert!(error.to_string().contains("journal/a"), "{error}");
                }
            }
            let key = layout::shard_key(4, "g1", 0, 1);
            if let Ok(Written { shard, .. }) = run.write_shard(&key, 0, bytes.clone()).await {
                match run.read_shard(&shard).await {
                    Ok(read) => assert_eq!(read, bytes),
                    Err(Error::Damaged { place, .. }) => assert!(place.contains("rank-000"), "{place}"),
                    Err(error) => assert!(error.to_string().contains("rank-000"), "{error}"),
                }
            }
        }
        assert!(created > 100 && failed > 0, "{created} were created, {failed} failed");
    }

    /// Parts of an upload, listings and removals fail too; sweeps and counts are right in the end.
    #[tokio::test(start_paused = true)]
    async fn uploads_in_parts_listings_and_sweeps_do_what_they_say_or_fail() {
        let bytes = Bytes::from(vec![7; 20 << 20]);
        let policy = Policy { keep_last: Some(1), keep_every: None };
        let (mut written, mut failed) = (0, 0);
        for seed in 0..20 {
            let (run, truth) = runs(&format!("seed={seed},error=0.2,delay=0.2,lost=0.1"));
            for iteration in [10, 20] {
                let key = layout::shard_key(iteration, "g1", 0, 1);
                match run.write_shard(&key, 0, bytes.clone()).await {
                    Ok(Written { shard, .. }) => {
                        written += 1;
                        assert!(truth.read_shard(&shard).await.unwrap() == bytes, "{seed}");
                        truth.commit(&Manifest::new(iteration, 1, vec![shard])).await.unwrap();
                    }
                    Err(error) => {
                        failed += 1;
                        assert!(error.to_string().contains(&key), "{error}");
                    }
                }
            }
            let committed = truth.checkpoints().await.unwrap();
            if let Ok(listed) = run.checkpoints().await {
                assert_eq!(listed, committed, "{seed}");
            }
            match run.sweep(policy, &BTreeSet::new(), 20).await {
                Ok(_) => {
                    assert_eq!(truth.checkpoints().await.unwrap().len(), committed.len().min(1), "{seed}")
                }
                Err(error) => assert!(error.to_string().contains("checkpoints"), "{error}"),
            }
            // The newest is never removed, and the checkpoints that are left are complete.
            assert_eq!(truth.checkpoints().await.unwrap().last(), committed.last(), "{seed}");
            assert!(truth.survey().await.unwrap().1.is_empty(), "{seed}");
        }
        assert!(written > 20 && failed > 0, "{written} were written, {failed} failed");
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_never_answers_is_given_up() {
        let error = run("hang=1").create("a", "x".into()).await.unwrap_err();
        assert!(matches!(error, Error::NoAnswer { .. }), "{error}");
        let error = run("hang=1").commit(&Manifest::new(1, 1, Vec::new())).await.unwrap_err();
        assert!(error.to_string().contains("no answer within 300 s"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_same_seed_misbehaves_in_the_same_way() {
        let story = async |seed: u64| {
            let run = run(&format!("seed={seed},error=0.5,lost=0.3"));
            let mut said = Vec::new();
            for n in 0..20 {
                said.push(run.create(&format!("{n}"), "x".into()).await.is_ok());
            }
            said
        };
        assert_eq!(story(1).await, story(1).await);
    }
}
