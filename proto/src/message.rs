//! The stream's messages as types that cannot be incomplete, and their wire form.
//!
//! Reports that the coordinator only records ([`wire::StepReport`]) keep their wire type: all their fields are plain
//! data.

use std::{fmt, num::NonZeroU32};

use serde::{Deserialize, Serialize};

use crate::{
    cursor::{Cursor, Generation, Phase},
    micro_batches::MicroBatches,
    scores::Evaluation,
    wire,
};

/// A message that lacks a required field or has an invalid one. The sender uses another protocol: its stream is closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed {message}: {problem}")]
pub struct Malformed {
    /// The kind of message.
    pub message: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

/// Bytes of the longest key of an object, of the longest other name, and characters of the longest texts that are kept whole.
const KEY: usize = 1024;
const NAME: usize = 255;
const PROSE: usize = 8192;
const PHRASE: usize = 200;

/// A name from outside, such as an id or a host.
fn name(message: &'static str, field: &str, value: String) -> Result<String, Malformed> {
    bounded(message, field, value, NAME)
}

/// An object's key from outside.
fn key(message: &'static str, field: &str, value: String) -> Result<String, Malformed> {
    bounded(message, field, value, KEY)
}

fn bounded(message: &'static str, field: &str, value: String, most: usize) -> Result<String, Malformed> {
    if value.len() > most {
        return malformed(message, format!("{field} has {} bytes; {most} are accepted", value.len()));
    }
    match value.chars().find(|c| c.is_control()) {
        Some(found) => malformed(message, format!("{field} has the character {}", found.escape_default())),
        None => Ok(value),
    }
}

/// A text from outside, for logs, terminals and pages: without control characters, of bounded length.
#[must_use]
pub fn prose(value: &str) -> String {
    shown(value, PROSE)
}

fn shown(value: &str, most: usize) -> String {
    let mut kept = String::new();
    for (count, c) in value.chars().enumerate() {
        if count == most {
            kept.push('…');
            break;
        }
        match c.is_control() || is_invisible(c) {
            true => kept.extend(c.escape_default()),
            false => kept.push(c),
        }
    }
    kept
}

/// Characters that change how the text around them is shown: those of bidirectional text, and line separators.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn malformed<T>(message: &'static str, problem: impl Into<String>) -> Result<T, Malformed> {
    Err(Malformed { message, problem: problem.into() })
}

/// The id of a worker process, different for every process: a restarted rank is a new worker.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub String);

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The first message of a stream: which worker attaches, and which state it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Protocol version; see [`crate::PROTOCOL`].
    pub protocol: u32,
    /// Its id.
    pub worker: WorkerId,
    /// The run it was started for.
    pub run_id: String,
    /// Its host.
    pub host: String,
    /// Its process id there.
    pub pid: u32,
    /// `cpu` or `cuda:<index>`.
    pub device: String,
    /// The cursor of the state that it holds completely; `None` for a fresh process.
    pub held: Option<Cursor>,
    /// Its newest place; `None` for a fresh process. It may have left that generation since.
    pub place: Option<Place>,
}

/// A worker's rank in a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The generation.
    pub generation: Generation,
    /// Its rank in that generation.
    pub rank: u32,
}

/// A worker's messages after its hello.
#[derive(Clone, Debug, PartialEq)]
pub enum FromWorker {
    /// It is alive, and its state is at this cursor.
    Heartbeat {
        /// Its generation.
        generation: Generation,
        /// The cursor of its state.
        cursor: Cursor,
        /// Its count of completed units of work, such as micro-batches.
        progress: u64,
        /// What it is doing, as text.
        activity: String,
        /// It waits for its peers in a collective.
        waiting: bool,
    },
    /// It has loaded what the run reads and can be given a place.
    Ready,
    /// One finished iteration of one rank.
    StepReport(wire::StepReport),
    /// Metrics of the teacher or of the student, from rank 0.
    Evaluation(Evaluation),
    /// Its shard of a checkpoint is durable.
    ShardReceipt(wire::ShardReceipt),
    /// Its shard of a checkpoint could not be written.
    ShardFailed(wire::ShardFailed),
    /// It left the group after a failed collective and waits.
    CollectiveFailed {
        /// The generation whose collective failed.
        generation: Generation,
        /// The cursor of the state that it kept.
        cursor: Cursor,
        /// Operation, rank and cause.
        error: String,
    },
    /// It left the group at a boundary, as agreed, and waits.
    Yielded {
        /// The generation it left.
        generation: Generation,
        /// The cursor of the state that it kept.
        cursor: Cursor,
    },
    /// It must leave its machine: it asks to save and leave at the next boundary.
    Leaving {
        /// Why, as text.
        reason: String,
    },
    /// The checkpoint that its assignment names cannot be read: it left the group and holds no state.
    CheckpointDamaged {
        /// The generation it left.
        generation: Generation,
        /// Key of the checkpoint's manifest.
        manifest_key: String,
        /// Which object, and what is wrong with it.
        error: String,
    },
    /// The ranks hold states in slices, and cannot put together what the assignment expects: the worker left the group.
    StateIncomplete {
        /// The generation it left.
        generation: Generation,
        /// The earlier state that the ranks can put together and that it holds slices of; the start of the run: none.
        cursor: Cursor,
        /// What is missing.
        error: String,
    },
    /// It has nothing left to compute.
    Finished {
        /// Its generation.
        generation: Generation,
        /// The cursor of its state.
        cursor: Cursor,
    },
    /// It cannot continue, and no other worker could.
    Failed {
        /// Its generation; 0 before any assignment.
        generation: Generation,
        /// The error: what failed, where, and what to do about it.
        error: String,
    },
}

/// Where the state of a generation comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "kebab-case")]
pub enum Source {
    /// From the teacher: iteration 0.
    Fresh,
    /// From the checkpoint whose manifest has this key below the run's folder.
    Checkpoint {
        /// Object key of the manifest.
        manifest_key: String,
    },
    /// From the rank that is furthest: it broadcasts its state to the others.
    Peer {
        /// Its rank.
        rank: u32,
    },
}

/// A worker's place in a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// The generation.
    pub generation: Generation,
    /// Its rank in it.
    pub rank: u32,
    /// The number of ranks.
    pub world_size: u32,
    /// Its micro-batches of every iteration.
    pub micro_batches: MicroBatches,
    /// Where the state comes from.
    pub source: Source,
    /// Whether this generation scores the teacher before it trains.
    pub evaluate_teacher: bool,
    /// What exists already.
    pub existing: Existing,
    /// The state from peers is at least as far as this.
    pub start: Cursor,
    /// The ranks that it shares slices of the state with, where each rank holds a slice and there is more than one.
    pub partners: Option<Partners>,
    /// Its place in the groups of ranks that each hold all slices of the state, where there are several. Then it has no
    /// partners.
    pub replica: Option<Replica>,
}

/// A place in one of several groups of ranks that each hold all slices of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replica {
    /// The number of the group, from 0.
    pub number: u32,
    /// The slice that the rank holds, from 0.
    pub slice: u32,
    /// The number of slices: that of the ranks of each group.
    pub slices: u32,
}

impl Replica {
    /// How many groups of equal size, of at least `smallest`, this many ranks form at most.
    #[must_use]
    pub fn count(ranks: u32, smallest: NonZeroU32) -> u32 {
        (1..=ranks / smallest).rev().find(|groups| ranks.is_multiple_of(*groups)).unwrap_or(1)
    }

    /// Whether a rank of this many can have this place.
    fn fits(self, world_size: u32) -> bool {
        let Self { number, slice, slices } = self;
        slice < slices
            && world_size.is_multiple_of(slices)
            && number < world_size / slices
            && slices < world_size
    }
}

/// Each slice of a state has two holders: the rank that owns it, and a partner that makes the same steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partners {
    /// The rank whose slice this rank holds beside its own.
    pub copies: u32,
    /// The rank that holds this rank's slice beside its own.
    pub copied_by: u32,
}

/// What a generation does not make again where it starts there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Existing {
    /// The iteration after which the student was scored last.
    pub evaluated: Option<u64>,
    /// The iteration of the newest checkpoint.
    pub saved: Option<u64>,
}

/// The coordinator's request to a whole generation, on whose execution its ranks agree over the control lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Save a checkpoint at the next boundary and continue.
    Checkpoint,
    /// Save a checkpoint at the next boundary and finish.
    CheckpointAndStop,
    /// Leave the group at the next boundary and wait for an assignment.
    Yield,
    /// Save a checkpoint at the next boundary, then leave the group and wait for an assignment.
    CheckpointAndYield,
}

/// The coordinator's messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToWorker {
    /// Answers the hello.
    Welcome {
        /// The run's id.
        run_id: String,
        /// The frozen specification, TOML.
        specification: String,
        /// Root of the object storage.
        storage_url: String,
        /// Time between two heartbeats.
        heartbeat_millis: u64,
        /// How long the ranks of a generation may take to meet.
        joining_timeout_millis: u64,
        /// How long to continue without a coordinator.
        patience_millis: u64,
        /// The coordinator's name, which its storage holds too.
        coordinator: String,
    },
    /// A place in a generation.
    Assignment(Assignment),
    /// Leave this generation's group, keep the state, and wait for an assignment.
    Abandon {
        /// The generation.
        generation: Generation,
        /// Why, as text.
        reason: String,
    },
    /// A checkpoint is committed.
    Committed {
        /// Its iteration.
        iteration: u64,
    },
    /// Raise a flag on the control lane, so that all ranks act at the same boundary.
    Request {
        /// The generation that is asked.
        generation: Generation,
        /// The request.
        what: Request,
    },
    /// The run is over for this worker.
    Stop {
        /// Whether the run has succeeded, or has saved when it was asked to stop.
        success: bool,
        /// Why.
        reason: String,
    },
    /// The hello was not accepted.
    Refused {
        /// Why.
        reason: String,
    },
    /// The worker hangs: its process must end at once, and its agent starts another.
    Restart {
        /// For how long it has made no progress, what it was doing, and its cursor.
        reason: String,
    },
}

// ------------------------------------------------------------------------------------------------ cursor

impl From<Cursor> for wire::Cursor {
    fn from(cursor: Cursor) -> Self {
        let phase = match cursor.phase {
            Phase::FakeScore => wire::Phase::FakeScore,
            Phase::Generator => wire::Phase::Generator,
        };
        Self { iteration: cursor.iteration, phase: phase.into() }
    }
}

impl TryFrom<wire::Cursor> for Cursor {
    type Error = Malformed;

    fn try_from(cursor: wire::Cursor) -> Result<Self, Malformed> {
        let phase = match wire::Phase::try_from(cursor.phase) {
            Ok(wire::Phase::FakeScore) => Phase::FakeScore,
            Ok(wire::Phase::Generator) => Phase::Generator,
            Ok(wire::Phase::Unspecified) | Err(_) => {
                return malformed("Cursor", format!("unknown phase {}", cursor.phase));
            }
        };
        Ok(Self { iteration: cursor.iteration, phase })
    }
}

fn cursor(message: &'static str, cursor: Option<wire::Cursor>) -> Result<Cursor, Malformed> {
    match cursor {
        Some(cursor) => cursor.try_into(),
        None => malformed(message, "no cursor"),
    }
}

// ------------------------------------------------------------------------------------------------ worker → coordinator

impl From<Hello> for wire::WorkerMessage {
    fn from(hello: Hello) -> Self {
        wire::WorkerMessage {
            kind: Some(wire::worker_message::Kind::Hello(wire::Hello {
                protocol: hello.protocol,
                worker_id: hello.worker.0,
                run_id: hello.run_id,
                host: hello.host,
                pid: hello.pid,
                device: hello.device,
                held: hello.held.map(Into::into),
                place: hello.place.map(|p| wire::Place { generation: p.generation.0, rank: p.rank }),
                worker_secret: Vec::new(),
            })),
        }
    }
}

/// A hello with the secret that proves its worker's id.
#[must_use]
pub fn proven(hello: Hello, secret: &[u8]) -> wire::WorkerMessage {
    let mut message = wire::WorkerMessage::from(hello);
    if let Some(wire::worker_message::Kind::Hello(hello)) = &mut message.kind {
        hello.worker_secret = secret.to_vec();
    }
    message
}

/// The secret in a hello; empty in any other message.
#[must_use]
pub fn secret(message: &wire::WorkerMessage) -> &[u8] {
    match &message.kind {
        Some(wire::worker_message::Kind::Hello(hello)) => &hello.worker_secret,
        _ => &[],
    }
}

impl TryFrom<wire::WorkerMessage> for Hello {
    type Error = Malformed;

    fn try_from(message: wire::WorkerMessage) -> Result<Self, Malformed> {
        let Some(wire::worker_message::Kind::Hello(hello)) = message.kind else {
            return malformed("stream", "its first message is not a Hello");
        };
        if hello.worker_id.is_empty() {
            return malformed("Hello", "worker_id must not be empty");
        }
        let held = match hello.held {
            None => None,
            held => Some(cursor("Hello", held)?),
        };
        Ok(Self {
            protocol: hello.protocol,
            worker: WorkerId(name("Hello", "worker_id", hello.worker_id)?),
            run_id: name("Hello", "run_id", hello.run_id)?,
            host: name("Hello", "host", hello.host)?,
            pid: hello.pid,
            device: name("Hello", "device", hello.device)?,
            held,
            place: hello.place.map(|p| Place { generation: Generation(p.generation), rank: p.rank }),
        })
    }
}

impl From<FromWorker> for wire::WorkerMessage {
    fn from(message: FromWorker) -> Self {
        use wire::worker_message::Kind;
        let kind = match message {
            FromWorker::Heartbeat { generation, cursor, progress, activity, waiting } => {
                Kind::Heartbeat(wire::Heartbeat {
                    generation: generation.0,
                    cursor: Some(cursor.into()),
                    progress,
                    activity,
                    waiting,
                })
            }
            FromWorker::Ready => Kind::Ready(wire::Ready {}),
            FromWorker::StepReport(report) => Kind::StepReport(report),
            FromWorker::Evaluation(report) => Kind::Evaluation(report.into()),
            FromWorker::ShardReceipt(receipt) => Kind::ShardReceipt(receipt),
            FromWorker::ShardFailed(failure) => Kind::ShardFailed(failure),
            FromWorker::CollectiveFailed { generation, cursor, error } => {
                Kind::CollectiveFailed(wire::CollectiveFailed {
                    generation: generation.0,
                    cursor: Some(cursor.into()),
                    error,
                })
            }
            FromWorker::Yielded { generation, cursor } => {
                Kind::Yielded(wire::Yielded { generation: generation.0, cursor: Some(cursor.into()) })
            }
            FromWorker::Leaving { reason } => Kind::Leaving(wire::Leaving { reason }),
            FromWorker::CheckpointDamaged { generation, manifest_key, error } => {
                let generation = generation.0;
                Kind::CheckpointDamaged(wire::CheckpointDamaged { generation, manifest_key, error })
            }
            FromWorker::StateIncomplete { generation, cursor, error } => {
                let (generation, cursor) = (generation.0, Some(cursor.into()));
                Kind::StateIncomplete(wire::StateIncomplete { generation, error, cursor })
            }
            FromWorker::Finished { generation, cursor } => {
                Kind::Finished(wire::Finished { generation: generation.0, cursor: Some(cursor.into()) })
            }
            FromWorker::Failed { generation, error } => {
                Kind::Failed(wire::Failed { generation: generation.0, error })
            }
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<wire::WorkerMessage> for FromWorker {
    type Error = Malformed;

    fn try_from(message: wire::WorkerMessage) -> Result<Self, Malformed> {
        use wire::worker_message::Kind;
        let Some(kind) = message.kind else {
            return malformed(
                "WorkerMessage",
                "it is empty, or of a kind that this version does not support",
            );
        };
        Ok(match kind {
            Kind::Hello(_) => return malformed("Hello", "a stream has only one"),
            Kind::StoreRequest(_) => return malformed("StoreRequest", "it is none of the run's messages"),
            Kind::Heartbeat(m) => FromWorker::Heartbeat {
                generation: Generation(m.generation),
                cursor: cursor("Heartbeat", m.cursor)?,
                progress: m.progress,
                activity: shown(&m.activity, PHRASE),
                waiting: m.waiting,
            },
            Kind::Ready(_) => FromWorker::Ready,
            Kind::StepReport(report) => FromWorker::StepReport(report),
            Kind::Evaluation(report) => {
                let evaluation = report.try_into();
                FromWorker::Evaluation(
                    evaluation.or_else(|problem: String| malformed("EvaluationReport", problem))?,
                )
            }
            Kind::ShardReceipt(mut receipt) => {
                receipt.key = key("ShardReceipt", "key", receipt.key)?;
                receipt.e_tag = receipt.e_tag.map(|tag| key("ShardReceipt", "e_tag", tag)).transpose()?;
                if receipt.sha256.len() != 64 || !receipt.sha256.bytes().all(|c| c.is_ascii_hexdigit()) {
                    return malformed("ShardReceipt", "sha256 must have 64 hexadecimal digits");
                }
                FromWorker::ShardReceipt(receipt)
            }
            Kind::ShardFailed(mut failure) => {
                failure.key = key("ShardFailed", "key", failure.key)?;
                failure.error = prose(&failure.error);
                FromWorker::ShardFailed(failure)
            }
            Kind::CollectiveFailed(m) => FromWorker::CollectiveFailed {
                generation: Generation(m.generation),
                cursor: cursor("CollectiveFailed", m.cursor)?,
                error: prose(&m.error),
            },
            Kind::Yielded(m) => FromWorker::Yielded {
                generation: Generation(m.generation),
                cursor: cursor("Yielded", m.cursor)?,
            },
            Kind::CheckpointDamaged(m) => FromWorker::CheckpointDamaged {
                generation: Generation(m.generation),
                manifest_key: key("CheckpointDamaged", "manifest_key", m.manifest_key)?,
                error: prose(&m.error),
            },
            Kind::StateIncomplete(m) => FromWorker::StateIncomplete {
                generation: Generation(m.generation),
                cursor: cursor("StateIncomplete", m.cursor)?,
                error: prose(&m.error),
            },
            Kind::Leaving(m) => FromWorker::Leaving { reason: prose(&m.reason) },
            Kind::Finished(m) => FromWorker::Finished {
                generation: Generation(m.generation),
                cursor: cursor("Finished", m.cursor)?,
            },
            Kind::Failed(m) => {
                FromWorker::Failed { generation: Generation(m.generation), error: prose(&m.error) }
            }
        })
    }
}

// ------------------------------------------------------------------------------------------------ coordinator → worker

impl From<ToWorker> for wire::CoordinatorMessage {
    fn from(message: ToWorker) -> Self {
        use wire::coordinator_message::Kind;
        let kind = match message {
            ToWorker::Welcome {
                run_id,
                specification,
                storage_url,
                heartbeat_millis,
                joining_timeout_millis,
                patience_millis,
                coordinator,
            } => Kind::Welcome(wire::Welcome {
                run_id,
                specification,
                storage_url,
                heartbeat_millis,
                joining_timeout_millis,
                patience_millis,
                coordinator,
            }),
            ToWorker::Assignment(a) => Kind::Assignment(wire::Assignment {
                generation: a.generation.0,
                rank: a.rank,
                world_size: a.world_size,
                first_micro_batch: a.micro_batches.first,
                micro_batches: a.micro_batches.count,
                evaluate_teacher: a.evaluate_teacher,
                evaluated: a.existing.evaluated,
                saved: a.existing.saved,
                source: Some(match a.source {
                    Source::Fresh => wire::assignment::Source::Fresh(wire::Fresh {}),
                    Source::Checkpoint { manifest_key } => {
                        wire::assignment::Source::Checkpoint(wire::FromCheckpoint { manifest_key })
                    }
                    Source::Peer { rank } => wire::assignment::Source::Peer(wire::FromPeer { rank }),
                }),
                start: Some(a.start.into()),
                partners: a
                    .partners
                    .map(|Partners { copies, copied_by }| wire::Partners { copies, copied_by }),
                replica: a.replica.map(|Replica { number, slice, slices }| wire::Replica {
                    number,
                    slice,
                    slices,
                }),
            }),
            ToWorker::Abandon { generation, reason } => {
                Kind::Abandon(wire::Abandon { generation: generation.0, reason })
            }
            ToWorker::Committed { iteration } => Kind::Committed(wire::Committed { iteration }),
            ToWorker::Request { generation, what } => Kind::Request(wire::Request {
                generation: generation.0,
                what: match what {
                    Request::Checkpoint => wire::request::What::Checkpoint,
                    Request::CheckpointAndStop => wire::request::What::CheckpointAndStop,
                    Request::Yield => wire::request::What::Yield,
                    Request::CheckpointAndYield => wire::request::What::CheckpointAndYield,
                }
                .into(),
            }),
            ToWorker::Stop { success, reason } => Kind::Stop(wire::Stop { success, reason }),
            ToWorker::Refused { reason } => Kind::Refused(wire::Refused { reason }),
            ToWorker::Restart { reason } => Kind::Restart(wire::Restart { reason }),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<wire::CoordinatorMessage> for ToWorker {
    type Error = Malformed;

    fn try_from(message: wire::CoordinatorMessage) -> Result<Self, Malformed> {
        use wire::coordinator_message::Kind;
        let Some(kind) = message.kind else {
            let problem = "it is empty, or of a kind that this version does not support";
            return malformed("CoordinatorMessage", problem);
        };
        Ok(match kind {
            Kind::Welcome(m) => ToWorker::Welcome {
                run_id: m.run_id,
                specification: m.specification,
                storage_url: m.storage_url,
                heartbeat_millis: m.heartbeat_millis,
                joining_timeout_millis: m.joining_timeout_millis,
                patience_millis: m.patience_millis,
                coordinator: m.coordinator,
            },
            Kind::Assignment(m) => {
                if m.rank >= m.world_size {
                    let problem = format!("rank {} of {}", m.rank, m.world_size);
                    return malformed("Assignment", problem);
                }
                let source = match m.source {
                    None => return malformed("Assignment", "no source of state"),
                    Some(wire::assignment::Source::Fresh(_)) => Source::Fresh,
                    Some(wire::assignment::Source::Checkpoint(c)) => {
                        Source::Checkpoint { manifest_key: c.manifest_key }
                    }
                    Some(wire::assignment::Source::Peer(p)) => Source::Peer { rank: p.rank },
                };
                let partners = m.partners.map(|p| Partners { copies: p.copies, copied_by: p.copied_by });
                let other = |rank: u32| rank < m.world_size && rank != m.rank;
                if partners.is_some_and(|p| !other(p.copies) || !other(p.copied_by)) {
                    let problem = format!("rank {} of {} has {partners:?}", m.rank, m.world_size);
                    return malformed("Assignment", problem);
                }
                let replica = m.replica.map(|wire::Replica { number, slice, slices }| Replica {
                    number,
                    slice,
                    slices,
                });
                if replica.is_some_and(|replica| partners.is_some() || !replica.fits(m.world_size)) {
                    let problem =
                        format!("rank {} of {} has {partners:?} and {replica:?}", m.rank, m.world_size);
                    return malformed("Assignment", problem);
                }
                ToWorker::Assignment(Assignment {
                    generation: Generation(m.generation),
                    rank: m.rank,
                    world_size: m.world_size,
                    micro_batches: MicroBatches { first: m.first_micro_batch, count: m.micro_batches },
                    source,
                    evaluate_teacher: m.evaluate_teacher,
                    existing: Existing { evaluated: m.evaluated, saved: m.saved },
                    start: cursor("Assignment", m.start)?,
                    partners,
                    replica,
                })
            }
            Kind::Abandon(m) => ToWorker::Abandon { generation: Generation(m.generation), reason: m.reason },
            Kind::Committed(m) => ToWorker::Committed { iteration: m.iteration },
            Kind::Request(m) => ToWorker::Request {
                generation: Generation(m.generation),
                what: match wire::request::What::try_from(m.what) {
                    Ok(wire::request::What::Checkpoint) => Request::Checkpoint,
                    Ok(wire::request::What::CheckpointAndStop) => Request::CheckpointAndStop,
                    Ok(wire::request::What::Yield) => Request::Yield,
                    Ok(wire::request::What::CheckpointAndYield) => Request::CheckpointAndYield,
                    Ok(wire::request::What::Unspecified) | Err(_) => {
                        return malformed("Request", format!("unknown request {}", m.what));
                    }
                },
            },
            Kind::Stop(m) => ToWorker::Stop { success: m.success, reason: m.reason },
            Kind::Refused(m) => ToWorker::Refused { reason: m.reason },
            Kind::Restart(m) => ToWorker::Restart { reason: m.reason },
            Kind::StoreReply(_) => return malformed("StoreReply", "it is none of the run's messages"),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_survive_the_wire() {
        let cursor = Cursor { iteration: 7, phase: Phase::Generator };
        let generation = Generation(3);
        let hello = Hello {
            protocol: 1,
            worker: WorkerId("w".into()),
            run_id: "r".into(),
            host: "h".into(),
            pid: 5,
            device: "cpu".into(),
            held: Some(cursor),
            place: Some(Place { generation, rank: 4 }),
        };
        assert_eq!(Hello::try_from(wire::WorkerMessage::from(hello.clone())), Ok(hello));
        for message in [
            FromWorker::Heartbeat { generation, cursor, progress: 9, activity: "a".into(), waiting: true },
            FromWorker::Ready,
            FromWorker::Yielded { generation, cursor },
            FromWorker::Leaving { reason: "r".into() },
            FromWorker::StepReport(wire::StepReport { iteration: 4, ..Default::default() }),
            FromWorker::CollectiveFailed { generation, cursor, error: "e".into() },
            FromWorker::CheckpointDamaged { generation, manifest_key: "k".into(), error: "e".into() },
            FromWorker::StateIncomplete { generation, cursor, error: "e".into() },
            FromWorker::Finished { generation, cursor },
            FromWorker::Failed { generation, error: "e".into() },
        ] {
            assert_eq!(FromWorker::try_from(wire::WorkerMessage::from(message.clone())), Ok(message));
        }
        for source in
            [Source::Fresh, Source::Checkpoint { manifest_key: "k".into() }, Source::Peer { rank: 1 }]
        {
            let message = ToWorker::Assignment(Assignment {
                generation,
                rank: 1,
                world_size: 2,
                micro_batches: MicroBatches { first: 2, count: 3 },
                source,
                evaluate_teacher: true,
                existing: Existing { evaluated: Some(0), saved: Some(4) },
                start: Cursor { iteration: 3, phase: Phase::Generator },
                partners: Some(Partners { copies: 0, copied_by: 0 }),
                replica: None,
            });
            assert_eq!(
                ToWorker::try_from(wire::CoordinatorMessage::from(message.clone())),
                Ok(message.clone())
            );
            let ToWorker::Assignment(assignment) = message else { unreachable!() };
            let placed = |replica| {
                let assignment = Assignment {
                    world_size: 4,
                    partners: None,
                    replica: Some(replica),
                    ..assignment.clone()
                };
                let message = ToWorker::Assignment(assignment);
                ToWorker::try_from(wire::CoordinatorMessage::from(message.clone())) == Ok(message)
            };
            assert!(placed(Replica { number: 1, slice: 0, slices: 2 }));
            for wrong in [(2, 0, 2), (0, 2, 2), (0, 0, 3), (0, 0, 4), (0, 0, 0)] {
                let (number, slice, slices) = wrong;
                assert!(!placed(Replica { number, slice, slices }), "{wrong:?}");
            }
        }
        for what in
            [Request::Checkpoint, Request::CheckpointAndStop, Request::Yield, Request::CheckpointAndYield]
        {
            let message = ToWorker::Request { generation, what };
            assert_eq!(ToWorker::try_from(wire::CoordinatorMessage::from(message.clone())), Ok(message));
        }
    }

    #[test]
    fn half_filled_messages_are_refused_by_name() {
        use wire::worker_message::Kind;
        let of = |kind| wire::WorkerMessage { kind };
        assert!(FromWorker::try_from(of(None)).is_err());
        let heartbeat = of(Some(Kind::Heartbeat(wire::Heartbeat::default())));
        let error = FromWorker::try_from(heartbeat.clone()).unwrap_err();
        assert_eq!(error.to_string(), "malformed Heartbeat: no cursor");
        assert!(Hello::try_from(heartbeat).is_err());
        let nameless = of(Some(Kind::Hello(wire::Hello::default())));
        assert!(Hello::try_from(nameless).unwrap_err().to_string().contains("worker_id"));
        let receipt = wire::ShardReceipt { sha256: "short".into(), ..Default::default() };
        let error = FromWorker::try_from(of(Some(Kind::ShardReceipt(receipt)))).unwrap_err();
        assert!(error.to_string().contains("64 hexadecimal digits"), "{error}");
    }

    #[test]
    fn names_from_outside_are_short_and_plain() {
        let hello = |host: String| {
            let hello = wire::Hello { worker_id: "w".into(), host, ..Default::default() };
            Hello::try_from(wire::WorkerMessage { kind: Some(wire::worker_message::Kind::Hello(hello)) })
        };
        assert!(hello("node-1.example".into()).is_ok());
        for bad in ["x".repeat(NAME + 1), "a\nERROR forged line".into(), "\u{1b}[2J".into()] {
            assert!(hello(bad.clone()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn texts_from_outside_cannot_forge_lines_or_move_the_cursor() {
        assert_eq!(prose("a\nb\u{1b}[31m\u{202e}c"), "a\\nb\\u{1b}[31m\\u{202e}c");
        assert_eq!(prose("déjà vu 漢字"), "déjà vu 漢字");
    }

    proptest! {
        #[test]
        fn any_text_becomes_one_line_of_bounded_length(text: String) {
            let long = text.repeat(200);
            for text in [text, long] {
                let kept = prose(&text);
                prop_assert!(kept.chars().all(|c| !c.is_control()));
                prop_assert!(kept.chars().count() <= 10 * PROSE + 1);
            }
        }
    }
}
