//! Tests against S3 over the wire, on a server in this process: unlike moto's (`s3.rs`) it honors the create-only
//! condition under concurrent writes, loses answers on demand, and needs no installation.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod s3_server;

use std::{collections::BTreeSet, num::NonZeroU64};

use bytes::Bytes;
use futures::future::join_all;
use potstill_storage::{
    Error, Root, Run,
    checkpoint::Manifest,
    journal::Journal,
    layout,
    retention::{Policy, Swept},
};
use s3_server::{Lost, Server};

const MIB: usize = 1 << 20;

fn run(root: &Root) -> Run {
    root.run(&"one".parse().unwrap())
}

/// Bytes without repetition.
fn content(length: usize) -> Bytes {
    (0..length).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// A committed checkpoint of shards with these lengths.
async fn commit(run: &Run, iteration: u64, lengths: &[usize]) -> Manifest {
    let world_size = lengths.len() as u32;
    let shards = lengths.iter().zip(0..).map(async |(length, rank)| {
        let key = layout::shard_key(iteration, "g1", rank, world_size);
        run.write_shard(&key, rank, content(*length)).await.unwrap().shard
    });
    let manifest = Manifest::new(iteration, 1, join_all(shards).await);
    run.commit(&manifest).await.unwrap();
    manifest
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_who_create_the_same_at_once_one_wins() {
    const WRITERS: usize = 32;
    let server = Server::start().await;
    server.let_meet(WRITERS);
    // Each its own client, as if each were its own process.
    let runs: Vec<Run> = (0..WRITERS).map(|_| run(&server.root())).collect();
    for key in 0..20 {
        let key = format!("journal/{key}");
        let answers = join_all(runs.iter().enumerate().map(|(writer, run)| {
            let (run, key) = (run.clone(), key.clone());
            tokio::spawn(async move { run.create(&key, writer.to_string().into()).await })
        }));
        let answers: Vec<_> = answers.await.into_iter().map(Result::unwrap).collect();
        let won: Vec<usize> = (0..WRITERS).filter(|&writer| answers[writer].is_ok()).collect();
        let [winner] = won[..] else { panic!("{key}: {won:?} have won") };
        for error in answers.into_iter().filter_map(Result::err) {
            assert!(matches!(error, Error::AlreadyExists { .. }), "{error}");
        }
        assert_eq!(runs[0].get(&key).await.unwrap().unwrap(), winner.to_string());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_coordinators_one_writes_each_record() {
    let server = Server::start().await;
    let mut expected: Vec<String> = Vec::new();
    for round in 0..30 {
        let open = async |name: &str| {
            let (journal, records) = Journal::open(&run(&server.root())).await.unwrap();
            (journal, records, format!("{name}, {round}"))
        };
        server.let_meet(1);
        let contenders = [open("one").await, open("two").await];
        server.let_meet(2);
        let appended = contenders.map(|(mut journal, records, record)| {
            assert_eq!(records, expected);
            tokio::spawn(async move { (journal.append(record.clone().into()).await, record) })
        });
        let (mut won, mut fenced) = (Vec::new(), 0);
        for (answer, record) in join_all(appended).await.into_iter().map(Result::unwrap) {
            match answer {
                Ok(()) => won.push(record),
                Err(Error::Fenced { place }) => {
                    assert!(place.ends_with(&layout::journal_key(round)), "{place}");
                    fenced += 1;
                }
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!((won.len(), fenced), (1, 1));
        expected.append(&mut won);
    }
}

#[tokio::test]
async fn a_checkpoint_in_parts_comes_back_whole_and_damage_is_named() {
    let server = Server::start().await;
    server.root().probe().await.unwrap();
    assert_eq!(server.keys(), [] as [&str; 0]);
    let run = run(&server.root());
    // In parts, in whole parts, at once, and empty.
    let lengths = [20 * MIB + 1, 16 * MIB, 8 * MIB, 0];
    let manifest = commit(&run, 20, &lengths).await;
    assert_eq!(server.open_uploads(), 0);
    let key = layout::manifest_key(20);
    assert_eq!(run.manifest(&key).await.unwrap(), manifest);
    for (shard, length) in manifest.shards.iter().zip(lengths) {
        assert!(run.read_shard(shard).await.unwrap() == content(length));
    }
    assert!(run.damage(&key).await.unwrap().is_none());
    let error = run.commit(&Manifest::new(20, 2, Vec::new())).await.unwrap_err();
    assert!(matches!(error, Error::AlreadyExists { .. }), "{error}");

    server.alter("rank-000-of-004.safetensors", |bytes| bytes[17 * MIB] ^= 1);
    let error = run.read_shard(&manifest.shards[0]).await.unwrap_err();
    let place = run.describe(&manifest.shards[0].key);
    assert_eq!(place, format!("s3://bucket/some/where/runs/one/{}", manifest.shards[0].key));
    assert!(error.to_string().contains(&format!("{place} is damaged: its SHA-256")), "{error}");
    assert!(run.damage(&key).await.unwrap().is_some());

    server.alter("rank-001-of-004.safetensors", |bytes| bytes.truncate(100));
    let (whole, damaged) = run.survey().await.unwrap();
    assert_eq!(whole, []);
    assert!(damaged[0].to_string().contains("rank-001-of-004.safetensors is damaged: it has 100 bytes"));
}

#[tokio::test]
async fn old_checkpoints_and_orphans_go() {
    let server = Server::start().await;
    let run = run(&server.root());
    for iteration in [10, 20, 30, 40, 50] {
        commit(&run, iteration, &[10, 20, 30]).await;
    }
    let orphan = layout::shard_key(35, "g1", 0, 2);
    run.write_shard(&orphan, 0, "left behind".into()).await.unwrap();
    assert_eq!(run.checkpoints().await.unwrap(), [10, 20, 30, 40, 50]);
    let policy = Policy { keep_last: Some(2), keep_every: NonZeroU64::new(20) };
    let swept = run.sweep(policy, &BTreeSet::new(), 50).await.unwrap();
    assert_eq!(swept, Swept { checkpoints: vec![30, 10], orphans: 1 });
    assert_eq!(run.checkpoints().await.unwrap(), [20, 40, 50]);
    // Three shards and a manifest each, and nothing else.
    assert_eq!(server.keys().len(), 3 * 4);
    let (whole, damaged) = run.survey().await.unwrap();
    assert_eq!((whole.len(), damaged.len()), (3, 0));
}

#[tokio::test]
async fn a_write_that_landed_is_our_own_though_its_answer_is_lost() {
    let server = Server::start().await;
    let run = run(&server.root());
    let (mut journal, _) = Journal::open(&run).await.unwrap();
    for (n, how) in [Lost::Replaced, Lost::CutOff].into_iter().enumerate() {
        let record = format!("{how:?}");
        server.lose_an_answer(how);
        journal.append(record.clone().into()).await.unwrap();
        assert_eq!(server.answers_lost(), 2 * n + 1, "{how:?}");
        assert_eq!(Journal::open(&run).await.unwrap().1.last().unwrap(), &record);

        // A write whose last answer is lost is repeated, in parts as well as at once.
        server.lose_an_answer(how);
        let key = layout::shard_key(n as u64, "g1", 0, 1);
        let shard = run.write_shard(&key, 0, content(20 * MIB)).await.unwrap().shard;
        assert_eq!(server.answers_lost(), 2 * n + 2, "{how:?}");
        assert!(run.read_shard(&shard).await.unwrap() == content(20 * MIB));
        assert_eq!(server.open_uploads(), 0);
    }
    // Another writer's object stays another's, also then.
    let (mut late, _) = Journal::open(&run).await.unwrap();
    journal.append("first".into()).await.unwrap();
    server.lose_an_answer(Lost::Replaced);
    assert!(matches!(late.append("second".into()).await, Err(Error::Fenced { .. })));
}

#[tokio::test]
async fn a_server_that_ignores_the_condition_is_refused() {
    let server = Server::start().await;
    server.root().probe().await.unwrap();
    server.ignore_conditions();
    let error = server.root().probe().await.unwrap_err();
    assert!(matches!(&error, Error::NotConditional { url } if url == "s3://bucket/some/where"), "{error}");
    assert!(error.to_string().contains("ignores conditional writes (If-None-Match: *)"), "{error}");
    assert_eq!(server.keys(), [] as [&str; 0]);
}
