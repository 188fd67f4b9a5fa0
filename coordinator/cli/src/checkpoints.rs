//! `potstill checkpoint`: lists, verifies and restores the checkpoints of a run.

use anyhow::{Context, ensure};
use comfy_table::{CellAlignment, Table, presets};
use potstill_storage::{Run, checkpoint::Manifest, layout::manifest_key};
use serde::Serialize;

/// A committed checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Entry {
    /// Completed iterations.
    pub iteration: u64,
    /// The generation that wrote it; none when the manifest cannot be read.
    pub generation: Option<u64>,
    /// The number of its shards.
    pub shards: Option<usize>,
    /// Bytes of all shards.
    pub bytes: Option<u64>,
    /// Path or URL of its manifest.
    pub manifest: String,
    /// Whether every shard was read and has the recorded length and checksum; none when the shards were not read.
    pub verified: Option<bool>,
    /// The error, if it cannot be read or is damaged.
    pub problem: Option<String>,
}

/// Every committed checkpoint of a run, oldest first. With `verify` each shard is read and its checksum compared.
///
/// # Errors
/// There is no such run, or the store does not answer. A damaged checkpoint is an entry, not an error.
pub async fn list(run: &Run, verify: bool) -> anyhow::Result<Vec<Entry>> {
    run.specification()
        .await?
        .with_context(|| format!("there is no run {}: {} is missing", run.id(), run.describe("run.toml")))?;
    let mut entries = Vec::new();
    for iteration in run.checkpoints().await? {
        let key = manifest_key(iteration);
        let manifest = run.manifest(&key).await;
        let mut entry = Entry {
            iteration,
            generation: None,
            shards: None,
            bytes: None,
            manifest: run.describe(&key),
            verified: None,
            problem: None,
        };
        match manifest {
            Ok(manifest) => {
                entry.generation = Some(manifest.generation);
                entry.shards = Some(manifest.shards.len());
                entry.bytes = Some(manifest.shards.iter().map(|shard| shard.bytes).sum());
                if verify {
                    entry.problem = damage(run, &manifest).await?;
                    entry.verified = Some(entry.problem.is_none());
                }
            }
            Err(error @ potstill_storage::Error::Damaged { .. }) => {
                entry.verified = Some(false);
                entry.problem = Some(error.to_string());
            }
            Err(error) => return Err(error.into()),
        }
        entries.push(entry);
    }
    Ok(entries)
}

/// The first shard whose content is not what was written.
async fn damage(run: &Run, manifest: &Manifest) -> anyhow::Result<Option<String>> {
    for shard in &manifest.shards {
        match run.read_shard_in_pieces(shard, |_| {}).await {
            Ok(()) => {}
            Err(error @ potstill_storage::Error::Damaged { .. }) => return Ok(Some(error.to_string())),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

/// Makes the run `to`, with the specification of `from` and a copy of its checkpoint of `iteration`, or of the newest
/// complete one. Returns the iteration.
///
/// # Errors
/// There is no such run or checkpoint, it is damaged, or `to` exists.
pub async fn restore(from: &Run, to: &Run, iteration: Option<u64>) -> anyhow::Result<u64> {
    let specification = from.specification().await?;
    let specification = specification.with_context(|| {
        format!("there is no run {}: {} is missing", from.id(), from.describe("run.toml"))
    })?;
    ensure!(to.specification().await?.is_none(), "run {} exists already; give another name to --to", to.id());
    let iteration = match iteration {
        Some(iteration) => iteration,
        None => {
            let (whole, _) = from.survey().await?;
            whole.last().with_context(|| format!("run {} has no complete checkpoint", from.id()))?.iteration
        }
    };
    // The specification is written last: the run exists from then on.
    from.copy_checkpoint(iteration, to).await?;
    to.freeze(&specification).await?;
    Ok(iteration)
}

/// The list as a table, or as JSON.
#[must_use]
pub fn table(entries: &[Entry]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header([
        "iteration",
        "generation",
        "shards",
        "MiB",
        "state",
    ]);
    for entry in entries {
        let number = |x: Option<String>| x.unwrap_or_else(|| "–".to_owned());
        let state = match (&entry.problem, entry.verified) {
            (Some(problem), _) => problem.clone(),
            (None, Some(_)) => "whole".to_owned(),
            (None, None) => "committed".to_owned(),
        };
        table.add_row([
            entry.iteration.to_string(),
            number(entry.generation.map(|g| g.to_string())),
            number(entry.shards.map(|s| s.to_string())),
            number(entry.bytes.map(|b| format!("{:.1}", b as f64 / f64::from(1 << 20)))),
            state,
        ]);
    }
    for column in table.column_iter_mut().take(4) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
