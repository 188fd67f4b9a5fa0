//! Tests the journal: its records are read in order, a missing record is noticed, and it fences coordinators.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::sync::Arc;

use bytes::Bytes;
use common::{Fault, Faulty, root_at, run, run_in, run_in_memory};
use object_store::{ObjectStoreExt, memory::InMemory, path::Path};
use potstill_storage::{
    Error, Run,
    journal::{Journal, Seen},
    layout,
};
use proptest::prelude::*;

async fn records(run: &Run) -> Vec<Bytes> {
    Journal::open(run).await.unwrap().1
}

#[tokio::test]
async fn records_come_back_in_order() {
    let folder = tempfile::tempdir().unwrap();
    for run in [run_in_memory(), run(&root_at(folder.path()))] {
        let (mut journal, before) = Journal::open(&run).await.unwrap();
        assert!(before.is_empty());
        for record in 0..12 {
            journal.append(format!("{record}").into()).await.unwrap();
        }
        // Another coordinator continues where the first one ended.
        let (mut journal, before) = Journal::open(&run).await.unwrap();
        assert_eq!(before, (0..12).map(|record| record.to_string()).collect::<Vec<_>>());
        journal.append("12".into()).await.unwrap();
        assert_eq!(records(&run).await.len(), 13);
    }
}

#[tokio::test]
async fn the_second_of_two_coordinators_is_fenced() {
    let folder = tempfile::tempdir().unwrap();
    for run in [run_in_memory(), run(&root_at(folder.path()))] {
        let (mut old, _) = Journal::open(&run).await.unwrap();
        old.append("old 0".into()).await.unwrap();
        let (mut new, _) = Journal::open(&run).await.unwrap();
        new.append("new 1".into()).await.unwrap();
        // However often it tries to write.
        for record in ["old 1", "old 2"] {
            let error = old.append(record.into()).await.unwrap_err();
            let taken = run.describe(&layout::journal_key(1));
            assert!(matches!(&error, Error::Fenced { place } if *place == taken), "{error}");
            assert!(error.to_string().contains(&taken), "{error}");
        }
        new.append("new 2".into()).await.unwrap();
        assert_eq!(records(&run).await, ["old 0", "new 1", "new 2"]);
    }
}

#[tokio::test]
async fn a_lost_answer_neither_fences_nor_loses_a_record() {
    for fault in [Fault::AnswerLost, Fault::WriteRepeated] {
        let run = run_in(Faulty::new(Arc::new(InMemory::new()), fault));
        let (mut journal, _) = Journal::open(&run).await.unwrap();
        journal.append("0".into()).await.unwrap();
        journal.append("1".into()).await.unwrap();
        assert_eq!(records(&run).await, ["0", "1"], "{fault:?}");
    }
}

#[tokio::test]
async fn a_record_that_could_not_be_written_can_be_tried_again() {
    let store = Arc::new(InMemory::new());
    let (mut failing, _) =
        Journal::open(&run_in(Faulty::new(store.clone(), Fault::WriteFails))).await.unwrap();
    for _ in 0..2 {
        let error = failing.append("0".into()).await.unwrap_err();
        assert!(matches!(&error, Error::Store { operation: "write", .. }), "{error}");
        assert!(error.to_string().contains(&layout::journal_key(0)), "{error}");
    }
    assert!(records(&run_in(store)).await.is_empty());
}

#[tokio::test]
async fn a_journal_that_cannot_be_listed_is_not_taken_for_an_empty_one() {
    let run = run_in(Faulty::new(Arc::new(InMemory::new()), Fault::BucketGone));
    let error = Journal::open(&run).await.unwrap_err();
    assert!(matches!(&error, Error::Store { operation: "list", .. }), "{error}");
}

#[tokio::test]
async fn other_objects_in_its_folder_are_no_records() {
    let run = run_in_memory();
    for key in ["journal/README", "journal/1.json", "journal/+0000000000000000000.json"] {
        run.put(key, "x".into()).await.unwrap();
    }
    let (mut journal, before) = Journal::open(&run).await.unwrap();
    assert!(before.is_empty());
    journal.append("0".into()).await.unwrap();
    assert_eq!(records(&run).await, ["0"]);
}

/// Appends records up to `count`, with the segments that come due.
async fn append_up_to(journal: &mut Journal, from: u64, count: u64) {
    for record in from..count {
        journal.append(record.to_string().into()).await.unwrap();
        if let Some(segment) = journal.segment() {
            segment.await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_long_journal_is_read_from_segments_and_still_fences() {
    let store = Arc::new(InMemory::new());
    let run = run_in(store.clone());
    let (mut old, _) = Journal::open(&run).await.unwrap();
    append_up_to(&mut old, 0, 2 * layout::SEGMENT - 1).await;
    let (mut new, before) = Journal::open(&run).await.unwrap();
    let expected = |count: u64| (0..count).map(|record| record.to_string()).collect::<Vec<_>>();
    assert_eq!(before, expected(2 * layout::SEGMENT - 1));
    append_up_to(&mut new, 2 * layout::SEGMENT - 1, 2 * layout::SEGMENT + 7).await;
    assert!(run.get(&layout::segment_key(1)).await.unwrap().is_some());
    assert_eq!(records(&run).await, expected(2 * layout::SEGMENT + 7));
    // The records stay beside their segments: without them the old coordinator could write one again.
    assert!(matches!(old.append("x".into()).await, Err(Error::Fenced { .. })));

    // A journal from before there were segments, or with one that cannot be used.
    for unusable in [None, Some("cut")] {
        let key = layout::segment_key(0);
        store.delete(&Path::from(format!("runs/one/{key}"))).await.unwrap();
        if let Some(content) = unusable {
            run.put(&key, content.into()).await.unwrap();
        }
        let (mut journal, found) = Journal::open(&run).await.unwrap();
        assert_eq!(found, expected(2 * layout::SEGMENT + 7));
        assert!(journal.segment().is_some(), "the coordinator that continues the run writes it");
    }
}

#[tokio::test]
async fn a_folder_that_vanishes_is_noticed_and_nothing_is_written_into_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let run = run(&root_at(folder.path()));
    let (mut journal, _) = Journal::open(&run).await.unwrap();
    journal.append("0".into()).await.unwrap();
    let there = folder.path().join("runs/one");
    let away = folder.path().join("away");
    std::fs::rename(&there, &away).unwrap();
    let newest = run.describe(&layout::journal_key(0));
    assert_eq!(journal.watch().await, Seen::Gone(0));
    for error in [journal.watched(Seen::Gone(0)).unwrap_err(), journal.append("1".into()).await.unwrap_err()]
    {
        assert!(matches!(&error, Error::Vanished { place } if *place == newest), "{error}");
    }
    assert!(!there.exists());
    // As when a file system is mounted again.
    std::fs::rename(&away, &there).unwrap();
    assert_eq!(journal.watch().await, Seen::Nothing);
    journal.append("1".into()).await.unwrap();
    assert_eq!(records(&run).await, ["0", "1"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_missing_record_is_named(count in 2..30_usize, missing: prop::sample::Index) {
        // A missing last record cannot be noticed: no other record follows it.
        let missing = missing.index(count - 1) as u64;
        tokio::runtime::Runtime::new().unwrap().block_on(async {
            let store = Arc::new(InMemory::new());
            let run = run_in(store.clone());
            let (mut journal, _) = Journal::open(&run).await.unwrap();
            for record in 0..count {
                journal.append(record.to_string().into()).await.unwrap();
            }
            let key = layout::journal_key(missing);
            store.delete(&Path::from(format!("runs/one/{key}"))).await.unwrap();
            let error = Journal::open(&run).await.unwrap_err();
            assert!(matches!(&error, Error::Damaged { place, .. } if *place == run.describe(&key)), "{error}");
            assert!(error.to_string().contains(&format!("record {}", missing + 1)), "{error}");
        });
    }
}
