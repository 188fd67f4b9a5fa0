//! The `potstill` command line: what it rejects, and that no agent outlives it.

#![allow(clippy::unwrap_used)] // A panic here is a failed test.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, ChildStderr, Command, Output, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

/// A folder with a run file, and a `potstill` that works in it.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("run.toml"), "[teacher]\nweights = 'teacher.safetensors'\n").unwrap();
        fs::write(folder.path().join("teacher.safetensors"), "not read here").unwrap();
        Self(folder)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// `potstill` with a worker that is this shell script.
    fn potstill(&self, worker: &str) -> Command {
        let script = self.path().join("worker.sh");
        // Checks of the worker program are not the subject of these tests.
        let checks = "[ \"$1\" = check ] && exit 0";
        fs::write(&script, format!("#!/bin/sh\n{checks}\n{worker}\n")).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_potstill"));
        command
            .current_dir(self.path())
            .env("POTSTILL_WORKER", script)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn launch(&self, worker: &str) -> Launched {
        let mut command = self.potstill(worker);
        command.args(["launch", "run.toml", "--workers", "1", "--run-id", "r"]);
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Launched { child, stderr }
    }

    /// Checks that `potstill launch` with these arguments fails with these words, and that it writes nothing.
    fn refuses(&self, arguments: &[&str], words: &[&str]) {
        let output = self.potstill("exit 0").arg("launch").args(arguments).output().unwrap();
        let stderr = error(&output);
        for word in words {
            assert!(stderr.contains(word), "{word:?} is not in {stderr:?}");
        }
        assert!(!self.path().join("runs").exists(), "something was written");
    }
}

/// The error message of a command that failed.
fn error(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.starts_with("error: "), "{stderr}");
    stderr
}

/// A running launcher. Its agent writes to the same standard error, which ends when both have ended.
struct Launched {
    child: Child,
    stderr: BufReader<ChildStderr>,
}

impl Launched {
    /// Reads until a line contains this text.
    fn wait_for(&mut self, word: &str) {
        let mut line = String::new();
        while !line.contains(word) {
            line.clear();
            assert!(self.stderr.read_line(&mut line).unwrap() > 0, "the output ended before {word:?}");
        }
    }

    fn send(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    /// The exit code and the rest of the output, once launcher and agent have ended.
    fn end(mut self) -> (Option<i32>, String) {
        let mut rest = String::new();
        self.stderr.read_to_string(&mut rest).unwrap();
        (self.child.wait().unwrap().code(), rest)
    }
}

#[test]
fn unknown_keys_are_refused_with_the_nearest_valid_one() {
    Folder::new().refuses(
        &["run.toml", "--workers", "1", "--set", "distillation.iteration=5"],
        &["unknown key `distillation.iteration`", "`distillation.iterations`"],
    );
}

#[test]
fn a_run_id_that_leaves_the_folder_is_refused() {
    Folder::new().refuses(&["run.toml", "--workers", "1", "--run-id", "../else"], &["--run-id", "../else"]);
}

#[test]
fn a_missing_run_file_is_named() {
    Folder::new().refuses(&["missing.toml", "--workers", "1"], &["cannot read", "missing.toml"]);
}

#[test]
fn no_workers_is_too_few() {
    Folder::new().refuses(&["run.toml", "--workers", "0"], &["--workers"]);
}

#[test]
fn a_batch_that_does_not_divide_is_refused() {
    Folder::new().refuses(
        &["run.toml", "--workers", "1", "--set", "distillation.global_batch=100"],
        &["distillation.global_batch (100) is not a multiple of distillation.micro_batch (64)"],
    );
}

#[test]
fn more_workers_than_micro_batches_are_refused() {
    Folder::new().refuses(&["run.toml", "--workers", "3"], &["3 workers but only 2 micro-batches"]);
}

#[test]
fn resume_needs_a_name() {
    Folder::new().refuses(&["run.toml", "--workers", "1", "--resume"], &["--run-id"]);
}

#[test]
fn a_storage_that_is_not_there_is_named_and_not_made_by_asking() {
    let folder = Folder::new();
    for subcommand in ["status", "report", "cancel", "checkpoint list", "checkpoint verify"] {
        let mut command = folder.potstill("exit 0");
        let output = command.args(subcommand.split(' ')).args(["r", "--storage", "tpyo"]).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{subcommand}");
        assert!(stderr.contains("\"tpyo\": there is no such folder"), "{subcommand}: {stderr}");
        assert!(!folder.path().join("tpyo").exists(), "{subcommand}");
    }
}

#[test]
fn a_missing_worker_program_is_named_with_what_to_do() {
    let folder = Folder::new();
    // A copy, because the real one may have a worker beside it.
    let potstill = folder.path().join("potstill");
    fs::copy(env!("CARGO_BIN_EXE_potstill"), &potstill).unwrap();
    let run = |override_: &str| {
        let mut command = Command::new(&potstill);
        command.current_dir(folder.path()).env("PATH", folder.path()).env("POTSTILL_WORKER", override_);
        error(&command.args(["launch", "run.toml", "--workers", "1"]).output().unwrap())
    };
    assert!(run("").contains("potstill-worker was not found"));
    assert!(run("/nowhere").contains("/nowhere, which is not a program"));
}

#[test]
fn what_needs_libtorch_is_handed_on_with_its_arguments() {
    let output = Folder::new()
        .potstill("echo \"$@\"; exit 7")
        .args(["train-teacher", "--help", "-n", "3", "--", "x"])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "train-teacher --help -n 3 -- x\n");
    assert_eq!(output.status.code(), Some(7));
}

#[test]
fn the_help_names_the_exit_codes() {
    let output = Folder::new().potstill("").arg("--help").output().unwrap();
    let help = String::from_utf8_lossy(&output.stdout);
    for part in ["launch", "serve", "train-teacher", "75", "130", "--resume"] {
        assert!(help.contains(part), "{part:?} is not in\n{help}");
    }
}

#[test]
fn an_agent_that_exits_fails_the_run() {
    let folder = Folder::new();
    let (code, log) = folder.launch("echo \"agent: $*\" >&2; exit 3").end();
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("the worker agent exited (exit status: 3)"), "{log}");
    assert!(
        log.contains("--run-id r --ranks 1 --spares 0 --device auto --log-format human --lifeline"),
        "{log}"
    );
}

#[test]
fn the_agent_does_not_outlive_a_killed_launcher() {
    let folder = Folder::new();
    let mut launched =
        folder.launch("echo agent up >&2; timeout 60 cat > /dev/null && echo lifeline closed >&2");
    launched.wait_for("agent up");
    launched.send(Signal::SIGKILL);
    let (_, rest) = launched.end();
    assert!(rest.contains("lifeline closed"), "{rest}");
}

#[test]
fn a_second_interrupt_ends_everything_at_once() {
    let folder = Folder::new();
    let mut launched = folder.launch("echo agent up >&2; exec timeout 60 cat > /dev/null");
    launched.wait_for("agent up");
    launched.send(Signal::SIGINT);
    launched.wait_for("a second signal");
    launched.send(Signal::SIGTERM);
    let (code, rest) = launched.end();
    assert_eq!(code, Some(130), "{rest}");
}

#[test]
fn a_coordinator_alone_says_how_workers_attach_and_stops_when_asked() {
    let folder = Folder::new();
    let mut command = folder.potstill("exit 0");
    command.args(["serve", "run.toml", "--workers", "1", "--run-id", "r", "--listen", "127.0.0.1:0"]);
    command.args(["--storage", "."]);
    let mut child = command.spawn().unwrap();
    let mut served = Launched { stderr: BufReader::new(child.stderr.take().unwrap()), child };
    served.wait_for("potstill agent --storage file://");
    served.send(Signal::SIGTERM);
    let (code, rest) = served.end();
    assert_eq!(code, Some(1), "nothing was saved, so there is nothing to resume: {rest}");
}

#[test]
fn the_version_is_that_of_both_programs() {
    let folder = Folder::new();
    let said = |mut command: Command| {
        let output = command.arg("--version").output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let own = format!("potstill {} (", env!("CARGO_PKG_VERSION"));
    let both =
        said(folder.potstill("[ \"$1\" = --version ] && echo potstill-worker 1, libtorch 2, CUDA 3, NCCL 4"));
    assert!(
        both.starts_with(&own) && both.ends_with("\npotstill-worker 1, libtorch 2, CUDA 3, NCCL 4\n"),
        "{both}"
    );
    let mut without = folder.potstill("");
    without.env("POTSTILL_WORKER", "/nowhere/worker");
    let alone = said(without);
    assert!(alone.starts_with(&own) && alone.lines().count() == 1, "{alone}");
}

#[test]
fn the_help_says_what_a_spare_costs() {
    let output = Folder::new().potstill("").args(["launch", "--help"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(text.contains("On GPUs each spare holds a device of its own"), "{text}");
}
