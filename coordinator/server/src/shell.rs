//! The one task that owns the state machine: it feeds it events and executes its actions, in order.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use potstill_core::{
    Action, ClientId, Core, Event, StreamId, Tick,
    observation::{Observation, Outcome},
    record::Record,
};
use potstill_proto::{
    message::ToWorker,
    wire::{CoordinatorMessage, coordinator_message::Kind},
};
use potstill_storage::{
    Run,
    coordinators::{Coordinator, Ended},
    journal::{Journal, Seen},
    layout,
    retention::{Policy, Swept},
};
use tokio::{
    sync::{
        mpsc::{self, error::TrySendError},
        oneshot,
    },
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};

use crate::{
    StartError,
    clock::Clock,
    opening::Opened,
    rendezvous::Rendezvous,
    service::{Arrival, Input, Outbox},
    storing,
};

/// How long the word in the storage that a run has ended may delay its end.
const LAST_WORD: Duration = Duration::from_secs(5);
/// How long the last sweep may delay the end of a run.
const LAST_SWEEP: Duration = Duration::from_secs(30);
/// Members in one answer about the status: so many fit into a message, however long their names are.
const MEMBERS_AT_ONCE: usize = 200;
/// A record of the journal that takes longer than this is mentioned in the status.
const SLOW: Duration = Duration::from_secs(2);
/// How often a coordinator checks that no other one has written to the journal, and that the journal is still there.
const WATCH: Duration = Duration::from_secs(10);

/// What ended a wait of the shell.
enum Happened {
    Persisted((Journal, Result<(), String>)),
    Seen(Seen),
    Arrival(Arrival),
    Input(Input),
    Event(Event),
    Nothing,
}

/// See the module's documentation.
pub struct Shell {
    core: Core,
    announced: Coordinator,
    /// The journal's length when it was announced.
    announced_at: u64,
    changed_specification: Option<String>,
    /// The address of the run's page.
    page: String,
    clock: Clock,
    run: Run,
    journal: Journal,
    streams: BTreeMap<StreamId, Outbox>,
    rendezvous: Rendezvous,
    /// Commits and verifications under way; the answers are events.
    commits: JoinSet<Event>,
    /// The record that is being written.
    persisting: JoinSet<(Journal, Result<(), String>)>,
    /// Since when: until its answer has been processed and not only received, when `persisting` is empty already.
    persisting_since: Option<Instant>,
    /// Actions that wait for it.
    pending: VecDeque<Action>,
    /// Events that wait for it, and when they happened.
    waiting: VecDeque<(Tick, Event)>,
    segments: JoinSet<Result<(), potstill_storage::Error>>,
    /// Since when the journal seems to be gone.
    gone_since: Option<Instant>,
    /// How long the storage may fail before the run ends.
    patience: Duration,
    /// The rule for checkpoints to keep, and the sweep under way.
    retention: Policy,
    sweep: JoinSet<()>,
    watch: JoinSet<Seen>,
    /// The clients that wait for a checkpoint.
    clients: BTreeMap<ClientId, oneshot::Sender<Result<u64, String>>>,
    next_client: u64,
    observations: mpsc::UnboundedSender<Observation>,
    outcome: Option<Outcome>,
    /// False once another coordinator may have taken it over.
    owns_the_run: bool,
}

impl Shell {
    /// A shell around an opened run.
    pub fn new(
        opened: Opened,
        page: String,
        clock: Clock,
        observations: mpsc::UnboundedSender<Observation>,
    ) -> Self {
        let Opened { setup, retention, changed_specification, run, journal, .. } = opened;
        let patience = Duration::from_millis(setup.terms.timeouts.wait_millis);
        let announced = Coordinator {
            name: setup.coordinator.clone(),
            address: setup.address.clone(),
            certificate: setup.certificate.clone(),
            ended: None,
        };
        Self {
            core: Core::new(setup),
            announced,
            announced_at: 0,
            changed_specification,
            page,
            clock,
            run,
            journal,
            streams: BTreeMap::new(),
            rendezvous: Rendezvous::default(),
            commits: JoinSet::new(),
            persisting: JoinSet::new(),
            persisting_since: None,
            pending: VecDeque::new(),
            waiting: VecDeque::new(),
            segments: JoinSet::new(),
            gone_since: None,
            patience,
            retention,
            sweep: JoinSet::new(),
            watch: JoinSet::new(),
            clients: BTreeMap::new(),
            next_client: 0,
            observations,
            outcome: None,
            owns_the_run: true,
        }
    }

    /// Says in the storage how the run has ended, for workers that the last message does not reach.
    async fn announce_end(&mut self, outcome: &Outcome) {
        if !self.owns_the_run {
            return;
        }
        let ToWorker::Stop { success, reason } = outcome.stop_message() else { return };
        self.announced.ended = Some(Ended { success, reason });
        let written = self.run.announce_end(self.announced_at, &self.announced);
        match tokio::time::timeout(LAST_WORD, written).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the storage does not say that the run has ended"),
            Err(_) => tracing::warn!("the storage does not say that the run has ended: it does not answer"),
        }
    }

    /// Writes this coordinator's first record into the journal, which shows whether it owns the run.
    pub async fn start(&mut self) -> Result<(), StartError> {
        // A start that fails is repeated by those who started it.
        let patience = std::mem::take(&mut self.patience);
        self.step(self.clock.now(), Event::Started);
        while let Some(Ok(persisted)) = self.persisting.join_next().await {
            self.persisted(persisted);
        }
        self.patience = patience;
        if let Some(Outcome::Failed { reason }) = self.outcome.take() {
            return Err(StartError::Journal(reason));
        }
        self.run.announce(&self.journal, &self.announced).await?;
        self.announced_at = self.journal.length();
        if let Some(text) = self.changed_specification.take() {
            self.run.put(layout::SPECIFICATION, text.into()).await?;
        }
        Ok(())
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
                self.announce_end(&outcome).await;
                // Objects that this sweep leaves are found by the next one, if there is one.
                let _ = tokio::time::timeout(LAST_SWEEP, self.sweep.join_next()).await;
                return outcome;
            }
            // What has happened while a record is written comes before any deadline.
            let idle = self.is_idle();
            let deadline = self.core.next_deadline().filter(|_| idle).map(|tick| self.clock.instant(tick));
            let timer = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            let happened = tokio::select! {
                biased;
                Some(input) = controls.recv() => Happened::Input(input),
                Some(Ok(persisted)) = self.persisting.join_next() => Happened::Persisted(persisted),
                Some(Ok(answer)) = self.commits.join_next() => Happened::Event(answer),
                Some(Ok(result)) = self.segments.join_next() => {
                    if let Err(error) = result {
                        tracing::warn!(%error, "a segment of the journal could not be written");
                    }
                    Happened::Nothing
                }
                Some(arrival) = inbox.recv() => Happened::Arrival(arrival),
                Some(Ok(seen)) = self.watch.join_next() => Happened::Seen(seen),
                // What it would see while a record is being written may be that record.
                _ = looks.tick(), if self.watch.is_empty() && idle => {
                    self.watch.spawn(self.journal.watch());
                    Happened::Nothing
                }
                () = timer => Happened::Event(Event::Timer),
            };
            if let Happened::Arrival(arrival) = happened {
                self.arrived(arrival);
                continue;
            }
            // Messages that have arrived are processed before the clock: a worker is not dead while its message waits
            // here, be it behind a journal write that took long.
            for _ in 0..inbox.len() {
                if let Ok(arrival) = inbox.try_recv() {
                    self.arrived(arrival);
                }
            }
            if let Some(time) = self.clock.deafness() {
                let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
                self.step(self.clock.now(), Event::Deaf { millis });
            }
            match happened {
                Happened::Persisted(persisted) => self.persisted(persisted),
                // The state of the journal before the record that is now being written.
                Happened::Seen(_) if !self.is_idle() => {}
                Happened::Seen(seen) => match self.journal.watched(seen) {
                    Ok(()) => self.gone_since = None,
                    Err(error @ potstill_storage::Error::Vanished { .. }) => self.journal_gone(&error),
                    Err(error) => self.lose_journal(error.to_string()),
                },
                Happened::Input(input) => self.arrived(Arrival { at: self.clock.now(), input }),
                Happened::Event(event) => self.step(self.clock.now(), event),
                Happened::Arrival(_) | Happened::Nothing => {}
            }
        }
    }

    fn arrived(&mut self, Arrival { at, input }: Arrival) {
        match input {
            Input::Attached { stream, hello, outbox } => {
                self.streams.insert(stream, outbox);
                self.step(at, Event::Attached { stream, hello });
            }
            Input::Received { stream, message } => self.step(at, Event::Received { stream, message }),
            Input::Store { stream, request } => {
                for (stream, reply) in self.rendezvous.ask(stream, request) {
                    let reply = CoordinatorMessage { kind: Some(Kind::StoreReply(reply)) };
                    self.send(stream, reply);
                }
                self.proceed();
            }
            Input::Closed { stream, reason, status } => {
                self.rendezvous.leave(stream);
                if let (Some(outbox), Some(status)) = (self.streams.remove(&stream), status) {
                    // Where the queue is full the worker does not read it, so the reason would not be read either.
                    let _ = outbox.try_send(Err(status));
                }
                self.step(at, Event::Closed { stream, reason });
            }
            Input::Status { first_member, reply } => {
                let mut status = self.core.status();
                let members = status.members.into_iter().skip(first_member as usize);
                status.members = members.take(MEMBERS_AT_ONCE).collect();
                status.page.clone_from(&self.page);
                if let Some(since) = self.persisting_since.filter(|since| since.elapsed() >= SLOW) {
                    let waits = format!(
                        "waiting for the storage to write the journal, for {:.0} s",
                        since.elapsed().as_secs_f64()
                    );
                    status.reason =
                        if status.reason.is_empty() { waits } else { format!("{}; {waits}", status.reason) };
                }
                // The client may have gone.
                let _ = reply.send(status);
            }
            Input::Checkpoint(reply) => {
                let client = ClientId(self.next_client);
                self.next_client += 1;
                self.clients.insert(client, reply);
                self.step(at, Event::CheckpointRequested { client });
            }
            Input::Stop { reason } => self.step(at, Event::StopRequested { reason }),
            Input::Fail { reason } => self.step(at, Event::WorkersUnavailable { reason }),
        }
    }

    /// Whether no record is being written: only then is `journal` positioned after the newest one.
    fn is_idle(&self) -> bool {
        self.persisting_since.is_none()
    }

    /// An event for the state machine. It waits while a record is being written: what the state machine decides next rests on
    /// that record.
    fn step(&mut self, at: Tick, event: Event) {
        self.waiting.push_back((at, event));
        self.proceed();
    }

    /// Executes actions in their order, up to one that waits for the journal, and feeds the events that wait to the state
    /// machine, at the times at which they happened.
    fn proceed(&mut self) {
        while self.is_idle() {
            if let Some(action) = self.pending.pop_front() {
                if let Err(reason) = self.act(action) {
                    self.lose_journal(reason);
                }
            } else if let Some((at, event)) = self.waiting.pop_front() {
                let mut actions = Vec::new();
                self.core.step(at, event, &mut actions);
                self.pending.extend(actions);
            } else {
                return;
            }
        }
    }

    /// Executes an action of the state machine.
    ///
    /// # Errors
    /// The journal cannot be continued.
    fn act(&mut self, action: Action) -> Result<(), String> {
        match action {
            Action::Send { stream, message } => {
                tracing::debug!(stream = stream.0, ?message, "send");
                if let ToWorker::Assignment(assignment) = &message {
                    self.rendezvous.admit(stream, assignment.generation);
                }
                self.send(stream, message.into());
            }
            Action::Close { stream } => {
                self.rendezvous.leave(stream);
                self.streams.remove(&stream);
            }
            Action::Persist(record) => self.persist(&record)?,
            Action::Commit(checkpoint) => {
                let (run, patience) = (self.run.clone(), self.patience);
                self.commits.spawn(async move {
                    let iteration = checkpoint.iteration;
                    let result = storing::commit(run, checkpoint, patience).await;
                    Event::CommitAnswered { iteration, result }
                });
            }
            Action::Verify { manifest_key } => {
                let (run, patience) = (self.run.clone(), self.patience);
                self.commits.spawn(async move {
                    let result = storing::verify(run, manifest_key.clone(), patience).await;
                    Event::Verified { manifest_key, result }
                });
            }
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
    /// Queues a message for a worker, if its stream is there. A worker that does not read its messages is lost.
    fn send(&mut self, stream: StreamId, message: CoordinatorMessage) {
        let Some(outbox) = self.streams.get(&stream) else { return };
        if let Err(TrySendError::Full(_)) = outbox.try_send(Ok(message)) {
            self.streams.remove(&stream);
            self.rendezvous.leave(stream);
            let reason = "it does not read its messages".into();
            self.waiting.push_front((self.clock.now(), Event::Closed { stream, reason }));
        }
    }

    /// Appends to the journal in the background; the actions that follow wait for it.
    fn persist(&mut self, record: &Record) -> Result<(), String> {
        tracing::debug!(?record, "journal");
        let bytes = record.encode().map_err(|e| format!("the journal's record cannot be written: {e}"))?;
        self.persisting.spawn(storing::append(self.journal.clone(), bytes.into(), self.patience));
        self.persisting_since = Some(Instant::now());
        Ok(())
    }

    /// The journal has been written, or cannot be.
    fn persisted(&mut self, (journal, result): (Journal, Result<(), String>)) {
        (self.journal, self.persisting_since) = (journal, None);
        match result {
            Ok(()) => {
                if self.segments.is_empty()
                    && let Some(segment) = self.journal.segment()
                {
                    self.segments.spawn(segment);
                }
                self.proceed();
            }
            Err(reason) => self.lose_journal(reason),
        }
    }

    /// No action after a record may be executed before the record is durable: those that wait never are.
    fn lose_journal(&mut self, reason: String) {
        self.owns_the_run = false;
        self.pending.clear();
        self.waiting.clear();
        self.step(self.clock.now(), Event::JournalLost { reason });
    }

    /// The journal seems to have been removed, or its file system is gone. It may come back.
    fn journal_gone(&mut self, error: &potstill_storage::Error) {
        let since = *self.gone_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= self.patience {
            return self.lose_journal(error.to_string());
        }
        let left = (self.patience - since.elapsed()).as_secs();
        tracing::error!(%error, "training goes on, nothing can be saved; the run ends in {left} s unless it comes back");
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

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use potstill_spec::RunSpec;
    use potstill_storage::Root;

    use super::*;
    use crate::{Options, Resume, Security, opening};

    /// A shell of a new run, before its first record.
    async fn shell() -> (Shell, Run, tempfile::TempDir) {
        let folder = tempfile::tempdir().expect("a folder");
        let weights = folder.path().join("teacher.safetensors");
        std::fs::write(&weights, b"weights").expect("a file");
        let mut spec = RunSpec::default();
        spec.teacher.weights = Some(weights);
        let storage = Root::open("memory://").expect("a storage");
        let run_id = "one".parse().expect("a name");
        let options = Options {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            spec,
            run_id,
            storage,
            resume: Resume::Never,
            from_teacher: false,
            security: Security::Insecure,
            page: String::new(),
            ranks_may_live: true,
        };
        let opened = opening::open(options, "127.0.0.1:1", None).await.expect("a new run");
        let run = opened.run.clone();
        let (observe, _) = mpsc::unbounded_channel();
        (Shell::new(opened, String::new(), Clock::start(Duration::from_secs(1)), observe), run, folder)
    }

    /// A message that is processed after the answer of the journal has been received and before it has been processed must not
    /// have the next record written over this one: the coordinator would take itself for another.
    #[tokio::test]
    async fn what_arrives_with_the_journals_answer_waits_for_it() {
        let (mut shell, run, _folder) = shell().await;
        shell.step(shell.clock.now(), Event::Started);
        let answer =
            shell.persisting.join_next().await.expect("a record is being written").expect("no panic");
        shell.arrived(Arrival { at: shell.clock.now(), input: Input::Stop { reason: "asked".to_owned() } });
        shell.persisted(answer);
        while let Some(answer) = shell.persisting.join_next().await {
            shell.persisted(answer.expect("no panic"));
        }
        assert_eq!(Journal::open(&run).await.expect("a journal").1.len(), 2);
        assert!(!matches!(&shell.outcome, Some(Outcome::Failed { reason }) if reason.contains("taken over")));
    }
}
