//! Tests that invalid input gets a clear error and an exit code other than 0, and that nothing is written.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{net::TcpListener, path::Path, process::Command};

use potstill_tests::{Cluster, Process, binary, repository, text};

fn says(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
}

#[test]
fn configuration() {
    let cluster = Cluster::default();
    let message = cluster.refused(&["distillation.iteratoins=5"], &[]);
    says(&message, &["`distillation.iteratoins`", "`distillation.iterations`"]);
    says(&cluster.refused(&["distillation.seed=soon"], &[]), &["distillation.seed"]);
    says(&cluster.refused(&["distillation.iterations=1.5"], &[]), &["distillation.iterations"]);
    says(
        &cluster.refused(&["optimizer.generator_learning_rate=-1"], &[]),
        &["generator_learning_rate is -1"],
    );
    says(&cluster.refused(&["distillation.micro_batch=3"], &[]), &["global_batch (8)", "micro_batch (3)"]);
    says(&cluster.refused(&["distillation.micro_batch=8"], &[]), &["2 workers", "1 micro-batch"]);
    says(&cluster.refused(&["seed"], &[]), &["key=value"]);
}

#[test]
fn variables() {
    let cluster = Cluster::default();
    let mut launch = cluster.launch("bad", 2, &[], &[]);
    let output = launch.env("GLOO_DEVICE_TRANSPORT", "TCP_TLS").output().unwrap();
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    says(&message, &["GLOO_DEVICE_TRANSPORT", "in the clear", "WireGuard"]);
    assert!(!cluster.run("bad").exists(), "{message}");
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
    says(&cluster.refused(&["teacher.weights=/nowhere/t.safetensors"], &[]), &["/nowhere/t.safetensors"]);
    let truncated = with(&whole[..whole.len() / 2]);
    says(&cluster.refused(&[&truncated], &[]), &["t.safetensors", "truncated"]);
    let renamed = with(&replaced(&whole, "model.map_layer0.bias", "model.map_layer0.bios"));
    says(
        &cluster.refused(&[&renamed], &[]),
        &["t.safetensors", "model.map_layer0.bias", "model.map_layer0.bios"],
    );
    let reshaped = with(&replaced(&whole, r#"\"model_channels\":16"#, r#"\"model_channels\":32"#));
    says(&cluster.refused(&[&reshaped], &[]), &["t.safetensors", "model.dec.4x4_block0.affine.bias"]);
    let mut broken = whole.clone();
    let last = broken.len() - 4;
    broken[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    says(&cluster.refused(&[&with(&broken)], &[]), &["weights are not finite"]);
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
    let message = cluster.refused(&[&format!("evaluation.reference={}", path.display())], &[]);
    says(&message, &["d.safetensors", "label 77", "out of range"]);
    let script = repository().join("configs/digits/one-step.toml");
    let message = cluster.refused(&[&format!("evaluation.clip={}", script.display())], &[]);
    says(&message, &["evaluation.clip", "text-to-image"]);
    let message = cluster.refused(&[&format!("evaluation.features={}", script.display())], &[]);
    says(&message, &["one-step.toml", "TorchScript"]);
}

#[test]
fn distillation_settings_that_do_not_fit() {
    let cluster = Cluster::default();
    let refused = |sets: &[&str]| cluster.refused(sets, &[]);
    says(&refused(&["generator.steps=4"]), &["generator.sigmas has 1", "generator.steps is 4"]);
    let rising = refused(&["generator.steps=2", "generator.sigmas=[0.5, 2.5]"]);
    says(&rising, &["generator.sigmas", "fall from step to step"]);
    says(&refused(&["generator.step_weights=[1, 2]"]), &["generator.step_weights", "each of the 1 steps"]);
    says(&refused(&["adversarial.limit=5"]), &["adversarial.data is missing"]);
    says(&refused(&["adversarial.data=/nowhere/real"]), &["adversarial.data", "/nowhere/real"]);
    let former = refused(&["adversarial.start_images=5"]);
    says(&former, &["adversarial.start_images", "earlier version", "adversarial.join_images"]);
    says(&refused(&["optimiser.clip_value=5"]), &["optimizer.generator_clip_value"]);
    let augmentation = refused(&["distillation.augmentation=0.12"]);
    says(&augmentation, &["distillation.augmentation", "9 augmentation labels", "takes 0"]);
    let weighting = refused(&["distillation.weighting=one-minus-t"]);
    says(&weighting, &["distillation.weighting", "flow-matching"]);
    says(&refused(&["distillation.precision=fp8"]), &["distillation.precision", "fp16"]);
    says(&refused(&["optimizer.clip_norm=0.0"]), &["optimizer.clip_norm"]);
    let decay = refused(&["optimizer.decay={start_images=10,end_images=20,end_factor=0.0}"]);
    says(&decay, &["optimizer.decay.end_images is 20"]);
    let teacher = repository().join("configs/digits/teacher.safetensors");
    let start = refused(&[&format!("generator.start_from={}", teacher.display())]);
    says(&start, &["generator.start_from", "not an exported generator"]);
}

#[test]
fn real_samples_of_another_shape() {
    let cluster = Cluster::default();
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("3")).unwrap();
    for index in 0..3 {
        let image = image::GrayImage::new(8, 9);
        image.save(folder.path().join(format!("3/{index}.png"))).unwrap();
    }
    let message = cluster.refused(&[&format!("adversarial.data={}", folder.path().display())], &[]);
    says(&message, &["adversarial.data", "9×8", "8×8"]);
}

#[test]
fn guidance_without_an_unconditional_class() {
    let cluster = Cluster::default();
    let folder = tempfile::tempdir().unwrap();
    // A teacher without classes, trained for one iteration.
    let config = folder.path().join("unconditional.toml");
    let text = std::fs::read_to_string(repository().join("configs/digits/teacher.toml")).unwrap();
    let images = repository().join("configs/digits/digits.safetensors");
    let text = text.replace("\"digits.safetensors\"", &format!("{:?}", images.display().to_string()));
    std::fs::write(&config, text).unwrap();
    let output = folder.path().join("teacher.safetensors");
    let trained = Command::new(binary("potstill"))
        .args(["train-teacher", config.to_str().unwrap(), "--set", "training.iterations=1"])
        .args(["--set", "network.label_dim=0", "--set", "network.label_dropout=0.0"])
        .args(["--set", "evaluation.samples=20", "--set", "evaluation.teacher_steps=2"])
        .args(["--set", &format!("output={}", output.display())])
        .args([
            "--set",
            &format!("evaluation.features={}", repository().join("configs/digits/features.pt").display()),
        ])
        .args(["--set", &format!("evaluation.reference={}", images.display())])
        .output()
        .unwrap();
    assert!(trained.status.success(), "{}", potstill_tests::text(&trained.stderr));
    let weights = format!("teacher.weights={}", output.display());
    let message = cluster.refused(&[&weights, "guidance.preset=lsg", "guidance.scale=2.0"], &[]);
    says(&message, &["guidance", "unconditional"]);
}

#[test]
fn a_generator_that_makes_nothing_finite_stops_the_run_with_a_reason() {
    let cluster = Cluster::default();
    cluster.succeed("good", 1, &["distillation.iterations=2"], &[]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("student.safetensors");
    let run = cluster.run("good");
    let exported = Command::new(binary("potstill"))
        .args(["export", "--checkpoint", run.to_str().unwrap(), "--out", path.to_str().unwrap()])
        .output()
        .unwrap();
    assert!(exported.status.success(), "{}", text(&exported.stderr));
    let start = format!("generator.start_from={}", path.display());
    let sets = [start.as_str(), "distillation.iterations=30", "distillation.non_finite_limit=4"];
    cluster.succeed("from-good", 1, &[&start, "distillation.iterations=2"], &[]);

    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    // Without evaluation: the metrics of such samples would be rejected before the first iteration.
    let sets = [&sets[..], &["checkpoint.every=1"]].concat();
    let output = cluster.unscored("launch", "diverged", 1, &sets, &[]).output().unwrap();
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    says(&message, &["4 iterations in a row", "not finite", "diverged"]);
}

#[test]
fn a_student_that_collapses_stops_the_run_and_leaves_the_checkpoint_before() {
    let cluster = Cluster::default();
    let sets = [
        "distillation.iterations=4",
        "checkpoint.every=1",
        "evaluation.every=2",
        "evaluation.teacher_steps=8",
        // At this stage the student's samples of one class are still very similar.
        "evaluation.collapse_share=0.9",
    ];
    let output = cluster.run_to_end("collapsed", 2, &sets, &[]);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    says(&message, &["the student has collapsed", "iteration 2", "evaluation.collapse_share"]);
    let manifest =
        |iteration: u64| cluster.run("collapsed").join(format!("checkpoints/{iteration:012}/manifest.json"));
    assert!(manifest(1).exists() && !manifest(2).exists());
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
    says(&cluster.refused(&[], &["--listen", &address]), &[&address, "in use"]);
}

#[test]
fn a_rank_without_a_device_of_its_own() {
    let cluster = Cluster::default();
    let mut command = cluster.unscored("launch", "hidden", 1, &[], &["--device", "cuda"]);
    // Hides every device, so that it is the same where there are some.
    let output = command.env("CUDA_VISIBLE_DEVICES", "-1").output().unwrap();
    let message = text(&output.stderr);
    assert!(!output.status.success(), "{message}");
    says(&message, &["rank 0 of this machine has no GPU of its own: there are 0 (CUDA_VISIBLE_DEVICES=-1)"]);
}

#[test]
fn resume() {
    let cluster = Cluster::default();
    says(&cluster.refused(&[], &["--resume"]), &["nothing to resume"]);

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
    // Bound, then closed: no process listens there.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let mut rank = Command::new(binary("potstill-worker"));
    rank.args(["rank", "--insecure", "--coordinator", &address, "--run-id", "r"]);
    let mut rank = Process::start(rank);
    // It may be starting, so that it is waited for.
    let waiting = rank.until(&["waiting for the coordinator"]);
    says(&waiting, &[&address, "refused", "giving up after"]);
}

#[test]
fn a_configuration_that_is_not_there() {
    let output =
        Command::new(binary("potstill")).args(["launch", "nowhere.toml", "--workers", "1"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    says(&text(&output.stderr), &["nowhere.toml"]);
    assert!(!Path::new("runs").exists());
}
