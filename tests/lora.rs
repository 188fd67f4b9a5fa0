//! Runs that train low-rank adapters on one frozen network.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::process::Command;

use potstill_tests::{Cluster, binary, relative_difference, text};

const LORA: &str = "lora={rank=4, alpha=4.0}";
const DROPPING: &str = "lora={rank=4, alpha=4.0, dropout=0.2}";

#[test]
fn a_checkpoint_holds_adapters_alone_and_any_number_of_workers_follows_one_trajectory() {
    let cluster = Cluster::default();
    let sets = [
        "distillation.iterations=12",
        "distillation.micro_batch=2",
        "generator.steps=2",
        "generator.sigmas=[2.5, 0.8]",
        DROPPING,
    ];
    for workers in [1, 2, 3] {
        cluster.succeed(&format!("w{workers}"), workers, &sets, &[]);
    }
    cluster.succeed("whole", 1, &[&sets[..4], &[LORA]].concat(), &[]);
    let difference =
        relative_difference(&cluster.checkpoint("whole", 12), &cluster.checkpoint("w1", 12), "generator/");
    assert!(difference > 1e-3, "dropout has an effect: {difference}");
    let one = cluster.checkpoint("w1", 12);
    for name in one.keys().filter(|name| !name.starts_with("counters/")) {
        assert!(name.ends_with("lora_A.weight") || name.ends_with("lora_B.weight"), "{name}");
    }
    for other in ["w2", "w3"] {
        let other = cluster.checkpoint(other, 12);
        for part in ["generator/", "fake_score/", "generator_ema/"] {
            let difference = relative_difference(&other, &one, part);
            assert!(difference <= 1e-4, "{part}: {difference}");
        }
    }
    let moved = |part: &str| {
        let up = |(name, _): &(&String, &Vec<f32>)| name.starts_with(part) && name.ends_with("lora_B.weight");
        one.iter().filter(up).all(|(_, values)| values.iter().any(|value| *value != 0.0))
    };
    assert!(moved("generator/") && moved("fake_score/"), "every adapter has been trained");
}

#[test]
fn a_run_with_adapters_resumes_bit_by_bit_and_loses_nothing_with_a_rank() {
    let cluster = Cluster::default();
    let sets = |iterations: &'static str| [iterations, DROPPING, "optimizer.generator_learning_rate=1e-3"];
    cluster.succeed("straight", 2, &sets("distillation.iterations=8"), &[]);
    cluster.succeed("halves", 2, &sets("distillation.iterations=4"), &[]);
    cluster.succeed("halves", 2, &sets("distillation.iterations=8"), &["--resume"]);
    assert!(cluster.checkpoint("straight", 8) == cluster.checkpoint("halves", 8), "a resumed run differs");

    let mut command = cluster.launch("killed", 2, &sets("distillation.iterations=8"), &[]);
    let once = cluster.storage().join("once");
    command.env("POTSTILL_FAULT", format!("die:forward:3:0:{}", once.display()));
    let output = command.output().unwrap();
    assert!(output.status.success() && once.exists(), "{}", text(&output.stderr));
    assert_eq!(cluster.summary("killed")["repeated_iterations"], 0);
    cluster.assert_same_end("killed", "straight", 8);
}

#[test]
fn a_student_with_adapters_is_exported_as_one_network_and_samples_the_same() {
    let cluster = Cluster::default();
    let storage = cluster.storage().to_str().unwrap().to_owned();
    let fast = "optimizer.generator_learning_rate=1e-2";
    cluster.succeed("done", 1, &["distillation.iterations=4", LORA, fast], &[]);
    let succeed = |arguments: &[&str]| {
        let output = Command::new(binary("potstill")).args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    };
    let (run, file) = (format!("{storage}/runs/done"), format!("{storage}/student.safetensors"));
    succeed(&["export", "--checkpoint", &run, "--out", &file]);
    let bytes = |name: &str| std::fs::read(format!("{storage}/{name}/000000.png")).unwrap();
    for (from, name) in [(&run, "a"), (&file, "b")] {
        let out = format!("{storage}/{name}");
        succeed(&["sample", "--checkpoint", from, "--count", "1", "--out", &out]);
    }
    assert_eq!(bytes("a"), bytes("b"));
    // It is not the teacher with one step.
    cluster.succeed(
        "untrained",
        1,
        &["distillation.iterations=1", "distillation.generator_start_images=1000000", LORA],
        &[],
    );
    let out = format!("{storage}/c");
    succeed(&["sample", "--checkpoint", &format!("{storage}/runs/untrained"), "--count", "1", "--out", &out]);
    assert_ne!(bytes("a"), bytes("c"));
}

#[test]
fn a_generator_starts_from_the_adapters_of_a_file() {
    let cluster = Cluster::default();
    let storage = cluster.storage().to_str().unwrap().to_owned();
    let fast = "optimizer.generator_learning_rate=1e-2";
    cluster.succeed(
        "first",
        1,
        &["distillation.iterations=4", LORA, fast, "optimizer.ema_half_life_images=1"],
        &[],
    );
    // Before its first step the generator is what it starts from.
    let still = ["distillation.iterations=1", "distillation.generator_start_images=1000000", LORA];
    for format in ["lora-diffusers", "lora-kohya"] {
        let file = format!("{storage}/{format}.safetensors");
        let run = format!("{storage}/runs/first");
        let output = Command::new(binary("potstill"))
            .args(["export", "--checkpoint", &run, "--out", &file, "--format", format])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        let start = format!("generator.start_from={file}");
        let second = format!("second-{format}");
        cluster.succeed(&second, 1, &[&still[..], &[&start]].concat(), &[]);
        let (first, second) = (cluster.checkpoint("first", 4), cluster.checkpoint(&second, 1));
        for (name, values) in &second {
            let Some(parameter) = name.strip_prefix("generator/") else { continue };
            let averaged = &first[&format!("generator_ema/{parameter}")];
            let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6 * b.abs().max(1e-3);
            assert!(values.iter().zip(averaged).all(close), "{format}: {parameter}");
        }
        let other = cluster.refused(&["lora={rank=2}", &start], &[]);
        assert!(other.contains("the file has rank 4, and [lora] asks for rank 2"), "{other}");
    }
    let teacher = "generator.start_from=teacher.safetensors";
    let message = cluster.refused(&[LORA, teacher], &[]);
    assert!(message.contains("is not the name of an adapter"), "{message}");
}

#[test]
fn adapters_that_a_network_cannot_have_are_refused() {
    let cluster = Cluster::default();
    let message = cluster.refused(&["lora={rank=4, targets=['conv0', 'conv7']}"], &[]);
    assert!(message.contains("conv7 (nearest: conv"), "{message}");
    let message = cluster.refused(&["lora={rank=400}"], &[]);
    assert!(message.contains("rank 400 is above what model."), "{message}");
    assert!(cluster.refused(&["lora={alpha=0.0}"], &[]).contains("lora.alpha is 0"));
    assert!(cluster.refused(&["lora={dropout=1.0}"], &[]).contains("lora.dropout is 1"));
    assert!(cluster.refused(&["lora={rank=0}"], &[]).contains("lora.rank"));
}

#[test]
fn a_half_precision_export_that_overflows_is_refused_and_leaves_nothing() {
    let cluster = Cluster::default();
    let fast = "optimizer.generator_learning_rate=1e6";
    cluster.finish("far", 1, &["distillation.iterations=1", LORA, fast], &[]);
    let out = cluster.storage().join("adapters.safetensors");
    let output = Command::new(binary("potstill"))
        .args(["export", "--format", "lora-diffusers", "--dtype", "fp16", "--checkpoint"])
        .arg(cluster.run("far"))
        .arg("--out")
        .arg(&out)
        .output()
        .unwrap();
    let message = text(&output.stderr);
    assert!(!output.status.success() && !out.exists(), "{message}");
    let count: Option<u64> = message.split(' ').find_map(|word| word.parse().ok());
    assert!(count.is_some_and(|count| count > 0) && message.contains("lora_B.weight"), "{message}");
}
