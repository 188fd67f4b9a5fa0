//! `potstill evaluate`: the scores of a run's own evaluation, from the command line.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    path::Path,
    process::{Command, Output},
};

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
    assert!(!std::path::Path::new("/nowhere").exists(), "reading creates nothing");
    refused(&["--checkpoint", &teacher], &["not an exported generator"]);
    refused(&["--teacher", &config], &["teacher.toml"]);
    refused(&["--teacher", &teacher, "--neighbours", "100"], &["--samples 100", "--neighbours 100"]);
}

/// `evaluate` of the shapes, a text-to-image teacher.
fn shapes(clip: &Path, more: &[&str]) -> Output {
    let shapes = repository().join("configs/shapes");
    Command::new(binary("potstill"))
        .args(["evaluate", "--teacher-guidance", "2", "--json", "--teacher"])
        .args([shapes.join("model"), "--prompts".into(), shapes.join("prompts.jsonl")])
        .args([Path::new("--features"), &shapes.join("features.pt"), Path::new("--clip"), clip])
        .args([Path::new("--reference"), &shapes.join("shapes.safetensors")])
        .args(more)
        .output()
        .unwrap()
}

#[test]
fn the_clip_score_says_whether_images_match_their_prompts() {
    let clip = repository().join("tests/fixtures/clip_shapes.pt");
    let score = |more: &[&str]| {
        let output =
            shapes(&clip, &[&["--samples", "120", "--teacher-steps", "8", "--threads", "1"], more].concat());
        assert!(output.status.success(), "{more:?}: {}", text(&output.stderr));
        let scores: Value = serde_json::from_slice(&output.stdout).unwrap();
        scores["clip_score"].as_f64().unwrap()
    };
    // The teacher draws nearly every shape in its colour; colours taken at random would score about half.
    let one = score(&["--workers", "1"]);
    assert!((90.0..=100.0).contains(&one), "{one}");
    // More processes than chunks: one of them makes nothing.
    let four = score(&["--workers", "4"]);
    assert!((one - four).abs() < 1e-3, "{one} {four}");
    assert!(score(&["--seed", "1"]) != one);
}

/// Modules that are no CLIP.
const NO_CLIPS: &str = "
import sys
import torch

class One(torch.nn.Module):
    def forward(self, x, ids):
        return x.flatten(1)

class Three(torch.nn.Module):
    def forward(self, x, ids):
        return x, x, ids

class Widths(torch.nn.Module):
    def forward(self, x, ids):
        return x.flatten(1), ids.float()

class Mean(torch.nn.Module):
    def forward(self, x, ids):
        return x.flatten(1).mean(0), x.flatten(1).mean(0)

class Small(torch.nn.Module):
    def forward(self, x, ids):
        return x.flatten(1)[:, :3], torch.zeros(5, 3)[ids].sum(1)

class Infinite(torch.nn.Module):
    def forward(self, x, ids):
        return x.flatten(1) / 0.0, x.flatten(1)

for kind in [One, Three, Widths, Mean, Small, Infinite]:
    torch.jit.script(kind()).save(f'{sys.argv[1]}/{kind.__name__}.pt')
";

#[test]
fn what_is_no_clip_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("make.py");
    std::fs::write(&script, NO_CLIPS).unwrap();
    let python = repository().join(".venv/bin/python");
    let made = Command::new(python).arg(&script).arg(folder.path()).output().unwrap();
    assert!(made.status.success(), "{}", text(&made.stderr));
    let features = repository().join("configs/shapes/features.pt");
    for (name, says) in [
        ("One.pt", "does not return (image embeddings, text embeddings)"),
        ("Three.pt", "a tuple that is not (image embeddings, text embeddings)"),
        ("Widths.pt", "expected [2, D] twice"),
        ("Mean.pt", "expected [2, D] twice"),
        ("Small.pt", "fails on images of shape [2, 3, 16, 16] and tokens of shape [2, 16]"),
        ("Infinite.pt", "embeddings are not finite"),
        ("make.py", "is not a TorchScript module"),
        ("none.pt", "none.pt"),
        (features.to_str().unwrap(), "fails on images of shape"),
    ] {
        let output = shapes(&folder.path().join(name), &["--samples", "20", "--teacher-steps", "2"]);
        let message = text(&output.stderr);
        assert!(!output.status.success() && message.contains(says), "{name}: {message}");
    }
    // Classes have no prompts.
    let teacher = repository().join("configs/digits/teacher.safetensors").display().to_string();
    let clip = repository().join("tests/fixtures/clip_shapes.pt").display().to_string();
    refused(&["--teacher", &teacher, "--clip", &clip], &["clip_shapes.pt", "text-to-image models"]);
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
