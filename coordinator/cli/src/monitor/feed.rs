//! What the page shows: a snapshot for a reader that comes, and messages about everything that changes after it.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use potstill_core::observation::{Observation, Outcome};
use potstill_proto::message::Source;
use potstill_spec::RunSpec;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::broadcast;

use super::{metrics::Row, unix_time::now};
use crate::status::RunStatus;

/// Messages that a reader may be behind; one that is further behind gets a new snapshot.
const BEHIND: usize = 1024;
/// Events that are kept.
const EVENTS: usize = 500;

/// A message for the page: the event's name and its JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The name of the server-sent event.
    pub name: &'static str,
    /// Its data.
    pub data: Arc<str>,
}

impl Message {
    fn new(name: &'static str, data: &impl Serialize) -> Option<Self> {
        match serde_json::to_string(data) {
            Ok(data) => Some(Self { name, data: data.into() }),
            Err(error) => {
                tracing::warn!(%error, "the page gets no {name}");
                None
            }
        }
    }
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Event {
    /// Seconds since 1970.
    time: f64,
    level: &'static str,
    what: String,
    reason: String,
}

/// A checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Saved {
    /// Completed iterations.
    pub iteration: u64,
    /// Bytes of its shards.
    pub bytes: u64,
    /// When it was committed, in seconds since 1970; none if by an earlier coordinator.
    pub time: Option<f64>,
}

/// See the module's documentation.
pub struct Feed {
    shown: Mutex<Shown>,
    sender: broadcast::Sender<Message>,
    global_batch: u64,
    /// Seconds of earlier attempts, and when this one started.
    earlier_seconds: f64,
    started: Instant,
}

#[derive(Default)]
struct Shown {
    status: Option<Value>,
    rows: Vec<Row>,
    events: VecDeque<Event>,
    checkpoints: BTreeMap<u64, Saved>,
    pictures: BTreeSet<u64>,
    ended: bool,
}

impl Feed {
    /// Of a run that has these rows already.
    #[must_use]
    pub fn new(spec: &RunSpec, rows: Vec<Row>, earlier_seconds: f64) -> Self {
        Self {
            shown: Mutex::new(Shown { rows, ..Shown::default() }),
            sender: broadcast::channel(BEHIND).0,
            global_batch: spec.distillation.global_batch.into(),
            earlier_seconds,
            started: Instant::now(),
        }
    }

    /// The snapshot, and the messages after it; no messages when the run is over.
    pub fn subscribe(&self) -> (Vec<Message>, Option<broadcast::Receiver<Message>>) {
        let shown = self.shown();
        let snapshot = json!({
            "status": shown.status,
            "rows": shown.rows,
            "events": shown.events,
            "checkpoints": shown.checkpoints.values().collect::<Vec<_>>(),
            "pictures": shown.pictures,
        });
        let mut first: Vec<_> = Message::new("snapshot", &snapshot).into_iter().collect();
        if shown.ended {
            first.extend(Message::new("end", &json!({})));
            return (first, None);
        }
        (first, Some(self.sender.subscribe()))
    }

    /// The pages that are open.
    #[must_use]
    pub fn readers(&self) -> usize {
        self.sender.receiver_count()
    }

    /// Whether a page is open.
    #[must_use]
    pub fn is_read(&self) -> bool {
        self.readers() > 0
    }

    /// The run's status; a message if more than the time has changed, or if `repeat`.
    pub fn status(&self, status: &RunStatus, members: u32, repeat: bool) {
        let Ok(mut value) = serde_json::to_value(status) else { return };
        value["images"] = (status.iteration * self.global_batch).into();
        value["members_total"] = members.into();
        let mut shown = self.shown();
        // The time of the one before, so that the rest is compared.
        value["wall_seconds"] =
            shown.status.as_ref().map_or(Value::Null, |before| before["wall_seconds"].clone());
        let changed = shown.status.as_ref() != Some(&value);
        value["wall_seconds"] = (self.earlier_seconds + self.started.elapsed().as_secs_f64()).into();
        if changed || repeat {
            self.send("status", &value);
        }
        shown.status = Some(value);
    }

    /// A new row of the metrics. An evaluation replaces that of the same subject and iteration.
    pub fn row(&self, row: &Row) {
        let mut shown = self.shown();
        if let Row::Evaluation(new) = row {
            shown.rows.retain(|row| {
                !matches!(row, Row::Evaluation(e) if e.subject == new.subject && e.iteration == new.iteration)
            });
        }
        shown.rows.push(row.clone());
        self.send("row", row);
    }

    /// The rows about the student beyond `iteration` are void. `rows` are those that are left.
    pub fn rewind(&self, iteration: u64, rows: Vec<Row>) {
        self.shown().rows = rows;
        self.send("rewind", &json!({ "iteration": iteration }));
    }

    /// Shows an observation as an event. Iterations and scores are rows.
    pub fn observe(&self, observation: &Observation) {
        if let Observation::Committed { iteration, bytes } = *observation {
            let saved = Saved { iteration, bytes, time: Some(now()) };
            let mut shown = self.shown();
            shown.checkpoints.insert(iteration, saved);
            self.send("checkpoint", &saved);
        }
        if let Observation::Ended(outcome) = observation {
            self.ended(outcome);
        }
        if let Some((level, what, reason)) = told(observation) {
            let event = Event { time: now(), level, what, reason };
            let mut shown = self.shown();
            self.send("event", &event);
            shown.events.push_back(event);
            if shown.events.len() > EVENTS {
                shown.events.pop_front();
            }
        }
    }

    /// The status as it stays: the coordinator is asked no more.
    fn ended(&self, outcome: &Outcome) {
        let (state, iteration, reason) = match outcome {
            Outcome::Succeeded { iteration } => ("succeeded", Some(*iteration), ""),
            Outcome::Stopped { iteration, reason } => ("stopped", Some(*iteration), reason.as_str()),
            Outcome::Failed { reason } => ("failed", None, reason.as_str()),
        };
        let mut shown = self.shown();
        let saved = shown.checkpoints.keys().next_back().copied();
        let Some(status) = shown.status.as_mut() else { return };
        (status["state"], status["reason"]) = (state.into(), reason.into());
        if let Some(iteration) = iteration {
            status["iteration"] = iteration.into();
            status["images"] = (iteration * self.global_batch).into();
        }
        if let Some(saved) = saved {
            status["committed_iteration"] = saved.into();
        }
        let status = status.clone();
        self.send("status", &status);
    }

    /// The checkpoints of which nothing but the iteration is known here.
    #[must_use]
    pub fn unknown(&self, listed: &[u64]) -> Vec<u64> {
        let shown = self.shown();
        listed.iter().copied().filter(|iteration| !shown.checkpoints.contains_key(iteration)).collect()
    }

    /// What is in storage: the checkpoints that are left and what was read of others, and the pictures.
    pub fn stored(&self, left: &[u64], read: Vec<Saved>, pictures: BTreeSet<u64>) {
        let mut shown = self.shown();
        let mut checkpoints = shown.checkpoints.clone();
        checkpoints.extend(read.into_iter().map(|saved| (saved.iteration, saved)));
        // One that was committed after the listing is in storage although it is not listed.
        let newest = left.last().copied().unwrap_or(0);
        checkpoints.retain(|iteration, _| left.contains(iteration) || *iteration > newest);
        if checkpoints != shown.checkpoints {
            self.send("checkpoints", &checkpoints.values().collect::<Vec<_>>());
            shown.checkpoints = checkpoints;
        }
        for iteration in pictures.difference(&shown.pictures) {
            self.send("picture", &json!({ "iteration": iteration }));
        }
        shown.pictures = pictures;
    }

    /// The run is over: pages are told so, and their streams end.
    pub fn end(&self) {
        self.shown().ended = true;
        self.send("end", &json!({}));
    }

    /// Called with the lock held, so that messages are in the order of the changes and a snapshot has either both or neither.
    fn send(&self, name: &'static str, data: &impl Serialize) {
        if self.is_read()
            && let Some(message) = Message::new(name, data)
        {
            // All readers may have gone since.
            let _ = self.sender.send(message);
        }
    }

    fn shown(&self) -> MutexGuard<'_, Shown> {
        // A thread that panicked has left a whole snapshot: each change is one assignment.
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Level, what happened, and why.
fn told(observation: &Observation) -> Option<(&'static str, String, String)> {
    Some(match observation {
        Observation::Started { coordinator, address, resumed, .. } => {
            let how = if *resumed { "continues the run" } else { "starts the run" };
            ("info", format!("coordinator {coordinator} {how}"), format!("it listens at {address}"))
        }
        Observation::Waiting { have, need, reason } => {
            ("info", format!("waiting for workers: {have} of {need}"), reason.clone())
        }
        Observation::Attached { worker } => ("info", format!("{worker} attached"), String::new()),
        Observation::Lost { worker, reason } => ("warn", format!("{worker} is lost"), reason.clone()),
        Observation::GenerationOpened { generation, world_size, source, reason, .. } => {
            let source = match source {
                Source::Fresh => "the teacher".to_owned(),
                Source::Checkpoint { manifest_key } => manifest_key.clone(),
                Source::Peer { rank } => format!("rank {rank}"),
            };
            let what = format!("{generation} opened with {world_size} ranks, state from {source}");
            ("info", what, reason.clone())
        }
        Observation::GenerationAbandoned { generation, reason } => {
            ("warn", format!("{generation} abandoned"), reason.clone())
        }
        Observation::Straggler { worker, straggles: true, seconds, median } => (
            "warn",
            format!("{worker} is slow: the others wait for it"),
            format!("{seconds:.3} s for a micro-batch, the median is {median:.3} s"),
        ),
        Observation::Straggler { worker, straggles: false, .. } => {
            ("info", format!("{worker} keeps up again"), String::new())
        }
        Observation::CheckpointFailed { iteration, reason } => {
            ("warn", format!("no checkpoint of iteration {iteration}"), reason.clone())
        }
        Observation::Committed { iteration, .. } => {
            ("info", format!("checkpoint of iteration {iteration} committed"), String::new())
        }
        Observation::Ended(Outcome::Succeeded { iteration }) => {
            ("info", format!("the run has succeeded with {iteration} iterations"), String::new())
        }
        Observation::Ended(Outcome::Stopped { iteration, reason }) => {
            ("info", format!("the run has stopped at iteration {iteration}"), reason.clone())
        }
        Observation::Ended(Outcome::Failed { reason }) => {
            ("error", "the run has failed".to_owned(), reason.clone())
        }
        Observation::Iteration(_) | Observation::Evaluated(_) => return None,
    })
}
