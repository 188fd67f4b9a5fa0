//! `potstill evaluate`: the scores of a run's own evaluation, from the command line.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::process::{Command, Output};

use potstill_tests::{Cluster, binary, repository, text};
use serde_json::Value;

fn evaluate(arguments: &[&str]) -> Output {
    let digits = repository().join("configs/digits");
    let file = |name: &str| digits.join(name).display().to_string();
    Command::new(binary("potstill"))
        .args(["evaluate", "--samples", "100", "--teacher-steps", "2", "--json", "--features"])
        .args([file("features.pt"), "--reference".into(), file("digits.safetensors")])
        .args(arguments)
        .output()
        .unwrap()
}

fn scores(arguments: &[&str]) -> Value {
    let output = evaluate(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn refused(arguments: &[&str], says: &[&str]) {
    let output = evaluate(arguments);
    let message = text(&output.stderr);
    assert!(!output.status.success(), "{arguments:?} was accepted");
    assert!(says.iter().all(|word| message.contains(word)), "{says:?}: {message}");
}

#[test]
fn the_command_and_the_run_come_to_the_same_scores_however_many_share_the_work() {
    let cluster = Cluster::default();
    let sets = ["distillation.iterations=2", "generator.steps=2", "generator.sigmas=[2.5, 0.8]"];
    cluster.succeed("done", 2, &sets, &[]);
    let run = cluster.run("done").display().to_string();
    let in_run = cluster.metrics("done");
    let in_run = |subject: &str| {
        let row = in_run.iter().rfind(|row| row["kind"] == "evaluation" && row["subject"] == subject);
        row.unwrap()["scores"].clone()
    };
    let teacher = repository().join("configs/digits/teacher.safetensors").display().to_string();
    for (subject, arguments) in [("student", ["--checkpoint", &run]), ("teacher", ["--teacher", &teacher])] {
        for workers in ["1", "2"] {
            let found = scores(&[&arguments[..], &["--workers", workers]].concat());
            let expected = in_run(subject);
            for name in ["fid", "agreement", "precision", "recall", "diversity", "evaluations_per_image"] {
                let (found, expected) = (found[name].as_f64().unwrap(), expected[name].as_f64().unwrap());
                let apart = (found - expected).abs();
                assert!(apart <= 1e-5 * expected.abs(), "{subject}, {workers}: {name} {found} {expected}");
            }
        }
    }
    let first = scores(&["--checkpoint", &run, "--steps", "1"]);
    assert_eq!(first["evaluations_per_image"], 1.0);
    assert_ne!(first["fid"], scores(&["--checkpoint", &run])["fid"]);
}

#[test]
fn statistics_take_the_place_of_images() {
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("statistics.safetensors").display().to_string();
    let teacher = repository().join("configs/digits/teacher.safetensors").display().to_string();
    let digits = repository().join("configs/digits/digits.safetensors").display().to_string();
    let features = repository().join("configs/digits/features.pt").display().to_string();
    let run = |more: &[&str]| {
        Command::new(binary("potstill"))
            .args(["evaluate", "--teacher", &teacher, "--samples", "50", "--teacher-steps", "2", "--json"])
            .args(["--features", &features])
            .args(more)
            .output()
            .unwrap()
    };
    let from_images = run(&["--reference", &digits, "--save-statistics", &saved]);
    let from_statistics = run(&["--reference", &saved]);
    let value = |output: &Output| -> Value { serde_json::from_slice(&output.stdout).unwrap() };
    let [a, b] = [value(&from_images), value(&from_statistics)];
    assert_eq!((&a["fid"], &a["recall"]), (&b["fid"], &b["recall"]));

    // Another extractor's features are refused.
    let bytes = std::fs::read(&saved).unwrap();
    let text_of_digest = String::from_utf8_lossy(&bytes[..400]).into_owned();
    let at = text_of_digest.find("extractor_sha256").unwrap() + "extractor_sha256\":\"".len();
    let mut other = bytes;
    other[at] = if other[at] == b'0' { b'1' } else { b'0' };
    std::fs::write(&saved, other).unwrap();
    let output = run(&["--reference", &saved]);
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("made by the extractor"), "{}", text(&output.stderr));
}

#[test]
fn what_cannot_be_scored_is_refused() {
    let teacher = repository().join("configs/digits/teacher.safetensors").display().to_string();
    let config = repository().join("configs/digits/teacher.toml").display().to_string();
    refused(&[], &["--checkpoint", "--teacher"]);
    refused(&["--checkpoint", "/nowhere/runs/x"], &["no run x"]);
    refused(&["--checkpoint", &teacher], &["not an exported generator"]);
    refused(&["--teacher", &config], &["teacher.toml"]);
    refused(&["--teacher", &teacher, "--neighbours", "100"], &["--samples 100", "--neighbours 100"]);
}

/// Extractors that return other things than features, and one that returns nothing but them.
const EXTRACTORS: &str = "
import sys
import torch

class Flat(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1)

class Images(torch.nn.Module):
    def forward(self, x):
        return x

class Five(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1), x.flatten(1)[:, :5]

class Wide(torch.nn.Module):
    def forward(self, x):
        return x.reshape(-1, 299 * 299)

for kind in [Flat, Images, Five, Wide]:
    torch.jit.script(kind()).save(f'{sys.argv[1]}/{kind.__name__}.pt')
";

#[test]
fn an_extractor_of_another_shape_is_refused() {
    let python = repository().join(".venv/bin/python");
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("make.py");
    // TorchScript reads the source, so it must be a file.
    std::fs::write(&script, EXTRACTORS).unwrap();
    let made = Command::new(python).arg(script).arg(folder.path()).output().unwrap();
    assert!(made.status.success(), "{}", text(&made.stderr));
    let teacher = repository().join("configs/digits/teacher.safetensors").display().to_string();
    let digits = repository().join("configs/digits/digits.safetensors").display().to_string();
    let with = |name: &str| {
        let features = folder.path().join(name).display().to_string();
        let arguments = ["evaluate", "--teacher", &teacher, "--reference", &digits, "--features", &features];
        let more = ["--samples", "20", "--teacher-steps", "2", "--json"];
        Command::new(binary("potstill")).args(arguments).args(more).output().unwrap()
    };
    for (name, says) in [
        ("Images.pt", "expected [2, D]"),
        ("Five.pt", "expected [2, 10]"),
        ("Wide.pt", "fails on images of shape"),
        ("none.pt", "none.pt"),
    ] {
        let output = with(name);
        assert!(!output.status.success(), "{name}");
        assert!(text(&output.stderr).contains(says), "{name}: {}", text(&output.stderr));
    }
    // Features alone are enough for all but agreement.
    let output = with("Flat.pt");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let scores: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(scores["fid"].as_f64().is_some() && scores["agreement"].is_null(), "{scores}");
}
