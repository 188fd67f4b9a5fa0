//! Tests the create-only write, plain reads and writes, and the frozen specification.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::sync::Arc;

use bytes::Bytes;
use common::{Fault, Faulty, root_at, run, run_in, run_in_memory};
use object_store::memory::InMemory;
use potstill_storage::{Error, Run};

/// Writes one content, the same content again, then another one.
async fn creates_only(run: &Run) {
    run.create("a/b", "first".into()).await.unwrap();
    run.create("a/b", "first".into()).await.unwrap();
    let error = run.create("a/b", "second".into()).await.unwrap_err();
    assert!(matches!(&error, Error::AlreadyExists { place } if *place == run.describe("a/b")), "{error}");
    assert_eq!(run.get("a/b").await.unwrap().unwrap(), "first");
    run.create("a/empty", Bytes::new()).await.unwrap();
    run.create("a/empty", Bytes::new()).await.unwrap();
    assert!(run.create("a/empty", "x".into()).await.is_err());
}

#[tokio::test]
async fn in_memory_the_first_write_stays() {
    creates_only(&run_in_memory()).await;
}

#[tokio::test]
async fn on_disk_the_first_write_stays() {
    let folder = tempfile::tempdir().unwrap();
    creates_only(&run(&root_at(folder.path()))).await;
}

#[tokio::test(start_paused = true)]
async fn a_write_that_landed_is_a_success_whatever_the_answer() {
    for fault in [Fault::AnswerLost, Fault::WriteRepeated] {
        let run = run_in(Faulty::new(Arc::new(InMemory::new()), fault));
        run.create("a", "mine".into()).await.unwrap();
        let error = run.create("a", "other".into()).await.unwrap_err();
        assert!(matches!(error, Error::AlreadyExists { .. }), "{fault:?}: {error}");
        assert_eq!(run.get("a").await.unwrap().unwrap(), "mine");
    }
}

#[tokio::test(start_paused = true)]
async fn a_write_that_did_not_land_is_a_failure() {
    for fault in [Fault::WriteFails, Fault::BucketGone] {
        let run = run_in(Faulty::new(Arc::new(InMemory::new()), fault));
        for error in
            [run.create("a", "x".into()).await.unwrap_err(), run.put("a", "x".into()).await.unwrap_err()]
        {
            assert!(matches!(&error, Error::Store { operation: "write", .. }), "{fault:?}: {error}");
            assert!(error.to_string().contains(&run.describe("a")), "{error}");
        }
    }
}

#[tokio::test]
async fn of_many_writers_one_wins() {
    let folder = tempfile::tempdir().unwrap();
    for run in [run_in_memory(), run(&root_at(folder.path()))] {
        let writers = (0..8).map(|writer| {
            let run = run.clone();
            tokio::spawn(async move { run.create("a", format!("writer {writer}").into()).await })
        });
        let answers = futures::future::join_all(writers).await;
        let won: Vec<usize> = (0..8).filter(|&writer| answers[writer].as_ref().unwrap().is_ok()).collect();
        let [winner] = won[..] else { panic!("{won:?} have won") };
        assert_eq!(run.get("a").await.unwrap().unwrap(), format!("writer {winner}"));
    }
}

#[tokio::test]
async fn a_plain_write_overwrites() {
    let run = run_in_memory();
    assert_eq!(run.get("metrics/a").await.unwrap(), None);
    run.put("metrics/a", "1".into()).await.unwrap();
    run.put("metrics/a", "2".into()).await.unwrap();
    assert_eq!(run.get("metrics/a").await.unwrap().unwrap(), "2");
}

#[tokio::test]
async fn a_specification_is_frozen_once() {
    let run = run_in_memory();
    assert_eq!(run.specification().await.unwrap(), None);
    run.freeze("seed = 1\n").await.unwrap();
    run.freeze("seed = 1\n").await.unwrap();
    assert!(matches!(run.freeze("seed = 2\n").await, Err(Error::AlreadyExists { .. })));
    assert_eq!(run.specification().await.unwrap().unwrap(), "seed = 1\n");
}

#[tokio::test]
async fn a_specification_that_is_not_text_is_damaged() {
    let run = run_in_memory();
    run.put("run.toml", vec![0xff, 0xfe].into()).await.unwrap();
    let error = run.specification().await.unwrap_err();
    assert!(
        matches!(&error, Error::Damaged { place, .. } if place.ends_with("runs/one/run.toml")),
        "{error}"
    );
}
