//! The one task that owns the state machine: it feeds it events and executes its actions, in order.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use potstill_core::{
    Action, ClientId, Core, Event, StreamId, Tick,
    ledger::Checkpoint,
    observation::{Observation, Outcome},
    record::Record,
};
use potstill_storage::{
    Run,
    checkpoint::{Manifest, Shard},
    journal::Journal,
    layout,
    retention::{Policy, Swept},
};
use tokio::{
    sync::{
        mpsc::{self, error::TrySendError},
        oneshot,
    },
    task::JoinSet,
    time::MissedTickBehavior,
};

use crate::{
    StartError,
    clock::Clock,
    opening::Opened,
    service::{Arrival, Input, Outbox},
};

/// How long the last sweep may delay the end of a run.
const LAST_SWEEP: Duration = Duration::from_secs(30);
/// How often a coordinator checks that no other one has written to the journal.
const WATCH: Duration = Duration::from_secs(10);

/// What ended a wait of the shell.
enum Happened {
    Arrival(Arrival),
    Input(Input),
    Event(Event),
    Nothing,
}

/// See the module's documentation.
pub struct Shell {
    core: Core,
    clock: Clock,
    run: Run,
    journal: Journal,
    streams: BTreeMap<StreamId, Outbox>,
    commits: JoinSet<(u64, Result<String, String>)>,
    /// The rule for checkpoints to keep, and the sweep under way.
    retention: Policy,
    sweep: JoinSet<()>,
    watch: JoinSet<Option<u64>>,
    /// The clients that wait for a checkpoint.
    clients: BTreeMap<ClientId, oneshot::Sender<Result<u64, String>>>,
    next_client: u64,
    observations: mpsc::UnboundedSender<Observation>,
    /// Events that result from executing an action.
    events: VecDeque<Event>,
    outcome: Option<Outcome>,
}

impl Shell {
    /// A shell around an opened run.
    pub fn new(opened: Opened, clock: Clock, observations: mpsc::UnboundedSender<Observation>) -> Self {
        let Opened { setup, retention, run, journal } = opened;
        Self {
            core: Core::new(setup),
            clock,
            run,
            journal,
            streams: BTreeMap::new(),
            commits: JoinSet::new(),
            retention,
            sweep: JoinSet::new(),
            watch: JoinSet::new(),
            clients: BTreeMap::new(),
            next_client: 0,
            observations,
            events: VecDeque::new(),
            outcome: None,
        }
    }

    /// Writes this coordinator's first record into the journal, which shows whether it owns the run.
    pub async fn start(&mut self) -> Result<(), StartError> {
        self.step(self.clock.now(), Event::Started).await;
        match self.outcome.take() {
            Some(Outcome::Failed { reason }) => Err(StartError::Journal(reason)),
            _ => Ok(()),
        }
    }

    /// Serves until the run is over.
    pub async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Arrival>,
        mut controls: mpsc::UnboundedReceiver<Input>,
    ) -> Outcome {
        let mut looks = tokio::time::interval(WATCH);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if let Some(outcome) = self.outcome.take() {
                // Objects that this sweep leaves are found by the next one, if there is one.
                let _ = tokio::time::timeout(LAST_SWEEP, self.sweep.join_next()).await;
                return outcome;
            }
            let deadline = self.core.next_deadline().map(|tick| self.clock.instant(tick));
            let timer = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            let happened = tokio::select! {
                biased;
                Some(input) = controls.recv() => Happened::Input(input),
                Some(Ok((iteration, result))) = self.commits.join_next() => {
                    Happened::Event(Event::CommitAnswered { iteration, result })
                }
                Some(arrival) = inbox.recv() => Happened::Arrival(arrival),
                Some(Ok(Some(found))) = self.watch.join_next() => match self.journal.watched(found) {
                    Ok(()) => Happened::Nothing,
                    Err(error) => Happened::Event(Event::JournalLost { reason: error.to_string() }),
                },
                _ = looks.tick(), if self.watch.is_empty() => {
                    self.watch.spawn(self.journal.watch());
                    Happened::Nothing
                }
                () = timer => Happened::Event(Event::Timer),
            };
            if let Happened::Arrival(arrival) = happened {
                self.arrived(arrival).await;
                continue;
            }
            // Messages that have arrived are processed before the clock: a worker is not dead while its message waits
            // here, be it behind a journal write that took long.
            for _ in 0..inbox.len() {
                if let Ok(arrival) = inbox.try_recv() {
                    self.arrived(arrival).await;
                }
            }
            if let Some(time) = self.clock.deafness() {
                let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
                self.step(self.clock.now(), Event::Deaf { millis }).await;
            }
            match happened {
                Happened::Input(input) => self.arrived(Arrival { at: self.clock.now(), input }).await,
                Happened::Event(event) => self.step(self.clock.now(), event).await,
                Happened::Arrival(_) | Happened::Nothing => {}
            }
        }
    }

    async fn arrived(&mut self, Arrival { at, input }: Arrival) {
        match input {
            Input::Attached { stream, hello, outbox } => {
                self.streams.insert(stream, outbox);
                self.step(at, Event::Attached { stream, hello }).await;
            }
            Input::Received { stream, message } => self.step(at, Event::Received { stream, message }).await,
            Input::Closed { stream, reason, status } => {
                if let (Some(outbox), Some(status)) = (self.streams.remove(&stream), status) {
                    // Where the queue is full the worker does not read it, so the reason would not be read either.
                    let _ = outbox.try_send(Err(status));
                }
                self.step(at, Event::Closed { stream, reason }).await;
            }
            Input::Status(reply) => {
                // The client may have gone.
                let _ = reply.send(self.core.status());
            }
            Input::Checkpoint(reply) => {
                let client = ClientId(self.next_client);
                self.next_client += 1;
                self.clients.insert(client, reply);
                self.step(at, Event::CheckpointRequested { client }).await;
            }
            Input::Stop { reason } => self.step(at, Event::StopRequested { reason }).await,
            Input::Fail { reason } => self.step(at, Event::WorkersUnavailable { reason }).await,
        }
    }

    /// Feeds an event, and those that result from its actions, to the state machine.
    async fn step(&mut self, at: Tick, event: Event) {
        self.events.push_back(event);
        while let Some(event) = self.events.pop_front() {
            let mut actions = Vec::new();
            self.core.step(at, event, &mut actions);
            for action in actions {
                if let Err(lost) = self.act(action).await {
                    // No action after a record may be executed before the record is durable.
                    self.events.clear();
                    self.events.push_back(Event::JournalLost { reason: lost });
                    break;
                }
            }
        }
    }

    /// Executes an action of the state machine.
    ///
    /// # Errors
    /// The journal cannot be continued.
    async fn act(&mut self, action: Action) -> Result<(), String> {
        match action {
            Action::Send { stream, message } => {
                let Some(outbox) = self.streams.get(&stream) else { return Ok(()) };
                tracing::debug!(stream = stream.0, ?message, "send");
                if let Err(TrySendError::Full(_)) = outbox.try_send(Ok(message.into())) {
                    self.streams.remove(&stream);
                    let reason = "it does not read its messages".into();
                    self.events.push_back(Event::Closed { stream, reason });
                }
            }
            Action::Close { stream } => {
                self.streams.remove(&stream);
            }
            Action::Persist(record) => self.persist(&record).await?,
            Action::Commit(checkpoint) => self.commit(checkpoint),
            Action::Retain { in_use, up_to } => self.retain(in_use, up_to),
            Action::Answer { client, result } => {
                if let Some(reply) = self.clients.remove(&client) {
                    // The client may have gone.
                    let _ = reply.send(result);
                }
            }
            Action::Observe(observation) => {
                // The receiver of observations may have been dropped.
                let _ = self.observations.send(observation);
            }
            Action::Log(what) => tracing::info!("{what}"),
            Action::End(outcome) => {
                // Each stream ends after the messages queued on it.
                self.streams.clear();
                self.outcome = Some(outcome);
            }
        }
        Ok(())
    }
}

impl Shell {
    /// Appends to the journal.
    ///
    /// # Errors
    /// Why the journal cannot be continued.
    async fn persist(&mut self, record: &Record) -> Result<(), String> {
        tracing::debug!(?record, "journal");
        let bytes = record.encode().map_err(|e| format!("the journal's record cannot be written: {e}"))?;
        self.journal.append(bytes.into()).await.map_err(|error| journal_lost(&error))
    }

    /// Writes a manifest in the background.
    fn commit(&mut self, checkpoint: Checkpoint) {
        let run = self.run.clone();
        self.commits.spawn(async move {
            let iteration = checkpoint.iteration;
            let written = commit(&run, &manifest(checkpoint)).await;
            (iteration, written.map_err(|error| error.to_string()))
        });
    }

    /// Sweeps in the background, unless the last sweep is still under way: the next one finds the same objects.
    fn retain(&mut self, in_use: BTreeSet<u64>, up_to: u64) {
        while self.sweep.try_join_next().is_some() {}
        if !self.sweep.is_empty() {
            return;
        }
        let (run, policy) = (self.run.clone(), self.retention);
        self.sweep.spawn(async move {
            match run.sweep(policy, &in_use, up_to).await {
                Ok(swept) if swept == Swept::default() => {}
                Ok(Swept { checkpoints, orphans }) => {
                    tracing::info!(
                        ?checkpoints,
                        orphans,
                        "removed old checkpoints and orphaned objects"
                    );
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot remove old checkpoints; trying again after the next checkpoint")
                }
            }
        });
    }
}

/// Writes a manifest. If a checkpoint of this iteration exists it is kept, since every generation computes the same
/// state; a damaged one is set aside first.
async fn commit(run: &Run, manifest: &Manifest) -> Result<String, potstill_storage::Error> {
    let refused = match run.commit(manifest).await {
        Err(error @ potstill_storage::Error::AlreadyExists { .. }) => error,
        other => return other,
    };
    let key = layout::manifest_key(manifest.iteration);
    if !run.is_damaged(&key).await? {
        return Ok(key);
    }
    tracing::warn!(reason = %refused, "the existing checkpoint is damaged: it is set aside");
    run.set_aside(manifest.iteration).await?;
    run.commit(manifest).await
}

fn journal_lost(error: &potstill_storage::Error) -> String {
    match error {
        potstill_storage::Error::Fenced { .. } => error.to_string(),
        other => format!("the journal cannot be written: {other}"),
    }
}

/// A checkpoint in the form in which storage writes it.
fn manifest(checkpoint: Checkpoint) -> Manifest {
    let Checkpoint { generation, iteration, shards } = checkpoint;
    let shard = |s: potstill_proto::wire::ShardReceipt| Shard {
        rank: s.rank,
        key: s.key,
        bytes: s.bytes,
        sha256: s.sha256,
    };
    Manifest::new(iteration, generation.0, shards.into_iter().map(shard).collect())
}
