//! The stream itself: connects, sends the hello, forwards messages, and reconnects when the stream is lost.

use std::{
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use potstill_c10d::ProcessGroup;
use potstill_proto::{
    MAX_MESSAGE_BYTES,
    cursor::Generation,
    message::{FromWorker, Hello, Place, Source, ToWorker},
    wire::{self, coordinator_client::CoordinatorClient},
};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Streaming, transport::Endpoint};

use super::{progress::Progress, retained::Retained};
use crate::process::lifeline;

/// How long a starting rank tries to reach the coordinator, which may be starting as well: it hashes the teacher and reads the
/// journal before it listens. As long as a run waits for workers by default.
const CONNECT_FOR: Duration = Duration::from_secs(300);
/// How often a rank that waits for the coordinator says so.
const SAY: Duration = Duration::from_secs(10);
/// Timeout of one attempt.
const ATTEMPT: Duration = Duration::from_secs(5);
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
    pub collective_timeout: Duration,
    /// How long to continue without a coordinator.
    pub patience: Duration,
    /// The coordinator's name, which its storage holds too.
    pub coordinator: String,
}

/// What the training thread receives.
pub(super) enum Inbound {
    Message(ToWorker),
    Lost(String),
}

/// Sends messages to the coordinator, from any thread, whether or not there is a stream at the moment.
#[derive(Clone, Default)]
pub struct Outbox(Arc<Mutex<Outgoing>>);

#[derive(Default)]
struct Outgoing {
    retained: Retained,
    stream: Option<UnboundedSender<wire::WorkerMessage>>,
}

impl Outbox {
    /// Sends a message; one that must not be lost is sent again after a lost stream.
    pub fn send(&self, message: FromWorker) {
        let mut outgoing = self.lock();
        outgoing.retained.keep(&message);
        if let Some(stream) = &outgoing.stream {
            // The link itself notices when a stream is lost.
            let _ = stream.send(message.into());
        }
    }

    /// Starts a stream: sends a hello, and all messages that a new coordinator may not have received.
    fn begin(
        &self,
        mut hello: Hello,
        progress: &Progress,
    ) -> anyhow::Result<UnboundedReceiverStream<wire::WorkerMessage>> {
        let (sender, messages) = unbounded_channel();
        let mut outgoing = self.lock();
        hello.place = outgoing.retained.place;
        hello.held = progress.held().filter(|_| outgoing.retained.keeps_state(progress.loaded()));
        let closed = "the stream closed before the hello";
        sender.send(hello.into()).context(closed)?;
        for message in outgoing.retained.messages() {
            sender.send(message.clone().into()).context(closed)?;
        }
        outgoing.stream = Some(sender);
        Ok(UnboundedReceiverStream::new(messages))
    }

    fn heard(&self, message: &ToWorker) {
        let retained = &mut self.lock().retained;
        match message {
            ToWorker::Assignment(a) => {
                let keeps_state = a.source == Source::Peer { rank: a.rank };
                retained.assigned(Place { generation: a.generation, rank: a.rank }, keeps_state);
            }
            ToWorker::Committed { iteration } => retained.committed(*iteration),
            _ => {}
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Outgoing> {
        // A thread that panicked leaves consistent data: every change is a single push or retain.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The rank's current group, which the link can abort.
pub type Entered = Arc<Mutex<Option<(Generation, ProcessGroup)>>>;

/// Aborts the collectives of the generation that `message` ends for this rank.
fn abort_if_called_away(entered: &Entered, message: &ToWorker) {
    let Ok(entered) = entered.lock() else { return };
    let Some((generation, group)) = entered.as_ref() else { return };
    let called_away = match message {
        ToWorker::Abandon { generation: abandoned, .. } => abandoned >= generation,
        ToWorker::Assignment(assignment) => assignment.generation > *generation,
        ToWorker::Stop { .. } => true,
        _ => false,
    };
    if called_away && let Err(error) = group.abort() {
        tracing::warn!(%generation, %error, "cannot abort the group");
    }
}

/// One rank's connection to the coordinators of its run.
pub struct Link {
    pub address: String,
    pub hello: Hello,
    pub outbox: Outbox,
    pub progress: Arc<Progress>,
    pub entered: Entered,
}

impl Link {
    /// Attaches for the first time.
    ///
    /// # Errors
    /// Where it tried and why it failed, or why the coordinator refused.
    pub async fn attach(&self) -> anyhow::Result<(Streaming<wire::CoordinatorMessage>, Terms)> {
        self.retry(CONNECT_FOR, LONGEST_PAUSE).await
    }

    /// Forwards messages, and reconnects whenever the stream is lost, until the run is over for this rank or no
    /// coordinator could be reached for `patience`.
    pub async fn keep(
        self,
        mut incoming: Streaming<wire::CoordinatorMessage>,
        terms: Terms,
        inbound: mpsc::Sender<Inbound>,
    ) {
        loop {
            let lost = match self.listen(incoming, &inbound).await {
                Some(lost) => lost,
                None => return,
            };
            tracing::warn!(
                reason = lost,
                "lost the coordinator; training continues while reconnecting to it or its successor"
            );
            let longest = terms.heartbeat.clamp(FIRST_PAUSE, LONGEST_PAUSE);
            match self.retry(terms.patience, longest).await {
                Ok((stream, _)) => {
                    tracing::info!("reattached to a coordinator");
                    incoming = stream;
                }
                Err(error) => {
                    let _ = inbound.send(Inbound::Lost(format!("{lost}; then {error:#}")));
                    return;
                }
            }
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
            let message = match ToWorker::try_from(message) {
                Ok(message) => message,
                Err(error) => return Some(error.to_string()),
            };
            if let ToWorker::Restart { reason } = &message {
                tracing::error!(reason, "this process hangs: ending it, so that its agent starts another");
                lifeline::end_now();
            }
            self.outbox.heard(&message);
            abort_if_called_away(&self.entered, &message);
            let over = matches!(message, ToWorker::Stop { .. } | ToWorker::Refused { .. });
            if inbound.send(Inbound::Message(message)).is_err() || over {
                return None;
            }
        }
    }

    /// Attaches, with repeated attempts for `patience`.
    async fn retry(
        &self,
        patience: Duration,
        longest: Duration,
    ) -> anyhow::Result<(Streaming<wire::CoordinatorMessage>, Terms)> {
        let address = &self.address;
        let started = Instant::now();
        let (mut tries, mut pause, mut said) = (0u32, FIRST_PAUSE, Instant::now());
        loop {
            tries += 1;
            let attempt = tokio::time::timeout(ATTEMPT, self.attempt()).await;
            let error = match attempt {
                Ok(Ok(attached)) => return Ok(attached),
                Ok(Err(Failure::Final(error))) => return Err(error),
                Ok(Err(Failure::Passing(error))) => error,
                Err(_) => anyhow::anyhow!("no answer within {} s", ATTEMPT.as_secs()),
            };
            if started.elapsed() + pause >= patience {
                bail!(
                    "cannot reach the coordinator at {address}: tried {tries} times in {:.0} s, last: {}. Check that it is running \
                     there, and that this machine can reach it over the network",
                    started.elapsed().as_secs_f64(),
                    error.root_cause()
                );
            }
            tracing::debug!(%address, tries, error = %error.root_cause(), "cannot reach the coordinator yet");
            if said.elapsed() >= SAY {
                said = Instant::now();
                tracing::info!(
                    error = %error.root_cause(),
                    "waiting for the coordinator at {address}, which may be starting, for {:.0} s; giving up after {} s",
                    started.elapsed().as_secs_f64(),
                    patience.as_secs()
                );
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(longest);
        }
    }

    async fn attempt(&self) -> Result<(Streaming<wire::CoordinatorMessage>, Terms), Failure> {
        let address = &self.address;
        let endpoint = Endpoint::from_shared(address.to_owned())
            .with_context(|| format!("{address:?} is not an address; expected http://host:port"))
            .map_err(Failure::Final)?
            .connect_timeout(ATTEMPT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE.0)
            .keep_alive_timeout(KEEP_ALIVE.1)
            .keep_alive_while_idle(true);
        let channel = endpoint.connect().await.map_err(|error| Failure::Passing(error.into()))?;
        let mut client = CoordinatorClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let outgoing = self.outbox.begin(self.hello.clone(), &self.progress).map_err(Failure::Passing)?;
        let lost = || format!("the coordinator at {address} closed the stream before its welcome");
        let welcomed = async {
            let mut incoming = client.attach(outgoing).await.with_context(lost)?.into_inner();
            let first = incoming.message().await.with_context(lost)?.with_context(lost)?;
            anyhow::Ok((incoming, first))
        };
        let (incoming, first) = welcomed.await.map_err(Failure::Passing)?;
        match ToWorker::try_from(first).map_err(|error| Failure::Final(error.into()))? {
            ToWorker::Welcome {
                run_id,
                specification,
                storage_url,
                heartbeat_millis,
                collective_timeout_millis,
                patience_millis,
                coordinator,
            } => {
                let terms = Terms {
                    run_id,
                    specification,
                    storage_url,
                    heartbeat: Duration::from_millis(heartbeat_millis),
                    collective_timeout: Duration::from_millis(collective_timeout_millis),
                    patience: Duration::from_millis(patience_millis),
                    coordinator,
                };
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

/// Why an attempt to attach failed.
enum Failure {
    /// Another attempt may succeed.
    Passing(anyhow::Error),
    /// No further attempt can succeed.
    Final(anyhow::Error),
}
