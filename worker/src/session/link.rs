//! The stream itself: connects, sends the hello, forwards messages, and reconnects when the stream is lost.

use std::{
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use potstill_access::{AccessError, Locator, Patience, WorkerSecret};
use potstill_c10d::ProcessGroup;
use potstill_logging::chain;
use potstill_proto::{
    cursor::Generation,
    message::{Hello, ToWorker},
    wire,
};
use potstill_storage::{Root, Run, coordinators::Ended};
use tonic::{Code, Status, Streaming};

use super::{flight, outbox::Outbox, progress::Progress, rendezvous::Calls};
use crate::process::lifeline;

/// How long a starting rank tries to reach the coordinator, which may be starting as well: it hashes the teacher and reads the
/// journal before it listens. As long as a run waits for workers by default.
const CONNECT_FOR: Duration = Duration::from_secs(300);
/// How often a rank that waits for the coordinator says so.
const SAY: Duration = Duration::from_secs(10);
/// Timeout of a connection with its handshake.
const CONNECTION: Duration = Duration::from_secs(5);
/// Timeout of one attempt: the storage in which the coordinator is looked up may be slow, and a coordinator that writes its
/// journal there answers when it has written.
const ATTEMPT: Duration = Duration::from_secs(30);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// A connection that is silent for the first of these is probed, and given up without an answer within the second: long
/// enough for a coordinator that was stopped for a while. Training goes on meanwhile.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(60));

/// The content of the welcome.
#[derive(Clone)]
pub struct Terms {
    pub run_id: String,
    pub specification: String,
    pub storage_url: String,
    pub heartbeat: Duration,
    /// How long the ranks of a generation may take to meet.
    pub joining_timeout: Duration,
    /// How long to continue without a coordinator.
    pub patience: Duration,
    /// The coordinator's name, which its storage holds too.
    pub coordinator: String,
    /// Its `host:port`.
    pub address: String,
}

impl Terms {
    /// The run in the storage as the coordinator has it.
    fn run(&self) -> Option<Run> {
        Some(Root::open(&self.storage_url).ok()?.run(&self.run_id.parse().ok()?))
    }
}

/// What the training thread receives.
pub(super) enum Inbound {
    Message(ToWorker),
    Lost(String),
}

/// The current groups of the rank, which the link can abort.
pub type Entered = Arc<Mutex<Option<(Generation, Vec<ProcessGroup>)>>>;

/// Aborts the collectives of the rank's generation if that is one of `which`.
pub fn abort(entered: &Entered, which: impl Fn(Generation) -> bool) {
    let Ok(entered) = entered.lock() else { return };
    let Some((generation, groups)) = entered.as_ref().filter(|(generation, _)| which(*generation)) else {
        return;
    };
    // That of all ranks first: what it settles does not count from then on.
    for group in groups {
        if let Err(error) = group.abort() {
            tracing::warn!(%generation, %error, "cannot abort a group");
        }
    }
}

/// Whether `message` ends a generation for this rank.
fn calls_away(message: &ToWorker, generation: Generation) -> bool {
    match message {
        ToWorker::Abandon { generation: abandoned, .. } => *abandoned >= generation,
        ToWorker::Assignment(assignment) => assignment.generation > generation,
        ToWorker::Stop { .. } => true,
        _ => false,
    }
}

/// One rank's connection to the coordinators of its run.
pub struct Link {
    pub locator: Locator,
    pub hello: Hello,
    pub secret: WorkerSecret,
    pub outbox: Outbox,
    pub progress: Arc<Progress>,
    pub entered: Entered,
    pub calls: Calls,
    /// Whether it takes the place of a process that has died after it had worked: then the run may have ended meanwhile.
    pub restarted: bool,
}

impl Link {
    /// Attaches for the first time.
    ///
    /// # Errors
    /// Where it tried and why it failed, or why the coordinator refused.
    pub async fn attach(&self) -> anyhow::Result<Found> {
        let run = self.locator.run().filter(|_| self.restarted);
        retry(CONNECT_FOR, LONGEST_PAUSE, || async {
            self.attempt_or_end(run).await.map_err(|failure| match failure {
                Failure::Refused(error) => Failure::Final(error),
                other => other,
            })
        })
        .await
    }

    /// Forwards messages, and reconnects whenever the stream is lost, until the run is over for this rank or no
    /// coordinator could be reached for `patience`.
    pub async fn keep(
        self,
        mut incoming: Streaming<wire::CoordinatorMessage>,
        terms: Terms,
        inbound: mpsc::Sender<Inbound>,
    ) {
        let run = self.locator.run().cloned().or_else(|| terms.run());
        loop {
            let lost = match self.listen(incoming, &inbound).await {
                Some(lost) => lost,
                None => return,
            };
            // In this order, so that no request is sent that would get no answer.
            self.outbox.welcomed(false);
            self.calls.lost();
            tracing::warn!(
                reason = lost,
                "lost the coordinator; training continues while reconnecting to it or its successor"
            );
            let longest = terms.heartbeat.clamp(FIRST_PAUSE, LONGEST_PAUSE);
            match retry(terms.patience, longest, || self.attempt_or_end(run.as_ref())).await {
                Ok(Found::Coordinator(stream, _)) => {
                    tracing::info!("reattached to a coordinator");
                    incoming = stream;
                }
                Ok(Found::End(Ended { success, reason })) => {
                    let message = ToWorker::Stop { success, reason };
                    self.outbox.heard(&message);
                    abort(&self.entered, |generation| calls_away(&message, generation));
                    let _ = inbound.send(Inbound::Message(message));
                    return;
                }
                Err(error) => {
                    // Its peers may be gone as well, and no coordinator is left to report it.
                    abort(&self.entered, |_| true);
                    let _ = inbound.send(Inbound::Lost(format!("{lost}; then {error:#}")));
                    return;
                }
            }
        }
    }

    /// Ends the requests for keys and values of the generation that `message` ends for this rank.
    fn end_what_waits(&self, message: &ToWorker) {
        match message {
            ToWorker::Abandon { generation, .. } => self.calls.leave(*generation),
            ToWorker::Assignment(assignment) => {
                self.calls.leave(Generation(assignment.generation.0.saturating_sub(1)));
            }
            ToWorker::Stop { .. } => self.calls.lost(),
            _ => {}
        }
    }

    /// How the stream was lost; `None` when the run is over for this rank.
    async fn listen(
        &self,
        mut incoming: Streaming<wire::CoordinatorMessage>,
        inbound: &mpsc::Sender<Inbound>,
    ) -> Option<String> {
        loop {
            let message = match incoming.message().await {
                Ok(Some(message)) => message,
                Ok(None) => return Some("the coordinator closed the stream".to_owned()),
                Err(status) => {
                    return Some(format!("the stream to the coordinator failed: {}", status.message()));
                }
            };
            if let Some(wire::coordinator_message::Kind::StoreReply(reply)) = message.kind {
                self.calls.answer(reply);
                continue;
            }
            let mut message = match ToWorker::try_from(message) {
                Ok(message) => message,
                Err(error) => return Some(error.to_string()),
            };
            if let ToWorker::Restart { reason } = &message {
                let record =
                    self.record_flight(|_| true).await.map_or_else(String::new, |it| format!("; {it}"));
                tracing::error!(
                    reason,
                    "this process hangs: ending it, so that its agent starts another{record}"
                );
                lifeline::end_now();
            }
            self.outbox.heard(&message);
            self.end_what_waits(&message);
            if let ToWorker::Abandon { generation, reason } = &mut message
                && let Some(waited) = self.progress.waited().filter(|waited| *waited >= flight::HANGS)
                && let Some(record) = self.record_flight(|entered| entered <= *generation).await
            {
                let waited = waited.as_secs_f64();
                *reason += &format!("; this rank had waited in a collective for {waited:.1} s, {record}");
            }
            abort(&self.entered, |generation| calls_away(&message, generation));
            let over = matches!(message, ToWorker::Stop { .. } | ToWorker::Refused { .. });
            if inbound.send(Inbound::Message(message)).is_err() || over {
                return None;
            }
        }
    }

    /// Writes down which collectives this rank is in, if it is in a generation that is one of `which`.
    async fn record_flight(&self, which: impl Fn(Generation) -> bool) -> Option<String> {
        let entered = self.entered.lock().ok()?.clone();
        let (generation, groups) = entered.filter(|(generation, _)| which(*generation))?;
        // The record is of all of the process's groups.
        Some(flight::record(groups.first()?, &self.hello.run_id, generation).await)
    }

    /// An attempt to reach the coordinator, or its successor. Where there is none, `run` may have ended.
    async fn attempt_or_end(&self, run: Option<&Run>) -> Result<Found, Failure> {
        let failure = match self.attempt().await {
            Ok((stream, terms)) => return Ok(Found::Coordinator(stream, terms)),
            Err(failure) => failure,
        };
        let Some(run) = run else { return Err(failure) };
        let ended = run.coordinator().await.ok().flatten().and_then(|newest| newest.ended);
        let ended = ended.ok_or(failure)?;
        tracing::info!(reason = ended.reason, "the run has ended, as its storage says");
        Ok(Found::End(ended))
    }

    async fn attempt(&self) -> Result<(Streaming<wire::CoordinatorMessage>, Terms), Failure> {
        let invitation = self.locator.find().await.map_err(|error| match &self.locator {
            // It may be about to be replaced.
            Locator::File(_) => Failure::Refused(error.into()),
            _ => error.into(),
        })?;
        let address = &invitation.address;
        let mut client =
            invitation.connect(Patience { connect: CONNECTION, keep_alive: Some(KEEP_ALIVE) }).await?;
        let outgoing =
            self.outbox.begin(self.hello.clone(), &self.secret, &self.progress).map_err(Failure::Passing)?;
        let lost = || format!("the coordinator at {address} closed the stream before its welcome");
        let failed = |status: Status| {
            let refused = matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied);
            let error = anyhow::anyhow!("{}: {}", lost(), status.message());
            if refused { Failure::Refused(error) } else { Failure::Passing(error) }
        };
        let mut incoming = client.attach(outgoing).await.map_err(failed)?.into_inner();
        let first = incoming.message().await.map_err(failed)?;
        let first = first.with_context(lost).map_err(Failure::Passing)?;
        match ToWorker::try_from(first).map_err(|error| Failure::Final(error.into()))? {
            ToWorker::Welcome {
                run_id,
                specification,
                storage_url,
                heartbeat_millis,
                joining_timeout_millis,
                patience_millis,
                coordinator,
            } => {
                let terms = Terms {
                    run_id,
                    specification,
                    storage_url,
                    heartbeat: Duration::from_millis(heartbeat_millis),
                    joining_timeout: Duration::from_millis(joining_timeout_millis),
                    patience: Duration::from_millis(patience_millis),
                    coordinator,
                    address: address.clone(),
                };
                self.outbox.welcomed(true);
                Ok((incoming, terms))
            }
            ToWorker::Refused { reason } | ToWorker::Stop { reason, .. } => Err(Failure::Final(
                anyhow::anyhow!("the coordinator at {address} refused this worker: {reason}"),
            )),
            other => Err(Failure::Final(anyhow::anyhow!(
                "the coordinator at {address} answered the hello with {other:?}"
            ))),
        }
    }
}

/// What a worker finds that looks for a coordinator.
#[allow(clippy::large_enum_variant, reason = "there is one")]
pub enum Found {
    /// The stream from it, or from its successor.
    Coordinator(Streaming<wire::CoordinatorMessage>, Terms),
    /// The end of the run, of which it was not told.
    End(Ended),
}

/// Repeats an attempt for `patience`, with pauses up to `longest`.
async fn retry<T, F: Future<Output = Result<T, Failure>>>(
    patience: Duration,
    longest: Duration,
    attempt: impl Fn() -> F,
) -> anyhow::Result<T> {
    let started = Instant::now();
    let (mut tries, mut pause, mut said) = (0u32, FIRST_PAUSE, Instant::now());
    loop {
        tries += 1;
        let error = match tokio::time::timeout(ATTEMPT, attempt()).await {
            Ok(Ok(attached)) => return Ok(attached),
            Ok(Err(Failure::Final(error))) => return Err(error),
            Ok(Err(Failure::Passing(error) | Failure::Refused(error))) => error,
            Err(_) => anyhow::anyhow!("no answer within {} s", ATTEMPT.as_secs()),
        };
        if started.elapsed() + pause >= patience {
            bail!(
                "cannot reach the coordinator: tried {tries} times in {:.0} s, last: {}. Check that it is running, and that this \
                 machine can reach it over the network",
                started.elapsed().as_secs_f64(),
                chain(&error)
            );
        }
        tracing::debug!(tries, error = %chain(&error), "cannot reach the coordinator yet");
        if said.elapsed() >= SAY {
            said = Instant::now();
            tracing::info!(
                error = %chain(&error),
                "waiting for the coordinator, which may be starting, for {:.0} s; giving up after {} s",
                started.elapsed().as_secs_f64(),
                patience.as_secs()
            );
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(longest);
    }
}

/// Why an attempt to attach failed.
enum Failure {
    /// Another attempt may succeed.
    Passing(anyhow::Error),
    /// The token was not accepted, or the invitation cannot be read. Another attempt may succeed where the coordinator has just
    /// been replaced.
    Refused(anyhow::Error),
    /// No further attempt can succeed.
    Final(anyhow::Error),
}

impl From<AccessError> for Failure {
    fn from(error: AccessError) -> Self {
        if error.may_pass() { Self::Passing(error.into()) } else { Self::Final(error.into()) }
    }
}
