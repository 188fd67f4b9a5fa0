//! Clusters of real processes: a test runs its own binary again, once per rank, with the scenario's name in
//! the environment.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::env;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use potstill_c10d::{Backend, Error, ProcessGroup, Store};

/// Long enough for a slow machine; no scenario waits until it is over.
pub const LONG: Duration = Duration::from_secs(60);
const SCENARIO: &str = "POTSTILL_TEST_SCENARIO";
/// Prefix of the ranks' messages to the test, which tells them from libtest's output.
const MARK: &str = "rank says ";

/// A child process; it is killed when this value is dropped.
pub struct Rank {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The ranks, and the folder of the store in which they meet.
pub struct Cluster {
    pub ranks: Vec<Rank>,
    _folder: tempfile::TempDir,
}

/// Starts `world` processes, each of which runs `scenario`.
pub fn launch(scenario: &str, world: usize) -> Cluster {
    launch_with(scenario, world, &[])
}

/// The same with variables of the environment.
pub fn launch_with(scenario: &str, world: usize, variables: &[(&str, &str)]) -> Cluster {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("store");
    let ranks = (0..world)
        .map(|rank| {
            let mut child = Command::new(env::current_exe().expect("this binary"))
                .args(["--exact", "rank", "--nocapture", "--test-threads=1"])
                .env(SCENARIO, format!("{scenario} {rank} {world} {}", file.display()))
                .envs(variables.iter().copied())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .expect("a child process");
            let stdin = child.stdin.take();
            let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
            Rank { child, stdin, stdout }
        })
        .collect();
    Cluster { ranks, _folder: folder }
}

/// Starts `world` processes that run `scenario`, and expects all of them to succeed.
pub fn run(scenario: &str, world: usize) {
    let mut cluster = launch(scenario, world);
    for rank in cluster.ranks.drain(..) {
        rank.finish();
    }
}

impl Rank {
    /// The next message that the rank [sends](say).
    pub fn hear(&mut self) -> String {
        let mut line = String::new();
        while self.stdout.read_line(&mut line).expect("a line") > 0 {
            // libtest leaves its own line open before a test's first message.
            if let Some((_, said)) = line.split_once(MARK) {
                return said.trim_end().to_owned();
            }
            line.clear();
        }
        panic!("a rank ended before its next message");
    }

    pub fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.child.id() as i32)
    }

    /// Kills the rank with SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().expect("a signal");
    }

    /// Lets a rank continue that [waits](wait_for_test), and expects it to succeed.
    pub fn finish(mut self) {
        self.stdin = None;
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).expect("text");
        let status = self.child.wait().expect("a status");
        assert!(status.success(), "a rank failed ({status}):\n{rest}");
    }
}

/// One process's rank in its cluster, and the store.
pub struct Seat {
    pub rank: usize,
    pub world: usize,
    pub store: Store,
}

/// In a child process: its scenario and its rank. `None` in the test itself.
pub fn seat() -> Option<(String, Seat)> {
    let line = env::var(SCENARIO).ok()?;
    let words: Vec<_> = line.split(' ').collect();
    let number = |index: usize| words[index].parse::<usize>().expect("a number");
    tch::set_num_threads(1);
    let store = Store::in_file(words[3].as_ref(), LONG).expect("the store");
    Some((words[0].to_owned(), Seat { rank: number(1), world: number(2), store }))
}

impl Seat {
    pub fn join(&self, prefix: &str, timeout: Duration) -> ProcessGroup {
        self.try_join(prefix, self.rank, self.world, timeout).expect("a group")
    }

    pub fn try_join(
        &self,
        prefix: &str,
        rank: usize,
        world: usize,
        timeout: Duration,
    ) -> Result<ProcessGroup, Error> {
        let backend = Backend::Gloo { host: "127.0.0.1".to_owned() };
        ProcessGroup::new(&backend, &self.store.prefix(prefix)?, rank, world, timeout)
    }
}

/// Sends a message to the test, which [receives](Rank::hear) it.
pub fn say(what: &str) {
    println!("{MARK}{what}");
    std::io::stdout().flush().expect("a pipe");
}

/// Blocks until the test lets this rank [finish](Rank::finish).
pub fn wait_for_test() {
    let _ = std::io::stdin().read(&mut [0]);
}
