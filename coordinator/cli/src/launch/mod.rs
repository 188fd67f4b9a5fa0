//! Runs a coordinator in this process, with or without a local worker agent, from start to end.

pub mod agent;
pub mod worker;

use std::{future, io::Write, net::SocketAddr, process::ExitCode, time::Duration};

use agent::{Agent, AgentPlan};
use anyhow::Context;
use potstill_core::observation::{Observation, Outcome};
use potstill_logging::LogFormat;
use potstill_server::{Options, Resume, Running, Security, StartError, address::advertised};
use potstill_spec::RunSpec;
use potstill_storage::{Root, RunId};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc::{self, UnboundedSender},
    time::Instant,
};
use tracing::{error, info, warn};
use worker::WorkerError;

use crate::{
    monitor::{Ending, Monitor, screen::Screen},
    web,
};

/// How long an agent may take to end after the run's end; longer where its ranks may have a state to rescue.
const LEAVING: Duration = Duration::from_secs(10);
const RESCUING: Duration = Duration::from_secs(600);

/// How the command ended, as its exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// All iterations are done and the last checkpoint is committed.
    Succeeded = 0,
    /// The run failed, or was stopped before it had a checkpoint.
    Failed = 1,
    /// The command line or the configuration is invalid; nothing was started. Also clap's exit code.
    Usage = 2,
    /// The run was asked to stop and there is a checkpoint: `--resume` continues. EX_TEMPFAIL of sysexits.h, on which a
    /// scheduler can requeue a job.
    Stopped = 75,
    /// Interrupted twice: 128 + SIGINT, as a shell reports it.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

/// Why a run did not start, or could not be observed to its end.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The coordinator did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The worker program cannot be run, or rejects a file that the run reads.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// Any other error.
    #[error(transparent)]
    Other(#[from] anyhow::Error),
}

impl LaunchError {
    /// The exit code, which tells an invalid request from a failure.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Start(error) if error.is_of_usage() => Exit::Usage,
            Self::Worker(WorkerError::Unfit(_)) => Exit::Usage,
            _ => Exit::Failed,
        }
    }
}

/// A run to coordinate.
pub struct Job {
    /// Its specification, validated.
    pub spec: RunSpec,
    /// Its name.
    pub run_id: RunId,
    /// The storage that holds it.
    pub storage: Root,
    /// Whether to continue a run that exists.
    pub resume: Resume,
    /// Whether it may start from the teacher although none of the checkpoints that it had can be read.
    pub from_teacher: bool,
    /// The address on which it listens for workers.
    pub listen: SocketAddr,
    /// The address of its page.
    pub page: SocketAddr,
    /// How it shows who it is, and whom it lets in.
    pub security: Security,
    /// How long the workers have to save when the run is asked to stop.
    pub grace: Duration,
    /// Format of log lines.
    pub log_format: LogFormat,
    /// The local agent; if none, workers are started elsewhere.
    pub agent: Option<AgentPlan>,
}

/// Coordinates a run until it has ended, prints its result, and returns how it ended.
///
/// # Errors
/// It could not start. Later errors are part of the run's outcome.
pub async fn run(job: Job) -> Result<Exit, LaunchError> {
    let mut signals = Signals::new().context("cannot listen for signals")?;
    let screen = Screen::new(job.log_format);
    let run_id = job.run_id.to_string();
    let (insecure, storage) = (job.security == Security::Insecure, job.storage.url().to_owned());
    let starting = async {
        if let Some(plan) = &job.agent {
            worker::check(&plan.program, job.spec.to_toml().map_err(StartError::from)?).await?;
        }
        let run = job.storage.run(&job.run_id);
        let report = Monitor::open(run.clone(), &job.spec, job.resume != Resume::Never, &screen).await?;
        let page = web::bind(job.page, &job.security)
            .map_err(|source| StartError::Listen { address: job.page, source })?;
        let options = Options {
            listen: job.listen,
            spec: job.spec,
            run_id: job.run_id,
            storage: job.storage,
            resume: job.resume,
            from_teacher: job.from_teacher,
            security: job.security,
            page: page.url.clone(),
            // The local agent ends with the launcher.
            ranks_may_live: job.agent.is_none(),
        };
        let running = potstill_server::start(options).await?;
        let page = page.serve(run, report.feed(), report.prometheus(), &running);
        Ok::<_, LaunchError>((report, running, page))
    };
    let resume = job.resume;
    let (report, mut running, page) = tokio::select! {
        started = starting => match started {
            // A scheduler starts the same command again until it has ended well: there is nothing left to do.
            Err(LaunchError::Start(error @ StartError::Complete { .. })) if resume == Resume::Auto => {
                info!("{error}");
                return Ok(Exit::Succeeded);
            }
            started => started?,
        },
        _ = signals.next() => return Ok(Exit::Interrupted),
    };

    let mut agent = None;
    let address = advertised(running.address);
    match &job.agent {
        Some(plan) => {
            let invitation = &running.invitation;
            info!(run = %run_id, address = invitation.address, ranks = plan.ranks, "starting the workers");
            match Agent::start(plan, invitation, job.log_format, &screen).await {
                Ok(started) => agent = Some(started),
                Err(error) => running.fail(format!("cannot start {}: {error}", plan.program.display())),
            }
        }
        None if insecure => warn!(
            "serving at {address} without TLS and without a key: whoever reaches this port can read, cancel and falsify the run. \
             Workers attach with: potstill agent --insecure --coordinator {address} --run-id {run_id} --ranks N"
        ),
        None => info!(
            "serving at {address}; workers attach with: potstill agent --storage {storage} --run-id {run_id} --ranks N"
        ),
    }

    // A task of its own, so that a slow upload of the metrics holds up neither the log nor a signal.
    let (observed, observations) = mpsc::unbounded_channel();
    let reporting = tokio::spawn(report.follow(observations));
    let outcome = until_ended(&mut running, &mut agent, &mut signals, job.grace, observed).await;
    let outcome = match outcome {
        Ended::As(outcome) => outcome,
        Ended::SecondSignal => return Ok(interrupted(&mut agent, &screen).await),
        Ended::Late => {
            // As the coordinator knows it: the storage may not answer.
            let (unfinished, resumable) = running.unfinished().await;
            interrupted(&mut agent, &screen).await;
            error!("not saved within {} s: {unfinished}", job.grace.as_secs());
            return Ok(if resumable { Exit::Stopped } else { Exit::Failed });
        }
    };

    let closing = async {
        running.outcome().await;
        if let Some(agent) = &mut agent {
            let rescues = job.agent.as_ref().is_some_and(|plan| plan.rescue_dir.is_some());
            agent.leave(if rescues { RESCUING } else { LEAVING }).await;
        }
        let report = reporting.await.context("the monitor's task ended early")?;
        let ending = report.finish(&outcome).await;
        // Last: what the run has left can be looked at while it is written.
        page.end().await;
        anyhow::Ok(ending)
    };
    let Ending { mut text, resumable } = tokio::select! {
        closed = closing => closed?,
        () = signals.second() => return Ok(interrupted(&mut agent, &screen).await),
    };
    let exit = match outcome {
        Outcome::Succeeded { .. } => Exit::Succeeded,
        Outcome::Stopped { .. } if resumable => {
            text += &format!("To continue, repeat the command with --run-id {run_id} --resume\n");
            Exit::Stopped
        }
        Outcome::Stopped { .. } | Outcome::Failed { .. } => Exit::Failed,
    };
    // A closed standard output does not change how the run ended.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(exit)
}

/// Why the wait for a run's end is over.
enum Ended {
    /// The run has ended.
    As(Outcome),
    /// A second signal was received.
    SecondSignal,
    /// The grace period is over.
    Late,
}

/// Forwards observations until the run has ended; asks it to stop at the first signal and fails it when the agent
/// exits.
async fn until_ended(
    running: &mut Running,
    agent: &mut Option<Agent>,
    signals: &mut Signals,
    grace: Duration,
    observed: UnboundedSender<Observation>,
) -> Ended {
    let mut deadline: Option<Instant> = None;
    loop {
        let late = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => future::pending().await,
            }
        };
        tokio::select! {
            // In this order: the agent leaves after the run's end, which must not be taken for a failure.
            biased;
            observation = running.observations.recv() => match observation {
                Some(observation) => {
                    let ended = match &observation {
                        Observation::Ended(outcome) => Some(outcome.clone()),
                        _ => None,
                    };
                    // Fails only if the monitor's task panicked, which is noticed when it is joined.
                    let _ = observed.send(observation);
                    if let Some(outcome) = ended {
                        return Ended::As(outcome);
                    }
                }
                None => return Ended::As(running.outcome().await),
            },
            name = signals.next() => {
                if signals.was_repeated() {
                    return Ended::SecondSignal;
                }
                warn!(
                    "{name}: the workers save and stop within {} s; a second signal ends the run at once, without saving",
                    grace.as_secs()
                );
                deadline = Some(Instant::now() + grace);
                running.stop(format!("{name} received"));
            }
            () = late => return Ended::Late,
            how = exit_of(agent) => {
                running.fail(format!("the worker agent exited ({how}) before the run's end; see its messages above"));
            }
        }
    }
}

/// How the agent ended; never returns without an agent, and not twice.
async fn exit_of(agent: &mut Option<Agent>) -> String {
    match agent {
        Some(agent) if !agent.is_gone() => agent.exited().await.to_owned(),
        _ => future::pending().await,
    }
}

async fn interrupted(agent: &mut Option<Agent>, screen: &Screen) -> Exit {
    screen.clear();
    if let Some(agent) = agent {
        agent.kill();
        agent.exited().await;
    }
    Exit::Interrupted
}

/// Ctrl-C and the scheduler's request to end.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    user: Signal,
    count: u32,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            user: signal(SignalKind::user_defined1())?,
            count: 0,
        })
    }

    /// The name of the next signal.
    async fn next(&mut self) -> &'static str {
        let name = tokio::select! {
            _ = self.interrupt.recv() => "Ctrl-C",
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.user.recv() => "SIGUSR1",
        };
        self.count += 1;
        name
    }

    /// Whether more than one was received.
    fn was_repeated(&self) -> bool {
        self.count > 1
    }

    /// Returns at the second signal.
    async fn second(&mut self) {
        while !self.was_repeated() {
            let name = self.next().await;
            if !self.was_repeated() {
                warn!(
                    "{name}: the run has ended and its summary is being written; a second signal ends the process at once"
                );
            }
        }
    }
}
