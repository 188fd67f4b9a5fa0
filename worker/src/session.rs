//! The rank's side of the `Attach` stream.
//!
//! The stream lives on a small runtime of its own, so heartbeats go out while the training thread computes or waits in a
//! collective. What the coordinator says is collected in [`Orders`], which the training thread looks at between
//! micro-batches. An order to leave also aborts the group that the rank is in, so that a rank which waits for a stuck peer
//! leaves at once.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use potstill_c10d::ProcessGroup;
use potstill_proto::{
    MAX_MESSAGE_BYTES,
    cursor::{Cursor, Generation, Phase},
    message::{Assignment, FromWorker, Hello, Request, ToWorker},
    wire::{self, coordinator_client::CoordinatorClient},
};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Endpoint;

/// How long a starting rank tries to reach the coordinator, which may be starting too.
const CONNECT_FOR: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// How far the rank is: written by the training thread, read by the heartbeat.
#[derive(Default)]
pub struct Progress {
    generation: AtomicU64,
    /// Twice the iteration, plus one in the generator phase: both in one atomic, so that they are never torn.
    cursor: AtomicU64,
    units: AtomicU64,
    activity: Mutex<&'static str>,
}

impl Progress {
    /// A unit of work is done.
    pub fn tick(&self) {
        self.units.fetch_add(1, Ordering::Relaxed);
    }

    pub fn set_cursor(&self, cursor: Cursor) {
        let phase = u64::from(cursor.phase == Phase::Generator);
        self.cursor.store(cursor.iteration * 2 + phase, Ordering::Relaxed);
        self.tick();
    }

    pub fn set_generation(&self, generation: Generation) {
        self.generation.store(generation.0, Ordering::Relaxed);
    }

    /// For people: what the rank is doing.
    pub fn set_activity(&self, activity: &'static str) {
        if let Ok(mut now) = self.activity.lock() {
            *now = activity;
        }
        self.tick();
    }

    fn heartbeat(&self) -> FromWorker {
        let cursor = self.cursor.load(Ordering::Relaxed);
        let phase = if cursor.is_multiple_of(2) { Phase::FakeScore } else { Phase::Generator };
        FromWorker::Heartbeat {
            generation: Generation(self.generation.load(Ordering::Relaxed)),
            cursor: Cursor { iteration: cursor / 2, phase },
            progress: self.units.load(Ordering::Relaxed),
            activity: self.activity.lock().map(|a| a.to_string()).unwrap_or_default(),
        }
    }
}

/// What the welcome says.
pub struct Terms {
    pub run_id: String,
    pub specification: String,
    pub storage_url: String,
    pub collective_timeout: Duration,
}

/// What the coordinator wants that has not been acted on.
#[derive(Default)]
pub struct Orders {
    /// A place in a new generation.
    pub assignment: Option<Assignment>,
    /// The generation to leave, and why.
    abandoned: Option<(Generation, String)>,
    /// The run is over: whether it succeeded, and why.
    pub stop: Option<(bool, String)>,
    /// A checkpoint is wanted in this generation.
    checkpoint: Option<Generation>,
    /// A checkpoint and then an end are wanted in this generation.
    checkpoint_and_stop: Option<Generation>,
}

impl Orders {
    /// Why the rank should leave `generation` now, if it should.
    pub fn interruption(&self, generation: Generation) -> Option<String> {
        if let Some((_, reason)) = &self.stop {
            return Some(reason.clone());
        }
        if let Some((_, reason)) = self.abandoned.as_ref().filter(|(g, _)| *g >= generation) {
            return Some(reason.clone());
        }
        let next = self.assignment.as_ref().filter(|a| a.generation > generation)?;
        Some(format!("{} replaces it", next.generation))
    }

    /// Whether a checkpoint was asked of `generation`; asked once, answered once.
    pub fn take_checkpoint(&mut self, generation: Generation) -> bool {
        self.checkpoint.take_if(|g| *g == generation).is_some()
    }

    /// Whether `generation` was asked to save and stop.
    pub fn stop_wanted(&self, generation: Generation) -> bool {
        self.checkpoint_and_stop == Some(generation)
    }

    fn take(&mut self, message: ToWorker) {
        match message {
            ToWorker::Assignment(assignment) => self.assignment = Some(assignment),
            ToWorker::Abandon { generation, reason } => self.abandoned = Some((generation, reason)),
            ToWorker::Stop { success, reason } => self.stop = Some((success, reason)),
            ToWorker::Refused { reason } => self.stop = Some((false, reason)),
            ToWorker::Request { generation, what: Request::Checkpoint } => self.checkpoint = Some(generation),
            ToWorker::Request { generation, what: Request::CheckpointAndStop } => {
                self.checkpoint_and_stop = Some(generation);
            }
            ToWorker::Committed { iteration } => tracing::debug!(iteration, "checkpoint committed"),
            ToWorker::Welcome { .. } => tracing::warn!("a second welcome; ignored"),
        }
    }
}

/// The group that the rank is in, for the session to abort.
type Entered = Arc<Mutex<Option<(Generation, ProcessGroup)>>>;

/// Ends the collectives of the generation that `message` calls the rank away from.
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

enum Inbound {
    Message(ToWorker),
    Lost(String),
}

/// A stream to the coordinator that has been welcomed.
pub struct Session {
    inbox: mpsc::Receiver<Inbound>,
    outbox: Outbox,
    orders: Orders,
    entered: Entered,
    pub progress: Arc<Progress>,
}

/// Sends to the coordinator, from any thread.
#[derive(Clone)]
pub struct Outbox(UnboundedSender<wire::WorkerMessage>);

impl Outbox {
    /// Queues a message. When the stream is gone it is dropped; the training thread hears of that by its inbox.
    pub fn send(&self, message: FromWorker) {
        let _ = self.0.send(message.into());
    }
}

impl Session {
    /// Attaches: connects with bounded retries, says hello, waits for the welcome.
    ///
    /// # Errors
    /// Where it tried and why it failed, or why the coordinator refused.
    pub async fn attach(address: &str, hello: Hello) -> anyhow::Result<(Self, Terms)> {
        let mut client = connect(address).await?;
        let (outbox, outgoing) = unbounded_channel();
        outbox.send(hello.into()).context("the stream closed before the hello")?;
        let mut incoming = client
            .attach(UnboundedReceiverStream::new(outgoing))
            .await
            .with_context(|| format!("the coordinator at {address} did not accept the stream"))?
            .into_inner();

        let lost = || format!("the coordinator at {address} closed the stream before its welcome");
        let first = incoming.message().await.with_context(lost)?.with_context(lost)?;
        let (terms, heartbeat) = match ToWorker::try_from(first)? {
            ToWorker::Welcome {
                run_id,
                specification,
                storage_url,
                heartbeat_millis,
                collective_timeout_millis,
            } => {
                let collective_timeout = Duration::from_millis(collective_timeout_millis);
                let terms = Terms { run_id, specification, storage_url, collective_timeout };
                (terms, Duration::from_millis(heartbeat_millis))
            }
            ToWorker::Refused { reason } | ToWorker::Stop { reason, .. } => {
                bail!("the coordinator at {address} refused this worker: {reason}")
            }
            other => bail!("the coordinator at {address} answered the hello with {other:?}"),
        };

        let progress = Arc::new(Progress::default());
        let entered = Entered::default();
        let (inbound, inbox) = mpsc::channel();
        let aborting = Arc::clone(&entered);
        tokio::spawn(async move {
            let lost = loop {
                match incoming.message().await {
                    Ok(Some(message)) => match ToWorker::try_from(message) {
                        Ok(message) => {
                            abort_if_called_away(&aborting, &message);
                            if inbound.send(Inbound::Message(message)).is_err() {
                                return;
                            }
                        }
                        Err(error) => break error.to_string(),
                    },
                    Ok(None) => break "the coordinator closed the stream".to_owned(),
                    Err(status) => {
                        break format!("the stream to the coordinator broke: {}", status.message());
                    }
                }
            };
            let _ = inbound.send(Inbound::Lost(lost));
        });
        let outbox = Outbox(outbox);
        let (beats, beating) = (outbox.clone(), Arc::clone(&progress));
        tokio::spawn(async move {
            let mut interval = tokio::time::interval(heartbeat);
            interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            while !beats.0.is_closed() {
                interval.tick().await;
                beats.send(beating.heartbeat());
            }
        });
        Ok((Self { inbox, outbox, orders: Orders::default(), entered, progress }, terms))
    }

    /// The rank has joined a group: from now on an order to leave its generation aborts it.
    pub fn enter_group(&self, generation: Generation, group: &ProcessGroup) {
        if let Ok(mut entered) = self.entered.lock() {
            *entered = Some((generation, group.clone()));
        }
    }

    /// The rank has left its group.
    pub fn leave_group(&self) {
        if let Ok(mut entered) = self.entered.lock() {
            *entered = None;
        }
    }

    /// A sender to hand to other threads.
    pub fn outbox(&self) -> Outbox {
        self.outbox.clone()
    }

    /// Queues a message.
    pub fn send(&self, message: FromWorker) {
        self.outbox.send(message);
    }

    /// What is wanted now, without waiting.
    ///
    /// # Errors
    /// The stream is gone.
    pub fn orders(&mut self) -> anyhow::Result<&mut Orders> {
        loop {
            match self.inbox.try_recv() {
                Ok(inbound) => self.accept(inbound)?,
                Err(mpsc::TryRecvError::Empty) => return Ok(&mut self.orders),
                Err(mpsc::TryRecvError::Disconnected) => bail!("the session's task ended"),
            }
        }
    }

    /// Waits for the next message and takes it into the orders.
    ///
    /// # Errors
    /// The stream is gone.
    pub fn wait(&mut self) -> anyhow::Result<&mut Orders> {
        let inbound = self.inbox.recv().context("the session's task ended")?;
        self.accept(inbound)?;
        Ok(&mut self.orders)
    }

    fn accept(&mut self, inbound: Inbound) -> anyhow::Result<()> {
        match inbound {
            Inbound::Message(message) => {
                self.orders.take(message);
                Ok(())
            }
            Inbound::Lost(reason) => bail!(reason),
        }
    }
}

async fn connect(address: &str) -> anyhow::Result<CoordinatorClient<tonic::transport::Channel>> {
    let endpoint = Endpoint::from_shared(address.to_owned())
        .with_context(|| format!("{address:?} is not an address; expected http://host:port"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_while_idle(true);
    let started = Instant::now();
    let (mut tries, mut pause) = (0u32, FIRST_PAUSE);
    loop {
        tries += 1;
        match endpoint.connect().await {
            Ok(channel) => {
                return Ok(CoordinatorClient::new(channel)
                    .max_decoding_message_size(MAX_MESSAGE_BYTES)
                    .max_encoding_message_size(MAX_MESSAGE_BYTES));
            }
            Err(error) if started.elapsed() + pause < CONNECT_FOR => {
                tracing::debug!(%address, tries, error = %root_cause(&error), "cannot reach the coordinator yet");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            Err(error) => bail!(
                "cannot reach the coordinator at {address}: tried {tries} times in {:.0} s, last: {}. Is it running there, \
                 and does the network let this machine reach it?",
                started.elapsed().as_secs_f64(),
                root_cause(&error)
            ),
        }
    }
}

/// The innermost error: tonic's own says only "transport error".
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
