//! Object storage: the journal, shards and manifests. Everything is created once and never changed.

use std::collections::{BTreeMap, BTreeSet};

use potstill_core::{
    ledger::{Checkpoint, CommittedCheckpoint},
    record::{Record, Unreadable},
};
use potstill_proto::cursor::Cursor;

use crate::state::State;

/// A manifest and whether its shards are readable.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// Its content.
    pub checkpoint: Checkpoint,
    /// Whether its shards can still be read.
    pub whole: bool,
}

impl Manifest {
    /// The state in its shards.
    #[must_use]
    pub fn state(&self) -> State {
        let Checkpoint { iteration, shards, .. } = &self.checkpoint;
        let lineage = shards.first().and_then(|shard| u64::from_str_radix(&shard.sha256, 16).ok());
        State { cursor: Cursor::boundary(*iteration), lineage: lineage.unwrap_or_default() }
    }
}

/// One run's folder.
#[derive(Debug, Default)]
pub struct Storage {
    journal: Vec<Vec<u8>>,
    /// By iteration.
    manifests: BTreeMap<u64, Manifest>,
    /// Shards as (iteration, generation, rank).
    shards: BTreeSet<(u64, u64, u32)>,
}

/// The key of an iteration's manifest.
#[must_use]
pub fn manifest_key(iteration: u64) -> String {
    format!("checkpoints/{iteration:012}/manifest.json")
}

impl Storage {
    /// How many records the journal has.
    #[must_use]
    pub fn records(&self) -> usize {
        self.journal.len()
    }

    /// Creates the record with this number. False when it exists already: another coordinator has written it.
    ///
    /// # Errors
    /// The record has no encoding.
    pub fn append(&mut self, number: usize, record: &Record) -> Result<bool, String> {
        if number != self.journal.len() {
            return Ok(false);
        }
        self.journal.push(record.encode().map_err(|error| error.to_string())?);
        Ok(true)
    }

    /// The whole journal.
    ///
    /// # Errors
    /// A record cannot be read.
    pub fn history(&self) -> Result<Vec<Record>, Unreadable> {
        self.journal.iter().map(|bytes| Record::decode(bytes)).collect()
    }

    /// Writes a rank's shard of a checkpoint.
    pub fn write_shard(&mut self, iteration: u64, generation: u64, rank: u32) {
        self.shards.insert((iteration, generation, rank));
    }

    /// Writes a manifest, create-only, and returns its key. A whole one that exists already counts as written, since both
    /// hold the same state; a damaged one is set aside.
    pub fn commit(&mut self, checkpoint: &Checkpoint) -> String {
        let iteration = checkpoint.iteration;
        let exists = self.manifests.get(&iteration).is_some_and(|manifest| manifest.whole);
        if !exists || self.is_torn(iteration) {
            self.manifests.insert(iteration, Manifest { checkpoint: checkpoint.clone(), whole: true });
        }
        manifest_key(iteration)
    }

    /// The checkpoints that are complete as far as a listing shows, oldest first.
    #[must_use]
    pub fn survey(&self) -> Vec<CommittedCheckpoint> {
        self.committed().into_iter().filter(|checkpoint| !self.is_torn(checkpoint.iteration)).collect()
    }

    /// All manifests, oldest first.
    #[must_use]
    pub fn committed(&self) -> Vec<CommittedCheckpoint> {
        let committed = |iteration: &u64| CommittedCheckpoint {
            iteration: *iteration,
            manifest_key: manifest_key(*iteration),
        };
        self.manifests.keys().map(committed).collect()
    }

    /// The manifest of an iteration.
    #[must_use]
    pub fn manifest(&self, iteration: u64) -> Option<&Manifest> {
        self.manifests.get(&iteration)
    }

    /// The manifest under a key.
    #[must_use]
    pub fn read(&self, key: &str) -> Option<&Manifest> {
        self.manifests.iter().find(|(iteration, _)| manifest_key(**iteration) == key).map(|(_, m)| m)
    }

    /// Damages a shard.
    pub fn damage(&mut self, iteration: u64) {
        if let Some(manifest) = self.manifests.get_mut(&iteration) {
            manifest.whole = false;
        }
    }

    /// The ranks whose shards of a checkpoint are missing.
    #[must_use]
    pub fn unseen(&self, checkpoint: &Checkpoint) -> BTreeSet<u32> {
        let Checkpoint { generation, iteration, shards } = checkpoint;
        let missing = |rank: &u32| !self.shards.contains(&(*iteration, generation.0, *rank));
        shards.iter().map(|shard| shard.rank).filter(missing).collect()
    }

    /// Whether a shard of a manifest is missing.
    #[must_use]
    pub fn is_torn(&self, iteration: u64) -> bool {
        self.manifests.get(&iteration).is_some_and(|manifest| !self.unseen(&manifest.checkpoint).is_empty())
    }

    /// Removes all but the newest `keep` checkpoints and those in use, and shards that no manifest names, up to an
    /// iteration.
    pub fn retain(&mut self, in_use: &BTreeSet<u64>, up_to: u64, keep: usize) {
        let newest = self.manifests.keys().rev().take(keep).copied();
        let kept: BTreeSet<_> = newest.chain(in_use.iter().copied()).collect();
        self.manifests.retain(|iteration, _| kept.contains(iteration));
        let manifests = &self.manifests;
        self.shards.retain(|(iteration, of, _)| {
            let named = manifests.get(iteration).is_some_and(|m| m.checkpoint.generation.0 == *of);
            named || *iteration > up_to || in_use.contains(iteration)
        });
    }
}
