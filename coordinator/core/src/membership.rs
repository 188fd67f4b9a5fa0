//! The attached workers and their liveness.
//!
//! Every message renews its sender's lease. A worker that is silent for a third of the failure timeout is *unknown*,
//! which changes only what log and status show; silent for all of it, or with its stream closed, it is dead and
//! removed.

use std::collections::{BTreeMap, BTreeSet};

use potstill_proto::{
    cursor::{Cursor, Generation},
    message::{Hello, Place, WorkerId},
};

use crate::{StreamId, Tick, terms::Timeouts};

/// Whether a member is known to be alive. Dead members are removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// Heard of within the first third of its lease.
    Alive,
    /// Silent for longer than that.
    Unknown,
}

/// How long a worker has been silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Silence {
    /// Milliseconds since its last message.
    pub millis: u64,
    /// Whether its lease is over; otherwise it is unknown from now on.
    pub dead: bool,
}

/// An attached worker.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its hello.
    pub hello: Hello,
    /// The furthest state that it is known to hold completely, if it is beyond the start of the run.
    pub held: Option<Cursor>,
    /// The newest cursor that it reported, for display.
    pub cursor: Cursor,
    /// Its count of completed units of work, from its heartbeats.
    pub progress: u64,
    /// When `progress` last changed, or its place did.
    pub moved: Tick,
    /// What it is doing, as text from its heartbeats.
    pub activity: String,
    /// Whether it waits for its peers in a collective.
    pub waiting: bool,
    /// Alive or unknown.
    pub liveness: Liveness,
    /// Its newest place. Kept when that generation is over, so that ranks stay stable.
    pub place: Option<Place>,
    /// Whether it has completed an iteration with its peers, as far as this coordinator knows.
    pub proven: bool,
    /// Generations in a row that failed with it before they completed an iteration, while others had proven themselves.
    pub fruitless: u32,
    /// Whether it is known to have taken over the state of its place completely. Until then the cursors of its
    /// heartbeats do not count.
    pub loaded: bool,
    /// Whether it may hold more than `held`: it has a rank, and has not said what it holds since its generation was opened, or
    /// since it was asked whether it has slices of an earlier state.
    pub unheard: bool,
    /// Whether it has loaded what the run reads.
    ready: bool,
    /// Why it leaves, once it has announced that.
    leaving: Option<String>,
    /// Until when it gets no place.
    barred: Option<Tick>,
    heard: Tick,
    deadline: Tick,
}

impl Member {
    /// Its id.
    #[must_use]
    pub fn id(&self) -> &WorkerId {
        &self.hello.worker
    }

    /// As text: id, host, process, device.
    #[must_use]
    pub fn describe(&self) -> String {
        let Hello { worker, host, pid, device, .. } = &self.hello;
        format!("{worker} ({host}, process {pid}, {device})")
    }

    /// Whether it is a rank of this generation that may hold more than `held`.
    #[must_use]
    pub fn is_unheard(&self, generation: Generation) -> bool {
        self.unheard && self.place.is_some_and(|place| place.generation == generation)
    }

    /// Notes the state that the worker says it holds; the start of the run does not count as one.
    pub fn hold(&mut self, cursor: Cursor) {
        self.cursor = cursor;
        self.unheard = false;
        self.held = Some(cursor).filter(|c| *c > Cursor::default());
    }

    /// It has left its group with this state. Its report replaces what was known of it, also where it holds less, and
    /// heartbeats that it overtook say nothing any more.
    pub fn left(&mut self, cursor: Cursor) {
        self.hold(cursor);
        self.loaded = false;
    }

    /// Whether it can be given a place.
    fn is_eligible(&self) -> bool {
        self.ready && self.leaving.is_none() && self.barred.is_none()
    }

    /// Whether it has loaded what the run reads.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// Why it leaves, once it has announced that.
    #[must_use]
    pub fn leaving(&self) -> Option<&str> {
        self.leaving.as_deref()
    }
}

/// All attached workers.
#[derive(Debug)]
pub struct Members {
    timeouts: Timeouts,
    by_stream: BTreeMap<StreamId, Member>,
    by_id: BTreeMap<WorkerId, StreamId>,
    /// Those that can be given a place.
    eligible: BTreeSet<StreamId>,
    /// When each member's liveness changes next, soonest first.
    deadlines: BTreeSet<(Tick, StreamId)>,
    /// Those that get no place, and until when, soonest first.
    barred: BTreeSet<(Tick, StreamId)>,
    /// How many have not yet loaded what the run reads.
    loading: u32,
    /// When one of these last made progress.
    load_moved: Tick,
}

impl Members {
    /// No workers yet.
    #[must_use]
    pub fn new(timeouts: Timeouts) -> Self {
        Self {
            timeouts,
            by_stream: BTreeMap::new(),
            by_id: BTreeMap::new(),
            eligible: BTreeSet::new(),
            deadlines: BTreeSet::new(),
            barred: BTreeSet::new(),
            loading: 0,
            load_moved: Tick::default(),
        }
    }

    /// Adds a worker. `place` is its place in an earlier generation, where that is known to be its own.
    pub fn attach(&mut self, now: Tick, stream: StreamId, hello: Hello, place: Option<Place>) -> &Member {
        let deadline = now.after(self.timeouts.unknown_millis);
        self.deadlines.insert((deadline, stream));
        self.by_id.insert(hello.worker.clone(), stream);
        let held = hello.held;
        let mut member = Member {
            hello,
            held: None,
            cursor: Cursor::default(),
            progress: 0,
            moved: now,
            activity: String::new(),
            waiting: false,
            liveness: Liveness::Alive,
            place,
            proven: false,
            fruitless: 0,
            loaded: held.is_some(),
            unheard: false,
            ready: false,
            leaving: None,
            barred: None,
            heard: now,
            deadline,
        };
        member.hold(held.unwrap_or_default());
        // A rank whose connection breaks while it takes over a state may have that state by now.
        member.unheard = held.is_none() && member.place.is_some();
        self.loading += 1;
        self.by_stream.entry(stream).or_insert(member)
    }

    /// Renews a lease. `None` when no worker is attached on the stream.
    pub fn heard(&mut self, now: Tick, stream: StreamId) -> Option<&mut Member> {
        let member = self.by_stream.get_mut(&stream)?;
        self.deadlines.remove(&(member.deadline, stream));
        member.heard = now;
        member.liveness = Liveness::Alive;
        member.deadline = now.after(self.timeouts.unknown_millis);
        self.deadlines.insert((member.deadline, stream));
        Some(member)
    }

    /// A worker has completed this number of units of work.
    pub fn progressed(&mut self, now: Tick, stream: StreamId, progress: u64) {
        let Some(member) = self.by_stream.get_mut(&stream) else { return };
        if member.progress != progress {
            (member.progress, member.moved) = (progress, now);
            if !member.ready {
                self.load_moved = now;
            }
        }
    }

    /// How many have not yet loaded what the run reads.
    #[must_use]
    pub fn loading(&self) -> u32 {
        self.loading
    }

    /// When a worker that loads last made progress.
    #[must_use]
    pub fn load_moved(&self) -> Tick {
        self.load_moved
    }

    /// A worker has loaded what the run reads.
    pub fn set_ready(&mut self, stream: StreamId) {
        if let Some(member) = self.by_stream.get_mut(&stream) {
            self.loading -= u32::from(!member.ready);
            member.ready = true;
            if member.is_eligible() {
                self.eligible.insert(stream);
            }
        }
    }

    /// A worker gets no place until a moment.
    pub fn bar(&mut self, stream: StreamId, until: Tick) {
        if let Some(member) = self.by_stream.get_mut(&stream) {
            if let Some(before) = member.barred.replace(until) {
                self.barred.remove(&(before, stream));
            }
            self.barred.insert((until, stream));
            self.eligible.remove(&stream);
        }
    }

    /// The next worker whose bar is over, if there is one; it can be given a place again.
    pub fn released(&mut self, now: Tick) -> Option<StreamId> {
        let &(_, stream) = self.barred.first().filter(|(until, _)| *until <= now)?;
        self.release(stream);
        Some(stream)
    }

    /// A worker that was barred can be given a place again.
    pub fn release(&mut self, stream: StreamId) {
        let Some(member) = self.by_stream.get_mut(&stream) else { return };
        if let Some(until) = member.barred.take() {
            self.barred.remove(&(until, stream));
            if member.is_eligible() {
                self.eligible.insert(stream);
            }
        }
    }

    /// A worker has announced that it leaves.
    pub fn set_leaving(&mut self, stream: StreamId, reason: String) {
        if let Some(member) = self.by_stream.get_mut(&stream) {
            member.leaving = Some(reason);
            self.eligible.remove(&stream);
        }
    }

    /// Removes a worker.
    pub fn remove(&mut self, stream: StreamId) -> Option<Member> {
        let member = self.by_stream.remove(&stream)?;
        self.by_id.remove(member.id());
        self.loading -= u32::from(!member.ready);
        self.eligible.remove(&stream);
        self.deadlines.remove(&(member.deadline, stream));
        if let Some(until) = member.barred {
            self.barred.remove(&(until, stream));
        }
        Some(member)
    }

    /// The next worker whose deadline has passed, if there is one. Dead workers stay until they are removed.
    pub fn expired(&mut self, now: Tick) -> Option<(StreamId, Silence)> {
        let &(deadline, stream) = self.deadlines.first().filter(|(deadline, _)| *deadline <= now)?;
        self.deadlines.remove(&(deadline, stream));
        let member = self.by_stream.get_mut(&stream)?;
        let lease = member.heard.after(self.timeouts.dead_millis);
        member.liveness = Liveness::Unknown;
        member.deadline = lease;
        self.deadlines.insert((lease, stream));
        Some((stream, Silence { millis: now.0 - member.heard.0, dead: lease <= now }))
    }

    /// When the liveness of a worker changes next, or one can be given a place again.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Tick> {
        [&self.deadlines, &self.barred].into_iter().filter_map(|due| due.first()).map(|(at, _)| *at).min()
    }

    /// The stream of a worker.
    #[must_use]
    pub fn stream_of(&self, id: &WorkerId) -> Option<StreamId> {
        self.by_id.get(id).copied()
    }

    /// The member on a stream.
    #[must_use]
    pub fn get(&self, stream: StreamId) -> Option<&Member> {
        self.by_stream.get(&stream)
    }

    /// The member on a stream.
    pub fn get_mut(&mut self, stream: StreamId) -> Option<&mut Member> {
        self.by_stream.get_mut(&stream)
    }

    /// All workers, in the order in which they attached.
    pub fn iter(&self) -> impl Iterator<Item = (StreamId, &Member)> {
        self.by_stream.iter().map(|(stream, member)| (*stream, member))
    }

    /// Those that can be given a place, in the order in which they attached.
    pub fn eligible(&self) -> impl Iterator<Item = (StreamId, &Member)> {
        self.eligible.iter().filter_map(|stream| Some((*stream, self.by_stream.get(stream)?)))
    }

    /// How many can be given a place.
    #[must_use]
    pub fn count(&self) -> u32 {
        u32::try_from(self.eligible.len()).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::run::fixtures::hello;

    fn members() -> Members {
        Members::new(Timeouts::new(Duration::from_secs(3), Duration::from_secs(300)))
    }

    #[test]
    fn silence_makes_unknown_then_dead_and_a_word_makes_alive_again() {
        let mut members = members();
        let stream = StreamId(1);
        members.attach(Tick(0), stream, hello("a"), None);
        assert_eq!(members.next_deadline(), Some(Tick(1000)));
        assert_eq!(members.expired(Tick(999)), None);
        assert_eq!(members.get(stream).unwrap().liveness, Liveness::Alive);
        assert_eq!(members.expired(Tick(1000)), Some((stream, Silence { millis: 1000, dead: false })));
        assert_eq!(members.expired(Tick(1000)), None);
        assert_eq!(members.get(stream).unwrap().liveness, Liveness::Unknown);
        assert_eq!(members.next_deadline(), Some(Tick(3000)));
        members.heard(Tick(2999), stream);
        assert_eq!(members.expired(Tick(3000)), None);
        assert_eq!(members.get(stream).unwrap().liveness, Liveness::Alive);
        assert_eq!(members.expired(Tick(5999)), Some((stream, Silence { millis: 3000, dead: true })));
    }

    #[test]
    fn all_who_are_due_at_once_are_found() {
        let mut members = members();
        for n in 0..5 {
            members.attach(Tick(n), StreamId(n), hello(&format!("w{n}")), None);
        }
        let mut dead = Vec::new();
        while let Some((stream, silence)) = members.expired(Tick(10_000)) {
            assert!(silence.dead);
            members.remove(stream);
            dead.push(stream.0);
        }
        assert_eq!(dead, [0, 1, 2, 3, 4]);
        assert_eq!(members.next_deadline(), None);
    }
}
