//! The rule for which checkpoints are kept, and the removal of the others.
//!
//! A checkpoint's manifest is removed first: from then on it does not exist, and its shards are orphans for this sweep
//! or a later one. The caller says which orphans may be removed: others may be about to be committed.

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroU64,
};

use crate::{Error, Run, layout};

/// Which checkpoints are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// The number of the newest to keep; without it all are kept.
    pub keep_last: Option<u64>,
    /// Those whose iteration is a multiple of this are kept too.
    pub keep_every: Option<NonZeroU64>,
}

/// The result of a sweep.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Iterations of the checkpoints that were removed.
    pub checkpoints: Vec<u64>,
    /// Objects that belonged to no checkpoint.
    pub orphans: usize,
}

/// The committed checkpoints that may be removed: never the newest one, never one in use.
#[must_use]
pub fn unneeded(committed: &BTreeSet<u64>, policy: Policy, in_use: &BTreeSet<u64>) -> Vec<u64> {
    let Some(newest) = policy.keep_last else { return Vec::new() };
    // The newest one always stays.
    let newest = usize::try_from(newest).unwrap_or(usize::MAX).max(1);
    let old = committed.iter().rev().skip(newest).copied();
    let kept = |iteration: &u64| {
        in_use.contains(iteration)
            || policy.keep_every.is_some_and(|every| iteration.is_multiple_of(every.get()))
    };
    old.filter(|iteration| !kept(iteration)).collect()
}

impl Run {
    /// Removes the checkpoints that the policy does not keep, and orphans up to an iteration. Up to that iteration no
    /// new checkpoint may be committed, except those `in_use`, whose objects are kept because they are being read or
    /// committed.
    ///
    /// # Errors
    /// The store's error. Objects that were not removed are found by the next sweep.
    pub async fn sweep(&self, policy: Policy, in_use: &BTreeSet<u64>, up_to: u64) -> Result<Swept, Error> {
        let mut folders: BTreeMap<u64, Vec<String>> = BTreeMap::new();
        for (key, _) in self.list(layout::CHECKPOINTS).await? {
            if let Some(iteration) = layout::checkpoint_iteration(&key) {
                folders.entry(iteration).or_default().push(key);
            }
        }
        let committed: BTreeSet<u64> = folders
            .iter()
            .filter(|(iteration, keys)| keys.contains(&layout::manifest_key(**iteration)))
            .map(|(iteration, _)| *iteration)
            .collect();
        let unneeded = unneeded(&committed, policy, in_use);
        for iteration in &unneeded {
            self.delete(&layout::manifest_key(*iteration)).await?;
        }
        let mut orphans = 0;
        for (iteration, keys) in folders {
            if in_use.contains(&iteration) || iteration > up_to {
                continue;
            }
            let needed = if unneeded.contains(&iteration) || !committed.contains(&iteration) {
                BTreeSet::new()
            } else {
                match self.needed(iteration, &keys).await? {
                    Some(needed) => needed,
                    // Its manifest cannot be read, so it is not known which objects belong to it.
                    None => continue,
                }
            };
            for key in keys.iter().filter(|key| !needed.contains(*key)) {
                if unneeded.contains(&iteration) && *key == layout::manifest_key(iteration) {
                    continue;
                }
                self.delete(key).await?;
                orphans += usize::from(!unneeded.contains(&iteration));
            }
        }
        orphans += self.remove_parts(in_use, up_to).await;
        Ok(Swept { checkpoints: unneeded, orphans })
    }

    /// Removes what writers that died have left of files that they were writing into a local folder, which no listing shows:
    /// `<file>#<n>`. Returns how many there were.
    async fn remove_parts(&self, in_use: &BTreeSet<u64>, up_to: u64) -> usize {
        let Some(root) = self.root().folder() else { return 0 };
        let folder = root.join(self.path(layout::CHECKPOINTS).as_ref());
        let in_use = in_use.clone();
        let removal = tokio::task::spawn_blocking(move || {
            let ended = |name: &str| {
                name.parse().is_ok_and(|iteration: u64| iteration <= up_to && !in_use.contains(&iteration))
            };
            let below = |folder: &std::path::Path| {
                std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
            };
            let name = |path: &std::path::Path| path.file_name().and_then(|n| n.to_str()).map(str::to_owned);
            let is_part = |path: &std::path::Path| {
                let name = name(path);
                let number = name.as_deref().and_then(|name| Some(name.rsplit_once('#')?.1));
                number.is_some_and(|n| !n.is_empty() && n.bytes().all(|byte| byte.is_ascii_digit()))
            };
            let iterations = below(&folder).filter(|path| name(path).is_some_and(|name| ended(&name)));
            let attempts = iterations.flat_map(|iteration| below(&iteration).collect::<Vec<_>>());
            let parts =
                attempts.flat_map(|attempt| below(&attempt).collect::<Vec<_>>()).filter(|path| is_part(path));
            parts.filter(|part| std::fs::remove_file(part).is_ok()).count()
        });
        removal.await.unwrap_or_default()
    }

    /// The objects of a committed checkpoint; `None` when its manifest cannot be read.
    async fn needed(&self, iteration: u64, keys: &[String]) -> Result<Option<BTreeSet<String>>, Error> {
        let manifest_key = layout::manifest_key(iteration);
        let attempts: BTreeSet<_> =
            keys.iter().filter_map(|key| key.rsplit_once('/')).map(|(f, _)| f).collect();
        if attempts.len() <= 2 {
            // They are in its own folder and in that of one attempt: the manifest's.
            return Ok(Some(keys.iter().cloned().collect()));
        }
        match self.manifest(&manifest_key).await {
            Ok(manifest) => {
                let shards = manifest.shards.into_iter().map(|shard| shard.key);
                Ok(Some(shards.chain([manifest_key]).collect()))
            }
            Err(Error::Damaged { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_needed_stays(
            committed in prop::collection::btree_set(0..500_u64, 0..30),
            in_use in prop::collection::btree_set(0..500_u64, 0..5),
            keep_last in prop::option::of(0..8_u64),
            keep_every in 0..100_u64,
        ) {
            let policy = Policy { keep_last, keep_every: NonZeroU64::new(keep_every) };
            let gone = unneeded(&committed, policy, &in_use);
            let newest: Vec<u64> =
                committed.iter().rev().take(keep_last.unwrap_or_default().max(1) as usize).copied().collect();
            for iteration in &gone {
                prop_assert!(committed.contains(iteration) && !in_use.contains(iteration));
                prop_assert!(!newest.contains(iteration));
                prop_assert!(keep_every == 0 || iteration % keep_every != 0);
            }
            // No other object stays.
            if keep_last.is_some() {
                for iteration in committed.iter().filter(|i| !gone.contains(i)) {
                    prop_assert!(
                        newest.contains(iteration)
                            || in_use.contains(iteration)
                            || (keep_every > 0 && iteration % keep_every == 0)
                    );
                }
            } else {
                prop_assert!(gone.is_empty());
            }
        }
    }
}
