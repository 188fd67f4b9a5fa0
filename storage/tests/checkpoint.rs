//! Tests checkpoints: shards and manifests are read back as written or not at all.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::sync::Arc;

use bytes::Bytes;
use common::{Fault, Faulty, files_below, root_at, run, run_in, run_in_memory};
use object_store::{ObjectStore, local::LocalFileSystem, memory::InMemory};
use potstill_storage::{
    Error, Root, Run,
    checkpoint::{Manifest, Shard, Written},
    layout,
};
use proptest::prelude::*;

const MIB: usize = 1 << 20;

/// Bytes without repetition.
fn content(length: usize) -> Bytes {
    let mut state = 1_u64;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

async fn write(run: &Run, iteration: u64, rank: u32, bytes: Bytes) -> Shard {
    let key = layout::shard_key(iteration, "g1", rank, 2);
    run.write_shard(&key, rank, bytes).await.unwrap().shard
}

fn assert_damaged(error: &Error, at: &str, how: &str) {
    assert!(matches!(error, Error::Damaged { place, .. } if place == at), "{error}");
    assert!(error.to_string().contains(at) && error.to_string().contains(how), "{error}");
}

#[tokio::test]
async fn a_checkpoint_comes_back_as_written() {
    let folder = tempfile::tempdir().unwrap();
    for run in [run_in_memory(), run(&root_at(folder.path()))] {
        let mut shards = Vec::new();
        for rank in 0..2 {
            shards.push(write(&run, 20, rank, content(1000 + rank as usize)).await);
        }
        // It does not exist before its manifest does.
        assert_eq!(run.checkpoints().await.unwrap(), [] as [u64; 0]);
        let manifest = Manifest::new(20, 3, shards);
        let key = run.commit(&manifest).await.unwrap();
        assert_eq!(key, layout::manifest_key(20));
        assert_eq!(run.checkpoints().await.unwrap(), [20]);

        let found = run.manifest(&key).await.unwrap();
        assert_eq!(found, manifest);
        for (rank, shard) in found.shards.iter().enumerate() {
            assert_eq!(shard.rank as usize, rank);
            assert_eq!(run.read_shard(shard).await.unwrap(), content(1000 + rank));
        }
    }
}

#[tokio::test]
async fn a_shard_is_recorded_with_its_length_and_checksum() {
    let shard = run_in_memory().write_shard("a", 7, "abc".into()).await.unwrap().shard;
    assert_eq!((shard.rank, shard.key.as_str(), shard.bytes), (7, "a", 3));
    // The example of FIPS 180-2.
    assert_eq!(shard.sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

#[tokio::test]
async fn a_shard_is_confirmed_by_what_is_in_the_storage() {
    let folder = tempfile::tempdir().unwrap();
    for run in [run_in_memory(), common::run(&common::root_at(folder.path()))] {
        let Written { shard, e_tag } = run.write_shard("checkpoints/a", 0, "abc".into()).await.unwrap();
        run.confirm_shard(&shard, e_tag.as_deref()).await.unwrap();
        run.confirm_shard(&shard, None).await.unwrap();
        // Another name of the content says nothing: the content is read.
        run.confirm_shard(&shard, Some("another")).await.unwrap();

        let refused = async |shard: &Shard| match run.confirm_shard(shard, e_tag.as_deref()).await {
            Err(Error::Damaged { problem, .. }) => problem,
            other => panic!("{other:?}"),
        };
        let elsewhere = Shard { key: "checkpoints/b".into(), ..shard.clone() };
        assert_eq!(refused(&elsewhere).await, "it is missing");
        assert!(refused(&Shard { bytes: 4, ..shard.clone() }).await.starts_with("it has 3 bytes"));
        run.put("checkpoints/a", "abd".into()).await.unwrap();
        assert!(refused(&shard).await.starts_with("its SHA-256 is"));
    }
}

#[tokio::test]
async fn checkpoints_are_listed_in_order_and_only_the_committed_ones() {
    let run = run_in_memory();
    for iteration in [100, 20, 3, 1000] {
        write(&run, iteration, 0, content(1)).await;
        run.commit(&Manifest::new(iteration, 1, Vec::new())).await.unwrap();
    }
    write(&run, 50, 0, content(1)).await;
    run.put("checkpoints/000000000060/g1/manifest.json", "{}".into()).await.unwrap();
    assert_eq!(run.checkpoints().await.unwrap(), [3, 20, 100, 1000]);
}

#[tokio::test]
async fn runs_of_one_root_do_not_see_each_other() {
    let root = Root::open("memory://").unwrap();
    let [one, ones] = ["one", "one-s"].map(|id| root.run(&id.parse().unwrap()));
    ones.commit(&Manifest::new(20, 1, Vec::new())).await.unwrap();
    assert_eq!(one.checkpoints().await.unwrap(), [] as [u64; 0]);
    assert_eq!(ones.checkpoints().await.unwrap(), [20]);
}

#[tokio::test]
async fn a_commit_can_be_repeated_but_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    for run in [run_in_memory(), run(&root_at(folder.path()))] {
        let manifest = Manifest::new(20, 3, vec![write(&run, 20, 0, content(10)).await]);
        let key = run.commit(&manifest).await.unwrap();
        assert_eq!(run.commit(&manifest).await.unwrap(), key);
        let error = run.commit(&Manifest::new(20, 4, manifest.shards.clone())).await.unwrap_err();
        assert!(matches!(&error, Error::AlreadyExists { place } if *place == run.describe(&key)), "{error}");
        assert_eq!(run.manifest(&key).await.unwrap(), manifest);
    }
}

#[tokio::test]
async fn a_damaged_shard_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let run = run(&root_at(folder.path()));
    let shard = write(&run, 20, 1, content(5000)).await;
    let place = run.describe(&shard.key);
    assert!(place.ends_with("rank-001-of-002.safetensors"), "{place}");

    let mut flipped = content(5000).to_vec();
    flipped[4321] ^= 0x10;
    std::fs::write(&place, &flipped).unwrap();
    assert_damaged(&run.read_shard(&shard).await.unwrap_err(), &place, "SHA-256");

    std::fs::write(&place, &content(5000)[..4999]).unwrap();
    assert_damaged(&run.read_shard(&shard).await.unwrap_err(), &place, "4999 bytes; 5000 were written");

    std::fs::write(&place, "").unwrap();
    assert_damaged(&run.read_shard(&shard).await.unwrap_err(), &place, "0 bytes");

    std::fs::remove_file(&place).unwrap();
    assert_damaged(&run.read_shard(&shard).await.unwrap_err(), &place, "missing");
}

#[tokio::test]
async fn a_manifest_that_this_code_did_not_write_is_damaged() {
    let run = run_in_memory();
    let key = layout::manifest_key(20);
    let place = run.describe(&key);
    assert_damaged(&run.manifest(&key).await.unwrap_err(), &place, "missing");

    let good = r#"{"version": 2, "iteration": 20, "generation": 1, "shards": []}"#;
    run.put(&key, good.into()).await.unwrap();
    assert_eq!(run.manifest(&key).await.unwrap(), Manifest::new(20, 1, Vec::new()));

    let with = |from: &str, to: &str| good.replace(from, to);
    let shard = r#"[{"rank": 0, "key": "a", "bytes": 1, "sha256": "", "colour": 1}]"#;
    let bad = [
        (with("{", r#"{"colour": 1, "#), "colour"),
        (with("[]", shard), "colour"),
        (with(r#""generation": 1, "#, ""), "generation"),
        (with("20", "-20"), "-20"),
        (good[..30].to_owned(), "EOF"),
        (String::new(), "EOF"),
    ];
    for (text, how) in bad {
        run.put(&key, text.into()).await.unwrap();
        assert_damaged(&run.manifest(&key).await.unwrap_err(), &place, how);
    }
}

/// A checkpoint in another format is neither treated as damaged, which would let it be replaced, nor misread.
#[tokio::test]
async fn a_checkpoint_of_another_version_is_refused_by_what_wrote_it() {
    let run = run_in_memory();
    let key = layout::manifest_key(20);
    let of =
        |version: u32| format!(r#"{{"version": {version}, "iteration": 20, "generation": 1, "shards": []}}"#);
    run.put(&key, of(1).into()).await.unwrap();
    assert_eq!(run.manifest(&key).await.unwrap().iteration, 20, "its generator can be exported");
    let error = run.resumable_manifest(&key).await.unwrap_err();
    let said = error.to_string();
    assert!(matches!(error, Error::Format { found: 1, .. }), "{said}");
    for part in ["manifest.json", "format 1", "earlier version", "potstill export", "generator.start_from"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(matches!(run.survey().await.unwrap_err(), Error::Format { found: 1, .. }));

    // A newer version may write other fields besides.
    run.put(&key, of(3).replace('{', r#"{"colour": 1, "#).into()).await.unwrap();
    for error in [
        run.manifest(&key).await.unwrap_err(),
        run.resumable_manifest(&key).await.unwrap_err(),
        run.survey().await.unwrap_err(),
        run.damage(&key).await.unwrap_err(),
    ] {
        assert!(
            matches!(error, Error::Format { found: 3, .. }) && error.to_string().contains("newer"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_large_shard_goes_up_in_parts() {
    let folder = tempfile::tempdir().unwrap();
    // More parts than are uploaded at a time; a whole number of parts; the largest shard that is written at once.
    for length in [20 * MIB + 1, 8 * MIB + 1, 48 * MIB, 8 * MIB] {
        let bytes = content(length);
        let run = run(&root_at(folder.path()));
        let shard = write(&run, 20, 0, bytes.clone()).await;
        assert_eq!(shard.bytes, length as u64);
        assert!(run.read_shard(&shard).await.unwrap() == bytes);
        // No part stays behind.
        assert_eq!(files_below(folder.path()), [std::path::PathBuf::from(run.describe(&shard.key))]);
    }
}

#[tokio::test(start_paused = true)]
async fn an_upload_that_fails_leaves_nothing() {
    // With few parts the failure shows at the end; with many, while parts remain to be sent.
    let cases = [
        (20 * MIB, Fault::PartFails(0)),
        (20 * MIB, Fault::PartFails(2)),
        (20 * MIB, Fault::CompleteFails),
        (20 * MIB, Fault::BucketGone),
        (56 * MIB, Fault::PartFails(0)),
    ];
    for (length, fault) in cases {
        let folder = tempfile::tempdir().unwrap();
        let local = LocalFileSystem::new_with_prefix(folder.path()).unwrap();
        for inner in [Arc::new(InMemory::new()) as Arc<dyn ObjectStore>, Arc::new(local)] {
            let store = Faulty::new(inner.clone(), fault);
            let key = layout::shard_key(20, "g1", 0, 1);
            let run = run_in(store.clone());
            let error = run.write_shard(&key, 0, content(length)).await.unwrap_err();
            assert!(matches!(&error, Error::Store { operation: "write", .. }), "{fault:?}: {error}");
            assert!(error.to_string().contains(&run.describe(&key)), "{error}");
            // Once for the first attempt, and once for each repetition.
            assert_eq!(store.aborted(), 5, "{fault:?}");
            assert_eq!(run_in(inner).get(&key).await.unwrap(), None);
        }
        assert_eq!(files_below(folder.path()), Vec::<std::path::PathBuf>::new(), "{fault:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_damage_to_a_shard_goes_unnoticed(
        bytes in prop::collection::vec(any::<u8>(), 1..300),
        at: prop::sample::Index,
        bit in 0..8_u32,
        cut: prop::sample::Index,
    ) {
        tokio::runtime::Runtime::new().unwrap().block_on(async {
            let run = run_in_memory();
            let shard = run.write_shard("a", 0, bytes.clone().into()).await.unwrap().shard;
            assert_eq!(run.read_shard(&shard).await.unwrap(), bytes);
            let mut flipped = bytes.clone();
            flipped[at.index(bytes.len())] ^= 1 << bit;
            let truncated = bytes[..cut.index(bytes.len())].to_vec();
            let lengthened = [&bytes[..], &[0]].concat();
            for damaged in [flipped, truncated, lengthened] {
                run.put("a", damaged.into()).await.unwrap();
                let error = run.read_shard(&shard).await.unwrap_err();
                assert_damaged(&error, &run.describe("a"), "");
            }
        });
    }

    #[test]
    fn a_manifest_comes_back_whatever_it_says(
        iteration in 0..1_000_000_000_000_u64,
        generation: u64,
        shards in prop::collection::vec((any::<u32>(), ".*", any::<u64>(), "[0-9a-f]{64}"), 0..5),
    ) {
        let shard = |(rank, key, bytes, sha256)| Shard { rank, key, bytes, sha256 };
        let manifest = Manifest::new(iteration, generation, shards.into_iter().map(shard).collect());
        tokio::runtime::Runtime::new().unwrap().block_on(async {
            let run = run_in_memory();
            let key = run.commit(&manifest).await.unwrap();
            assert_eq!(run.manifest(&key).await.unwrap(), manifest);
            assert_eq!(run.checkpoints().await.unwrap(), [iteration]);
        });
    }
}
