//! Objects of a run, whatever bytes they are.

#![allow(clippy::unwrap_used)] // A panic here is a failed test.

use potstill_storage::{
    Root, Run,
    checkpoint::{Manifest, Shard},
    coordinators::{Coordinator, Ended},
    journal::Journal,
    layout,
};
use potstill_tests::fuzz::{MEMORY, cases, edited};
use proptest::prelude::*;

#[global_allocator]
static ALLOCATOR: cap::Cap<std::alloc::System> = cap::Cap::new(std::alloc::System, MEMORY);

fn manifests() -> Vec<Vec<u8>> {
    let shard =
        |rank| Shard { rank, key: layout::shard_key(20, "g1", rank, 2), bytes: 5, sha256: "ab".repeat(32) };
    vec![serde_json::to_vec_pretty(&Manifest::new(20, 1, vec![shard(0), shard(1)])).unwrap()]
}

fn coordinators() -> Vec<Vec<u8>> {
    let certificate = Some("ab".repeat(32));
    let ended = Some(Ended { success: true, reason: "all iterations are done".into() });
    let coordinator = Coordinator { name: "c".into(), address: "10.0.0.1:7070".into(), certificate, ended };
    vec![serde_json::to_vec_pretty(&coordinator).unwrap(), b"0123456789abcdef\n".to_vec()]
}

fn segments() -> Vec<Vec<u8>> {
    let line = r#"{"version":1,"record":"committed","iteration":20,"manifest_key":"key"}"#;
    vec![vec![line; layout::SEGMENT as usize].join("\n").into_bytes(), b"\n\n".to_vec()]
}

fn run() -> (tokio::runtime::Runtime, Run) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let run = Root::open("memory:///").unwrap().run(&"r".parse().unwrap());
    (runtime, run)
}

proptest! {
    #![proptest_config(cases(1000))]

    #[test]
    fn a_manifest_is_read_or_refused(bytes in edited(manifests())) {
        let (runtime, run) = run();
        runtime.block_on(async {
            let key = layout::manifest_key(20);
            run.put(&key, bytes.into()).await.unwrap();
            let _ = run.manifest(&key).await;
            let _ = run.damage(&key).await;
            let _ = run.survey().await;
        });
    }

    #[test]
    fn a_coordinators_object_and_a_join_key_are_read_or_refused(bytes in edited(coordinators())) {
        let (runtime, run) = run();
        runtime.block_on(async {
            run.put(&layout::coordinator_key(1), bytes.clone().into()).await.unwrap();
            run.put(layout::JOIN_KEY, bytes.into()).await.unwrap();
            let _ = run.coordinator().await;
            let _ = run.join_key().await;
        });
    }

    #[test]
    fn a_segment_of_a_journal_is_read_or_passed_over(bytes in edited(segments())) {
        let (runtime, run) = run();
        runtime.block_on(async {
            run.put(&layout::segment_key(0), bytes.into()).await.unwrap();
            if let Ok((journal, records)) = Journal::open(&run).await {
                assert_eq!(journal.length(), records.len() as u64);
            }
        });
    }
}
