//! Tests that a sweep removes old checkpoints and orphans in an order that never leaves half a checkpoint, that damaged
//! checkpoints are found, and that copies are exact.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{collections::BTreeSet, num::NonZeroU64};

use common::{root_at, run_in_memory};
use potstill_storage::{
    Error, Run,
    checkpoint::Manifest,
    layout,
    retention::{Policy, Swept},
};

/// A committed checkpoint of two shards.
async fn commit(run: &Run, iteration: u64, generation: u64) {
    let mut shards = Vec::new();
    for rank in 0..2 {
        shards.push(attempt(run, iteration, generation, rank).await);
    }
    run.commit(&Manifest::new(iteration, generation, shards)).await.unwrap();
}

async fn attempt(
    run: &Run,
    iteration: u64,
    generation: u64,
    rank: u32,
) -> potstill_storage::checkpoint::Shard {
    let key = layout::shard_key(iteration, &format!("g{generation}"), rank, 2);
    run.write_shard(&key, rank, format!("{iteration} {generation} {rank}").into()).await.unwrap().shard
}

#[tokio::test]
async fn old_checkpoints_and_orphans_go_and_everything_else_stays() {
    let folder = tempfile::tempdir().unwrap();
    for run in [run_in_memory(), common::run(&root_at(folder.path()))] {
        for iteration in [10, 20, 30, 40, 50] {
            commit(&run, iteration, 2).await;
        }
        // A generation that died while it saved, before a committed checkpoint and beside one.
        attempt(&run, 15, 1, 0).await;
        let beside = attempt(&run, 40, 1, 1).await;
        // Shards that may be about to be committed: a later checkpoint may exist already.
        let coming = attempt(&run, 60, 2, 0).await;
        commit(&run, 70, 2).await;

        let policy = Policy { keep_last: Some(2), keep_every: NonZeroU64::new(20) };
        let swept = run.sweep(policy, &BTreeSet::from([30]), 50).await.unwrap();
        assert_eq!(swept, Swept { checkpoints: vec![10], orphans: 2 });
        assert_eq!(run.checkpoints().await.unwrap(), [20, 30, 40, 50, 70]);
        assert!(run.read_shard(&coming).await.is_ok());
        assert!(matches!(run.read_shard(&beside).await, Err(Error::Damaged { .. })));
        let (whole, damaged) = run.survey().await.unwrap();
        assert_eq!(whole.iter().map(|m| m.iteration).collect::<Vec<_>>(), [20, 30, 40, 50, 70]);
        assert!(damaged.is_empty());
        // A second sweep removes nothing.
        let again = run.sweep(policy, &BTreeSet::from([30]), 50).await.unwrap();
        assert_eq!(again, Swept::default());
        assert_eq!(run.sweep(policy, &BTreeSet::new(), 50).await.unwrap().checkpoints, [30]);
    }
}

#[tokio::test]
async fn what_an_interrupted_sweep_left_is_swept_later() {
    let run = run_in_memory();
    for iteration in [10, 20] {
        commit(&run, iteration, 1).await;
    }
    // A sweep was interrupted after it had moved the manifest.
    run.set_aside(10).await.unwrap();
    let swept =
        run.sweep(Policy { keep_last: Some(1), keep_every: None }, &BTreeSet::new(), 50).await.unwrap();
    assert_eq!(swept, Swept { checkpoints: vec![], orphans: 3 });
    assert_eq!(run.checkpoints().await.unwrap(), [20]);
}

#[tokio::test]
async fn a_policy_that_keeps_all_removes_none() {
    let run = run_in_memory();
    for iteration in [10, 20, 30] {
        commit(&run, iteration, 1).await;
    }
    let swept = run.sweep(Policy::default(), &BTreeSet::new(), 50).await.unwrap();
    assert_eq!(swept, Swept::default());
}

#[tokio::test]
async fn damaged_checkpoints_are_told_from_whole_ones_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let run = common::run(&root_at(folder.path()));
    for iteration in [10, 20, 30, 40] {
        commit(&run, iteration, 1).await;
    }
    let shard = |iteration, rank| run.describe(&layout::shard_key(iteration, "g1", rank, 2));
    std::fs::remove_file(shard(20, 1)).unwrap();
    std::fs::write(shard(30, 0), "short").unwrap();
    std::fs::write(run.describe(&layout::manifest_key(40)), "{").unwrap();
    let (whole, damaged) = run.survey().await.unwrap();
    assert_eq!(whole.iter().map(|m| m.iteration).collect::<Vec<_>>(), [10]);
    let damaged: Vec<_> = damaged.iter().map(ToString::to_string).collect();
    assert!(damaged[0].contains(&shard(20, 1)) && damaged[0].contains("missing"), "{damaged:?}");
    assert!(damaged[1].contains(&shard(30, 0)) && damaged[1].contains("5 bytes"), "{damaged:?}");
    assert!(damaged[2].contains("000000000040/manifest.json"), "{damaged:?}");

    // Its iteration can be committed again.
    run.set_aside(20).await.unwrap();
    commit(&run, 20, 2).await;
    assert_eq!(run.manifest(&layout::manifest_key(20)).await.unwrap().generation, 2);
}

#[tokio::test]
async fn a_checkpoint_is_copied_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let root = root_at(folder.path());
    let (from, to) = (common::run(&root), root.run(&"two".parse().unwrap()));
    commit(&from, 10, 3).await;
    let manifest = from.copy_checkpoint(10, &to).await.unwrap();
    assert_eq!(to.survey().await.unwrap().0, [manifest]);

    commit(&from, 20, 3).await;
    std::fs::write(from.describe(&layout::shard_key(20, "g3", 1, 2)), "20 3 2").unwrap();
    let error = from.copy_checkpoint(20, &to).await.unwrap_err();
    assert!(
        error.to_string().contains("rank-001-of-002") && error.to_string().contains("SHA-256"),
        "{error}"
    );
    assert_eq!(to.checkpoints().await.unwrap(), [10]);
}

#[tokio::test]
async fn what_a_writer_that_died_left_of_a_file_goes() {
    let folder = tempfile::tempdir().unwrap();
    let run = common::run(&root_at(folder.path()));
    commit(&run, 20, 1).await;
    commit(&run, 40, 1).await;
    // As the local store names the files that it writes before it moves them to their place.
    let part = |iteration: u64, name: &str| {
        let key = layout::shard_key(iteration, "g2", 0, 2);
        let path = folder.path().join("runs/one").join(key).with_file_name(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "half").unwrap();
        path
    };
    let [old, live] = [20, 60].map(|iteration| part(iteration, "rank-000.safetensors#1"));
    let policy = Policy { keep_last: Some(5), keep_every: None };
    let swept = run.sweep(policy, &BTreeSet::new(), 40).await.unwrap();
    assert_eq!((swept.checkpoints.len(), swept.orphans), (0, 1));
    assert_eq!((old.exists(), live.exists()), (false, true));
}
