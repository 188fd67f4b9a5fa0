//! One per node: keeps the ranks of a machine alive. A rank that dies is started again at once; it then takes the state
//! from its peers, so a crash costs no completed step.

use std::{
    collections::{BTreeMap, VecDeque},
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use clap::Args;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    commands::rank::{self, Service},
    process::device::Choice,
};
use potstill_logging::chain;

/// A rank that dies more often than this within [`WINDOW`] is not started again: the cause is not a passing one.
const RESTARTS: usize = 20;
const WINDOW: Duration = Duration::from_secs(60);

/// Exit code of an agent whose ranks have left as it was asked to: saved, and to be started again. EX_TEMPFAIL of
/// sysexits.h, as `potstill launch` ends when it has saved.
const LEFT_ON_REQUEST: u8 = 75;

/// What ranks are told through their environment, unless somebody has said otherwise there.
///
/// The first two keep glibc from giving memory back between two passes over the network, only to fault it in again: an eighth of
/// a small network's time. The third keeps c10d's warnings, with their stacks, out of the log, whose lines are the rank's own.
const ENVIRONMENT: [(&str, &str); 3] = [
    ("MALLOC_TRIM_THRESHOLD_", "1073741824"),
    ("MALLOC_MMAP_THRESHOLD_", "33554432"),
    ("TORCH_CPP_LOG_LEVEL", "ERROR"),
];

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    service: Service,
    /// Ranks on this node.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    ranks: u32,
    /// Processes beyond these that stand by with everything loaded, to take the place of one that dies.
    #[arg(long, default_value_t = 0)]
    spares: u32,
    /// Threads per rank; by default the machine's cores divided by the ranks.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// Where they compute.
    #[arg(long, value_enum, default_value_t)]
    device: Choice,
    /// Seconds that the ranks have to save and leave after SIGTERM or SIGUSR1.
    #[arg(long, default_value_t = 30)]
    grace: u64,
}

/// The ranks of this node.
#[derive(Default)]
struct Ranks {
    /// Those that live, by slot.
    living: BTreeMap<u32, Pid>,
    /// Whether they were asked to leave: none is started any more.
    leaving: bool,
}

type Shared = Arc<Mutex<Ranks>>;

enum News {
    /// A slot is empty for good.
    Ended { slot: u32, result: anyhow::Result<bool> },
    /// The agent was asked to leave.
    Signal(&'static str),
}

pub fn main(arguments: &Arguments) -> ExitCode {
    arguments.service.enter();
    keep_ranks(arguments).unwrap_or_else(|error| {
        tracing::error!("{}", chain(&error));
        ExitCode::FAILURE
    })
}

fn keep_ranks(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let service = &arguments.service;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let threads = arguments.threads.unwrap_or((cores / arguments.ranks).max(1));
    let program =
        std::env::current_exe().context("cannot find this program's own file to start ranks from")?;

    let (tell, news) = mpsc::channel();
    listen_for_signals(tell.clone())?;
    let ranks = Shared::default();
    let slots = arguments.ranks + arguments.spares;
    for slot in 0..slots {
        let mut command = Command::new(&program);
        command
            .arg("rank")
            .args(["--coordinator", &service.coordinator, "--run-id", &service.run_id])
            .args(["--threads", &threads.to_string(), "--lifeline"])
            .args(["--device", arguments.device.as_argument(), "--slot", &slot.to_string()])
            .args(["--log-format", service.log_format.name()])
            // libtorch's OpenMP pool would otherwise be sized before the rank can say how many threads it wants.
            .env("OMP_NUM_THREADS", threads.to_string())
            .envs(ENVIRONMENT.iter().filter(|(name, _)| std::env::var_os(name).is_none()).copied())
            .stdin(Stdio::piped());
        let (tell, ranks) = (tell.clone(), Arc::clone(&ranks));
        // The thread that spawns must live as long as the child: the kernel's death signal refers to it.
        std::thread::spawn(move || {
            let result = supervise(slot, command, &ranks);
            let _ = tell.send(News::Ended { slot, result });
        });
    }

    let (mut ended, mut failed) = (0, false);
    // Until when the ranks have to leave, once they were asked to.
    let mut deadline: Option<Instant> = None;
    while ended < slots {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let next = match left {
            Some(left) => news.recv_timeout(left),
            None => news.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match next {
            Ok(News::Ended { result: Ok(true), .. }) => ended += 1,
            // It has told the coordinator itself; the others will be told to leave.
            Ok(News::Ended { result: Ok(false), .. }) => (ended, failed) = (ended + 1, true),
            // Leaving closes the other ranks' lifelines.
            Ok(News::Ended { slot, result: Err(error) }) => bail!("rank process {slot}: {}", chain(&error)),
            Ok(News::Signal(name)) => {
                tracing::info!("{name}: the ranks save and leave; they have {} s", arguments.grace);
                deadline.get_or_insert_with(|| Instant::now() + Duration::from_secs(arguments.grace));
                let mut ranks = lock(&ranks);
                ranks.leaving = true;
                for pid in ranks.living.values() {
                    // The only error is that it has just gone.
                    let _ = kill(*pid, Signal::SIGTERM);
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                let late = &lock(&ranks).living;
                bail!(
                    "{} rank processes ({}) had not saved and left {} s after they were asked to: ending them. What they \
                     completed since the newest checkpoint lives on only in other workers; see potstill status",
                    late.len(),
                    late.iter()
                        .map(|(slot, pid)| format!("slot {slot}, process {pid}"))
                        .collect::<Vec<_>>()
                        .join("; "),
                    arguments.grace
                );
            }
            Err(RecvTimeoutError::Disconnected) => bail!("the threads that watch the ranks ended"),
        }
    }
    Ok(match (failed, deadline) {
        (true, _) => ExitCode::FAILURE,
        (false, Some(_)) => ExitCode::from(LEFT_ON_REQUEST),
        (false, None) => ExitCode::SUCCESS,
    })
}

/// SIGTERM and SIGUSR1 become news.
fn listen_for_signals(tell: mpsc::Sender<News>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let entered = runtime.enter();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut user = signal(SignalKind::user_defined1())?;
    drop(entered);
    std::thread::spawn(move || {
        runtime.block_on(async {
            loop {
                let name = tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    _ = user.recv() => "SIGUSR1",
                };
                if tell.send(News::Signal(name)).is_err() {
                    return;
                }
            }
        });
    });
    Ok(())
}

fn lock(ranks: &Shared) -> std::sync::MutexGuard<'_, Ranks> {
    // Each change is a single one, so a thread that panicked has left it whole.
    ranks.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs one rank until it leaves of its own accord. True: told to leave. False: it reported a failure that no restart
/// would mend.
fn supervise(slot: u32, mut command: Command, ranks: &Shared) -> anyhow::Result<bool> {
    let mut deaths = VecDeque::new();
    loop {
        let mut child = {
            let mut ranks = lock(ranks);
            if ranks.leaving {
                return Ok(true);
            }
            let child = command.spawn().context("cannot start")?;
            ranks.living.insert(slot, Pid::from_raw(i32::try_from(child.id()).context("its process id")?));
            child
        };
        let status = wait(&mut child)?;
        lock(ranks).living.remove(&slot);
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
