//! Helpers of the tests in this folder: they run `potstill launch` and read the files of a run.
//!
//! The binaries are in the target folder beside the tests: `cargo build --workspace` makes them.

pub mod fuzz;
pub mod tiny_model;

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Command, Output, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use nix::{sys::signal::Signal, unistd::Pid};
use safetensors::SafeTensors;
use tempfile::TempDir;

/// Says that `test` cannot run because this machine lacks `what`, for a test that returns then.
///
/// `POTSTILL_TEST_WITHOUT`, a list with commas, names what a machine is known to lack. The file that `POTSTILL_TEST_SKIPPED` names gets
/// a line for each test that is left out.
///
/// # Panics
/// `what` is not in that list: a test is never left out unseen.
pub fn lacks(what: &str, test: &str, reason: &str) {
    let known = std::env::var("POTSTILL_TEST_WITHOUT").unwrap_or_default();
    assert!(
        known.split(',').any(|name| name.trim() == what),
        "{test} needs {what}: {reason}. Install it, or leave the tests that need it out with POTSTILL_TEST_WITHOUT={what}"
    );
    let line = format!("{test}: without {what}: {reason}\n");
    if let Some(file) = std::env::var_os("POTSTILL_TEST_SKIPPED") {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(file);
        let written = file.and_then(|mut file| std::io::Write::write_all(&mut file, line.as_bytes()));
        written.expect("POTSTILL_TEST_SKIPPED can be written");
    }
    eprint!("skipped: {line}");
}

/// A browser of Chromium's kind, if there is one.
#[must_use]
pub fn browser() -> Option<PathBuf> {
    let folders = std::env::var_os("PATH")?;
    ["chromium", "chromium-browser", "google-chrome"]
        .iter()
        .flat_map(|name| std::env::split_paths(&folders).map(move |folder| folder.join(name)))
        .find(|path| path.is_file())
}

/// The root of the repository.
#[must_use]
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests have a parent folder").to_owned()
}

/// A built binary of the workspace.
///
/// # Panics
/// It has not been built.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own file");
    let folder = test.ancestors().nth(2).expect("tests lie in target/<profile>/deps");
    let path = folder.join(name);
    assert!(path.exists(), "{} is missing: run cargo build --workspace first", path.display());
    path
}

/// A storage folder for one cluster.
pub struct Cluster {
    folder: TempDir,
}

impl Default for Cluster {
    fn default() -> Self {
        Self { folder: tempfile::tempdir().expect("a temporary folder") }
    }
}

impl Cluster {
    /// Root of the storage.
    #[must_use]
    pub fn storage(&self) -> &Path {
        self.folder.path()
    }

    /// The folder of a run.
    #[must_use]
    pub fn run(&self, run: &str) -> PathBuf {
        self.folder.path().join("runs").join(run)
    }

    /// `potstill launch` on the digits with two micro-batches of 4 per iteration and without evaluation, unless `sets`
    /// change that.
    #[must_use]
    pub fn launch(&self, run: &str, workers: u32, sets: &[&str], flags: &[&str]) -> Command {
        let mut command = Self::launch_anywhere(run, workers, sets, flags);
        command.arg("--storage").arg(self.storage());
        command
    }

    /// [`launch`](Self::launch) without a storage argument.
    #[must_use]
    pub fn launch_anywhere(run: &str, workers: u32, sets: &[&str], flags: &[&str]) -> Command {
        let mut command = Command::new(binary("potstill"));
        command
            .arg("launch")
            .arg(repository().join("configs/digits/one-step.toml"))
            .args(["--workers", &workers.to_string(), "--run-id", run, "--threads", "1"])
            .args(["--set", "distillation.global_batch=8", "--set", "distillation.micro_batch=4"])
            .args(["--set", "evaluation.every=none", "--set", "evaluation.samples=100"])
            // With two steps the teacher's samples are not digits yet, so a collapse could not be recognized.
            .args(["--set", "evaluation.teacher_steps=2", "--set", "evaluation.collapse_share=0.0"])
            .args(sets.iter().flat_map(|set| ["--set", set]))
            .args(flags)
            .stdin(Stdio::null());
        command
    }

    /// A run file of the digits without an extractor, so that nothing is evaluated.
    ///
    /// # Panics
    /// It cannot be written.
    #[must_use]
    pub fn unscored_config(&self) -> PathBuf {
        let digits = repository().join("configs/digits");
        let config = self.folder.path().join("unscored.toml");
        let text = format!(
            "[teacher]\nweights = {:?}\n[distillation]\nglobal_batch = 8\nmicro_batch = 4",
            digits.join("teacher.safetensors").display().to_string()
        );
        std::fs::write(&config, text).expect("the run file can be written");
        config
    }

    /// `potstill launch` or `potstill serve` on the digits, without evaluation, with two micro-batches of 4 per
    /// iteration unless `sets` change that.
    #[must_use]
    pub fn unscored(
        &self,
        subcommand: &str,
        run: &str,
        workers: u32,
        sets: &[&str],
        flags: &[&str],
    ) -> Command {
        let mut command = Command::new(binary("potstill"));
        command
            .arg(subcommand)
            .arg(self.unscored_config())
            .args(["--workers", &workers.to_string(), "--run-id", run, "--storage"])
            .arg(self.storage())
            .args(sets.iter().flat_map(|set| ["--set", set]))
            .args(flags)
            .stdin(Stdio::null());
        if subcommand == "launch" {
            command.args(["--threads", "1"]);
        }
        command
    }

    /// Runs [`unscored`](Self::unscored)'s `potstill launch` to its end, which must be a success. Returns its log.
    ///
    /// # Panics
    /// It failed.
    pub fn finish(&self, run: &str, workers: u32, sets: &[&str], flags: &[&str]) -> String {
        let output = self.unscored("launch", run, workers, sets, flags).output().expect("potstill starts");
        let log = text(&output.stderr);
        assert!(output.status.success(), "{run}: {}: {log}", output.status);
        log
    }

    /// `potstill agent`, which finds the run's coordinator in the storage.
    #[must_use]
    pub fn agent(&self, run: &str, ranks: u32) -> Command {
        let mut command = Command::new(binary("potstill"));
        command
            .args(["agent", "--run-id", run, "--ranks", &ranks.to_string(), "--threads", "1", "--storage"])
            .arg(self.storage())
            .stdin(Stdio::null());
        command
    }

    /// A command about a run, such as `potstill status`.
    #[must_use]
    pub fn about(&self, subcommand: &str, run: &str) -> Command {
        let mut command = Command::new(binary("potstill"));
        command.args(subcommand.split(' ')).args([run, "--storage"]).arg(self.storage()).stdin(Stdio::null());
        command
    }

    /// `summary.json` of a finished run.
    ///
    /// # Panics
    /// There is none.
    #[must_use]
    pub fn summary(&self, run: &str) -> serde_json::Value {
        let bytes = std::fs::read(self.run(run).join("summary.json")).expect("the run has a summary");
        serde_json::from_slice(&bytes).expect("the summary is JSON")
    }

    /// Asserts that two runs ended with the same networks, but for the order of float sums, and that the first one repeated
    /// no iteration.
    ///
    /// They differ.
    /// They did not.
    pub fn assert_same_end(&self, disturbed: &str, undisturbed: &str, iteration: u64) {
        let (a, b) = (self.checkpoint(disturbed, iteration), self.checkpoint(undisturbed, iteration));
        for part in ["generator/", "fake_score/", "generator_ema/"] {
            let difference = relative_difference(&a, &b, part);
            assert!(difference <= 1e-4, "{disturbed}: {part}: {difference}");
        }
        let summary = self.summary(disturbed);
        assert_eq!(summary["iterations"], iteration, "{disturbed}");
        assert_eq!(summary["repeated_iterations"], 0, "{disturbed}");
    }

    /// Runs [`launch`](Self::launch) to its end.
    #[must_use]
    pub fn run_to_end(&self, run: &str, workers: u32, sets: &[&str], flags: &[&str]) -> Output {
        self.launch(run, workers, sets, flags).output().expect("potstill starts")
    }

    /// Launches with input that must be refused before anything is written, and returns the message.
    ///
    /// # Panics
    /// It was accepted, or left something behind.
    #[must_use]
    pub fn refused(&self, sets: &[&str], flags: &[&str]) -> String {
        let output = self.run_to_end("bad", 2, sets, flags);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{sets:?} {flags:?}: {message}");
        assert!(message.contains("error: "), "{message}");
        assert!(!self.run("bad").exists(), "{sets:?} {flags:?} left something behind: {message}");
        message
    }

    /// [`run_to_end`](Self::run_to_end) of a run that must succeed.
    ///
    /// # Panics
    /// It failed.
    pub fn succeed(&self, run: &str, workers: u32, sets: &[&str], flags: &[&str]) {
        let output = self.run_to_end(run, workers, sets, flags);
        assert!(output.status.success(), "{}: {}", output.status, text(&output.stderr));
    }

    /// The lines of `metrics.jsonl`.
    ///
    /// # Panics
    /// The run has none.
    #[must_use]
    pub fn metrics(&self, run: &str) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(self.run(run).join("metrics.jsonl")).expect("the run has metrics");
        text.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
    }

    /// Every tensor of a committed checkpoint, by name, from all shards. Pieces of tensors are put together.
    ///
    /// # Panics
    /// There is no such checkpoint, or two shards hold the same tensor.
    #[must_use]
    pub fn checkpoint(&self, run: &str, iteration: u64) -> BTreeMap<String, Vec<f32>> {
        let run = self.run(run);
        let manifest = run.join(format!("checkpoints/{iteration:012}/manifest.json"));
        let manifest = std::fs::read(&manifest).unwrap_or_else(|e| panic!("{}: {e}", manifest.display()));
        let manifest: serde_json::Value = serde_json::from_slice(&manifest).expect("a manifest is JSON");
        let mut pieces = BTreeMap::new();
        for shard in manifest["shards"].as_array().expect("a manifest lists shards") {
            let bytes =
                std::fs::read(run.join(shard["key"].as_str().expect("a key"))).expect("a shard can be read");
            for (name, view) in SafeTensors::deserialize(&bytes).expect("a shard is safetensors").iter() {
                let (values, _) = view.data().as_chunks::<4>();
                let values: Vec<f32> = values.iter().map(|b| f32::from_le_bytes(*b)).collect();
                let (tensor, first) = match name.rsplit_once('@') {
                    Some((tensor, first)) => (tensor, first.parse().expect("a number of elements")),
                    None => (name, 0),
                };
                let piece = (tensor.to_owned(), first);
                assert!(pieces.insert(piece, values).is_none(), "{name} was written twice");
            }
        }
        let mut tensors: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        for ((tensor, first), values) in pieces {
            let whole = tensors.entry(tensor).or_default();
            assert_eq!(whole.len(), first, "pieces follow each other");
            whole.extend(values);
        }
        tensors
    }
}

/// The value of `POTSTILL_FAULT` by which ranks die, each once: at a point of an iteration, as a rank.
#[must_use]
pub fn deaths(folder: &Path, run: &str, deaths: &[(&str, u64, u32)]) -> String {
    let death = |(at, iteration, rank): &(&str, u64, u32)| {
        let once = folder.join(format!("{run}-{at}-{iteration}-{rank}"));
        format!("die:{at}:{iteration}:{rank}:{}", once.display())
    };
    deaths.iter().map(death).collect::<Vec<_>>().join(";")
}

/// Longer than any command takes that does not hang.
const PATIENCE: Duration = Duration::from_secs(240);

/// A running command, whose log on standard error is read line by line.
pub struct Process {
    child: Child,
    log: BufReader<ChildStderr>,
    seen: String,
}

impl Drop for Process {
    fn drop(&mut self) {
        // A test that panics leaves no process running. Fails where it has been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Process {
    /// Starts a command.
    ///
    /// # Panics
    /// It cannot be started.
    #[must_use]
    pub fn start(mut command: Command) -> Self {
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.expect("the program starts");
        let log = BufReader::new(child.stderr.take().expect("its log is a pipe"));
        Self { child, log, seen: String::new() }
    }

    /// Reads until a line contains all of `words`; returns it.
    ///
    /// # Panics
    /// The log ends before.
    pub fn until(&mut self, words: &[&str]) -> String {
        loop {
            let mut line = String::new();
            let length = self.log.read_line(&mut line).expect("the log can be read");
            self.seen += &line;
            assert!(length > 0, "no line with {words:?} in:\n{}", self.seen);
            if words.iter().all(|word| line.contains(word)) {
                return line;
            }
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal);
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a process id")
    }

    /// Reads the log to its end, when the process and all its children have closed it, and reaps the process. Returns
    /// its exit code and the rest of the log.
    ///
    /// # Panics
    /// A process still holds the log open after a long time.
    #[must_use]
    pub fn end(mut self) -> (Option<i32>, String) {
        let mut said = std::mem::take(&mut self.seen);
        let (tell, lines) = mpsc::channel();
        let ended = std::thread::spawn(move || {
            let mut line = String::new();
            while self.log.read_line(&mut line).expect("the log can be read") > 0 {
                // Fails when the test has given up.
                let _ = tell.send(std::mem::take(&mut line));
            }
            if let Some(mut stdout) = self.child.stdout.take() {
                // A line that cannot be read is missing in the result.
                let _ = stdout.read_to_string(&mut line);
            }
            let _ = tell.send(line);
            self.child.wait().map(|status| status.code())
        });
        let deadline = Instant::now() + PATIENCE;
        loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => said += &line,
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    panic!("a process of the command still holds its log open, which says so far:\n{said}")
                }
            }
        }
        let code = ended.join().expect("the log was read");
        (code.expect("the process can be waited for"), said)
    }
}

/// Sends a signal to a process that the test has started.
///
/// # Panics
/// It has ended.
pub fn kill(pid: i32, signal: Signal) {
    nix::sys::signal::kill(Pid::from_raw(pid), signal).unwrap_or_else(|e| panic!("{signal} to {pid}: {e}"));
}

/// The process id in a log line about a worker: "… (host, process 123, cpu)".
///
/// # Panics
/// The line has none.
#[must_use]
pub fn worker_pid(line: &str) -> i32 {
    let pid = line.split("process ").nth(1).and_then(|rest| rest.split(',').next());
    pid.and_then(|pid| pid.parse().ok()).unwrap_or_else(|| panic!("no process in {line:?}"))
}

/// A port of this machine on which no process listens.
///
/// # Panics
/// There is none.
#[must_use]
pub fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.local_addr().expect("it is bound").port()
}

/// Output as text.
#[must_use]
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// |a − b| / |b| over all tensors whose names begin with `prefix`.
///
/// # Panics
/// The two have different tensors, or none.
#[must_use]
pub fn relative_difference(
    a: &BTreeMap<String, Vec<f32>>,
    b: &BTreeMap<String, Vec<f32>>,
    prefix: &str,
) -> f64 {
    let values = |tensors: &BTreeMap<String, Vec<f32>>| -> Vec<f64> {
        let chosen = tensors.iter().filter(|(name, _)| name.starts_with(prefix));
        chosen.flat_map(|(_, values)| values.iter().map(|v| f64::from(*v))).collect()
    };
    let (a, b) = (values(a), values(b));
    assert!(!a.is_empty() && a.len() == b.len(), "{prefix}: {} and {} values", a.len(), b.len());
    let squares: f64 = a.iter().zip(&b).map(|(x, y)| (x - y).powi(2)).sum();
    (squares / b.iter().map(|y| y * y).sum::<f64>()).sqrt()
}
