//! The agent: one per node, keeps its ranks alive.
//!
//! A rank that leaves because it was told to is done. A rank that dies otherwise is started again, a bounded number of
//! times: the coordinator gives the new process a place and a peer's state, so a crash costs no completed step.

use std::{
    collections::VecDeque,
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use clap::Args;

use crate::{
    chain::chain,
    rank::{self, Service},
};

/// A rank that dies more often than this within [`WINDOW`] is not started again: the cause is not a passing one.
const RESTARTS: usize = 5;
const WINDOW: Duration = Duration::from_secs(60);

/// Keeps glibc from giving memory back between two passes over the network, only to fault it in again: an eighth of a
/// small network's time.
const MALLOC: [(&str, &str); 2] =
    [("MALLOC_TRIM_THRESHOLD_", "1073741824"), ("MALLOC_MMAP_THRESHOLD_", "33554432")];

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    service: Service,
    /// Ranks on this node.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    ranks: u32,
    /// Threads per rank; by default the machine's cores divided by the ranks.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
}

pub fn main(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let service = &arguments.service;
    service.enter();
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let threads = arguments.threads.unwrap_or((cores / arguments.ranks).max(1));
    let program =
        std::env::current_exe().context("cannot find this program's own file to start ranks from")?;

    let (ended, ends) = mpsc::channel();
    for slot in 0..arguments.ranks {
        let mut command = Command::new(&program);
        command
            .arg("rank")
            .args(["--coordinator", &service.coordinator, "--run-id", &service.run_id])
            .args(["--threads", &threads.to_string(), "--lifeline"])
            .args(["--log-format", service.log_format.as_argument()])
            // libtorch's OpenMP pool would otherwise be sized before the rank can say how many threads it wants.
            .env("OMP_NUM_THREADS", threads.to_string())
            .envs(MALLOC.iter().filter(|(name, _)| std::env::var_os(name).is_none()).copied())
            .stdin(Stdio::piped());
        let ended = ended.clone();
        // The thread that spawns must live as long as the child: the kernel's death signal refers to it.
        std::thread::spawn(move || {
            let _ = ended.send((slot, supervise(slot, command)));
        });
    }
    drop(ended);

    let mut failed = false;
    for (slot, result) in ends {
        match result {
            Ok(true) => {}
            // It has told the coordinator itself; the others will be told to leave.
            Ok(false) => failed = true,
            // Leaving closes the other ranks' lifelines.
            Err(error) => bail!("rank process {slot}: {}", chain(&error)),
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Runs one rank until it leaves of its own accord. True: told to leave. False: it reported a failure that no restart
/// would mend.
fn supervise(slot: u32, mut command: Command) -> anyhow::Result<bool> {
    let mut deaths = VecDeque::new();
    loop {
        let mut child = command.spawn().context("cannot start")?;
        let status = wait(&mut child)?;
        match status.code() {
            Some(0) => return Ok(true),
            Some(code) if code == i32::from(rank::LEFT_IN_FAILURE) => return Ok(false),
            _ => {}
        }
        let now = Instant::now();
        deaths.push_back(now);
        while deaths.front().is_some_and(|d| now - *d > WINDOW) {
            deaths.pop_front();
        }
        if deaths.len() > RESTARTS {
            bail!(
                "died {} times within {} s, last with {status}; not starting it again",
                deaths.len(),
                WINDOW.as_secs()
            );
        }
        tracing::warn!(slot, %status, deaths = deaths.len(), "rank process died; starting it again");
    }
}

/// Waits without closing the child's stdin, which is its lifeline ([`Child::wait`] would close it).
fn wait(child: &mut Child) -> anyhow::Result<ExitStatus> {
    let held = child.stdin.take();
    let status = child.wait().context("cannot wait for the rank process")?;
    drop(held);
    Ok(status)
}
