//! `doctor`: checks what a run needs of a node, and says what to mend, before a job waits in a queue for it.

use std::{
    fs,
    net::TcpListener,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use clap::Args;
use nix::sys::{
    resource::{Resource, getrlimit},
    statvfs::statvfs,
};
use potstill_access::address;
use potstill_c10d::{Backend, ProcessGroup, ReduceOp, Store};
use potstill_logging::{chain, print};
use potstill_storage::Root;
use tch::{Cuda, Device, Kind, Tensor};

use super::version::VERSION;
use crate::process::{
    device::{self, Choice},
    network,
};

/// How long a group of one rank may take to form: it waits for no other rank.
const FORMING: Duration = Duration::from_secs(60);
/// A clock that differs by more has times in logs and signed requests that mislead, or are refused.
const SKEW: Duration = Duration::from_secs(30);
/// Open files of a coordinator of a few hundred workers.
const FILES: u64 = 4096;
/// Shared memory that NCCL may want for each device.
const SHARED: u64 = 1 << 30;

#[derive(Args)]
pub struct Arguments {
    /// Storage of runs to read and write: a folder or a URL.
    #[arg(long, value_name = "URL")]
    storage: Option<String>,
    /// Address of a coordinator to connect to, as HOST:PORT.
    #[arg(long, value_name = "ADDRESS", value_parser = address::coordinator)]
    coordinator: Option<String>,
    /// Network interface for the traffic between ranks.
    #[arg(long, value_name = "NAME")]
    interface: Option<String>,
    /// Device of the ranks.
    #[arg(long, value_enum, default_value_t)]
    device: Choice,
}

/// The result of a check.
enum Found {
    /// All is well.
    Fine(String),
    /// It works, and something is likely to hurt.
    Doubtful(String),
}

use Found::{Doubtful, Fine};

/// Runs every check, also after one that failed, and prints a line for each.
pub fn main(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let device = arguments.device.device(0);
    let computing = device.as_ref().ok().copied();
    let mut checks = vec![
        ("program", program()),
        ("driver", driver()),
        ("devices", device.and_then(devices)),
        ("cores", cores()),
        ("memory", memory()),
        ("open files", files()),
        ("shared memory", shared(computing)),
        ("network", interface(arguments)),
        (
            "collectives",
            computing.context("there is no device").and_then(|device| collectives(device, arguments)),
        ),
    ];
    if let Some(coordinator) = &arguments.coordinator {
        checks.push(("coordinator", reach(coordinator)));
    }
    if let Some(storage) = &arguments.storage {
        checks.push(("storage", runtime.block_on(stored(storage))));
    }
    let failed = checks.iter().filter(|(_, found)| found.is_err()).count();
    for (name, found) in checks {
        let (mark, text) = match found {
            Ok(Fine(text)) => ("ok", text),
            Ok(Doubtful(text)) => ("warn", text),
            Err(error) => ("FAIL", chain(&error).to_string()),
        };
        print(format_args!("{mark:<5}{name:<15}{text}"));
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn program() -> anyhow::Result<Found> {
    Ok(Fine(format!("potstill-worker {}", VERSION.as_str())))
}

/// What the driver says of itself and of its devices.
fn driver() -> anyhow::Result<Found> {
    let Ok(version) = fs::read_to_string("/proc/driver/nvidia/version") else {
        return Ok(Fine("no NVIDIA driver: ranks compute on the CPU".to_owned()));
    };
    let version = version.lines().next().unwrap_or_default().trim_start_matches("NVRM version:").trim();
    let mut models = Vec::new();
    for device in fs::read_dir("/proc/driver/nvidia/gpus").context("/proc/driver/nvidia/gpus")?.flatten() {
        let information = fs::read_to_string(device.path().join("information")).unwrap_or_default();
        let model = information.lines().find_map(|line| line.strip_prefix("Model:"));
        models.push(model.unwrap_or("unknown model").trim().to_owned());
    }
    Ok(Fine(format!("{version}; {}", models.join(", "))))
}

/// Whether the devices that libtorch sees compute.
fn devices(first: Device) -> anyhow::Result<Found> {
    if !first.is_cuda() {
        return Ok(Fine("the CPU".to_owned()));
    }
    let count = Cuda::device_count();
    for index in 0..count {
        let device = Device::Cuda(usize::try_from(index)?);
        let sum = Tensor::f_ones([1024, 1024], (Kind::BFloat16, device))
            .and_then(|ones| ones.f_matmul(&ones))
            .and_then(|product| product.f_mean(Kind::Float))
            .with_context(|| {
                format!("cuda:{index} does not compute: look for its errors with nvidia-smi and dmesg")
            })?;
        let mean = f64::try_from(sum).with_context(|| format!("cuda:{index}"))?;
        ensure!(
            (mean - 1024.0).abs() < 1.0,
            "cuda:{index} computes wrong results ({mean} for 1024): replace it"
        );
    }
    let visible = device::visible();
    Ok(Fine(format!("{count} that compute{visible}: at most {count} ranks and spares here")))
}

fn cores() -> anyhow::Result<Found> {
    let usable = std::thread::available_parallelism()?.get();
    let spinning = std::env::var("OMP_WAIT_POLICY").is_ok_and(|policy| policy.eq_ignore_ascii_case("active"));
    Ok(if spinning {
        Doubtful(format!(
            "{usable}; OMP_WAIT_POLICY=active makes ranks that share cores many times slower: unset it"
        ))
    } else {
        Fine(format!("{usable} for this process"))
    })
}

/// Memory that is free, within the limit of this process's control group.
fn memory() -> anyhow::Result<Found> {
    let text = fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
    let available = text.lines().find_map(|line| {
        let kib = line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?;
        kib.parse::<u64>().ok()
    });
    let available = available.context("/proc/meminfo has no MemAvailable")? << 10;
    let limit =
        fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    let free = limit.map_or(available, |limit: u64| limit.min(available));
    let limit =
        limit.map_or_else(String::new, |limit| format!("; the control group's limit is {}", gib(limit)));
    Ok(Fine(format!("{} free{limit}", gib(free))))
}

fn files() -> anyhow::Result<Found> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    // The programs raise the soft limit themselves.
    Ok(if hard < FILES {
        Doubtful(format!(
            "at most {hard}: a coordinator of many workers needs more; raise the hard limit (ulimit -Hn)"
        ))
    } else {
        Fine(format!("{soft}, and up to {hard}"))
    })
}

fn shared(device: Option<Device>) -> anyhow::Result<Found> {
    let place = Path::new("/dev/shm");
    let system = statvfs(place).context("/dev/shm")?;
    let bytes = system.blocks_available() * system.fragment_size();
    let wanted =
        device.filter(|device| device.is_cuda()).map_or(0, |_| SHARED * Cuda::device_count().max(1) as u64);
    Ok(if bytes < wanted {
        Doubtful(format!(
            "{} free in /dev/shm: NCCL may fail with less than {}; mount a larger one (Kubernetes: an emptyDir in memory)",
            gib(bytes),
            gib(wanted)
        ))
    } else {
        Fine(format!("{} free in /dev/shm", gib(bytes)))
    })
}

/// The address at which other ranks reach those of this node.
fn interface(arguments: &Arguments) -> anyhow::Result<Found> {
    let address = match (&arguments.interface, &arguments.coordinator) {
        (Some(interface), _) => network::address_of(interface)?,
        (None, Some(coordinator)) => network::address_towards(coordinator)?,
        (None, None) => std::net::Ipv4Addr::LOCALHOST.into(),
    };
    let listener = TcpListener::bind((address, 0)).with_context(|| format!("cannot listen on {address}"))?;
    let reached = std::net::TcpStream::connect(listener.local_addr()?);
    reached.with_context(|| format!("{address} cannot be reached from this node: look at its firewall"))?;
    let name = network::interface_with(address)?;
    let why = if address.is_loopback() && arguments.coordinator.is_none() && arguments.interface.is_none() {
        "; --coordinator or --interface checks the one that other nodes use"
    } else {
        ""
    };
    Ok(Fine(format!("ranks listen on {address} ({name}){why}")))
}

/// A group of one rank: the libraries load, and reduce.
fn collectives(device: Device, arguments: &Arguments) -> anyhow::Result<Found> {
    let host = match &arguments.interface {
        Some(interface) => network::address_of(interface)?.to_string(),
        None => "127.0.0.1".to_owned(),
    };
    let (name, backend) = match device {
        Device::Cuda(device) => ("NCCL", Backend::Nccl { device }),
        _ => ("Gloo", Backend::Gloo { host }),
    };
    let started = Instant::now();
    let group = ProcessGroup::new(&backend, &Store::alone(FORMING)?, 0, 1, FORMING)?;
    let tensor = Tensor::ones([1024], (Kind::Float, device));
    group.all_reduce(&tensor, ReduceOp::Sum)?.wait(None)?;
    let sum = f64::try_from(tensor.sum(Kind::Float))?;
    ensure!(sum == 1024.0, "{name} reduces wrongly: {sum} for 1024");
    Ok(Fine(format!("{name}: a group of one rank reduces, {:.1} s", started.elapsed().as_secs_f64())))
}

fn reach(coordinator: &str) -> anyhow::Result<Found> {
    use std::net::ToSocketAddrs;

    let mut addresses =
        coordinator.to_socket_addrs().with_context(|| format!("{coordinator} has no address"))?;
    let address = addresses.next().with_context(|| format!("{coordinator} has no address"))?;
    let started = Instant::now();
    std::net::TcpStream::connect_timeout(&address, Duration::from_secs(10)).with_context(|| {
        format!(
            "nothing answers at {coordinator} ({address}): is the coordinator running, and its port open?"
        )
    })?;
    Ok(Fine(format!("{coordinator} answers in {:.1} ms", started.elapsed().as_secs_f64() * 1e3)))
}

/// Whether the storage keeps what a run writes, and agrees about the time.
async fn stored(url: &str) -> anyhow::Result<Found> {
    let root = Root::open_existing(url)?;
    let started = Instant::now();
    root.probe().await?;
    let took = started.elapsed().as_secs_f64();
    let skew = root.clock_skew().await?;
    let text = format!("{}: read, written and \"create if absent\" honored in {took:.2} s", root.url());
    Ok(if skew.abs() > SKEW.as_secs_f64() {
        Doubtful(format!("{text}; its clock differs by {skew:.0} s from this node's: synchronize them (NTP)"))
    } else {
        Fine(format!("{text}; the clocks agree within {:.0} s", skew.abs().ceil()))
    })
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}
