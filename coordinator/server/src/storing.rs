//! What the shell has the storage do in the background: records of the journal, manifests, and the verification of checkpoints.
//! While the store does not answer, each of them is tried again for as long as the run waits for workers: the workers hold
//! their state meanwhile, and no state is as new as theirs.

use std::time::Duration;

use bytes::Bytes;
use potstill_core::{Uncommitted, ledger::Checkpoint};
use potstill_proto::wire::ShardReceipt;
use potstill_storage::{
    Error, Run,
    checkpoint::{Manifest, Shard},
    journal::Journal,
    layout,
};
use tokio::time::{Instant, sleep, timeout_at};

/// The pause between two attempts.
const PAUSE: Duration = Duration::from_secs(2);
/// How long a shard that was reported may be invisible: file systems on a network show new files late.
const VISIBLE: Duration = Duration::from_secs(10);

/// Appends a record, with repeated attempts for `patience`. Returns the journal after it.
pub async fn append(
    mut journal: Journal,
    record: Bytes,
    patience: Duration,
) -> (Journal, Result<(), String>) {
    let started = Instant::now();
    let deadline = started + patience;
    let mut last = "no answer".to_owned();
    let outcome = loop {
        // The first attempt is always made, with the patience of a single operation.
        let answer = match started.elapsed() < PAUSE {
            true => journal.append(record.clone()).await,
            false => match timeout_at(deadline, journal.append(record.clone())).await {
                Ok(answer) => answer,
                Err(_) => break Err(unwritten(&last, started)),
            },
        };
        match answer {
            Ok(()) => break Ok(()),
            Err(error @ Error::Fenced { .. }) => break Err(error.to_string()),
            Err(error) => last = error.to_string(),
        }
        if Instant::now() + PAUSE >= deadline {
            break Err(unwritten(&last, started));
        }
        tracing::warn!(
            error = last,
            "the journal cannot be written: the run holds its workers, and tries again for {:.0} s",
            (deadline - Instant::now()).as_secs_f64()
        );
        sleep(PAUSE).await;
    };
    (journal, outcome)
}

fn unwritten(error: &str, started: Instant) -> String {
    format!("the journal cannot be written for {:.0} s: {error}", started.elapsed().as_secs_f64())
}

/// Checks that every shard of a checkpoint is in the storage as the coordinator sees it, then writes its manifest. Returns the
/// manifest's key.
pub async fn commit(run: Run, checkpoint: Checkpoint, patience: Duration) -> Result<String, Uncommitted> {
    let (mut unseen, mut problems) = (std::collections::BTreeSet::new(), Vec::new());
    for receipt in &checkpoint.shards {
        match confirmed(&run, &checkpoint, receipt, patience).await {
            Ok(()) => {}
            Err(error @ Error::Damaged { .. }) => {
                unseen.insert(receipt.rank);
                problems.push(format!("rank {}: {error}", receipt.rank));
            }
            Err(error) => {
                return Err(Uncommitted { reason: error.to_string(), ..Uncommitted::default() });
            }
        }
    }
    if !problems.is_empty() {
        return Err(Uncommitted { reason: problems.join("; "), unseen, manifest_key: None });
    }
    let manifest = manifest(checkpoint);
    let written = patiently(patience, "write a manifest", || write(&run, &manifest)).await;
    let manifest_key = Some(layout::manifest_key(manifest.iteration));
    written.map_err(|error| Uncommitted { reason: error.to_string(), manifest_key, ..Uncommitted::default() })
}

/// What is wrong with a checkpoint, if something is.
pub async fn verify(run: Run, manifest_key: String, patience: Duration) -> Result<Option<String>, String> {
    let found = patiently(patience, "verify a checkpoint", || run.damage(&manifest_key)).await;
    found.map(|damage| damage.map(|error| error.to_string())).map_err(|error| error.to_string())
}

/// Checks one shard: its key must be the one that this rank had to write, and its content must be there.
async fn confirmed(
    run: &Run,
    checkpoint: &Checkpoint,
    receipt: &ShardReceipt,
    patience: Duration,
) -> Result<(), Error> {
    let world_size = u32::try_from(checkpoint.shards.len()).unwrap_or(u32::MAX);
    let attempt = checkpoint.generation.store_prefix();
    let key = layout::shard_key(checkpoint.iteration, &attempt, receipt.rank, world_size);
    if receipt.key != key {
        let problem = format!("its rank reports the key {:?}", receipt.key);
        return Err(Error::Damaged { place: run.describe(&key), problem });
    }
    let (shard, e_tag) = (entry(receipt.clone()), receipt.e_tag.as_deref());
    let started = Instant::now();
    loop {
        let checked = patiently(patience, "check a shard", || run.confirm_shard(&shard, e_tag)).await;
        match checked {
            Err(Error::Damaged { .. }) if started.elapsed() < VISIBLE.min(patience) => sleep(PAUSE / 4).await,
            checked => return checked,
        }
    }
}

/// Repeats an operation while the store does not answer it.
async fn patiently<T, F: Future<Output = Result<T, Error>>>(
    patience: Duration,
    what: &'static str,
    operation: impl Fn() -> F,
) -> Result<T, Error> {
    let deadline = Instant::now() + patience;
    loop {
        match operation().await {
            Err(error @ (Error::Store { .. } | Error::NoAnswer { .. }))
                if Instant::now() + PAUSE < deadline =>
            {
                tracing::warn!(%error, "cannot {what}; trying again");
                sleep(PAUSE).await;
            }
            answer => return answer,
        }
    }
}

/// Writes a manifest. If a checkpoint of this iteration exists it is kept, since every generation computes the same
/// state; a damaged one is set aside first.
async fn write(run: &Run, manifest: &Manifest) -> Result<String, Error> {
    let refused = match run.commit(manifest).await {
        Err(error @ Error::AlreadyExists { .. }) => error,
        other => return other,
    };
    let key = layout::manifest_key(manifest.iteration);
    if run.damage(&key).await?.is_none() {
        return Ok(key);
    }
    tracing::warn!(reason = %refused, "the existing checkpoint is damaged: it is set aside");
    run.set_aside(manifest.iteration).await?;
    run.commit(manifest).await
}

/// A checkpoint in the form in which storage writes it.
fn manifest(checkpoint: Checkpoint) -> Manifest {
    let Checkpoint { generation, iteration, shards } = checkpoint;
    Manifest::new(iteration, generation.0, shards.into_iter().map(entry).collect())
}

fn entry(receipt: ShardReceipt) -> Shard {
    let ShardReceipt { rank, key, bytes, sha256, .. } = receipt;
    Shard { rank, key, bytes, sha256 }
}
