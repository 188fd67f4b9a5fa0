//! `agent`: starts the ranks of one machine, and restarts those that die. A restarted rank takes the state from its
//! peers, so a crash costs no completed step.

use std::{
    collections::{BTreeMap, VecDeque},
    ffi::OsStr,
    io::Write,
    net::IpAddr,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
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

use potstill_access::Locator;

use crate::{
    commands::rank::{self, Service},
    process::{
        cores::{self, Cores},
        device::Choice,
        environment, lifeline, network,
    },
};
use potstill_logging::chain;

/// A rank that dies more often than this within [`WINDOW`] is not restarted: its failure is permanent.
const RESTARTS: usize = 20;
const WINDOW: Duration = Duration::from_secs(60);
/// Nor one that has died this number of times in a row without getting further than an earlier life did, however long each was.
const FRUITLESS: usize = 10;

/// Exit code of an agent whose ranks have saved and ended because it was asked to stop; they can be started again.
/// EX_TEMPFAIL of sysexits.h, like the exit code of `potstill launch` after a save.
const LEFT_ON_REQUEST: u8 = 75;

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    service: Service,
    /// Ranks on this machine.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    ranks: u32,
    /// Spare processes beyond these, with everything loaded, each of which takes the place of a rank that dies. On
    /// GPUs each spare holds a device of its own.
    #[arg(long, default_value_t = 0)]
    spares: u32,
    /// Threads per rank; by default the machine's cores divided by the ranks, or the cores near a rank's GPU.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// Device of the ranks.
    #[arg(long, value_enum, default_value_t)]
    device: Choice,
    /// Seconds in which the ranks must save and end after SIGTERM or SIGUSR1.
    #[arg(long, default_value_t = 30)]
    grace: u64,
    /// Folder of this machine for a state that cannot be saved otherwise: when the run fails or its coordinator is lost, a rank
    /// whose state is newer than the newest checkpoint writes it there, as a run that --resume continues.
    #[arg(long)]
    rescue_dir: Option<PathBuf>,
    /// Network interface for the exchange between ranks, as in ib0; by default the one on the route to the coordinator.
    #[arg(long, conflicts_with = "address")]
    interface: Option<String>,
    /// The same, as an address of this machine.
    #[arg(long)]
    address: Option<IpAddr>,
}

/// The ranks of this machine.
#[derive(Default)]
struct Ranks {
    /// Running processes, by slot.
    living: BTreeMap<u32, Pid>,
    /// Whether they were asked to end: none is started any more.
    leaving: bool,
}

type Shared = Arc<Mutex<Ranks>>;

enum News {
    /// A slot's process has ended and is not restarted.
    Ended { slot: u32, result: anyhow::Result<bool> },
    /// The agent was asked to stop.
    Signal(&'static str),
}

pub fn main(arguments: &Arguments) -> ExitCode {
    let entered = arguments.service.enter();
    entered.and_then(|locator| keep_ranks(arguments, &locator)).unwrap_or_else(|error| {
        tracing::error!("{}", chain(&error));
        ExitCode::FAILURE
    })
}

fn keep_ranks(arguments: &Arguments, locator: &Locator) -> anyhow::Result<ExitCode> {
    environment::check()?;
    let service = &arguments.service;
    let count = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let program =
        std::env::current_exe().context("cannot find this program's own file to start ranks from")?;

    let address = match &arguments.interface {
        Some(name) => Some(network::address_of(name).context("--interface")?),
        None => arguments.address,
    };
    let interface = address.map(network::interface_with).transpose().context("--address")?;

    let (tell, news) = mpsc::channel();
    listen_for_signals(tell.clone())?;
    let ranks = Shared::default();
    let slots = arguments.ranks + arguments.spares;
    let invitation = match locator {
        Locator::Fixed(invitation) if service.join.is_some() => Some(format!("{}\n", invitation.to_text())),
        _ => None,
    };
    let mut bound = near_devices(arguments.device, slots as usize);
    for slot in 0..slots {
        let own = bound.as_mut().map(|bound| std::mem::take(&mut bound[slot as usize]));
        let most = own.as_ref().map_or(count, |own| own.len() as u32);
        let threads = arguments.threads.unwrap_or((count / arguments.ranks).clamp(1, most.max(1)));
        let mut command = Command::new(&program);
        command
            .arg("rank")
            .args(service.forwarded())
            .args(["--threads", &threads.to_string(), "--lifeline"])
            .args(["--device", arguments.device.as_argument(), "--slot", &slot.to_string()])
            .args(["--log-format", service.log_format.name()])
            .args(
                arguments
                    .rescue_dir
                    .iter()
                    .flat_map(|folder| [OsStr::new("--rescue-dir"), folder.as_os_str()]),
            )
            .args(address.iter().flat_map(|address| ["--address".to_owned(), address.to_string()]))
            // NCCL finds its interface by this variable; "=" stands for this name alone.
            .envs(interface.iter().map(|name| ("NCCL_SOCKET_IFNAME", format!("={name}"))))
            // Otherwise libtorch's OpenMP pool would be sized before the rank sets its number of threads.
            .env("OMP_NUM_THREADS", threads.to_string())
            .envs(environment::of_children());
        let (tell, ranks, invitation) = (tell.clone(), Arc::clone(&ranks), invitation.clone());
        // The thread that spawns must live as long as the child: the kernel's death signal refers to it.
        std::thread::spawn(move || {
            if let Some(own) = own {
                match cores::bind(&own) {
                    Ok(()) => {
                        tracing::info!(slot, cores = %cores::text(&own), "bound to the cores near its GPU")
                    }
                    Err(error) => tracing::warn!(slot, %error, "cannot be bound to the cores near its GPU"),
                }
            }
            let result = supervise(slot, command, invitation.as_deref(), &ranks);
            let _ = tell.send(News::Ended { slot, result });
        });
    }

    let (mut ended, mut failed) = (0, false);
    // The time by which the ranks must have ended, once they were asked to.
    let mut deadline: Option<Instant> = None;
    while ended < slots {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let next = match left {
            Some(left) => news.recv_timeout(left),
            None => news.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match next {
            Ok(News::Ended { result: Ok(true), .. }) => ended += 1,
            // It has told the coordinator itself, which will stop the others.
            Ok(News::Ended { result: Ok(false), .. }) => (ended, failed) = (ended + 1, true),
            // Returning closes the other ranks' lifelines.
            Ok(News::Ended { slot, result: Err(error) }) => bail!("rank process {slot}: {}", chain(&error)),
            Ok(News::Signal(name)) => {
                tracing::info!("{name}: the ranks save and end within {} s", arguments.grace);
                deadline.get_or_insert_with(|| Instant::now() + Duration::from_secs(arguments.grace));
                let mut ranks = lock(&ranks);
                ranks.leaving = true;
                for pid in ranks.living.values() {
                    // The only possible error is that it has just ended.
                    let _ = kill(*pid, Signal::SIGTERM);
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                let late = &lock(&ranks).living;
                bail!(
                    "{} rank processes ({}) had not saved and ended {} s after they were asked to: killing them. What they \
                     completed since the newest checkpoint is kept only by other workers; see potstill status",
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

/// The cores of each rank, where they have GPUs: its threads and those of its libraries stay near its device.
fn near_devices(device: Choice, ranks: usize) -> Option<Vec<Cores>> {
    let addresses = device.addresses(ranks)?;
    let allowed =
        cores::allowed().inspect_err(|error| tracing::warn!(%error, "the ranks are not bound to cores"));
    Some(cores::divided(Path::new("/sys"), &allowed.ok()?, &addresses))
}

/// Forwards SIGTERM and SIGUSR1.
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
    // Each change is a single operation, so a thread that panicked has left consistent data.
    ranks.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs one rank until it ends by itself. True: it was told to stop. False: it reported a failure that no restart would
/// repair.
fn supervise(
    slot: u32,
    mut command: Command,
    invitation: Option<&str>,
    ranks: &Shared,
) -> anyhow::Result<bool> {
    // The iteration that came last of those that a life of this rank has completed.
    let mut furthest = None;
    let (mut deaths, mut fruitless, mut restarted) = (VecDeque::new(), 0, false);
    loop {
        // The rank's lifeline, through which it tells how far it has come.
        let (mut own, its) = UnixStream::pair().context("cannot make a socket pair")?;
        own.write_all(invitation.unwrap_or_default().as_bytes()).context("its socket")?;
        command.stdin(OwnedFd::from(its));
        let mut child = {
            let mut ranks = lock(ranks);
            if ranks.leaving {
                return Ok(true);
            }
            let child = command.spawn().context("cannot start")?;
            ranks.living.insert(slot, Pid::from_raw(i32::try_from(child.id()).context("its process id")?));
            child
        };
        // The command holds its end until it is given another one.
        command.stdin(Stdio::null());
        let reached = lifeline::last_completed(&own);
        let status = child.wait().context("cannot wait for the rank process")?;
        lock(ranks).living.remove(&slot);
        match status.code() {
            Some(0) => return Ok(true),
            Some(code) if code == i32::from(rank::LEFT_IN_FAILURE) => return Ok(false),
            _ => {}
        }
        fruitless = if reached > furthest { 0 } else { fruitless + 1 };
        furthest = reached.max(furthest);
        if fruitless >= FRUITLESS {
            let point = match furthest {
                None => "before it completed an iteration".to_owned(),
                Some(iteration) => format!("without getting beyond iteration {iteration}"),
            };
            bail!("died {fruitless} times in a row {point}, last with {status}; it is not restarted");
        }
        let now = Instant::now();
        deaths.push_back(now);
        while deaths.front().is_some_and(|d| now - *d > WINDOW) {
            deaths.pop_front();
        }
        if deaths.len() > RESTARTS {
            bail!(
                "died {} times within {} s, last with {status}; it is not restarted",
                deaths.len(),
                WINDOW.as_secs()
            );
        }
        tracing::warn!(slot, %status, deaths = deaths.len(), "rank process died; restarting it");
        // Where a life of it has worked, an end that the storage tells is not that of an earlier attempt at the run.
        if furthest.is_some() && !std::mem::replace(&mut restarted, true) {
            command.arg("--restarted");
        }
    }
}
