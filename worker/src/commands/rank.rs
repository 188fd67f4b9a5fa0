//! `rank`: one worker process with one device.

use std::{
    net::{ToSocketAddrs, UdpSocket},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use clap::Args;
use potstill_c10d::TcpStore;
use potstill_proto::{
    PROTOCOL,
    cursor::Generation,
    message::{FromWorker, Hello, WorkerId},
};
use potstill_spec::RunSpec;
use potstill_storage::{Root, RunId, layout};
use tch::Device;

use crate::{
    process::device::{self, Choice},
    process::lifeline,
    session::{Session, Terms},
    training::{Ending, Holding, Job, run_generation},
};
use potstill_logging::{LogFormat, chain};

/// How long the coordinator's name may be invisible in the storage.
const VISIBLE: Duration = Duration::from_secs(10);

/// Exit code of a rank that ends because the run has failed, or because it cannot take part in it: a restart would not
/// help.
pub const LEFT_IN_FAILURE: u8 = 70;

/// Arguments about the run and the log: the same for an agent.
#[derive(Args)]
pub struct Service {
    /// Address of the coordinator, as in http://10.0.0.1:7070.
    #[arg(long)]
    pub coordinator: String,
    /// Name of the run.
    #[arg(long)]
    pub run_id: String,
    /// End when standard input is closed: set by the process that starts this one and holds the other end of the pipe.
    #[arg(long)]
    pub lifeline: bool,
    /// Format of log lines.
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
}

impl Service {
    /// Starts logging, and watches the lifeline.
    pub fn enter(&self) {
        self.log_format.start();
        if self.lifeline {
            lifeline::hold();
        }
    }
}

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    service: Service,
    /// Threads for libtorch.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    threads: u32,
    /// Device of the rank.
    #[arg(long, value_enum, default_value_t)]
    device: Choice,
    /// Index among the ranks of this machine, from 0.
    #[arg(long, default_value_t = 0)]
    slot: usize,
}

pub fn main(arguments: Arguments) -> anyhow::Result<ExitCode> {
    arguments.service.enter();
    let device = match arguments.device.device(arguments.slot) {
        Ok(device) => device,
        Err(error) => {
            tracing::error!("{}", chain(&error));
            return Ok(ExitCode::from(LEFT_IN_FAILURE));
        }
    };
    tch::set_num_threads(arguments.threads as i32);
    // One worker thread for heartbeats and uploads, beside the training thread.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;

    // The coordinator ended it, not a crash: the agent must not restart it.
    match serve(&arguments.service, &runtime, device) {
        Ok(true) => Ok(ExitCode::SUCCESS),
        Ok(false) => Ok(ExitCode::from(LEFT_IN_FAILURE)),
        Err(error) => {
            tracing::error!("{}", chain(&error));
            Ok(ExitCode::from(LEFT_IN_FAILURE))
        }
    }
}

/// Attaches and works until told to stop. True: the run succeeded, or saved when it was asked to stop.
fn serve(service: &Service, runtime: &tokio::runtime::Runtime, device: Device) -> anyhow::Result<bool> {
    // Entered, so that the session can start its tasks.
    let _entered = runtime.enter();
    let run_id: RunId = service.run_id.parse()?;
    let host = address_towards(&service.coordinator)?;
    let store = TcpStore::serve(&host, 0, Duration::from_secs(30)).context("this worker's own TCPStore")?;
    let hello = Hello {
        protocol: PROTOCOL,
        worker: WorkerId(uuid::Uuid::new_v4().to_string()),
        run_id: run_id.to_string(),
        host: nix::unistd::gethostname().map(|h| h.to_string_lossy().into_owned()).unwrap_or_default(),
        pid: std::process::id(),
        device: device::name(device),
        store_address: format!("{host}:{}", store.port()),
        held: None,
        place: None,
    };
    let (mut session, terms) = runtime.block_on(Session::attach(&service.coordinator, hello))?;
    let job = match prepare(&terms, &run_id, runtime, device) {
        Ok(job) => job,
        Err(error) => return give_up(&mut session, Generation::default(), error),
    };
    session.send(FromWorker::Ready);

    let mut holding = Holding::default();
    let mut saving = None;
    loop {
        let orders = session.wait()?;
        if let Some((success, reason)) = orders.stop.take() {
            tracing::info!(success, reason, "leaving");
            return Ok(success);
        }
        // Several messages may have followed an interrupted generation; only the newest assignment counts.
        while let Some(assignment) = session.orders()?.assignment.take() {
            let ending = run_generation(
                &job,
                &mut session,
                &mut holding,
                &mut saving,
                &assignment,
                &host,
                terms.collective_timeout,
            );
            let (generation, cursor) = (assignment.generation, holding.cursor);
            match ending {
                Ok(Ending::Finished) => session.send(FromWorker::Finished { generation, cursor }),
                Ok(Ending::Yielded) => {
                    tracing::info!(%generation, %cursor, "yielded at a boundary; waiting for an assignment");
                    session.progress.set_activity("waiting for an assignment");
                    session.send(FromWorker::Yielded { generation, cursor });
                }
                Ok(Ending::Damaged { manifest_key, error }) => {
                    tracing::error!(%generation, manifest_key, error, "the checkpoint is damaged");
                    session.progress.set_activity("waiting for an assignment");
                    session.send(FromWorker::CheckpointDamaged { generation, manifest_key, error });
                }
                Ok(Ending::Left(error)) => {
                    tracing::warn!(%generation, %cursor, error, "left the group; keeping the state, waiting for an assignment");
                    session.progress.set_activity("waiting for an assignment");
                    session.send(FromWorker::CollectiveFailed { generation, cursor, error });
                }
                Err(error) => return give_up(&mut session, generation, error),
            }
        }
        if let Some((success, reason)) = session.orders()?.stop.take() {
            tracing::info!(success, reason, "leaving");
            return Ok(success);
        }
    }
}

fn prepare(
    terms: &Terms,
    run_id: &RunId,
    runtime: &tokio::runtime::Runtime,
    device: Device,
) -> anyhow::Result<Job> {
    if terms.run_id != run_id.to_string() {
        bail!("the coordinator serves run {}, not {run_id}", terms.run_id);
    }
    let spec = RunSpec::from_toml(&terms.specification)?;
    let run = Root::open_existing(&terms.storage_url)?.run(run_id);
    runtime.block_on(same_storage(&run, terms))?;
    Job::load(spec, run, runtime.handle().clone(), device)
}

/// Checks that this worker sees the coordinator's storage: its name lies there. File systems on a network may show it late.
async fn same_storage(run: &potstill_storage::Run, terms: &Terms) -> anyhow::Result<()> {
    let started = Instant::now();
    loop {
        let found = run.get(layout::COORDINATOR).await?;
        if found.as_deref() == Some(terms.coordinator.as_bytes()) {
            return Ok(());
        }
        if started.elapsed() >= VISIBLE {
            let place = run.describe(layout::COORDINATOR);
            let problem = match found {
                Some(_) => format!("{place} names another coordinator"),
                None => format!("there is no {place}"),
            };
            bail!(
                "this machine does not see the run's storage, {}: {problem}. Give it access to the same storage as the \
                 coordinator's",
                terms.storage_url
            );
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Reports an error that this worker cannot avoid, and waits for the coordinator to end the run, or this worker.
fn give_up(session: &mut Session, generation: Generation, error: anyhow::Error) -> anyhow::Result<bool> {
    tracing::error!("{}", chain(&error));
    session.send(FromWorker::Failed { generation, error: chain(&error) });
    while session.wait()?.stop.is_none() {}
    Ok(false)
}

/// This machine's address in the network of the coordinator, where peers can reach it too.
fn address_towards(coordinator: &str) -> anyhow::Result<String> {
    let authority = coordinator.split("://").last().unwrap_or(coordinator).trim_end_matches('/');
    let target = authority
        .to_socket_addrs()
        .with_context(|| format!("{coordinator:?} is not a reachable address; expected http://host:port"))?
        .next()
        .with_context(|| format!("{coordinator:?} has no address"))?;
    if target.ip().is_loopback() {
        return Ok(target.ip().to_string());
    }
    // No packet is sent: connecting a UDP socket only chooses the route.
    let unspecified = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(unspecified)?;
    socket.connect(target).with_context(|| format!("no route to the coordinator at {coordinator}"))?;
    Ok(socket.local_addr()?.ip().to_string())
}
