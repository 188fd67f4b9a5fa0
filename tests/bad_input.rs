//! Bad input gets a clear error, a code other than 0, and leaves nothing behind.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{net::TcpListener, path::Path, process::Command};

use potstill_tests::{Cluster, binary, repository, text};

/// Launches with what must be refused and returns the message.
fn refused(cluster: &Cluster, sets: &[&str], flags: &[&str]) -> String {
    let output = cluster.run_to_end("bad", 2, sets, flags);
    let message = text(&output.stderr);
    assert!(!output.status.success(), "{sets:?} {flags:?} was accepted: {message}");
    assert!(message.contains("error: "), "{message}");
    assert!(!cluster.run("bad").exists(), "{sets:?} {flags:?} left something behind: {message}");
    message
}

fn says(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
}

#[test]
fn configuration() {
    let cluster = Cluster::default();
    let message = refused(&cluster, &["distillation.iteratoins=5"], &[]);
    says(&message, &["`distillation.iteratoins`", "`distillation.iterations`"]);
    says(&refused(&cluster, &["distillation.seed=soon"], &[]), &["distillation.seed"]);
    says(&refused(&cluster, &["distillation.iterations=1.5"], &[]), &["distillation.iterations"]);
    says(
        &refused(&cluster, &["optimiser.generator_learning_rate=-1"], &[]),
        &["generator_learning_rate is -1"],
    );
    says(&refused(&cluster, &["distillation.micro_batch=7"], &[]), &["global_batch (32)", "micro_batch (7)"]);
    says(&refused(&cluster, &["distillation.micro_batch=32"], &[]), &["2 workers", "1 micro-batch"]);
    says(&refused(&cluster, &["seed"], &[]), &["key=value"]);
}

#[test]
fn teacher() {
    let cluster = Cluster::default();
    let folder = tempfile::tempdir().unwrap();
    let whole = std::fs::read(repository().join("configs/digits/teacher.safetensors")).unwrap();
    let with = |bytes: &[u8]| {
        let path = folder.path().join("t.safetensors");
        std::fs::write(&path, bytes).unwrap();
        format!("teacher.weights={}", path.display())
    };
    says(&refused(&cluster, &["teacher.weights=/nowhere/t.safetensors"], &[]), &["/nowhere/t.safetensors"]);
    let truncated = with(&whole[..whole.len() / 2]);
    says(&refused(&cluster, &[&truncated], &[]), &["t.safetensors", "truncated"]);
    let renamed = with(&replaced(&whole, "model.map_layer0.bias", "model.map_layer0.bios"));
    says(
        &refused(&cluster, &[&renamed], &[]),
        &["t.safetensors", "model.map_layer0.bias", "model.map_layer0.bios"],
    );
    let reshaped = with(&replaced(&whole, r#"\"model_channels\":16"#, r#"\"model_channels\":32"#));
    says(&refused(&cluster, &[&reshaped], &[]), &["t.safetensors", "model.map_layer0.weight"]);
}

/// `bytes` with one occurrence of some text replaced by another of the same length.
fn replaced(bytes: &[u8], from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let at =
        bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap_or_else(|| panic!("no {from}"));
    let mut bytes = bytes.to_vec();
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    bytes
}

#[test]
fn evaluation_data() {
    let cluster = Cluster::default();
    let folder = tempfile::tempdir().unwrap();
    let digits = std::fs::read(repository().join("configs/digits/digits.safetensors")).unwrap();
    let path = folder.path().join("d.safetensors");
    let mut bad = digits;
    let last = bad.len() - 1;
    bad[last] = 77;
    std::fs::write(&path, bad).unwrap();
    let message = refused(&cluster, &[&format!("evaluation.reference={}", path.display())], &[]);
    says(&message, &["d.safetensors", "label 77", "out of range"]);
    let script = repository().join("configs/digits/one-step.toml");
    let message = refused(&cluster, &[&format!("evaluation.features={}", script.display())], &[]);
    says(&message, &["one-step.toml", "TorchScript"]);
}

#[test]
fn storage() {
    let refused = |storage: &str| {
        let output = Cluster::launch_anywhere("bad", 2, &[], &["--storage", storage]).output().unwrap();
        assert!(!output.status.success());
        text(&output.stderr)
    };
    says(&refused("ftp://somewhere/x"), &["error: ", "ftp://somewhere/x", "s3://"]);
    let file = tempfile::NamedTempFile::new().unwrap();
    let below = file.path().join("storage");
    says(&refused(below.to_str().unwrap()), &["error: ", below.to_str().unwrap()]);
}

#[test]
fn a_port_in_use() {
    let cluster = Cluster::default();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    says(&refused(&cluster, &[], &["--listen", &address]), &[&address, "in use"]);
}

#[test]
fn resume() {
    let cluster = Cluster::default();
    says(&refused(&cluster, &[], &["--resume"]), &["nothing to resume"]);

    cluster.succeed("done", 1, &["distillation.iterations=2"], &[]);
    let again = |sets: &[&str], flags: &[&str]| {
        let output = cluster.run_to_end("done", 1, sets, flags);
        assert!(!output.status.success());
        text(&output.stderr)
    };
    says(&again(&["distillation.iterations=2"], &[]), &["exists", "--resume"]);
    says(&again(&["distillation.iterations=2"], &["--resume"]), &["complete", "distillation.iterations"]);
    let message =
        again(&["distillation.iterations=4", "distillation.seed=5", "distillation.alpha=1.1"], &["--resume"]);
    says(&message, &["distillation.seed", "distillation.alpha"]);

    let folder = tempfile::tempdir().unwrap();
    let other = folder.path().join("t.safetensors");
    let whole = std::fs::read(repository().join("configs/digits/teacher.safetensors")).unwrap();
    let mut changed = whole;
    let last = changed.len() - 1;
    changed[last] ^= 1;
    std::fs::write(&other, changed).unwrap();
    let other = format!("teacher.weights={}", other.display());
    says(&again(&["distillation.iterations=4", &other], &["--resume"]), &["teacher.sha256"]);
}

#[test]
fn a_coordinator_that_is_not_there() {
    // Bound, then let go: nobody listens there.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let coordinator = format!("http://{address}");
    let output = Command::new(binary("potstill-worker"))
        .args(["rank", "--coordinator", &coordinator, "--run-id", "r"])
        .output()
        .unwrap();
    assert!(!output.status.success());
    says(&text(&output.stderr), &[&coordinator, "tried", "refused"]);
}

#[test]
fn a_configuration_that_is_not_there() {
    let output =
        Command::new(binary("potstill")).args(["launch", "nowhere.toml", "--workers", "1"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    says(&text(&output.stderr), &["nowhere.toml"]);
    assert!(!Path::new("runs").exists());
}
