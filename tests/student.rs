//! Tests the uses of a finished student: export, and samples from the export or from the run itself.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{path::Path, process::Command};

use potstill_tests::{Cluster, binary, text};

fn potstill(arguments: &[&str]) -> Command {
    let mut command = Command::new(binary("potstill"));
    command.args(arguments);
    command
}

fn succeed(arguments: &[&str]) -> String {
    let output = potstill(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

fn refused(arguments: &[&str]) -> String {
    let output = potstill(arguments).output().unwrap();
    assert!(!output.status.success(), "{arguments:?} was accepted");
    text(&output.stderr)
}

#[test]
fn samples_are_the_same_from_the_run_and_from_its_export() {
    let cluster = Cluster::default();
    let sets = [
        "distillation.iterations=4",
        "checkpoint.every=2",
        "generator.steps=2",
        "generator.sigmas=[2.5, 0.8]",
    ];
    cluster.succeed("done", 1, &sets, &[]);
    let storage = cluster.storage().to_str().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (file, a, b, c) = (path("student.safetensors"), path("a"), path("b"), path("c"));

    let run = format!("{storage}/runs/done");
    let said = succeed(&["export", "--checkpoint", &run, "--out", &file]);
    assert!(said.contains("[2.5, 0.8]") && said.contains("000000000004"), "the newest checkpoint: {said}");
    succeed(&["sample", "--checkpoint", &file, "--count", "12", "--labels", "3,7", "--out", &a]);
    succeed(&["sample", "--checkpoint", &run, "--count", "5", "--labels", "3,7", "--out", &b]);
    let read = |folder: &str, name: &str| std::fs::read(Path::new(folder).join(name)).unwrap();
    for index in 0..5 {
        let name = format!("{index:06}.png");
        assert_eq!(read(&a, &name), read(&b, &name), "image {index} does not depend on how many are made");
    }
    let single = image::load_from_memory(&read(&a, "000011.png")).unwrap();
    assert_eq!((single.width(), single.height()), (8, 8));
    let grid = image::load_from_memory(&read(&a, "grid.png")).unwrap();
    assert!(grid.width() > 10 * 56 && grid.height() > 2 * 56, "two rows of ten");

    let second = format!("{run}/checkpoints/2");
    succeed(&["sample", "--checkpoint", &second, "--count", "1", "--out", &c]);
    succeed(&["sample", "--checkpoint", &file, "--count", "1", "--seed", "9", "--out", &b]);
    assert_ne!(read(&a, "000000.png"), read(&b, "000000.png"), "another seed, another image");

    succeed(&["sample", "--checkpoint", &file, "--count", "1", "--steps", "1", "--labels", "3", "--out", &c]);
    assert_ne!(read(&a, "000000.png"), read(&c, "000000.png"), "the first step alone");

    let third = format!("{run}/checkpoints/3");
    let none = format!("{storage}/runs/none");
    let teacher = potstill_tests::repository().join("configs/digits/teacher.safetensors");
    for (checkpoint, more, says) in [
        (file.as_str(), ["--labels", "10"], "class 10 is out of range"),
        (&file, ["--steps", "3"], "has 2 step(s)"),
        (&none, ["--count", "1"], "no run none"),
        (&third, ["--count", "1"], "iteration 3"),
        ("/nowhere.safetensors", ["--count", "1"], "/nowhere.safetensors"),
        ("nowhere", ["--count", "1"], "expected an exported"),
        (teacher.to_str().unwrap(), ["--count", "1"], "not an exported generator"),
    ] {
        let arguments = [&["sample", "--checkpoint", checkpoint, "--out", &c], &more[..]].concat();
        let message = refused(&arguments);
        assert!(message.contains(says), "{says}: {message}");
    }
}

/// A checkpoint of the previous format: its generator can be exported, but no run can be resumed from it.
#[test]
fn what_an_earlier_version_saved_is_exported_but_not_resumed() {
    let cluster = Cluster::default();
    let sets = ["distillation.iterations=2", "adversarial.data=digits.safetensors"];
    cluster.succeed("old", 1, &sets, &[]);
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let run = cluster.run("old");
    succeed(&["export", "--checkpoint", run.to_str().unwrap(), "--out", &file("new.safetensors")]);

    let change = |name: &str, from: &str, to: &str| {
        let path = run.join(name);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(path, text.replace(from, to)).unwrap();
    };
    let manifest = "checkpoints/000000000002/manifest.json";
    change(manifest, "\"version\": 2", "\"version\": 1");
    let log = |output: std::process::Output| {
        assert!(!output.status.success());
        text(&output.stderr)
    };
    let longer = ["distillation.iterations=4", "adversarial.data=digits.safetensors"];
    let message = log(cluster.run_to_end("old", 1, &longer, &["--resume"]));
    for part in ["manifest.json", "format 1", "earlier version", "potstill export", "generator.start_from"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    // Its run file has former keys.
    change("run.toml", "[adversarial]", "[adversarial]\nstart_images = 0\nscore_identity_weight = 100.0");
    let message = log(cluster.run_to_end("old", 1, &longer, &["--resume"]));
    assert!(message.contains("earlier version") && message.contains("score_identity_weight"), "{message}");
    succeed(&["export", "--checkpoint", run.to_str().unwrap(), "--out", &file("old.safetensors")]);
    let read = |name: &str| std::fs::read(file(name)).unwrap();
    assert!(read("old.safetensors") == read("new.safetensors"));
    assert!(run.join(manifest).exists(), "nothing is set aside or swept");
}
