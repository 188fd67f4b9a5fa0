//! Tests how `potstill launch` ends: by itself, by a signal, by kill -9, with a rank lost before; which files it
//! leaves, and what `potstill status` shows meanwhile.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::BTreeMap,
    process::{Command, Stdio},
};

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::signal::Signal,
    unistd::Pid,
};
use potstill_tests::{Cluster, Process, lacks, repository, text, worker_pid};

#[test]
fn the_doctor_finds_what_is_there_and_what_is_not() {
    let cluster = Cluster::default();
    let doctor = |arguments: &[&str]| {
        let mut command = Command::new(potstill_tests::binary("potstill"));
        let output = command.arg("doctor").args(arguments).output().unwrap();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let storage = cluster.storage().display().to_string();
    let (code, said, problem) = doctor(&["--storage", &storage, "--device", "cpu"]);
    assert_eq!(code, Some(0), "{said}{problem}");
    for part in [
        "ok   program",
        "libtorch 2.11.0",
        "Gloo: a group of one rank reduces",
        "\"create if absent\" honored",
    ] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    assert_eq!(
        std::fs::read_dir(cluster.storage().join("runs")).unwrap().count(),
        0,
        "its probes are removed"
    );

    // Each problem is found, and named with what to do about it.
    let port = format!("127.0.0.1:{}", potstill_tests::free_port());
    let (code, said, _) =
        doctor(&["--storage", "/nowhere/at/all", "--coordinator", &port, "--interface", "nowhere0"]);
    assert_eq!(code, Some(1), "{said}");
    let failed: Vec<_> =
        said.lines().filter_map(|line| line.strip_prefix("FAIL ")?.split("  ").next()).collect();
    assert_eq!(failed, ["network", "collectives", "coordinator", "storage"], "{said}");
    assert!(said.contains("no interface nowhere0") && said.contains("nothing answers at"), "{said}");
}

#[test]
fn a_finished_run_leaves_scores_pictures_and_metrics() {
    let cluster = Cluster::default();
    let sets = ["distillation.iterations=6", "evaluation.every=3", "checkpoint.every=4"];
    let output = cluster.run_to_end("results", 2, &sets, &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let run = cluster.run("results");

    let summary: serde_json::Value =
        serde_json::from_slice(&std::fs::read(run.join("summary.json")).unwrap()).unwrap();
    assert_eq!(summary["run"], "results");
    assert_eq!(summary["world_size"], 2);
    assert_eq!(summary["iterations"], 6);
    assert_eq!(summary["images"], 6 * 8);
    for path in ["/images_per_second", "/wall_seconds", "/initial/fid", "/initial/agreement"] {
        assert!(summary.pointer(path).unwrap().as_f64().unwrap() >= 0.0, "{path}: {summary}");
    }
    for subject in ["teacher", "student"] {
        for field in ["fid", "agreement", "recall", "evaluations_per_image", "images_per_second"] {
            assert!(summary[subject][field].as_f64().unwrap() >= 0.0, "{subject}.{field}: {summary}");
        }
    }
    assert_eq!(summary["teacher"]["evaluations_per_image"], 3.0);
    assert_eq!(summary["student"]["evaluations_per_image"], 1.0);

    for picture in ["samples.png", "curves.png"] {
        let picture = image::open(run.join(picture)).unwrap().to_luma8();
        let (darkest, brightest) =
            picture.pixels().fold((255, 0), |(low, high), pixel| (low.min(pixel[0]), high.max(pixel[0])));
        assert!(picture.width() > 300 && brightest - darkest > 100, "not blank");
    }
    // A picture with each evaluation; the last one is the lower half of samples.png.
    let names = |run: &std::path::Path| -> Vec<String> {
        let folder = std::fs::read_dir(run.join("pictures")).unwrap();
        let mut names: Vec<String> =
            folder.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&run), [0, 3, 6].map(|iteration| format!("{iteration:012}.png")));
    let open = |path: std::path::PathBuf| image::open(path).unwrap().to_luma8();
    let pictures: Vec<_> = names(&run).iter().map(|name| open(run.join("pictures").join(name))).collect();
    assert!(pictures[0] != pictures[2], "the student has learnt");
    let (both, student) = (open(run.join("samples.png")), &pictures[2]);
    let gap = 4;
    let below = both.height() - student.height() + gap;
    for (x, y, pixel) in student.enumerate_pixels().filter(|(_, y, _)| *y >= gap) {
        assert_eq!(both.get_pixel(x, below + y - gap), pixel, "{x}, {y}");
    }
    // Any number of workers draws the same.
    let sets = ["distillation.iterations=1", "evaluation.pictures_every=1"];
    assert!(cluster.run_to_end("one", 1, &sets, &[]).status.success());
    let one = cluster.run("one").join("pictures");
    assert_eq!(std::fs::read_dir(&one).unwrap().count(), 2);
    let first = open(one.join(format!("{:012}.png", 0)));
    assert!(first.pixels().zip(pictures[0].pixels()).all(|(a, b)| a[0].abs_diff(b[0]) <= 1));

    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let rows: Vec<serde_json::Value> =
        metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let students = |row: &&serde_json::Value| row["kind"] == "evaluation" && row["subject"] == "student";
    let scored: Vec<u64> =
        rows.iter().filter(students).map(|row| row["iteration"].as_u64().unwrap()).collect();
    assert_eq!(scored, [0, 3, 6]);
    let peaks: Vec<_> =
        rows.iter().filter(|row| row["kind"] == "iteration").map(|row| &row["memory_peak_bytes"]).collect();
    assert!(peaks.iter().all(|bytes| bytes.as_u64().is_some_and(|bytes| bytes > 32 << 20)), "{peaks:?}");

    let table = text(&output.stdout);
    for word in
        ["teacher", "student", "FID", "agreement", "recall", "summary.json", "samples.png", "curves.png"]
    {
        assert!(table.contains(word), "{word}: {table}");
    }
    for iteration in [4, 6] {
        assert!(!cluster.checkpoint("results", iteration).is_empty());
    }
}

/// The real TensorBoard, if `scripts/test.sh` has installed it.
#[test]
fn tensorboard_reads_a_run_that_was_resumed() {
    let python = repository().join(".venv/bin/python");
    let has = Command::new(&python).args(["-c", "import tensorboard"]).stderr(Stdio::null()).status();
    if !has.is_ok_and(|status| status.success()) {
        return lacks("tensorboard", "tensorboard_reads_a_run_…", "pip install -r requirements-test.txt");
    }
    let cluster = Cluster::default();
    let sets = |iterations: &'static str| [iterations, "evaluation.every=10", "checkpoint.every=10"];
    assert!(cluster.run_to_end("board", 1, &sets("distillation.iterations=20"), &[]).status.success());
    // What follows the older checkpoint is computed again.
    let checkpoints = cluster.run("board").join("checkpoints");
    std::fs::remove_dir_all(checkpoints.join(format!("{:012}", 20))).unwrap();
    let again = cluster.run_to_end("board", 1, &sets("distillation.iterations=30"), &["--resume"]);
    assert!(again.status.success(), "{}", text(&again.stderr));
    let read = Command::new(python)
        .arg(repository().join("tests/tensorboard_events.py"))
        .arg(cluster.run("board").join("tensorboard"))
        .output()
        .unwrap();
    assert!(read.status.success(), "{}", text(&read.stderr));
    let found: serde_json::Value = serde_json::from_slice(&read.stdout).unwrap();

    let metrics = cluster.metrics("board");
    let of = |kind: &str, key: &str| -> Vec<(u64, f64)> {
        let rows = metrics.iter().filter(|row| row["kind"] == kind && row["subject"] != "teacher");
        rows.map(|row| (row["iteration"].as_u64().unwrap(), row.pointer(key).unwrap().as_f64().unwrap()))
            .collect()
    };
    for (tag, expected) in [
        ("loss/generator", of("iteration", "/generator_loss")),
        ("gradient_norm/fake_score", of("iteration", "/fake_score_grad_norm")),
        ("student/fid", of("evaluation", "/scores/fid")),
    ] {
        let read: Vec<(u64, f64)> = serde_json::from_value(found["scalars"][tag].clone()).unwrap();
        // The state from which a run is resumed is scored again.
        let read: Vec<(u64, f64)> = BTreeMap::from_iter(read).into_iter().collect();
        assert_eq!(read.len(), expected.len(), "{tag}: {read:?}, {expected:?}");
        for ((step, value), (iteration, number)) in read.iter().zip(&expected) {
            assert_eq!(step, iteration, "{tag}");
            assert!((value - number).abs() <= 1e-6 * number.abs(), "{tag}: {value}, {number}");
        }
    }
    let pictures: Vec<[u64; 3]> = serde_json::from_value(found["images"]["student"].clone()).unwrap();
    assert_eq!(pictures.iter().map(|picture| picture[0]).collect::<Vec<_>>(), [0, 10, 20, 30]);
    let specification = found["texts"]["specification/text_summary"][0].as_str().unwrap();
    assert!(specification.contains("[distillation]"), "{specification}");
}

/// The iteration of a run's only checkpoint: it was asked to stop, and saved at the next boundary.
fn saved_at(cluster: &Cluster, run: &str) -> u64 {
    let folders = std::fs::read_dir(cluster.run(run).join("checkpoints")).unwrap();
    let saved: Vec<u64> =
        folders.map(|entry| entry.unwrap().file_name().to_string_lossy().parse().unwrap()).collect();
    let [iteration] = saved[..] else { panic!("{run}: one checkpoint, at the stop: {saved:?}") };
    iteration
}

/// A run that saves only on request.
const ENDLESS: [&str; 2] = ["distillation.iterations=100000", "checkpoint.every=100000"];

#[test]
fn signals_save_and_resume_goes_on_bit_by_bit() {
    let cluster = Cluster::default();
    let signals = [("Ctrl-C", Signal::SIGINT), ("SIGTERM", Signal::SIGTERM), ("SIGUSR1", Signal::SIGUSR1)];
    let saved = signals.map(|(name, signal)| {
        let run = name.to_lowercase();
        let mut launched = Process::start(cluster.unscored("launch", &run, 2, &ENDLESS, &[]));
        launched.until(&["iteration", "images/s"]);
        launched.signal(signal);
        let (code, log) = launched.end();
        assert_eq!(code, Some(75), "{log}");
        assert!(log.contains(&format!("{name} received")), "{log}");
        assert!(log.contains("--resume"), "it says how to go on: {log}");
        let iteration = saved_at(&cluster, &run);
        (run, iteration)
    });
    let end = saved.iter().map(|(_, iteration)| iteration).max().unwrap() + 5;
    let iterations = format!("distillation.iterations={end}");
    cluster.finish("straight", 2, &[&iterations], &[]);
    for (run, _) in saved {
        cluster.finish(&run, 2, &[&iterations], &["--resume"]);
        assert_eq!(cluster.checkpoint(&run, end), cluster.checkpoint("straight", end), "{run}");
    }
}

#[test]
fn a_signal_to_an_agent_saves_its_ranks_leave_and_resume_goes_on_bit_by_bit() {
    let cluster = Cluster::default();
    let listen = "127.0.0.1:0";
    let mut served =
        Process::start(cluster.unscored("serve", "preempted", 2, &ENDLESS, &["--listen", listen]));
    served.until(&["coordinator started"]);
    let agent = Process::start(cluster.agent("preempted", 2));
    served.until(&["iteration", "images/s"]);
    agent.signal(Signal::SIGUSR1);
    let (code, log) = agent.end();
    assert_eq!(code, Some(75), "{log}");
    assert_eq!(log.matches("is saved").count(), 2, "both ranks leave when what they did is safe: {log}");
    served.until(&["waiting for workers", "0 of 2 workers"]);
    served.signal(Signal::SIGTERM);
    let (code, log) = served.end();
    assert_eq!(code, Some(75), "{log}");

    let end = saved_at(&cluster, "preempted") + 5;
    let iterations = format!("distillation.iterations={end}");
    cluster.finish("preempted", 2, &[&iterations], &["--resume"]);
    cluster.finish("straight", 2, &[&iterations], &[]);
    assert_eq!(cluster.checkpoint("preempted", end), cluster.checkpoint("straight", end));
}

#[test]
fn status_says_who_is_there_and_what_a_run_waits_for() {
    let cluster = Cluster::default();
    let listen = "127.0.0.1:0";
    let sets = ["distillation.iterations=100000", "checkpoint.every=2"];
    let mut served = Process::start(cluster.unscored("serve", "asked", 2, &sets, &["--listen", listen]));
    let ask = |flags: &[&str]| text(&cluster.about("status", "asked").args(flags).output().unwrap().stdout);
    let status = || serde_json::from_str::<serde_json::Value>(&ask(&["--json"])).unwrap();
    served.until(&["coordinator started"]);

    let first = Process::start(cluster.agent("asked", 1));
    let pid = worker_pid(&served.until(&["worker attached"]));
    served.until(&["waiting for workers", "1 of 2 workers"]);
    let waiting = status();
    assert_eq!(waiting["state"], "waiting");
    let reason = waiting["reason"].as_str().unwrap();
    assert!(reason.contains("the run starts: 1 of 2 workers; the run fails after"), "{reason}");
    let member = &waiting["members"][0];
    assert_eq!((&member["pid"], &member["liveness"]), (&pid.into(), &"alive".into()), "{waiting}");
    assert!(member["rank"].is_null() && waiting["committed_iteration"].is_null(), "{waiting}");
    let said = ask(&[]);
    for words in [&format!("asked: waiting: {reason}"), "generation 0, iteration 0", "there is no checkpoint"]
    {
        assert!(said.contains(words), "{words}: {said}");
    }

    let second = Process::start(cluster.agent("asked", 1));
    let lost = worker_pid(&served.until(&["worker attached"]));
    served.until(&["checkpoint committed"]);
    let training = status();
    assert_eq!((&training["state"], &training["generation"]), (&"training".into(), &1.into()), "{training}");
    assert!(training["iteration"].as_u64() >= Some(2) && training["committed_iteration"].as_u64() >= Some(2));
    let members = training["members"].as_array().unwrap();
    let mut ranks: Vec<_> = members.iter().map(|member| member["rank"].as_u64().unwrap()).collect();
    ranks.sort_unstable();
    assert_eq!(ranks, [0, 1]);
    assert!(members.iter().all(|member| member["cursor"].as_str().unwrap().starts_with("iteration ")));
    let said = ask(&[]);
    for words in
        ["asked: training", "generation 1, iteration", "of 100000", "the newest checkpoint is checkpoints/"]
    {
        assert!(said.contains(words), "{words}: {said}");
    }

    // The agent, since it would restart its rank.
    second.signal(Signal::SIGKILL);
    assert_eq!(second.end().0, None);
    served.until(&["waiting for workers", "1 of 2 workers"]);
    let waiting = status();
    let reason = waiting["reason"].as_str().unwrap();
    let named = reason.contains(&format!("process {lost},")) && reason.contains("is lost");
    assert!(named && reason.contains("1 of 2 workers"), "it says who is missing: {reason}");

    let watching = ["--watch", "--json"];
    let watching = cluster.about("status", "asked").args(watching).stdout(Stdio::piped()).spawn().unwrap();
    served.signal(Signal::SIGTERM);
    assert_eq!(served.end().0, Some(75));
    assert_eq!(first.end().0, Some(0));
    let watched = watching.wait_with_output().unwrap();
    assert!(watched.status.success());
    let last: serde_json::Value =
        serde_json::from_str(text(&watched.stdout).lines().last().unwrap()).unwrap();
    assert_eq!(last["state"], "stopped", "it watches until the run has ended");
    let stopped = status();
    assert_eq!(stopped["state"], "stopped");
    assert!(stopped["reason"].as_str().unwrap().contains("SIGTERM"), "{stopped}");
}

#[test]
fn nothing_outlives_a_launcher_that_is_killed() {
    let cluster = Cluster::default();
    let mut launched = Process::start(cluster.launch("killed", 2, &["distillation.iterations=100000"], &[]));
    launched.until(&["iteration", "images/s"]);
    launched.signal(Signal::SIGKILL);
    // The log ends only when agent and ranks, which write to it too, have ended.
    let (code, _) = launched.end();
    assert_eq!(code, None);
}

/// Ranks see the devices that their agent is left, and keep to the cores that it is left. On the CPU they are not bound to some of
/// these.
#[test]
fn ranks_keep_to_the_devices_and_cores_of_their_agent() {
    let cluster = Cluster::default();
    let mine = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let first = (0..CpuSet::count()).find(|core| mine.is_set(*core).unwrap()).unwrap();
    let mut one = CpuSet::new();
    one.set(first).unwrap();
    let mut command = cluster.unscored("launch", "kept", 2, &["distillation.iterations=1000000"], &[]);
    command.env("CUDA_VISIBLE_DEVICES", "3,1");
    // A thread's affinity is that of what it starts; this one's ends with it.
    let launched = std::thread::spawn(move || {
        sched_setaffinity(Pid::from_raw(0), &one).unwrap();
        Process::start(command)
    });
    let mut launched = launched.join().unwrap();
    let pids = [(); 2].map(|()| worker_pid(&launched.until(&["worker attached"])));
    for pid in pids {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
        let mut variables = environment.split(|byte| *byte == 0);
        assert!(variables.any(|variable| variable == b"CUDA_VISIBLE_DEVICES=3,1"));
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let cores = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
        assert_eq!(cores.trim(), first.to_string());
    }
    launched.until(&["images/s"]);
    launched.signal(Signal::SIGINT);
    let (code, log) = launched.end();
    assert_eq!(code, Some(75), "{log}");
}
