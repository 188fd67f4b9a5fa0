//! What every store must do, so that a run can be kept in it. Each store's test calls this with a server of its own.

use std::{collections::BTreeSet, num::NonZeroU64};

use bytes::Bytes;
use potstill_storage::{
    Error, Root, Run,
    checkpoint::Manifest,
    journal::Journal,
    layout,
    retention::{Policy, Swept},
};

/// A root that is empty keeps all of it.
pub async fn is_kept_by(root: &Root) {
    root.probe().await.unwrap();
    let run = |name: &str| root.run(&name.parse().unwrap());
    the_first_write_stays(&run("created")).await;
    the_second_coordinator_fences_the_first(&run("fenced")).await;
    checkpoints_come_back_whole_or_are_named_and_old_ones_go(&run("saved")).await;
}

async fn the_first_write_stays(run: &Run) {
    run.create("a/b", "first".into()).await.unwrap();
    // The same content again is the writer's own.
    run.create("a/b", "first".into()).await.unwrap();
    let error = run.create("a/b", "second".into()).await.unwrap_err();
    assert!(matches!(error, Error::AlreadyExists { .. }), "{error}");
    assert_eq!(run.get("a/b").await.unwrap().unwrap(), "first");
}

async fn the_second_coordinator_fences_the_first(run: &Run) {
    let (mut one, _) = Journal::open(run).await.unwrap();
    one.append("one, 0".into()).await.unwrap();
    let (mut two, records) = Journal::open(run).await.unwrap();
    assert_eq!(records, ["one, 0"]);
    two.append("two, 1".into()).await.unwrap();
    assert!(matches!(one.append("one, 1".into()).await, Err(Error::Fenced { .. })));
    let (_, records) = Journal::open(run).await.unwrap();
    assert_eq!(records, ["one, 0", "two, 1"]);
}

async fn checkpoints_come_back_whole_or_are_named_and_old_ones_go(run: &Run) {
    // The first is uploaded in parts.
    let large: Bytes = (0..20_u32 << 20).map(|n| (n % 251) as u8).collect();
    for (iteration, bytes) in [(10, large.clone()), (20, "small".into()), (30, "small".into())] {
        let key = layout::shard_key(iteration, "g1", 0, 1);
        let shard = run.write_shard(&key, 0, bytes).await.unwrap().shard;
        run.commit(&Manifest::new(iteration, 1, vec![shard])).await.unwrap();
    }
    let (whole, damaged) = run.survey().await.unwrap();
    assert_eq!((whole.len(), damaged.len()), (3, 0));
    assert!(run.read_shard(&whole[0].shards[0]).await.unwrap() == large);

    run.put(&whole[1].shards[0].key, "smell".into()).await.unwrap();
    let error = run.read_shard(&whole[1].shards[0]).await.unwrap_err();
    let place = run.describe(&whole[1].shards[0].key);
    assert!(error.to_string().contains(&format!("{place} is damaged")), "{error}");

    let orphan = layout::shard_key(15, "g1", 0, 2);
    run.write_shard(&orphan, 0, "left behind".into()).await.unwrap();
    let policy = Policy { keep_last: Some(1), keep_every: NonZeroU64::new(20) };
    let swept = run.sweep(policy, &BTreeSet::new(), 30).await.unwrap();
    assert_eq!(swept, Swept { checkpoints: vec![10], orphans: 1 });
    assert_eq!(run.checkpoints().await.unwrap(), [20, 30]);
}
