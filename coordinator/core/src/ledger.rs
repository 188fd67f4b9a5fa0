//! Which checkpoints exist: receipts of shards are gathered until every rank's is there, then the manifest is written.
//!
//! Only the live generation's receipts count. A commit that is under way when its generation ends is still completed:
//! its shards are complete, and equal to what the next generation would compute again.

use std::collections::BTreeMap;

use potstill_proto::{cursor::Generation, wire::ShardReceipt};

/// The content of a manifest.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// The generation whose ranks wrote its shards.
    pub generation: Generation,
    /// Completed iterations.
    pub iteration: u64,
    /// One receipt for each rank, in the order of ranks.
    pub shards: Vec<ShardReceipt>,
}

impl Checkpoint {
    /// Bytes of all shards.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.bytes).sum()
    }
}

/// A checkpoint whose manifest is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommittedCheckpoint {
    /// Completed iterations.
    pub iteration: u64,
    /// Its manifest's key below the run's folder.
    pub manifest_key: String,
}

/// The ledger of one run.
#[derive(Debug)]
pub struct Ledger {
    /// Oldest first.
    committed: Vec<CommittedCheckpoint>,
    /// Those whose manifests were sent to the storage, which answered with an error: they may exist.
    possible: BTreeMap<u64, String>,
    generation: Generation,
    world_size: u32,
    collecting: BTreeMap<u64, BTreeMap<u32, ShardReceipt>>,
    committing: BTreeMap<u64, Checkpoint>,
    failed: BTreeMap<u64, String>,
}

impl Ledger {
    /// A ledger of the checkpoints that storage holds, oldest first.
    #[must_use]
    pub fn new(committed: Vec<CommittedCheckpoint>) -> Self {
        Self {
            committed,
            possible: BTreeMap::new(),
            generation: Generation(0),
            world_size: 0,
            collecting: BTreeMap::new(),
            committing: BTreeMap::new(),
            failed: BTreeMap::new(),
        }
    }

    /// Starts a new generation: incomplete checkpoints of the old one are dropped.
    pub fn open(&mut self, generation: Generation, world_size: u32) {
        self.generation = generation;
        self.world_size = world_size;
        self.collecting.clear();
        self.failed.clear();
    }

    /// Takes a receipt from `rank` of the live generation. Returns the checkpoint when this receipt completes it and
    /// its manifest must be written.
    ///
    /// # Errors
    /// Why the receipt is ignored.
    pub fn receipt(&mut self, rank: u32, receipt: ShardReceipt) -> Result<Option<Checkpoint>, String> {
        let iteration = receipt.iteration;
        if receipt.rank != rank {
            return Err(format!("a receipt of rank {} came from rank {rank}", receipt.rank));
        }
        if self.has(iteration) {
            return Err(format!("iteration {iteration} or a later one is committed already"));
        }
        self.collecting.entry(iteration).or_default().insert(rank, receipt);
        Ok(self.complete(iteration))
    }

    /// The checkpoint of `iteration`, when all its receipts are there and its manifest is not being written already.
    fn complete(&mut self, iteration: u64) -> Option<Checkpoint> {
        let complete = self.collecting.get(&iteration)?.len() == self.world_size as usize;
        if !complete || self.committing.contains_key(&iteration) {
            return None;
        }
        let shards = self.collecting.remove(&iteration)?.into_values().collect();
        let checkpoint = Checkpoint { generation: self.generation, iteration, shards };
        self.committing.insert(iteration, checkpoint.clone());
        Some(checkpoint)
    }

    /// The manifest of `iteration` was written. Returns its checkpoint.
    pub fn committed(&mut self, iteration: u64, manifest_key: String) -> Option<Checkpoint> {
        let checkpoint = self.committing.remove(&iteration)?;
        self.possible.remove(&iteration);
        // The answer for an older one may come later: it is the next best where the newer one is damaged.
        if let Err(place) = self.committed.binary_search_by_key(&iteration, |other| other.iteration) {
            self.committed.insert(place, CommittedCheckpoint { iteration, manifest_key });
        }
        self.collecting.retain(|i, _| *i > iteration);
        self.failed.retain(|i, _| *i > iteration);
        Some(checkpoint)
    }

    /// The manifest of `iteration` could not be written, or only its answer was lost: then it is under `manifest_key`. Returns a
    /// checkpoint to commit when another generation has meanwhile completed the same iteration.
    pub fn commit_failed(
        &mut self,
        iteration: u64,
        reason: String,
        manifest_key: Option<String>,
    ) -> Option<Checkpoint> {
        let failed = self.committing.remove(&iteration)?;
        self.possible.extend(manifest_key.map(|key| (iteration, key)));
        let again = self.complete(iteration);
        // What an earlier generation could not commit says nothing about this one.
        if again.is_none() && failed.generation == self.generation {
            self.failed.insert(iteration, reason);
        }
        again
    }

    /// A rank could not write its shard.
    pub fn shard_failed(&mut self, iteration: u64, reason: String) {
        self.failed.insert(iteration, reason);
    }

    /// The newest checkpoint that exists.
    #[must_use]
    pub fn newest(&self) -> Option<&CommittedCheckpoint> {
        self.committed.last()
    }

    /// Drops a checkpoint that cannot be read: the one before it becomes the newest. False when there is no such
    /// checkpoint.
    pub fn mark_damaged(&mut self, manifest_key: &str) -> bool {
        let before = self.committed.len();
        self.committed.retain(|checkpoint| checkpoint.manifest_key != manifest_key);
        self.committed.len() < before
    }

    /// Counts on the newest of those that may exist, once no checkpoint is left. False when there is none.
    pub fn recall(&mut self) -> bool {
        debug_assert!(self.committed.is_empty(), "a checkpoint that is known to exist comes first");
        let newest = self.possible.pop_last();
        self.committed
            .extend(newest.map(|(iteration, manifest_key)| CommittedCheckpoint { iteration, manifest_key }));
        !self.committed.is_empty()
    }

    /// Whether there is a checkpoint with this manifest.
    #[must_use]
    pub fn knows(&self, manifest_key: &str) -> bool {
        self.committed.iter().any(|checkpoint| checkpoint.manifest_key == manifest_key)
    }

    /// Whether a checkpoint of `iteration` or later exists.
    #[must_use]
    pub fn has(&self, iteration: u64) -> bool {
        self.newest().is_some_and(|newest| newest.iteration >= iteration)
    }

    /// Whether the manifest of `iteration` is being written.
    #[must_use]
    pub fn is_committing(&self, iteration: u64) -> bool {
        self.committing.contains_key(&iteration)
    }

    /// The checkpoint of `iteration` whose manifest is being written.
    #[must_use]
    pub fn committing_of(&self, iteration: u64) -> Option<&Checkpoint> {
        self.committing.get(&iteration)
    }

    /// The checkpoints whose manifests are being written, oldest first.
    pub fn committing(&self) -> impl DoubleEndedIterator<Item = u64> {
        self.committing.keys().copied()
    }

    /// Why the live generation has no checkpoint of `iteration`, if it tried to make one.
    #[must_use]
    pub fn failure(&self, iteration: u64) -> Option<&str> {
        self.failed.get(&iteration).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receipt(iteration: u64, rank: u32) -> ShardReceipt {
        ShardReceipt { iteration, rank, bytes: 10, key: format!("{iteration}/{rank}"), ..Default::default() }
    }

    fn ledger() -> Ledger {
        let mut ledger = Ledger::new(Vec::new());
        ledger.open(Generation(1), 2);
        ledger
    }

    #[test]
    fn a_checkpoint_is_committed_when_every_rank_has_a_receipt() {
        let mut ledger = ledger();
        assert_eq!(ledger.receipt(1, receipt(5, 1)), Ok(None));
        assert_eq!(ledger.receipt(1, receipt(5, 1)), Ok(None));
        let checkpoint = ledger.receipt(0, receipt(5, 0)).unwrap().unwrap();
        assert_eq!(checkpoint.shards, [receipt(5, 0), receipt(5, 1)]);
        assert_eq!((checkpoint.bytes(), ledger.has(5)), (20, false));
        assert_eq!(ledger.committed(5, "k".into()), Some(checkpoint));
        assert_eq!(ledger.newest().unwrap().manifest_key, "k");
        assert!(ledger.receipt(0, receipt(5, 0)).is_err());
        assert!(ledger.receipt(0, receipt(6, 1)).unwrap_err().contains("came from rank 0"));
    }

    #[test]
    fn an_older_checkpoint_whose_answer_comes_later_counts_too() {
        let mut ledger = ledger();
        for iteration in [3, 4] {
            for rank in 0..2 {
                let _ = ledger.receipt(rank, receipt(iteration, rank));
            }
        }
        assert!(
            ledger.committed(4, "four".into()).is_some() && ledger.committed(3, "three".into()).is_some()
        );
        assert_eq!(ledger.newest().unwrap().iteration, 4);
        assert!(ledger.mark_damaged("four"));
        assert_eq!(ledger.newest().unwrap().manifest_key, "three");
    }

    #[test]
    fn receipts_of_an_old_generation_are_void() {
        let mut ledger = ledger();
        assert_eq!(ledger.receipt(0, receipt(5, 0)), Ok(None));
        ledger.open(Generation(2), 2);
        assert_eq!(ledger.receipt(1, receipt(5, 1)), Ok(None));
        assert_eq!(ledger.receipt(0, receipt(5, 0)).unwrap().unwrap().generation, Generation(2));
    }

    #[test]
    fn a_commit_that_fails_is_tried_again_only_with_another_generations_shards() {
        let mut ledger = Ledger::new(Vec::new());
        ledger.open(Generation(1), 1);
        assert!(ledger.receipt(0, receipt(5, 0)).unwrap().is_some());
        ledger.open(Generation(2), 1);
        assert_eq!(ledger.receipt(0, receipt(5, 0)), Ok(None));
        let again = ledger.commit_failed(5, "disk full".into(), None).unwrap();
        assert_eq!(again.generation, Generation(2));
        assert_eq!(ledger.commit_failed(5, "disk full".into(), None), None);
        assert_eq!(ledger.failure(5), Some("disk full"));
    }
}
