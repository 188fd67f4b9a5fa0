//! `rank`: one worker process with one device.

use std::{
    ffi::{OsStr, OsString},
    net::IpAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use clap::Args;
use potstill_access::{Invitation, Locator, Role, WorkerSecret, address};
use potstill_proto::{
    PROTOCOL,
    cursor::{Cursor, Generation},
    message::{FromWorker, Hello, WorkerId},
};
use potstill_spec::{RunSpec, TeacherSpec};
use potstill_storage::{Root, RunId, layout};
use tch::Device;

use crate::{
    checkpoint,
    model::teacher_folder,
    process::device::{self, Choice},
    process::lifeline,
    process::network,
    session::{Attached, Session, Terms},
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
    /// Name of the run.
    #[arg(long)]
    pub run_id: String,
    /// Storage of runs as this machine sees it, in which the coordinator's address, its certificate and the join key lie: a
    /// folder or a URL.
    #[arg(long, required_unless_present_any = ["join", "insecure"])]
    pub storage: Option<String>,
    /// File with an invitation (potstill invite), for a machine that may not read the join key; - reads it from the first line
    /// of standard input. Without --storage, the storage is where the coordinator has it.
    #[arg(long)]
    pub join: Option<PathBuf>,
    /// Address of the coordinator, if another than the one that it states, as HOST:PORT.
    #[arg(long, conflicts_with = "join", value_parser = address::coordinator)]
    pub coordinator: Option<String>,
    /// Accept a coordinator that serves without TLS and without a key, at --coordinator or as the storage has it.
    #[arg(long, conflicts_with = "join")]
    pub insecure: bool,
    /// End when standard input is closed: set by the process that starts this one and holds the other end of the pipe.
    #[arg(long)]
    pub lifeline: bool,
    /// Format of log lines.
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
}

impl Service {
    /// The arguments with which an agent's ranks find the coordinator.
    pub fn forwarded(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        let mut add = |name: &str, value: Option<&OsStr>| {
            if let Some(value) = value {
                arguments.extend([name.into(), value.into()]);
            }
        };
        add("--run-id", Some(self.run_id.as_ref()));
        add("--storage", self.storage.as_ref().map(AsRef::as_ref));
        add("--join", self.join.as_ref().map(AsRef::as_ref));
        add("--coordinator", self.coordinator.as_ref().map(AsRef::as_ref));
        arguments.extend(self.insecure.then(|| "--insecure".into()));
        arguments
    }

    /// Starts logging, reads an invitation from standard input where it is there, and watches the lifeline.
    ///
    /// # Errors
    /// The invitation is not acceptable, or the storage's URL, or the run's name.
    pub fn enter(&self) -> anyhow::Result<Locator> {
        self.log_format.start();
        let from_input = self.join.as_deref() == Some(Path::new("-"));
        let line = from_input.then(lifeline::first_line).transpose();
        if self.lifeline {
            lifeline::hold();
        }
        let run_id: RunId = self.run_id.parse()?;
        if let Some(line) = line.context("standard input")? {
            return Ok(Locator::Fixed(Invitation::parse(&line, "standard input")?));
        }
        Ok(match (&self.join, &self.storage, &self.coordinator) {
            (Some(file), _, _) => Locator::File(file.clone()),
            (None, Some(storage), address) => Locator::Storage {
                run: Root::open_existing(storage).context("--storage")?.run(&run_id),
                role: Role::Worker,
                address: address.clone(),
                insecure: self.insecure,
            },
            (None, None, Some(address)) => Locator::Fixed(Invitation::insecure(&self.run_id, address)),
            (None, None, None) => bail!("--insecure needs --coordinator or --storage"),
        })
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
    /// It takes the place of a rank that has died after it had worked.
    #[arg(long)]
    restarted: bool,
    /// See the agent's option.
    #[arg(long)]
    rescue_dir: Option<PathBuf>,
    /// Address of this machine for the exchange between ranks; by default the one on the route to the coordinator.
    #[arg(long)]
    address: Option<IpAddr>,
}

pub fn main(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let locator = arguments.service.enter();
    let checked = locator.and_then(|locator| Ok((locator, arguments.device.device(arguments.slot)?)));
    let (locator, device) = match checked {
        Ok(checked) => checked,
        Err(error) => {
            tracing::error!("{}", chain(&error));
            return Ok(ExitCode::from(LEFT_IN_FAILURE));
        }
    };
    tch::set_num_threads(arguments.threads as i32);
    // One worker thread for heartbeats and uploads, beside the training thread.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;

    // The coordinator ended it, not a crash: the agent must not restart it.
    match serve(&arguments, locator, &runtime, device) {
        Ok(true) => Ok(ExitCode::SUCCESS),
        Ok(false) => Ok(ExitCode::from(LEFT_IN_FAILURE)),
        Err(error) => {
            tracing::error!("{}", chain(&error));
            Ok(ExitCode::from(LEFT_IN_FAILURE))
        }
    }
}

/// Attaches and works until told to stop. True: the run succeeded, or saved when it was asked to stop.
fn serve(
    arguments: &Arguments,
    locator: Locator,
    runtime: &tokio::runtime::Runtime,
    device: Device,
) -> anyhow::Result<bool> {
    let service = &arguments.service;
    // Entered, so that the session can start its tasks.
    let _entered = runtime.enter();
    let run_id: RunId = service.run_id.parse()?;
    let secret = WorkerSecret::generate()?;
    let hello = Hello {
        protocol: PROTOCOL,
        worker: WorkerId(secret.id()),
        run_id: run_id.to_string(),
        host: nix::unistd::gethostname().map(|h| h.to_string_lossy().into_owned()).unwrap_or_default(),
        pid: std::process::id(),
        device: device::name(device),
        held: None,
        place: None,
    };
    let attached = Session::attach(locator, hello, secret, arguments.restarted);
    let (mut session, terms) = match runtime.block_on(attached)? {
        Attached::Session(session, terms) => (session, terms),
        Attached::TooLate(ended) => return Ok(ended.success),
    };
    // Only now: the connection shows that the coordinator's address can be resolved and reached.
    let host = match arguments.address {
        Some(address) => address,
        None => network::address_towards(&terms.address)?,
    };
    let host = host.to_string();
    let storage = service.storage.as_deref().unwrap_or(&terms.storage_url);
    session.progress.set_activity("loading what the run reads");
    let job = match prepare(&terms, storage, &run_id, runtime, device) {
        Ok(job) => job,
        Err(error) => return give_up(&mut session, Generation::default(), error),
    };
    session.send(FromWorker::Ready);

    let mut holding = Holding::default();
    let ended = work(&job, &mut session, &mut holding, &host, &terms);
    if let Some(folder) = &arguments.rescue_dir
        && !matches!(ended, Ok(true))
    {
        rescue(folder, &job, &session, &holding, &terms, runtime);
    }
    ended
}

/// Works in one generation after another until told to stop. True: the run succeeded, or saved when it was asked to stop.
fn work(
    job: &Job,
    session: &mut Session,
    holding: &mut Holding,
    host: &str,
    terms: &Terms,
) -> anyhow::Result<bool> {
    let mut saving = None;
    loop {
        let orders = session.wait()?;
        if let Some((success, reason)) = orders.stop.take() {
            tracing::info!(success, reason, "leaving");
            return Ok(success);
        }
        // Several messages may have followed an interrupted generation; only the newest assignment counts.
        while let Some(assignment) = session.orders()?.assignment.take() {
            let ending =
                run_generation(job, session, holding, &mut saving, &assignment, host, terms.joining_timeout);
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
                Ok(Ending::Incomplete { cursor, error }) => {
                    tracing::warn!(%generation, %cursor, error, "left the group; the state that it was to take over is not whole");
                    session.progress.set_activity("waiting for an assignment");
                    session.send(FromWorker::StateIncomplete { generation, cursor, error });
                }
                Ok(Ending::Left(error)) => {
                    tracing::warn!(%generation, %cursor, error, "left the group; keeping the state, waiting for an assignment");
                    session.progress.set_activity("waiting for an assignment");
                    session.send(FromWorker::CollectiveFailed { generation, cursor, error });
                }
                Err(error) => return give_up(session, generation, error),
            }
        }
        if let Some((success, reason)) = session.orders()?.stop.take() {
            tracing::info!(success, reason, "leaving");
            return Ok(success);
        }
    }
}

/// Writes the state that this rank holds, if no checkpoint has it, to a folder of this machine.
fn rescue(
    folder: &Path,
    job: &Job,
    session: &Session,
    holding: &Holding,
    terms: &Terms,
    runtime: &tokio::runtime::Runtime,
) {
    let (cursor, saved) = (holding.cursor, session.outbox().saved());
    let Some(state) = holding.state.as_ref().filter(|_| cursor > Cursor::boundary(saved)) else { return };
    if job.spec().memory.is_sharded() {
        return tracing::error!("nothing is rescued: with memory.shard a rank does not hold the whole state");
    }
    tracing::info!(%cursor, folder = %folder.display(), "rescuing the state");
    let rescued = || -> anyhow::Result<Option<String>> {
        let root = Root::open(&folder.display().to_string())?;
        let run = root.run(&terms.run_id.parse()?);
        let generation = session.progress.loaded();
        let writer = uuid::Uuid::new_v4().to_string();
        runtime.block_on(checkpoint::rescue(&run, &terms.specification, state, cursor, generation, &writer))
    };
    match rescued() {
        Ok(Some(place)) => tracing::info!(
            %cursor,
            "the state is rescued: {place}. To go on with it, launch or serve with --storage {} --run-id {} --resume",
            folder.display(),
            terms.run_id
        ),
        Ok(None) => tracing::info!(%cursor, "another rank of this machine rescues this state"),
        Err(error) => tracing::error!(%cursor, "the state cannot be rescued: {}", chain(&error)),
    }
}

fn prepare(
    terms: &Terms,
    storage: &str,
    run_id: &RunId,
    runtime: &tokio::runtime::Runtime,
    device: Device,
) -> anyhow::Result<Job> {
    if terms.run_id != run_id.to_string() {
        bail!("the coordinator serves run {}, not {run_id}", terms.run_id);
    }
    let spec = RunSpec::from_toml(&terms.specification)?;
    let run = Root::open_existing(storage)?.run(run_id);
    runtime.block_on(same_storage(&run, terms))?;
    if spec.teacher.model.is_some() && spec.teacher.sha256.is_none() {
        // Fetching and hashing it block.
        if let Some(found) = teacher_folder(&spec.teacher, true)?.digest {
            runtime.block_on(same_teacher(&run, &spec.teacher, &found))?;
        }
    }
    Job::load(spec, run, runtime.handle().clone(), device)
}

/// Checks that this worker's copy of a teacher of which the coordinator has none is the one with which the run was started: the
/// first worker's. `found`: the SHA-256 of this one.
async fn same_teacher(run: &potstill_storage::Run, teacher: &TeacherSpec, found: &str) -> anyhow::Result<()> {
    let first = run.keep_teacher(found).await?;
    ensure!(
        first == found,
        "the teacher {teacher} has SHA-256 {found} on this machine, but {first} where the run was started ({}): give this \
         machine that model, or start another run",
        run.describe(layout::TEACHER)
    );
    Ok(())
}

/// Checks that this worker sees the coordinator's storage: its name lies there. File systems on a network may show it late.
async fn same_storage(run: &potstill_storage::Run, terms: &Terms) -> anyhow::Result<()> {
    let started = Instant::now();
    loop {
        if run.has_coordinator(&terms.coordinator).await? {
            return Ok(());
        }
        if started.elapsed() >= VISIBLE {
            let place = run.describe(layout::COORDINATORS);
            let problem = format!("no object below {place} names the coordinator");
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
