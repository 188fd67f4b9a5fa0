//! Tests `potstill evaluate`: the metrics of a run's own evaluation, from the command line.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use nix::sys::signal::Signal;
use potstill_tests::{Cluster, Process, binary, repository, text};
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

    // Features of another extractor are rejected.
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

/// `evaluate` of the shapes, a text-to-image teacher, on its own prompts.
fn shapes(clip: &Path, more: &[&str]) -> Output {
    shapes_on(&repository().join("configs/shapes/prompts.jsonl"), clip, more)
}

fn shapes_on(prompts: &Path, clip: &Path, more: &[&str]) -> Output {
    let shapes = repository().join("configs/shapes");
    Command::new(binary("potstill"))
        .args(["evaluate", "--teacher-guidance", "2", "--json", "--teacher"])
        .args([&shapes.join("model"), Path::new("--prompts"), prompts])
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
    // The teacher draws nearly every shape in its color; random colors would score about half.
    let one = score(&["--workers", "1"]);
    assert!((90.0..=100.0).contains(&one), "{one}");
    // More processes than chunks: one of them makes nothing.
    let four = score(&["--workers", "4"]);
    assert!((one - four).abs() < 1e-3, "{one} {four}");
    assert!(score(&["--seed", "1"]) != one);
}

/// Modules that are not a CLIP.
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

class Fixed(torch.nn.Module):
    def forward(self, x, ids):
        x = x.reshape(len(x), -1)[:, :3]
        return x, x + ids.sum(1)[:, None]

for kind in [One, Three, Widths, Mean, Small, Infinite]:
    torch.jit.script(kind()).save(f'{sys.argv[1]}/{kind.__name__}.pt')
example = torch.zeros(8, 3, 16, 16), torch.zeros(8, 16, dtype=torch.long)
torch.jit.trace(Fixed(), example).save(f'{sys.argv[1]}/Fixed.pt')
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
        ("Fixed.pt", "takes a batch of 8, but not one of 2: it was traced with a fixed batch size"),
        ("Infinite.pt", "embeddings of a trial image are not finite"),
        ("make.py", "is not a TorchScript module"),
        ("none.pt", "none.pt"),
        (features.to_str().unwrap(), "fails on images of shape"),
    ] {
        let output = shapes(&folder.path().join(name), &["--samples", "20", "--teacher-steps", "2"]);
        let message = text(&output.stderr);
        assert!(!output.status.success() && message.contains(says), "{name}: {message}");
    }
    // Class-conditional teachers have no prompts.
    let teacher = repository().join("configs/digits/teacher.safetensors").display().to_string();
    let clip = repository().join("tests/fixtures/clip_shapes.pt").display().to_string();
    refused(&["--teacher", &teacher, "--clip", &clip], &["clip_shapes.pt", "text-to-image models"]);
}

/// Extractors that return other values than features, and one that returns only features.
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

/// The scores that must be the same bit for bit, as JSON writes them: all digits that tell two numbers apart.
fn bits(scores: &Value) -> Vec<String> {
    ["fid", "precision", "recall", "agreement", "diversity", "samples", "seed"]
        .map(|name| scores[name].to_string())
        .to_vec()
}

/// The chunks below a folder of kept ones, and its sub-folders.
fn kept(folder: &Path) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let list = |folder: &Path| -> Vec<PathBuf> {
        std::fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
    };
    let evaluations = list(folder);
    let chunks = evaluations.iter().flat_map(|evaluation| list(evaluation));
    (chunks.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect(), evaluations)
}

#[expect(clippy::disallowed_methods, reason = "another process is watched, which tells nothing by itself")]
#[test]
fn an_evaluation_that_is_killed_goes_on_where_it_was_with_the_same_scores() {
    let folder = tempfile::tempdir().unwrap();
    let digits = repository().join("configs/digits");
    let command = |workers: &str, resume: Option<&Path>, seed: &str| {
        let mut command = Command::new(binary("potstill"));
        command
            .args(["evaluate", "--samples", "1150", "--teacher-steps", "10", "--json", "--threads", "1"])
            .args(["--seed", seed])
            .args(["--workers", workers])
            .args([Path::new("--teacher"), &digits.join("teacher.safetensors")])
            .args([Path::new("--features"), &digits.join("features.pt")])
            .args([Path::new("--reference"), &digits.join("digits.safetensors")])
            .args(resume.into_iter().flat_map(|folder| [Path::new("--resume-dir"), folder]));
        command
    };
    let scored = |mut command: Command| -> (Value, String) {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        (serde_json::from_slice(&output.stdout).unwrap(), text(&output.stderr))
    };
    let (undisturbed, _) = scored(command("1", None, "7"));

    // Killed twice, each time with another number of workers, when it has made a few more of the twelve chunks.
    let resume = folder.path().join("kept");
    let mut before = 0;
    for workers in ["2", "1"] {
        let process = Process::start(command(workers, Some(&resume), "7"));
        while kept(&resume).0.len() < before + 2 {
            std::thread::sleep(Duration::from_millis(5));
        }
        process.signal(Signal::SIGKILL);
        // The processes that it had started have ended as well when the log is closed.
        let (code, log) = process.end();
        assert_eq!(code, None, "{log}");
        assert_eq!(log.contains("resuming"), before > 0, "{log}");
        before = kept(&resume).0.len();
        assert!(before < 12, "there is something left to make");
    }
    let (scores, said) = scored(command("2", Some(&resume), "7"));
    assert!(said.contains("resuming"), "{said}");
    assert_eq!(bits(&scores), bits(&undisturbed));
    assert!(scores["images_per_second"].as_f64().unwrap() > 0.0);
    let (chunks, evaluations) = kept(&resume);
    assert_eq!((chunks.len(), evaluations.len()), (12, 1));

    // All chunks are kept: nothing is sampled, so there is no speed.
    let (again, said) = scored(command("1", Some(&resume), "7"));
    assert!(said.contains("1150 of 1150"), "{said}");
    assert_eq!(bits(&again), bits(&undisturbed));
    assert!(again["images_per_second"].is_null());

    // Another evaluation has a sub-folder of its own.
    let (other, said) = scored(command("1", Some(&resume), "5"));
    assert!(!said.contains("resuming"), "{said}");
    assert_ne!(other["fid"], undisturbed["fid"]);
    let (chunks, evaluations) = kept(&resume);
    assert_eq!((chunks.len(), evaluations.len()), (24, 2));

    // A damaged file is named.
    for damaged in chunks.iter().filter(|path| path.ends_with("000004.safetensors")) {
        std::fs::write(damaged, b"damaged").unwrap();
    }
    let output = command("1", Some(&resume), "7").output().unwrap();
    let message = text(&output.stderr);
    assert!(!output.status.success() && message.contains("000004.safetensors is damaged"), "{message}");
}

/// The moments of features that `potstill evaluate` saved, in the formats of EDM and pytorch-fid, and files without
/// valid ones.
const MOMENTS: &str = "
import sys
import numpy as np
from safetensors.numpy import load_file

features = load_file(sys.argv[1])['features'].astype(np.float64)
mu, sigma = features.mean(0), np.cov(features, rowvar=False)
folder = sys.argv[2]
np.savez(f'{folder}/stored.npz', mu=mu, sigma=sigma)
np.savez_compressed(f'{folder}/compressed.npz', mu=mu, sigma=sigma)
np.savez(f'{folder}/fortran.npz', mu=mu, sigma=np.asfortranarray(sigma))
np.savez(f'{folder}/lacks.npz', mu=mu, cov=sigma)
np.savez(f'{folder}/narrow.npz', mu=mu[:3], sigma=sigma[:3, :3])
np.savez(f'{folder}/whole.npz', mu=mu, sigma=np.ones_like(sigma, dtype=np.int64))
";

#[test]
fn moments_give_fid_and_nothing_that_needs_features() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let file = |name: &str| repository().join("configs/digits").join(name).display().to_string();
    let evaluate = |reference: &str, more: &[&str]| {
        Command::new(binary("potstill"))
            .args(["evaluate", "--teacher", &file("teacher.safetensors"), "--features", &file("features.pt")])
            .args(["--samples", "100", "--teacher-steps", "2", "--reference", reference])
            .args(more)
            .output()
            .unwrap()
    };
    let value = |output: &Output| -> Value {
        assert!(output.status.success(), "{}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let saved = path("features.safetensors");
    let whole = value(&evaluate(&file("digits.safetensors"), &["--json", "--save-statistics", &saved]));
    let script = folder.path().join("moments.py");
    std::fs::write(&script, MOMENTS).unwrap();
    let python = repository().join(".venv/bin/python");
    let made = Command::new(python).arg(script).arg(&saved).arg(folder.path()).output().unwrap();
    assert!(made.status.success(), "{}", text(&made.stderr));
    for name in ["stored.npz", "compressed.npz", "fortran.npz"] {
        let scores = value(&evaluate(&path(name), &["--json"]));
        let [found, expected] = [&scores, &whole].map(|scores| scores["fid"].as_f64().unwrap());
        assert!((found - expected).abs() <= 1e-6 * expected, "{name}: {found} {expected}");
        assert!(scores["precision"].is_null() && scores["recall"].is_null(), "{scores}");
        assert_eq!((&scores["agreement"], &scores["diversity"]), (&whole["agreement"], &whole["diversity"]));
    }
    let table = text(&evaluate(&path("stored.npz"), &[]).stdout);
    for name in ["precision", "recall"] {
        let row = table.lines().find(|line| line.trim_start().starts_with(name)).unwrap();
        assert!(row.ends_with('–'), "{table}");
    }
    for (name, says) in [
        ("lacks.npz", vec!["lacks.npz", "has no array `sigma`", "\"cov\""]),
        ("narrow.npz", vec!["`mu` has shape [3]", "the extractor's"]),
        ("whole.npz", vec!["`sigma` holds numbers of kind", "fp64 or fp32"]),
    ] {
        let output = evaluate(&path(name), &[]);
        let message = text(&output.stderr);
        assert!(
            !output.status.success() && says.iter().all(|word| message.contains(word)),
            "{name}: {message}"
        );
    }
    let output = evaluate(&path("stored.npz"), &["--save-statistics", &path("x.safetensors")]);
    assert!(text(&output.stderr).contains("moments only"), "{}", text(&output.stderr));
}

#[test]
fn a_run_compared_with_moments_says_nothing_about_recall() {
    let cluster = Cluster::default();
    let digits = repository().join("configs/digits");
    let moments = cluster.storage().join("moments.npz");
    // No digit has such features; the test is about the output, not about quality.
    let script = "import sys, numpy as np; n = int(sys.argv[2]); np.savez(sys.argv[1], mu=np.zeros(n), sigma=np.eye(n))";
    let width = "import sys, torch; print(torch.jit.load(sys.argv[1])(torch.zeros(1, 1, 8, 8))[0].shape[1])";
    let python = |arguments: &[&Path]| {
        let output = Command::new(repository().join(".venv/bin/python")).arg("-c").args(arguments).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout).trim().to_owned()
    };
    let width = python(&[Path::new(width), &digits.join("features.pt")]);
    python(&[Path::new(script), &moments, Path::new(&width)]);
    let reference = format!("evaluation.reference={}", moments.display());
    let output =
        cluster.launch("moments", 1, &["distillation.iterations=1", &reference], &[]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let summary = cluster.summary("moments");
    assert!(summary["student"]["fid"].is_f64(), "{summary}");
    assert!(summary["student"]["recall"].is_null() && summary["teacher"]["precision"].is_null(), "{summary}");
    assert!(!text(&output.stderr).contains("NaN"), "{}", text(&output.stderr));
    let table = text(&output.stdout);
    assert!(table.lines().any(|line| line.contains("recall") && line.contains('–')), "{table}");
    let rows = cluster.metrics("moments");
    let scores: Vec<&Value> =
        rows.iter().filter(|row| row["kind"] == "evaluation").map(|row| &row["scores"]).collect();
    assert!(!scores.is_empty() && scores.iter().all(|scores| scores["recall"].is_null()));
    let mut report = Command::new(binary("potstill"));
    report.args(["report", "moments", "--require", "student.recall>=0", "--storage"]).arg(cluster.storage());
    let output = report.output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("student.recall was not measured"), "{}", text(&output.stderr));
}

#[test]
fn images_are_scored_in_the_size_that_the_protocol_has() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("make.py");
    std::fs::write(&script, EXTRACTORS).unwrap();
    let python = repository().join(".venv/bin/python");
    let made = Command::new(python).arg(&script).arg(folder.path()).output().unwrap();
    assert!(made.status.success(), "{}", text(&made.stderr));
    let file = |name: &str| repository().join("configs/digits").join(name).display().to_string();
    let features = folder.path().join("Flat.pt").display().to_string();
    let digits = file("digits.safetensors");
    let evaluate = |reference: &str, more: &[&str]| {
        Command::new(binary("potstill"))
            .args(["evaluate", "--teacher", &file("teacher.safetensors"), "--features", &features])
            .args(["--samples", "50", "--teacher-steps", "2", "--json", "--reference", reference])
            .args(more)
            .output()
            .unwrap()
    };
    let fid = |reference: &str, more: &[&str]| {
        let output = evaluate(reference, more);
        assert!(output.status.success(), "{more:?}: {}", text(&output.stderr));
        serde_json::from_slice::<Value>(&output.stdout).unwrap()["fid"].as_f64().unwrap()
    };
    let [small, patch] = ["small", "patch"]
        .map(|name| folder.path().join(name).with_extension("safetensors").display().to_string());
    let width = |name: &str| -> usize {
        let bytes = std::fs::read(name).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        tensors.tensor("features").unwrap().shape()[1]
    };
    let resized = ["--images", "resized", "--image-size", "5"];
    let of_patch = ["--images", "patch", "--image-size", "6"];
    let one = fid(&digits, &[&resized[..], &["--save-statistics", &small]].concat());
    let two = fid(&digits, &[&of_patch[..], &["--save-statistics", &patch]].concat());
    assert_eq!((width(&small), width(&patch)), (25, 36), "the extractor sees images of that size");
    assert!(one != two && one > 0.0);
    // The features in a file are of one treatment.
    assert!((fid(&small, &resized) - one).abs() <= 1e-9 * one);
    for (reference, more, says) in [
        (&small, vec![], vec!["images resized to 5", "as-made"]),
        (&small, of_patch.to_vec(), vec!["resized to 5", "patch of 6"]),
        (&digits, vec!["--images", "resized"], vec!["evaluation.image_size"]),
        (&digits, vec!["--image-size", "5"], vec!["as-made", "changes no size"]),
        (&digits, vec!["--images", "patch"], vec!["299×299", "8×8"]),
    ] {
        let output = evaluate(reference, &more);
        let message = text(&output.stderr);
        let refused = !output.status.success() && says.iter().all(|word| message.contains(word));
        assert!(refused, "{more:?}: {message}");
    }
}

#[test]
fn each_caption_can_have_one_image() {
    let clip = repository().join("tests/fixtures/clip_shapes.pt");
    let folder = tempfile::tempdir().unwrap();
    let captions = folder.path().join("captions.jsonl");
    let line = |colour: &str| format!("{{\"caption\": \"a {colour} circle\", \"label\": 0}}\n");
    std::fs::write(&captions, ["red", "green", "blue", "yellow"].map(line).concat()).unwrap();
    let own = repository().join("configs/shapes/prompts.jsonl");
    let score = |prompts: &Path, samples: &str, more: &[&str]| {
        let fixed = ["--samples", samples, "--teacher-steps", "4", "--threads", "1"];
        let output = shapes_on(prompts, &clip, &[&fixed, more].concat());
        assert!(output.status.success(), "{more:?}: {}", text(&output.stderr));
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let one_each = score(&own, "48", &["--samples-per-prompt", "1"]);
    assert!(one_each["diversity"].is_null() && one_each["fid"].is_f64(), "{one_each}");
    assert!(one_each["agreement"].is_f64() && one_each["clip_score"].is_f64(), "{one_each}");
    assert!(score(&own, "48", &["--samples-per-prompt", "2"])["diversity"].is_f64());
    // Fewer captions than samples: they are used in turn, so there are pairs.
    let circles = score(&captions, "24", &["--prompts-column", "caption", "--samples-per-prompt", "1"]);
    assert!(circles["diversity"].is_f64(), "{circles}");
    let output = shapes_on(&captions, &clip, &["--samples", "24"]);
    let message = text(&output.stderr);
    assert!(message.contains("\"prompt\"") && message.contains("--prompts-column"), "{message}");
}
