//! The life of a run: gathering workers, training in generations, ending.

mod attach;
mod ending;
mod generations;
mod hangs;
mod messages;
mod newcomers;
mod reattaching;
mod slow;
mod status;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use potstill_proto::{
    cursor::{Cursor, Generation},
    message::{ToWorker, WorkerId},
};

use crate::{
    Action, ClientId, Event, StreamId, Tick,
    assignment::Start,
    ledger::{CommittedCheckpoint, Ledger},
    membership::Members,
    observation::Outcome,
    record::Record,
    steps::Steps,
    stragglers::Stragglers,
    terms::Terms,
};

/// The run fails when this number of generations in a row have failed before they finished an iteration, for as long as it
/// would wait for workers.
const FAILED_STARTS: u32 = 8;
/// While the run waits for workers, one that loads counts as coming, until this number of them were lost while they loaded.
const FAILED_LOADS: u32 = 8;

/// What a coordinator knows of its run when it starts.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Name of this coordinator, different for every coordinator: the journal tells two writers apart by it.
    pub coordinator: String,
    /// Address at which it can be reached.
    pub address: String,
    /// SHA-256 of its TLS certificate; none where it serves without TLS.
    pub certificate: Option<String>,
    /// The run's name.
    pub run_id: String,
    /// The part of its specification that the coordinator needs.
    pub terms: Terms,
    /// Its whole specification as TOML, for the workers.
    pub specification: String,
    /// Root of the object storage, for the workers.
    pub storage_url: String,
    /// The records of its journal so far.
    pub history: Vec<Record>,
    /// The complete checkpoints in storage, oldest first.
    pub checkpoints: Vec<CommittedCheckpoint>,
    /// Whether ranks of an earlier coordinator may still be at work; false where they end with their coordinator.
    pub ranks_may_live: bool,
    /// Whether the run may start from the teacher although it has had a checkpoint.
    pub from_teacher: bool,
}

/// The coordinator's state machine; see the crate's documentation.
#[derive(Debug)]
pub struct Core {
    coordinator: String,
    address: String,
    certificate: Option<String>,
    run_id: String,
    specification: String,
    storage_url: String,
    terms: Terms,
    /// Whether this run has a journal from an earlier coordinator.
    resumed: bool,
    /// Whether the teacher has still to be scored.
    evaluate_teacher: bool,
    /// Of the teacher, once it was scored.
    teacher_diversity: Option<f64>,
    /// The iteration after which the state that the run now has was scored last.
    evaluated: Option<u64>,
    /// [`Evaluation::order`](crate::record::Evaluation::order) of the newest evaluation in the journal.
    scored: Option<(Generation, u64, bool)>,

    now: Tick,
    members: Members,
    /// The newest generation, whether it is live or over.
    generation: Generation,
    /// Where it started.
    start: Start,
    /// Members of the newest generation by rank.
    named: Vec<WorkerId>,
    /// The workers that have ever had a place: no other one holds a state of this run.
    placed: BTreeSet<WorkerId>,
    /// The newest generation whose ranks found that a slice of its state is gone: what is left of this state, and of those of
    /// older generations, is of no use.
    incomplete: Generation,
    /// Whether they have been waited for once already.
    awaited: bool,
    /// Whether the run may start from the teacher.
    from_teacher: bool,
    /// Checkpoints that some workers could not read, and these workers: they are being verified.
    doubted: BTreeMap<String, BTreeSet<StreamId>>,
    /// The worker without which the newest generation was tried.
    left_out: Option<StreamId>,
    /// Why the newest worker that failed before it had a place was sent away.
    sent_away: Option<String>,
    /// Why ranks of it that are lost may be alive.
    unsure: Option<String>,
    /// Generations in a row that ended in a failed collective before they finished an iteration, and since when.
    failed_starts: u32,
    failing_since: Tick,
    /// What ranks were doing when they hung, and how often, and the number of finished iterations at that time.
    hangs: (u64, BTreeMap<String, u32>),
    /// Generations that were opened after the last checkpoint was committed.
    closing: u32,
    stage: Stage,
    steps: Steps,
    stragglers: Stragglers,
    /// Iterations that were computed again, over the whole run.
    repeated: u64,
    ledger: Ledger,
    /// Failed checkpoints since the last one that was committed.
    failures: u32,
    /// Clients that wait for a checkpoint.
    clients: BTreeSet<ClientId>,
    /// Why the run is to stop, once a stop was requested.
    stop: Option<String>,
}

#[derive(Debug)]
enum Stage {
    /// An earlier coordinator's generation may be live: its ranks are awaited.
    Reattaching(Reattaching),
    /// No generation is live: workers are too few, or more may come.
    Gathering(Gathering),
    /// A generation was abandoned; its survivors report their cursors.
    Settling(Settling),
    /// A generation is live.
    Training(Training),
    /// The run is over.
    Ended(Outcome),
}

#[derive(Debug)]
struct Reattaching {
    /// Members by rank, from the journal.
    expected: Vec<WorkerId>,
    /// Those that are here, by rank.
    here: BTreeMap<u32, StreamId>,
    /// Those of them that have left the generation's group.
    left: BTreeSet<StreamId>,
    /// Ranks that have nothing left to compute, and where they stand.
    finished: BTreeMap<u32, Cursor>,
    since: Tick,
}

#[derive(Debug)]
struct Gathering {
    /// Since when workers are too few.
    short_since: Tick,
    /// Workers lost since then, while they loaded what the run reads.
    failed_loads: u32,
    /// Since when there are enough to start with.
    enough_since: Option<Tick>,
    /// Whether to wait a while for more than `min_workers`: only before the first generation.
    patient: bool,
    /// No generation is opened before this: the last ones failed.
    not_before: Tick,
    /// Why there is no generation.
    reason: String,
}

impl Gathering {
    /// Workers are awaited since `now`.
    fn since(now: Tick, reason: String) -> Self {
        Self {
            short_since: now,
            failed_loads: 0,
            enough_since: None,
            patient: false,
            not_before: now,
            reason,
        }
    }
}

#[derive(Debug)]
struct Settling {
    /// Survivors that have not yet reported their cursors.
    awaiting: BTreeSet<StreamId>,
    /// Survivors known to hold what the generation had reached, or more.
    holders: BTreeSet<StreamId>,
    /// How the generation ended.
    cause: Cause,
    since: Tick,
    reason: String,
}

/// How a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Cause {
    /// A collective failed for a reason not yet known: a death may still be noticed.
    Unexplained,
    /// No rank makes progress, and all wait for each other.
    Stuck,
    /// Its ranks found that a slice of its state is gone: all of them are about to say so.
    Incomplete,
    /// It is known which worker died or makes no progress.
    Known,
    /// Its ranks agreed to yield at a boundary.
    Agreed,
    /// They agreed to yield after saving a checkpoint.
    AgreedAndSaving,
}

#[derive(Debug)]
struct Training {
    /// Members by rank.
    ranks: Vec<StreamId>,
    /// Ranks that have nothing left to compute, and their cursors.
    finished: BTreeMap<u32, Cursor>,
    /// How and why its ranks were asked to yield at the next boundary.
    yielding: Option<(Cause, String)>,
    /// When to look next for ranks that make no progress.
    look: Tick,
}

impl Training {
    fn all_finished(&self) -> bool {
        self.finished.len() == self.ranks.len()
    }
}

type Actions = Vec<Action>;

fn send(actions: &mut Actions, stream: StreamId, message: ToWorker) {
    actions.push(Action::Send { stream, message });
}

fn log(actions: &mut Actions, what: String) {
    actions.push(Action::Log(what));
}

fn seconds(millis: u64) -> f64 {
    millis as f64 / 1000.0
}

impl Core {
    /// The state machine of a run without attached workers. Its first event must be [`Event::Started`].
    #[must_use]
    pub fn new(setup: Setup) -> Self {
        let Setup {
            coordinator,
            address,
            certificate,
            run_id,
            terms,
            specification,
            storage_url,
            history,
            checkpoints,
            ranks_may_live,
            from_teacher,
        } = setup;
        let timeouts = terms.timeouts;
        let teacher_diversity = history.iter().rev().find_map(|record| match record {
            Record::Evaluated(evaluation) if evaluation.of_teacher => evaluation.scores.diversity,
            _ => None,
        });
        let mut generation = Generation::default();
        let mut repeated = 0;
        let was_saved = history.iter().any(|record| matches!(record, Record::Committed { .. }));
        let mut placed = BTreeSet::new();
        for record in &history {
            if let Record::GenerationOpened { generation: opened, members, repeats, .. } = record {
                generation = *opened;
                repeated += repeats;
                placed.extend(members.iter().cloned().map(WorkerId));
            }
        }
        let saved = checkpoints.last().map_or(0, |checkpoint| checkpoint.iteration);
        let start = Start { cursor: Cursor::boundary(saved), exact: true };
        let mut core = Self {
            coordinator,
            address,
            certificate,
            run_id,
            specification,
            storage_url,
            resumed: !history.is_empty(),
            evaluate_teacher: teacher_diversity.is_none() && terms.scored,
            teacher_diversity,
            evaluated: None,
            scored: history.iter().rev().find_map(|record| match record {
                Record::Evaluated(evaluation) => Some(evaluation.order()),
                _ => None,
            }),
            now: Tick::default(),
            members: Members::new(timeouts),
            generation,
            start,
            named: Vec::new(),
            placed,
            incomplete: Generation::default(),
            awaited: false,
            from_teacher: from_teacher || !(was_saved || saved > 0),
            doubted: BTreeMap::new(),
            left_out: None,
            sent_away: None,
            unsure: None,
            failed_starts: 0,
            failing_since: Tick::default(),
            hangs: (0, BTreeMap::new()),
            closing: 0,
            stage: Stage::Gathering(Gathering {
                patient: true,
                ..Gathering::since(Tick::default(), "the run starts".into())
            }),
            steps: Steps::new(terms.micro_batches, terms.micro_batch, start),
            stragglers: Stragglers::new(terms.straggler_factor),
            terms,
            repeated,
            ledger: Ledger::new(checkpoints),
            failures: 0,
            clients: BTreeSet::new(),
            stop: None,
        };
        if ranks_may_live {
            core.await_generation(&history);
        }
        core
    }

    /// Processes an event and appends the actions to take. `now` must not run backwards.
    pub fn step(&mut self, now: Tick, event: Event, actions: &mut Actions) {
        self.now = self.now.max(now);
        match event {
            Event::Started => self.started(actions),
            Event::Attached { stream, hello } => self.attached(stream, hello, actions),
            Event::Received { stream, message } => self.received(stream, message, actions),
            Event::Closed { stream, reason } => self.lost(stream, &reason, actions),
            Event::Timer => {}
            Event::Deaf { millis } => {
                let reason =
                    format!("the coordinator was stopped or got no CPU for {:.1} s", seconds(millis));
                log(actions, format!("{reason}; this time does not count"));
                self.unsure = Some(reason);
            }
            Event::CommitAnswered { iteration, result } => self.commit_answered(iteration, result, actions),
            Event::Verified { manifest_key, result } => self.verified(&manifest_key, result, actions),
            Event::CheckpointRequested { client } => self.checkpoint_requested(client, actions),
            Event::StopRequested { reason } => self.stop_requested(reason, actions),
            Event::WorkersUnavailable { reason } => {
                let cause = self.sent_away.take().unwrap_or(reason);
                self.fail(cause, actions);
            }
            Event::JournalLost { reason } => self.journal_lost(reason, actions),
        }
        self.advance(actions);
    }

    /// When [`Event::Timer`] is due, unless another event comes first.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Tick> {
        let stage = match &self.stage {
            Stage::Ended(_) => return None,
            Stage::Training(training) => Some(training.look),
            Stage::Reattaching(reattaching) => Some(self.reattached_by(reattaching)),
            // It waits for an event then.
            Stage::Settling(_) if self.awaits_storage() => None,
            Stage::Settling(settling) => Some(self.settled_by(settling)),
            Stage::Gathering(gathering @ Gathering { enough_since: Some(since), .. }) => {
                let patient = gathering.patient && self.members.count() < self.terms.max_workers;
                let due = if patient { since.after(self.terms.timeouts.dead_millis) } else { *since };
                Some(due.max(gathering.not_before))
            }
            Stage::Gathering(gathering) => Some(self.gathered_by(gathering)),
        };
        [stage, self.members.next_deadline()].into_iter().flatten().min()
    }
}

#[cfg(test)]
pub(crate) mod fixtures {
    //! Workers for tests.

    use potstill_proto::{
        PROTOCOL,
        message::{Hello, WorkerId},
    };

    /// The hello of a fresh worker.
    pub fn hello(id: &str) -> Hello {
        Hello {
            protocol: PROTOCOL,
            worker: WorkerId(id.into()),
            run_id: "run".into(),
            host: "host".into(),
            pid: 7,
            device: "cpu".into(),
            held: None,
            place: None,
        }
    }
}
