//! `potstill checkpoint list` and `verify` on runs with complete, damaged and missing parts.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    path::Path,
    process::{Command, Output},
};

use bytes::Bytes;
use potstill_storage::{Root, checkpoint::Manifest, layout::shard_key};
use serde_json::Value;

/// A run with checkpoints of iterations 10 and 20, two shards each.
fn storage() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let run = Root::open(folder.path().to_str().unwrap()).unwrap().run(&"demo".parse().unwrap());
        run.freeze("").await.unwrap();
        for iteration in [10, 20] {
            let mut shards = Vec::new();
            for rank in 0..2 {
                let key = shard_key(iteration, "g1", rank, 2);
                let bytes = Bytes::from(vec![rank as u8; 1 << 20]);
                shards.push(run.write_shard(&key, rank, bytes).await.unwrap().shard);
            }
            run.commit(&Manifest::new(iteration, 1, shards)).await.unwrap();
        }
    });
    folder
}

fn checkpoint(command: &str, storage: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_potstill"))
        .args(["checkpoint", command, "demo", "--storage"])
        .arg(storage)
        .args(arguments)
        .output()
        .unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn whole_checkpoints_are_listed_and_verified() {
    let storage = storage();
    let output = checkpoint("list", storage.path(), &[]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("10") && text.contains("2.0") && text.contains("committed"), "{text}");
    let listed = json(&checkpoint("verify", storage.path(), &["--json"]));
    assert_eq!(listed[1]["iteration"], 20);
    assert_eq!(listed[1]["bytes"], 2 << 20);
    assert_eq!(listed[1]["shards"], 2);
    assert_eq!(listed[1]["verified"], true);
    let unseen = json(&checkpoint("list", storage.path(), &["--json"]));
    assert!(unseen[0]["verified"].is_null(), "they were not read");
}

#[test]
fn damage_is_named_and_sets_the_exit_code() {
    let storage = storage();
    let run = storage.path().join("runs/demo");
    let shard = run.join(shard_key(20, "g1", 1, 2));
    let mut bytes = std::fs::read(&shard).unwrap();
    bytes[77] ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    assert_eq!(
        checkpoint("list", storage.path(), &[]).status.code(),
        Some(0),
        "list does not read the shards"
    );
    let output = checkpoint("verify", storage.path(), &["--json"]);
    assert_eq!(output.status.code(), Some(3));
    let listed = json(&output);
    assert_eq!((&listed[0]["verified"], &listed[1]["verified"]), (&true.into(), &false.into()));
    let problem = listed[1]["problem"].as_str().unwrap();
    assert!(problem.contains("rank-001-of-002") && problem.contains("SHA-256"), "{problem}");

    std::fs::remove_file(run.join(shard_key(10, "g1", 0, 2))).unwrap();
    let listed = json(&checkpoint("verify", storage.path(), &["--json"]));
    assert!(listed[0]["problem"].as_str().unwrap().contains("missing"), "{listed}");

    std::fs::write(run.join("checkpoints/000000000010/manifest.json"), "{").unwrap();
    let output = checkpoint("list", storage.path(), &["--json"]);
    assert_eq!(output.status.code(), Some(3), "a manifest that cannot be read is seen at once");
}

#[test]
fn a_run_that_is_not_there_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let output = checkpoint("list", folder.path(), &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no run demo"));
}
