//! Tests that nothing is lost: ranks that die, hang or are stopped at any point, coordinators that die, workers that
//! come and go. Every run here must end with the networks of an undisturbed one, and repeat no iteration whose result a
//! surviving worker held.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{path::Path, process::Command, time::Duration};

use nix::{
    sys::{signal::Signal, stat::Mode},
    unistd::mkfifo,
};
use potstill_tests::{Cluster, Process, kill, lacks, relative_difference, repository, text, worker_pid};

/// A short run that saves once before its end.
const SHORT: [&str; 2] = ["distillation.iterations=8", "checkpoint.every=4"];

fn dies(command: &mut Command, cluster: &Cluster, how: &str, at: &str, iteration: u64, rank: u32) {
    let once = cluster.storage().join(format!("once-{at}-{iteration}-{rank}"));
    command.env("POTSTILL_FAULT", format!("{how}:{at}:{iteration}:{rank}:{}", once.display()));
}

/// A run in which ranks die, one after the other, goes on each time and ends as the undisturbed one. Returns its log.
fn survives(mut command: Command, run: &str, deaths: usize, end: u64, cluster: &Cluster) -> String {
    let output = command.output().unwrap();
    let log = text(&output.stderr);
    assert!(output.status.success(), "{run}: {log}");
    let died = log.matches("because of POTSTILL_FAULT").count();
    assert_eq!(died, deaths, "{run}: {log}");
    assert!(log.contains(&format!("generation={}", 1 + deaths)), "{run}: {log}");
    cluster.assert_same_end(run, "undisturbed", end);
    log
}

#[test]
fn a_rank_may_die_at_any_point_of_an_iteration() {
    let cluster = Cluster::default();
    // Three micro-batches for rank 0, two for rank 1: each has some work between two backward passes, and when rank 0
    // starts its last one, rank 1 already waits in the all-reduce.
    let sets = [
        "distillation.iterations=20",
        "checkpoint.every=4",
        "distillation.global_batch=10",
        "distillation.micro_batch=2",
    ];
    cluster.finish("undisturbed", 2, &sets, &[]);
    // The last checkpoint is of iteration 20, when nothing is left to compute.
    let points = [
        ("forward", 2),
        ("backward", 3),
        ("reducing", 4),
        ("reduced", 5),
        ("stepped", 6),
        ("reported", 7),
        ("snapshot", 12),
        ("uploaded", 16),
        ("uploaded", 20),
    ];
    for rank in [0, 1] {
        let run = format!("without-{rank}");
        let deaths = points.map(|(at, iteration)| (at, iteration, rank));
        let mut command = cluster.unscored("launch", &run, 2, &sets, &[]);
        command.env("POTSTILL_FAULT", potstill_tests::deaths(cluster.storage(), &run, &deaths));
        survives(command, &run, deaths.len(), 20, &cluster);
    }
}

/// As NCCL leaves a collective that is aborted: complete, with a part of its result, and without an error.
#[test]
fn a_reduction_that_was_cut_short_is_never_applied() {
    let cluster = Cluster::default();
    cluster.unscored("launch", "undisturbed", 2, &SHORT, &[]).output().unwrap();
    for rank in [0, 1] {
        let run = format!("torn-{rank}");
        let mut command = cluster.unscored("launch", &run, 2, &SHORT, &[]);
        dies(&mut command, &cluster, "tear", "reduced", 3, rank);
        let output = command.output().unwrap();
        let log = text(&output.stderr);
        assert!(output.status.success(), "{log}");
        assert!(log.contains("generation=2") && log.contains("the group was aborted"), "{log}");
        cluster.assert_same_end(&run, "undisturbed", 8);
    }
}

#[test]
fn a_rank_that_dies_again_and_again_at_one_point_ends_the_run_with_the_reason() {
    let cluster = Cluster::default();
    // Before it has ever worked; and each time in the same iteration, with others before it.
    for (run, workers, fault, point) in [
        ("at-once", 2, "die:forward:0:1:", "before it completed an iteration"),
        ("late", 1, "die:stepped:2:0:", "without getting beyond iteration 1"),
    ] {
        let mut command = cluster.unscored("launch", run, workers, &SHORT, &[]);
        let output = command.env("POTSTILL_FAULT", fault).output().unwrap();
        let log = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{log}");
        assert!(log.contains(&format!("died 10 times in a row {point}")), "{log}");
    }
}

#[test]
fn a_rank_that_hangs_is_named_and_started_again() {
    let cluster = Cluster::default();
    let sets = [SHORT[0], SHORT[1], "cluster.failure_timeout=1s"];
    let mut command = cluster.unscored("launch", "hung", 2, &sets, &[]);
    dies(&mut command, &cluster, "hang", "forward", 3, 1);
    command.env("TORCH_FR_DUMP_TEMP_FILE", cluster.storage().join("record-"));
    let output = command.output().unwrap();
    let log = text(&output.stderr);
    assert!(output.status.success(), "{log}");
    let named = |line: &&str| {
        line.contains("rank 1") && line.contains("rank hung: heartbeats arrive, no progress for")
    };
    assert!(log.lines().any(|line| named(&line)), "{log}");
    // It says what it has done before, and the rank that waited for it in which collective: pickles with the names of operations.
    for rank in [0, 1] {
        let record = cluster.storage().join(format!("record-{rank}"));
        assert!(log.contains(&format!("its flight record is {}", record.display())), "{log}");
        let record = std::fs::read(record).unwrap();
        let holds = |what: &str| record.windows(what.len()).any(|part| part == what.as_bytes());
        assert!(holds("gloo:all_reduce") && holds("scheduled") && holds("time_created_ns"));
    }
    cluster.unscored("launch", "undisturbed", 2, &sets, &[]).output().unwrap();
    cluster.assert_same_end("hung", "undisturbed", 8);
}

#[test]
fn a_rank_that_is_paused_is_named_and_may_come_back() {
    let cluster = Cluster::default();
    let sets = [
        "distillation.iterations=200",
        "cluster.failure_timeout=1s",
        "cluster.min_workers=1",
        "cluster.max_workers=2",
    ];
    let mut launched = Process::start(cluster.unscored("launch", "paused", 2, &sets, &[]));
    let pid = worker_pid(&launched.until(&["worker attached"]));
    launched.until(&["images/s"]);
    kill(pid, Signal::SIGSTOP);
    let lost = launched.until(&["worker lost", "no heartbeat for"]);
    assert_eq!(worker_pid(&lost), pid);
    launched.until(&["generation opened", "generation=2", "world_size=1"]);
    kill(pid, Signal::SIGCONT);
    launched.until(&["generation opened", "generation=3", "world_size=2"]);
    let (code, log) = launched.end();
    assert_eq!(code, Some(0), "{log}");
    cluster.unscored("launch", "undisturbed", 2, &sets, &[]).output().unwrap();
    cluster.assert_same_end("paused", "undisturbed", 200);
}

#[test]
fn ranks_may_die_faster_than_the_run_recovers() {
    let cluster = Cluster::default();
    let sets = ["distillation.iterations=100", "checkpoint.every=1000", "cluster.min_workers=1"];
    let mut launched = Process::start(cluster.unscored(
        "launch",
        "hunted",
        2,
        &sets,
        &["--spares", "1", "--set", "cluster.max_workers=2"],
    ));
    for _ in 0..3 {
        launched.until(&["worker attached"]);
    }
    launched.until(&["images/s"]);
    let status = cluster.about("status", "hunted").arg("--json").output().unwrap();
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    // One rank is not disturbed: it must hold the state.
    for member in status["members"].as_array().unwrap().iter().filter(|member| member["rank"] != 0) {
        kill(i32::try_from(member["pid"].as_u64().unwrap()).unwrap(), Signal::SIGKILL);
    }
    for _ in 0..6 {
        kill(worker_pid(&launched.until(&["worker attached"])), Signal::SIGKILL);
    }
    let (code, log) = launched.end();
    assert_eq!(code, Some(0), "{log}");
    cluster.unscored("launch", "undisturbed", 2, &sets, &[]).output().unwrap();
    cluster.assert_same_end("hunted", "undisturbed", 100);
}

/// Each rank holds a slice of the state, and a copy of another's. Three ranks have one micro-batch or two.
const SHARDED: [&str; 4] = [
    "memory.shard=gradients",
    "distillation.global_batch=8",
    "distillation.micro_batch=2",
    "optimizer.clip_norm=0.5",
];

#[test]
fn a_rank_with_a_slice_of_the_state_may_die_at_any_point_of_an_iteration() {
    let cluster = Cluster::default();
    let sets = [&["distillation.iterations=10", "checkpoint.every=1000"], &SHARDED[..]].concat();
    cluster.finish("undisturbed", 3, &sets, &[]);
    let points = ["forward", "reducing", "reduced", "agreed", "stepped", "gathering", "reported"];
    for (shift, mode) in [(0, "optimizer"), (1, "gradients")] {
        let ranks = [0, 1, 2].into_iter().cycle().skip(shift);
        let deaths: Vec<_> = (2..).zip(points).zip(ranks).map(|((i, at), rank)| (at, i, rank)).collect();
        let sharded = format!("memory.shard={mode}");
        let mut command = cluster.unscored("launch", mode, 3, &[&sets[..], &[&sharded]].concat(), &[]);
        command.env("POTSTILL_FAULT", potstill_tests::deaths(cluster.storage(), mode, &deaths));
        survives(command, mode, deaths.len(), 10, &cluster);
    }
}

/// One rank's group fails after all have reduced the gradient, and before it learns its norm: the others make the step.
#[test]
fn a_rank_that_missed_the_word_makes_the_step_that_the_others_have_made() {
    let cluster = Cluster::default();
    let sets = [&[SHORT[0], "checkpoint.every=1000"], &SHARDED[..]].concat();
    cluster.unscored("launch", "undisturbed", 3, &sets, &[]).output().unwrap();
    let mut command = cluster.unscored("launch", "missed", 3, &sets, &[]);
    dies(&mut command, &cluster, "tear", "agreed", 3, 1);
    let log = survives(command, "missed", 1, 8, &cluster);
    assert!(log.contains("this rank makes the step that others have made"), "{log}");
}

#[test]
fn when_both_holders_of_a_slice_die_the_last_checkpoint_lives_on_and_the_log_says_why() {
    let cluster = Cluster::default();
    let sets = [&["distillation.iterations=60", "checkpoint.every=10"], &SHARDED[..]].concat();
    let mut launched = Process::start(cluster.unscored("launch", "pair", 3, &sets, &[]));
    let pids = [(); 3].map(|()| worker_pid(&launched.until(&["worker attached"])));
    launched.until(&["checkpoint committed"]);
    // Of three ranks any two share a slice.
    pids[..2].iter().for_each(|pid| kill(*pid, Signal::SIGKILL));
    let (code, log) = launched.end();
    assert_eq!(code, Some(0), "{log}");
    let said = "a slice of the state is gone with both of the ranks that held it";
    assert!(log.contains(said) && log.contains("state_from=checkpoints/"), "{log}");
    cluster.unscored("launch", "undisturbed", 3, &sets, &[]).output().unwrap();
    let (a, b) = (cluster.checkpoint("pair", 60), cluster.checkpoint("undisturbed", 60));
    for part in ["generator/", "fake_score/", "generator_ema/"] {
        let difference = relative_difference(&a, &b, part);
        assert!(difference <= 1e-4, "{part}: {difference}");
    }
}

#[test]
fn when_all_die_the_last_checkpoint_lives_on() {
    let cluster = Cluster::default();
    let sets = ["distillation.iterations=60", "checkpoint.every=10"];
    let mut launched = Process::start(cluster.unscored("launch", "all", 2, &sets, &[]));
    let pids = [(); 2].map(|()| worker_pid(&launched.until(&["worker attached"])));
    launched.until(&["checkpoint committed"]);
    pids.into_iter().for_each(|pid| kill(pid, Signal::SIGKILL));
    let opened = launched.until(&["generation opened"]);
    let (code, log) = launched.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("state_from=checkpoints/"), "{opened}\n{log}");
    cluster.unscored("launch", "undisturbed", 2, &sets, &[]).output().unwrap();
    assert_eq!(cluster.checkpoint("all", 60), cluster.checkpoint("undisturbed", 60));
}

#[test]
fn a_coordinator_may_die_and_its_workers_go_on() {
    let cluster = Cluster::default();
    let listen = "127.0.0.1:0";
    let sets = ["distillation.iterations=150", "checkpoint.every=50"];
    let serve = |flags: &[&str]| {
        let flags: Vec<_> = ["--listen", listen].into_iter().chain(flags.iter().copied()).collect();
        cluster.unscored("serve", "led", 2, &sets, &flags)
    };
    let mut first = Process::start(serve(&[]));
    first.until(&["coordinator started"]);
    let agent = Process::start(cluster.agent("led", 2));
    first.until(&["images/s"]);

    // While it is alive, another coordinator is rejected.
    let flags = ["--resume", "--listen", "127.0.0.1:0"];
    let second = cluster.unscored("serve", "led", 2, &sets, &flags).output().unwrap();
    assert_eq!(second.status.code(), Some(2));
    assert!(text(&second.stderr).contains("is being served"), "{}", text(&second.stderr));

    first.until(&["checkpoint committed"]);
    first.signal(Signal::SIGKILL);
    assert_eq!(first.end().0, None);
    let status = cluster.about("status", "led").output().unwrap();
    assert!(text(&status.stdout).contains("unreachable"), "{}", text(&status.stdout));

    let mut successor = Process::start(serve(&["--resume"]));
    successor.until(&["it continues"]);
    let saved = cluster.about("checkpoint save", "led").output().unwrap();
    let status = cluster.about("status", "led").output().unwrap();
    let (saved, status) = (text(&saved.stdout), text(&status.stdout));
    assert!(saved.contains("manifest.json"), "{saved}");
    assert!(status.contains("generation 1") && status.contains("alive"), "{status}");
    let (code, log) = successor.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(!log.contains("generation opened"), "no worker was lost, so no generation is opened: {log}");
    assert_eq!(agent.end().0, Some(0));

    cluster.unscored("launch", "undisturbed", 2, &sets, &[]).output().unwrap();
    cluster.assert_same_end("led", "undisturbed", 150);
}

/// The object of a run's newest coordinator, and where it is.
fn announced(cluster: &Cluster, run: &str) -> (std::path::PathBuf, serde_json::Value) {
    let files = std::fs::read_dir(cluster.run(run).join("coordinators")).unwrap();
    let newest = files.map(|file| file.unwrap().path()).max().unwrap();
    let object = serde_json::from_slice(&std::fs::read(&newest).unwrap()).unwrap();
    (newest, object)
}

/// As where the coordinator's last message does not come through, and the coordinator has gone.
#[test]
fn a_worker_that_was_not_told_of_the_end_finds_it_in_the_storage() {
    let cluster = Cluster::default();
    cluster.finish("told", 1, &SHORT, &[]);
    let ended = announced(&cluster, "told").1["ended"].clone();
    assert_eq!(ended["success"], true, "{ended}");

    let flags = ["--listen", "127.0.0.1:0"];
    let endless = ["distillation.iterations=100000"];
    let mut serve = Process::start(cluster.unscored("serve", "untold", 2, &endless, &flags));
    serve.until(&["coordinator started"]);
    let agent = Process::start(cluster.agent("untold", 2));
    let pid = worker_pid(&serve.until(&["worker attached"]));
    serve.until(&["images/s"]);
    serve.signal(Signal::SIGKILL);
    assert_eq!(serve.end().0, None);
    // Its successor finds no coordinator at all.
    kill(pid, Signal::SIGKILL);
    let (file, mut object) = announced(&cluster, "untold");
    assert!(object["ended"].is_null(), "{object}");
    object["ended"] = ended;
    std::fs::write(file, object.to_string()).unwrap();
    let (code, log) = agent.end();
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(log.matches("the run has ended, as its storage says").count(), 2, "{log}");
}

/// Longer than the failure timeout of the runs here that pause something.
const PAUSE: Duration = Duration::from_secs(5);

#[test]
#[expect(clippy::disallowed_methods, reason = "the length of the pause is what is tested")]
fn a_coordinator_that_is_stopped_for_a_while_loses_no_worker() {
    let cluster = Cluster::default();
    let listen = "127.0.0.1:0";
    let sets = ["distillation.iterations=150", "checkpoint.every=1000", "cluster.failure_timeout=1s"];
    let mut serve = Process::start(cluster.unscored("serve", "stopped", 2, &sets, &["--listen", listen]));
    serve.until(&["coordinator started"]);
    let agent = Process::start(cluster.agent("stopped", 2));
    serve.until(&["images/s"]);
    serve.signal(Signal::SIGSTOP);
    std::thread::sleep(PAUSE);
    serve.signal(Signal::SIGCONT);
    let (code, log) = serve.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("this time does not count") && !log.contains("worker lost"), "{log}");
    assert_eq!(log.matches("generation opened").count(), 1, "{log}");
    assert_eq!(agent.end().0, Some(0));
    cluster.unscored("launch", "undisturbed", 2, &sets, &[]).output().unwrap();
    cluster.assert_same_end("stopped", "undisturbed", 150);
}

#[test]
fn a_rank_and_the_coordinator_may_die_together() {
    let cluster = Cluster::default();
    let listen = "127.0.0.1:0";
    let sets = ["distillation.iterations=80", "checkpoint.every=1000", "cluster.failure_timeout=2s"];
    let mut first = Process::start(cluster.unscored("serve", "both", 2, &sets, &["--listen", listen]));
    first.until(&["coordinator started"]);
    let agent = Process::start(cluster.agent("both", 2));
    let pid = worker_pid(&first.until(&["worker attached"]));
    first.until(&["images/s"]);
    first.signal(Signal::SIGKILL);
    kill(pid, Signal::SIGKILL);
    assert_eq!(first.end().0, None);
    let successor =
        Process::start(cluster.unscored("serve", "both", 2, &sets, &["--listen", listen, "--resume"]));
    let (code, log) = successor.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("state_from=\"rank ") || log.contains("state_from=rank "), "{log}");
    assert_eq!(agent.end().0, Some(0));
    cluster.unscored("launch", "undisturbed", 2, &sets, &[]).output().unwrap();
    cluster.assert_same_end("both", "undisturbed", 80);
}

#[test]
fn workers_come_and_go_and_change_nothing() {
    let cluster = Cluster::default();
    let listen = "127.0.0.1:0";
    // Six micro-batches: one, two and three workers share them.
    let sets = [
        "distillation.iterations=48",
        "distillation.global_batch=12",
        "distillation.micro_batch=2",
        "checkpoint.every=1000",
        "cluster.min_workers=1",
    ];
    let mut served = Process::start(cluster.unscored("serve", "elastic", 3, &sets, &["--listen", listen]));
    served.until(&["coordinator started"]);
    // Each waits after an iteration until the next one is to join: that happens two iterations later.
    let agent = |rank: u32, iteration: u64| {
        let pipe = cluster.storage().join(format!("pipe-{rank}"));
        mkfifo(&pipe, Mode::S_IRWXU).unwrap();
        let mut agent = cluster.agent("elastic", 1);
        agent.env("POTSTILL_FAULT", format!("hold:reported:{iteration}:{rank}:{}", pipe.display()));
        (Process::start(agent), pipe)
    };
    let (first, go_on) = agent(0, 2);
    served.until(&["generation opened", "world_size=1"]);
    let (second, then_go_on) = agent(1, 4);
    served.until(&["asked to yield at the next boundary", "joins"]);
    std::fs::write(go_on, "").unwrap();
    served.until(&["generation opened", "world_size=2"]);
    let third = Process::start(cluster.agent("elastic", 1));
    served.until(&["asked to yield at the next boundary", "joins"]);
    std::fs::write(then_go_on, "").unwrap();
    served.until(&["generation opened", "world_size=3"]);
    for agent in [second, third] {
        agent.signal(Signal::SIGTERM);
        let (code, log) = agent.end();
        assert_eq!(code, Some(75), "{log}");
        assert!(log.contains("is saved"), "it leaves when what it did is safe: {log}");
    }
    served.until(&["generation opened", "world_size=1"]);
    let (code, log) = served.end();
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(first.end().0, Some(0));
    cluster.unscored("launch", "undisturbed", 1, &sets, &[]).output().unwrap();
    cluster.assert_same_end("elastic", "undisturbed", 48);
}

#[test]
fn a_spare_takes_the_place_of_a_rank_that_dies() {
    let cluster = Cluster::default();
    let sets = ["distillation.iterations=60", "checkpoint.every=1000"];
    let mut launched = Process::start(cluster.unscored("launch", "spared", 2, &sets, &["--spares", "1"]));
    let pids = [(); 3].map(|()| worker_pid(&launched.until(&["worker attached"])));
    launched.until(&["images/s"]);
    kill(pids[0], Signal::SIGKILL);
    let (code, log) = launched.end();
    assert_eq!(code, Some(0), "{log}");
    let replaced: Vec<_> = log.lines().filter(|line| line.contains("generation opened")).collect();
    assert!(replaced.iter().all(|line| line.contains("world_size=2")), "{log}");
    cluster.unscored("launch", "undisturbed", 2, &sets, &[]).output().unwrap();
    cluster.assert_same_end("spared", "undisturbed", 60);
}

#[test]
fn a_spare_takes_the_place_of_a_rank_that_stays_slow() {
    let cluster = Cluster::default();
    let sets = ["distillation.iterations=120", "checkpoint.every=1000", "cluster.replace_stragglers=true"];
    let mut command = cluster.unscored("launch", "dragged", 2, &sets, &["--spares", "1"]);
    dies(&mut command, &cluster, "drag", "forward", 3, 1);
    let mut launched = Process::start(command);
    let slow = worker_pid(&launched.until(&["the others wait for this rank", "rank 1"]));
    let replaced = launched.until(&["generation opened", "generation=2", "world_size=2"]);
    assert!(replaced.contains("a spare takes the place of worker"), "{replaced}");
    assert_eq!(worker_pid(&replaced), slow, "{replaced}");
    let (code, log) = launched.end();
    assert_eq!(code, Some(0), "{log}");
    cluster.unscored("launch", "undisturbed", 2, &sets, &[]).output().unwrap();
    cluster.assert_same_end("dragged", "undisturbed", 120);
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_is_used() {
    let cluster = Cluster::default();
    let halves = ["distillation.iterations=8", "checkpoint.every=4"];
    let whole = ["distillation.iterations=12", "checkpoint.every=4"];
    assert!(cluster.unscored("launch", "damaged", 2, &halves, &[]).output().unwrap().status.success());
    let folder = cluster.run("damaged").join("checkpoints/000000000008/g1");
    let shard = std::fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&shard).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let resumed = cluster.unscored("launch", "damaged", 2, &whole, &["--resume"]).output().unwrap();
    let log = text(&resumed.stderr);
    assert!(resumed.status.success(), "{log}");
    let name = shard.file_name().unwrap().to_string_lossy().into_owned();
    assert!(log.contains("is damaged") && log.contains(&name), "{log}");
    assert!(log.contains("state_from=checkpoints/000000000004/manifest.json"), "{log}");
    cluster.unscored("launch", "undisturbed", 2, &whole, &[]).output().unwrap();
    assert_eq!(cluster.checkpoint("damaged", 12), cluster.checkpoint("undisturbed", 12));
}

/// The folder of the last checkpoint is a file: no shard can be written there.
fn unwritable(cluster: &Cluster, run: &str, iteration: u64) -> std::path::PathBuf {
    let folder = cluster.run(run).join("checkpoints");
    std::fs::create_dir_all(&folder).unwrap();
    let blocked = folder.join(format!("{iteration:012}"));
    std::fs::write(&blocked, "no folder").unwrap();
    blocked
}

#[test]
fn the_last_checkpoint_waits_for_a_storage_that_fails() {
    let cluster = Cluster::default();
    let blocked = unwritable(&cluster, "waits", 8);
    let mut launched = Process::start(cluster.unscored("launch", "waits", 2, &SHORT, &[]));
    launched.until(&["the last checkpoint cannot be written"]);
    std::fs::remove_file(blocked).unwrap();
    let (code, log) = launched.end();
    assert_eq!(code, Some(0), "{log}");
    cluster.unscored("launch", "undisturbed", 2, &SHORT, &[]).output().unwrap();
    cluster.assert_same_end("waits", "undisturbed", 8);
}

#[test]
fn a_state_that_cannot_be_saved_is_rescued_and_the_run_goes_on_from_there() {
    let cluster = Cluster::default();
    let elsewhere = Cluster::default();
    let halves = ["distillation.iterations=6", "checkpoint.every=100", "cluster.wait_timeout=10s"];
    let whole = ["distillation.iterations=8", "checkpoint.every=100", "cluster.wait_timeout=10s"];
    unwritable(&cluster, "rescued", 6);
    let folder = elsewhere.storage().display().to_string();
    let flags = ["--rescue-dir", &folder];
    let output = cluster.unscored("launch", "rescued", 2, &halves, &flags).output().unwrap();
    let log = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{log}");
    assert_eq!(log.matches("the state is rescued").count(), 1, "one rank of the machine does it: {log}");
    let resumed = elsewhere.unscored("launch", "rescued", 2, &whole, &["--resume"]).output().unwrap();
    let log = text(&resumed.stderr);
    assert!(resumed.status.success(), "{log}");
    assert!(log.contains("state_from=checkpoints/000000000006/manifest.json"), "{log}");
    cluster.unscored("launch", "undisturbed", 2, &whole, &[]).output().unwrap();
    assert_eq!(elsewhere.checkpoint("rescued", 8), cluster.checkpoint("undisturbed", 8));
}

/// Two agents, of which one sees another file system where the storage is.
/// Whether this machine has mount namespaces, and lets this user make them.
fn mounts() -> bool {
    Command::new("unshare").args(["--mount", "true"]).output().is_ok_and(|output| output.status.success())
}

/// A command that finds a folder empty.
fn hiding(folder: &Path, command: &Command) -> Command {
    let mut hiding = Command::new("unshare");
    hiding
        .args(["--mount", "sh", "-c", "mount -t tmpfs none \"$0\" && exec \"$@\""])
        .arg(folder)
        .arg(command.get_program())
        .args(command.get_args());
    hiding
}

#[test]
fn a_machine_that_does_not_see_the_storage_is_sent_away_and_the_run_goes_on_without_it() {
    let name = "a_machine_that_does_not_see_the_storage_is_sent_away_and_the_run_goes_on_without_it";
    if !mounts() {
        return lacks("root", name, "mount namespaces cannot be made");
    }
    let (cluster, elsewhere) = (Cluster::default(), Cluster::default());
    let listen = "127.0.0.1:0";
    let halves = ["distillation.iterations=4", "checkpoint.every=4", "cluster.min_workers=1"];
    let whole = ["distillation.iterations=8", "checkpoint.every=4", "cluster.min_workers=1"];
    cluster.finish("seen", 1, &halves, &[]);
    let flags = ["--listen", listen, "--resume"];
    let mut serve = Process::start(cluster.unscored("serve", "seen", 2, &whole, &flags));
    serve.until(&["coordinator started"]);
    let invitation = elsewhere.storage().join("invitation");
    let mut invite = cluster.about("invite", "seen");
    invite.args(["--role", "worker", "--output"]).arg(&invitation);
    assert!(invite.status().unwrap().success());
    let mut agent = Command::new(potstill_tests::binary("potstill"));
    agent.args(["agent", "--run-id", "seen", "--ranks", "1", "--threads", "1", "--join"]).arg(&invitation);
    let blind = Process::start(hiding(cluster.storage(), &agent));
    let lost = serve.until(&["worker lost", "does not see the run's storage"]);
    assert!(lost.contains("no object below"), "{lost}");
    assert_eq!(blind.end().0, Some(1));
    let sighted = Process::start(cluster.agent("seen", 1));
    let (code, log) = serve.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("state_from=checkpoints/000000000004/manifest.json"), "{log}");
    assert!(!log.contains("is damaged"), "{log}");
    assert_eq!(sighted.end().0, Some(0));
}

/// A folder that the others have, such as a mount, is empty on the newcomer's machine.
#[test]
fn a_machine_without_the_teacher_is_sent_away_by_name_and_costs_a_running_job_nothing() {
    let name = "a_machine_without_the_teacher_is_sent_away_by_name_and_costs_a_running_job_nothing";
    if !mounts() {
        return lacks("root", name, "mount namespaces cannot be made");
    }
    let (cluster, models) = (Cluster::default(), tempfile::tempdir().unwrap());
    let teacher = models.path().join("teacher.safetensors");
    std::fs::copy(repository().join("configs/digits/teacher.safetensors"), &teacher).unwrap();
    let weights = format!("teacher.weights={}", teacher.display());
    let sets = ["distillation.iterations=120", "checkpoint.every=100000", &weights];
    let listen = ["--listen", "127.0.0.1:0"];
    let mut serve = Process::start(cluster.unscored("serve", "lacking", 2, &sets, &listen));
    serve.until(&["coordinator started"]);
    let agent = Process::start(cluster.agent("lacking", 2));
    serve.until(&["generation opened", "world_size=2"]);
    serve.until(&["images/s"]);
    let without = Process::start(hiding(models.path(), &cluster.agent("lacking", 1)));
    let lost = serve.until(&["worker lost", &teacher.display().to_string()]);
    assert!(lost.contains("No such file"), "{lost}");
    let (code, said) = without.end();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains(&teacher.display().to_string()), "{said}");
    let (code, log) = serve.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(!log.contains("generation abandoned") && !log.contains("generation=2"), "{log}");
    assert_eq!(agent.end().0, Some(0));
    cluster.finish("undisturbed", 2, &sets, &[]);
    cluster.assert_same_end("lacking", "undisturbed", 120);
}

#[test]
fn what_is_not_saved_within_the_grace_period_is_said() {
    let cluster = Cluster::default();
    let sets = ["distillation.iterations=100000", "checkpoint.every=2"];
    let mut command = cluster.unscored("launch", "late", 1, &sets, &["--grace", "1"]);
    dies(&mut command, &cluster, "hang", "forward", 5, 0);
    let mut launched = Process::start(command);
    launched.until(&["hanging"]);
    launched.signal(Signal::SIGUSR1);
    let (code, log) = launched.end();
    assert_eq!(code, Some(75), "there is a checkpoint to go on from: {log}");
    assert!(log.contains("not saved within 1 s") && log.contains("of iteration 4"), "{log}");
}

#[test]
fn the_grace_period_is_kept_when_the_storage_answers_nothing() {
    let cluster = Cluster::default();
    let silence = tempfile::NamedTempFile::new().unwrap();
    let file = silence.path().to_owned();
    silence.close().unwrap();
    let sets = ["distillation.iterations=100000", "checkpoint.every=5"];
    let mut command = cluster.unscored("launch", "mute", 2, &sets, &["--grace", "2"]);
    command.env("POTSTILL_STORAGE_FAULTS", format!("silent_while={}", file.display()));
    let mut launched = Process::start(command);
    launched.until(&["checkpoint committed"]);
    std::fs::write(&file, "").unwrap();
    launched.signal(Signal::SIGTERM);
    let (code, log) = launched.end();
    assert_eq!(code, Some(75), "there is a checkpoint to go on from: {log}");
    assert!(log.contains("not saved within 2 s"), "{log}");
    std::fs::remove_file(&file).unwrap();
    let mut resumed = Process::start(cluster.unscored("launch", "mute", 2, &sets, &["--resume"]));
    resumed.until(&["state_from=checkpoints/"]);
    resumed.signal(Signal::SIGTERM);
    let (code, log) = resumed.end();
    assert_eq!(code, Some(75), "{log}");
}

#[test]
fn old_checkpoints_go_and_one_can_be_restored_as_a_new_run() {
    let cluster = Cluster::default();
    let sets = [
        "distillation.iterations=12",
        "checkpoint.every=2",
        "checkpoint.keep_last=2",
        "checkpoint.keep_every=4",
    ];
    let output = cluster.unscored("launch", "swept", 2, &sets, &[]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let list = cluster.about("checkpoint verify", "swept").args(["--json"]).output().unwrap();
    let list: serde_json::Value = serde_json::from_slice(&list.stdout).unwrap();
    let kept: Vec<_> = list.as_array().unwrap().iter().map(|c| c["iteration"].as_u64().unwrap()).collect();
    assert_eq!(kept, [4, 8, 10, 12]);
    assert!(list.as_array().unwrap().iter().all(|c| c["verified"] == true), "{list}");

    let restored = cluster
        .about("checkpoint restore", "swept")
        .args(["--iteration", "8", "--to", "again"])
        .output()
        .unwrap();
    assert!(restored.status.success(), "{}", text(&restored.stderr));
    let output = cluster.unscored("launch", "again", 2, &sets, &["--resume"]).output().unwrap();
    let log = text(&output.stderr);
    assert!(
        output.status.success() && log.contains("state_from=checkpoints/000000000008/manifest.json"),
        "{log}"
    );
    assert_eq!(cluster.checkpoint("again", 12), cluster.checkpoint("swept", 12));
}

#[test]
fn a_storage_that_misbehaves_costs_saves_and_not_the_run() {
    let cluster = Cluster::default();
    let sets = ["distillation.iterations=30", "checkpoint.every=3", "checkpoint.keep_last=all"];
    let mut command = cluster.unscored("launch", "shaky", 2, &sets, &[]);
    command.env("POTSTILL_STORAGE_FAULTS", "seed=5,error=0.2,delay=0.1,lost=0.1");
    let output = command.output().unwrap();
    let log = text(&output.stderr);
    assert!(output.status.success(), "{log}");
    assert!(log.contains("503 Service Unavailable"), "nothing misbehaved: {log}");
    cluster.unscored("launch", "undisturbed", 2, &sets, &[]).output().unwrap();
    assert_eq!(cluster.checkpoint("shaky", 30), cluster.checkpoint("undisturbed", 30));
    let list = cluster.about("checkpoint verify", "shaky").output().unwrap();
    assert!(list.status.success(), "every checkpoint that exists is whole: {}", text(&list.stdout));
}

#[test]
fn a_save_that_is_due_while_the_one_before_is_written_is_given_up() {
    let cluster = Cluster::default();
    let sets = ["distillation.iterations=40", "checkpoint.every=1", "checkpoint.keep_last=all"];
    let mut command = cluster.unscored("launch", "slow", 2, &sets, &[]);
    // Each write takes as long as several iterations.
    command.env("POTSTILL_STORAGE_FAULTS", "seed=1,delay=1");
    let output = command.output().unwrap();
    let log = text(&output.stderr);
    assert!(output.status.success(), "{log}");
    let given_up = |line: &&str| {
        line.contains("checkpoint failed; training continues") && line.contains("still being written")
    };
    assert!(log.lines().any(|line| given_up(&line)), "{log}");
    cluster.finish("undisturbed", 2, &sets, &[]);
    assert_eq!(cluster.checkpoint("slow", 40), cluster.checkpoint("undisturbed", 40));
    assert_eq!(cluster.summary("slow")["repeated_iterations"], 0, "{log}");
    let list = cluster.about("checkpoint verify", "slow").output().unwrap();
    assert!(list.status.success(), "what exists is whole: {}", text(&list.stdout));
}

#[test]
fn a_save_may_outlive_its_generation() {
    let cluster = Cluster::default();
    let sets = ["distillation.iterations=60", "checkpoint.every=10", "checkpoint.keep_last=all"];
    let mut command = cluster.unscored("launch", "carried", 2, &sets, &[]);
    let pipe = cluster.storage().join("pipe");
    mkfifo(&pipe, Mode::S_IRWXU).unwrap();
    command.env("POTSTILL_FAULT", format!("hold:copied:10:0:{}", pipe.display()));
    let mut launched = Process::start(command);
    launched.until(&["waiting because of"]);
    let status = cluster.about("status", "carried").arg("--json").output().unwrap();
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    let victim = status["members"].as_array().unwrap().iter().find(|member| member["rank"] == 1).unwrap();
    kill(i32::try_from(victim["pid"].as_u64().unwrap()).unwrap(), Signal::SIGKILL);
    launched.until(&["generation opened", "generation=2"]);
    // Rank 0 has no memory for another copy: it still holds that of the previous generation.
    launched.until(&["checkpoint failed; training continues", "still being written"]);
    std::fs::write(&pipe, "").unwrap();
    let (code, log) = launched.end();
    assert_eq!(code, Some(0), "{log}");
    // The shard that it wrote does not count in the new generation.
    assert!(!cluster.run("carried").join("checkpoints/000000000010/manifest.json").exists(), "{log}");
    cluster.unscored("launch", "undisturbed", 2, &sets, &[]).output().unwrap();
    cluster.assert_same_end("carried", "undisturbed", 60);
}

#[test]
fn each_transition_is_one_line_of_json() {
    let cluster = Cluster::default();
    let mut command = cluster.unscored("launch", "json", 2, &SHORT, &["--log-format", "json"]);
    dies(&mut command, &cluster, "die", "forward", 3, 1);
    let output = command.output().unwrap();
    let log = text(&output.stderr);
    assert!(output.status.success(), "{log}");
    let object = |line: &str| {
        let parsed: Result<serde_json::Map<_, _>, _> = serde_json::from_str(line);
        parsed.unwrap_or_else(|error| panic!("{error}: {line}"))
    };
    let lines: Vec<_> = log.lines().map(object).collect();
    for (message, times) in [
        ("generation opened", 2),
        ("generation abandoned", 1),
        ("worker lost", 1),
        ("checkpoint committed", 2),
        ("run succeeded", 1),
    ] {
        let told: Vec<_> = lines.iter().filter(|line| line["message"] == message).collect();
        assert_eq!(told.len(), times, "{message}: {log}");
        for line in told {
            assert!(line["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{line:?}");
        }
    }
    // An error at the start has the same format.
    let output = cluster.unscored("launch", "json", 2, &SHORT, &["--log-format", "json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let log = text(&output.stderr);
    assert!(
        log.lines().map(object).any(|line| line["message"].as_str().unwrap().contains("run json exists")),
        "{log}"
    );
}
