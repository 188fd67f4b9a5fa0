//! Generations: one is abandoned, its survivors report their cursors, the next is opened.

use std::collections::{BTreeMap, BTreeSet};

use potstill_proto::{
    cursor::Cursor,
    message::{Existing, Place, Source, ToWorker},
};

use super::{
    Actions, Cause, Core, FAILED_LOADS, FAILED_STARTS, Gathering, Settling, Stage, Training, log,
    newcomers::FAILED_WITH_ALL, seconds, send,
};
use crate::{
    Action, StreamId, Tick, assignment,
    observation::{Observation, Outcome},
    record::Record,
};

/// After the last checkpoint only pictures are left: so many generations may try to make them.
const MOST_CLOSING: u32 = 3;

/// Why a run does not start from the teacher.
const NOTHING_TO_CONTINUE: &str = "every checkpoint of this run is damaged or gone, and no worker holds its state: restore \
     the files, start another run, or resume with --from-teacher to begin this one again from the teacher";

impl Core {
    /// Ends the live generation. `spoken` is the survivor whose report of a failure is the cause, if there is one: it
    /// has reported its cursor already.
    pub(super) fn abandon(&mut self, reason: String, spoken: Option<StreamId>, actions: &mut Actions) {
        let cause = if spoken.is_none() { Cause::Known } else { Cause::Unexplained };
        self.abandon_for(cause, reason, spoken, actions);
    }

    pub(super) fn abandon_for(
        &mut self,
        cause: Cause,
        reason: String,
        spoken: Option<StreamId>,
        actions: &mut Actions,
    ) {
        let Stage::Training(training) = &self.stage else { return };
        let survivors = || training.ranks.iter().copied().filter(|s| self.members.get(*s).is_some());
        let awaiting: BTreeSet<_> = survivors().filter(|s| Some(*s) != spoken).collect();
        let holds = |stream: &StreamId| {
            let held = self.members.get(*stream).and_then(|m| m.held);
            held.unwrap_or_default() >= self.start.cursor
        };
        let holders = survivors().filter(holds).collect();
        self.tell_to_abandon(&awaiting, &reason, actions);
        self.stage = Stage::Settling(Settling { awaiting, holders, cause, since: self.now, reason });
    }

    pub(super) fn tell_to_abandon(&self, members: &BTreeSet<StreamId>, reason: &str, actions: &mut Actions) {
        let generation = self.generation;
        for stream in members {
            send(actions, *stream, ToWorker::Abandon { generation, reason: reason.to_owned() });
        }
        let reason = reason.to_owned();
        actions.push(Action::Observe(Observation::GenerationAbandoned { generation, reason }));
    }

    /// A rank has yielded at a boundary, as all ranks agreed: the others are about to report the same.
    pub(super) fn yielded(&mut self, stream: StreamId, cursor: Cursor, actions: &mut Actions) {
        if let Stage::Training(training) = &mut self.stage {
            let (cause, reason) = training
                .yielding
                .take()
                .unwrap_or_else(|| (Cause::Agreed, "its ranks agreed to yield".to_owned()));
            log(actions, format!("{} yields at {cursor}: {reason}", self.generation));
            self.await_ranks(cause, reason);
        }
        self.spoke(stream, cursor);
    }

    /// The live generation ends by itself: all its ranks are about to say so, and are not told to leave.
    pub(super) fn await_ranks(&mut self, cause: Cause, reason: String) {
        if let Stage::Training(training) = &self.stage {
            let awaiting = training.ranks.iter().copied().collect();
            let holders = BTreeSet::new();
            self.stage = Stage::Settling(Settling { awaiting, holders, cause, since: self.now, reason });
        }
    }

    /// A survivor of the newest generation has reported its cursor.
    pub(super) fn spoke(&mut self, stream: StreamId, cursor: Cursor) {
        match &mut self.stage {
            Stage::Settling(settling) => {
                settling.awaiting.remove(&stream);
                self.keeps(stream, cursor);
            }
            Stage::Reattaching(reattaching) => {
                reattaching.left.insert(stream);
            }
            Stage::Training(_) | Stage::Gathering(_) | Stage::Ended(_) => {}
        }
    }

    /// How long survivors have to report their cursors. What is known of them may be one heartbeat old, so they get a
    /// quarter of a heartbeat's interval; they get the failure timeout where without their report a state would be
    /// lost, or where the cause of the failure is not known yet.
    pub(super) fn settled_by(&self, settling: &Settling) -> Tick {
        let safe = !settling.holders.is_empty() || self.start.cursor == Cursor::default();
        let patience = match settling.cause {
            Cause::Known if safe => self.terms.timeouts.heartbeat_millis / 4,
            Cause::Known | Cause::Unexplained | Cause::Stuck | Cause::Incomplete | Cause::Agreed => {
                self.terms.timeouts.dead_millis
            }
            // Storage may be slow; a worker that dies meanwhile is noticed.
            Cause::AgreedAndSaving => self.terms.timeouts.wait_millis,
        };
        settling.since.after(patience)
    }

    /// Whether storage is about to say something that decides where the next generation starts: that a checkpoint is
    /// damaged or not, or that one is committed that is further than the state of every member that could continue.
    pub(super) fn awaits_storage(&self) -> bool {
        if !self.doubted.is_empty() {
            return true;
        }
        let Some(iteration) = self.ledger.committing().next_back() else { return false };
        self.members.eligible().all(|(_, member)| member.held < Some(Cursor::boundary(iteration)))
    }

    /// Makes the decisions that are due because time has passed or numbers have changed. Cheap when there are none.
    pub(super) fn advance(&mut self, actions: &mut Actions) {
        if matches!(self.stage, Stage::Ended(_)) {
            return;
        }
        while let Some((stream, silence)) = self.members.expired(self.now) {
            let silent = format!("no heartbeat for {:.1} s", seconds(silence.millis));
            if silence.dead {
                if self.rank(stream).is_some() {
                    self.unsure = Some(silent.clone());
                }
                self.lost(stream, &silent, actions);
                actions.push(Action::Close { stream });
            } else if let Some(member) = self.members.get(stream) {
                log(actions, format!("worker {} is silent: {silent}", member.describe()));
            }
        }
        while let Some(stream) = self.members.released(self.now) {
            self.released(stream, actions);
        }
        let gathering = matches!(self.stage, Stage::Gathering(_));
        match &self.stage {
            Stage::Reattaching(_) => self.reattach(actions),
            Stage::Settling(settling) => {
                let settled = settling.awaiting.is_empty() || self.settled_by(settling) <= self.now;
                if settled && !self.awaits_storage() {
                    let (reason, cause) = (settling.reason.clone(), settling.cause);
                    self.settled(reason, cause, actions);
                }
            }
            Stage::Gathering(gathering) => match gathering.enough_since {
                Some(since) => {
                    let patient = gathering.patient && self.members.count() < self.terms.max_workers;
                    let due = !patient || since.after(self.terms.timeouts.dead_millis) <= self.now;
                    if due && gathering.not_before <= self.now {
                        let reason = gathering.reason.clone();
                        self.open(reason, actions);
                    }
                }
                None if self.gathered_by(gathering) <= self.now => {
                    let reason = self.too_few(gathering);
                    self.fail(reason, actions);
                }
                None => {}
            },
            Stage::Training(_) => self.look_for_hangs(actions),
            Stage::Ended(_) => {}
        }
        // There may be enough workers already.
        if !gathering && matches!(self.stage, Stage::Gathering(_)) {
            self.advance(actions);
        }
    }

    /// All survivors have reported, or their time is over.
    fn settled(&mut self, reason: String, cause: Cause, actions: &mut Actions) {
        let leaving: Vec<_> =
            self.members.iter().filter(|(_, m)| m.leaving().is_some()).map(|(stream, _)| stream).collect();
        if !leaving.is_empty() {
            // The ranks' places are over: the loss of one of them changes nothing any more.
            self.stage = Stage::Gathering(Gathering::since(self.now, reason.clone()));
            for stream in leaving {
                self.let_go(stream, actions);
            }
        }
        if self.await_holders(actions) {
            return;
        }
        // Ranks that met and found their state incomplete are neither a success nor a failure to meet.
        if cause == Cause::Incomplete {
            return self.open_or_gather(reason, actions);
        }
        let fruitless = matches!(cause, Cause::Unexplained | Cause::Stuck)
            && self.steps.finished() <= self.start.cursor.iteration;
        let of_newcomers = fruitless && self.bar_newcomers(&reason, actions);
        if fruitless && !of_newcomers {
            if self.failed_starts == 0 {
                self.failing_since = self.now;
            }
            self.failed_starts += 1;
        } else {
            self.failed_starts = 0;
        }
        let failing_for = self.now.0 - self.failing_since.0;
        // Each worker has its turn to be left out.
        let tries = FAILED_STARTS.max(FAILED_WITH_ALL + 2 * self.members.count());
        if self.failed_starts >= tries && failing_for >= self.terms.timeouts.wait_millis {
            let reason = format!(
                "{} generations in a row, for {:.1} s, failed before they finished an iteration, although no worker died; check \
                 that the workers can reach each other. The last failure: {reason}",
                self.failed_starts,
                seconds(failing_for)
            );
            return self.fail(reason, actions);
        }
        self.leave_one_out(actions);
        if self.failed_starts >= FAILED_WITH_ALL && self.members.count() >= self.terms.min_workers {
            self.gather(reason, actions);
            if let Stage::Gathering(gathering) = &mut self.stage {
                gathering.not_before = self.now.after(self.terms.timeouts.dead_millis);
            }
        } else {
            self.open_or_gather(reason, actions);
        }
    }

    /// When the run fails for lack of workers. One that loads what the run reads, and makes progress, is coming.
    pub(super) fn gathered_by(&self, gathering: &Gathering) -> Tick {
        let since = match gathering.failed_loads < FAILED_LOADS {
            true => gathering.short_since.max(self.members.load_moved()),
            false => gathering.short_since,
        };
        since.after(self.terms.timeouts.wait_millis)
    }

    /// Why the run fails for lack of workers.
    fn too_few(&self, gathering: &Gathering) -> String {
        let mut why = gathering.reason.clone();
        if let Some(reason) = &self.sent_away {
            why += &format!("; {reason}");
        }
        if gathering.failed_loads > 0 {
            why += &format!("; {} workers were lost while they loaded", gathering.failed_loads);
        }
        if let Some((_, member)) = self.members.iter().find(|(_, member)| !member.is_ready()) {
            let still = seconds(self.now.0 - member.moved.0);
            why += &format!(
                "; worker {} is {}, without progress for {still:.1} s",
                member.describe(),
                member.activity
            );
        }
        format!(
            "{} of the {} workers it needs were attached for {:.1} s ({why}): start more workers, lower cluster.min_workers or \
             raise cluster.wait_timeout",
            self.members.count(),
            self.terms.min_workers,
            seconds(self.now.0 - gathering.short_since.0),
        )
    }

    fn open_or_gather(&mut self, reason: String, actions: &mut Actions) {
        if self.members.count() >= self.terms.min_workers {
            self.open(reason, actions);
        } else {
            self.gather(reason, actions);
        }
    }

    /// Waits for workers.
    pub(super) fn gather(&mut self, reason: String, actions: &mut Actions) {
        if let Some(stop) = self.stop.clone() {
            return self.stop_without_generation(stop, actions);
        }
        self.stage = Stage::Gathering(Gathering::since(self.now, reason));
        self.recount(actions);
    }

    /// The number of workers has changed while the run waits.
    pub(super) fn recount(&mut self, actions: &mut Actions) {
        let (have, need, now) = (self.members.count(), self.terms.min_workers, self.now);
        let Stage::Gathering(gathering) = &mut self.stage else { return };
        if have < need {
            if gathering.enough_since.take().is_some() {
                (gathering.short_since, gathering.failed_loads) = (now, 0);
            }
        } else {
            gathering.enough_since.get_or_insert(now);
        }
        if have < need || (gathering.patient && have < self.terms.max_workers) {
            let Stage::Gathering(gathering) = &self.stage else { return };
            let reason = self.waiting_reason(gathering);
            actions.push(Action::Observe(Observation::Waiting { have, need, reason }));
        }
    }

    pub(super) fn waiting_reason(&self, gathering: &Gathering) -> String {
        let (have, timeouts) = (self.members.count(), &self.terms.timeouts);
        let sent_away = self.sent_away.as_deref().map(|why| format!(" ({why})")).unwrap_or_default();
        let reason = format!("{}{sent_away}", gathering.reason);
        if gathering.not_before > self.now {
            let pause = seconds(gathering.not_before.0 - self.now.0);
            format!("{reason}: the next generation is tried in {pause:.1} s")
        } else if gathering.enough_since.is_some() {
            let (most, patience) = (self.terms.max_workers, seconds(timeouts.dead_millis));
            format!(
                "{reason}: {have} of at most {most} workers; training starts when all are attached or after {patience:.1} s"
            )
        } else {
            let (need, patience) = (self.terms.min_workers, seconds(timeouts.wait_millis));
            match self.members.loading() {
                0 => format!("{reason}: {have} of {need} workers; the run fails after {patience:.1} s"),
                loading => format!(
                    "{reason}: {have} of {need} workers, and {loading} that load; the run fails after {patience:.1} s without \
                     progress"
                ),
            }
        }
    }

    /// Opens the next generation with all workers that can be given a place.
    fn open(&mut self, reason: String, actions: &mut Actions) {
        let (most, newest) = (self.terms.max_workers, self.ledger.newest());
        let plan =
            assignment::plan(&self.members, most, newest, self.terms.division, (self.generation, self.start));
        if plan.source == Source::Fresh && !self.from_teacher {
            if self.ledger.recall() {
                return self.open(reason, actions);
            }
            return self.fail(NOTHING_TO_CONTINUE.to_owned(), actions);
        }
        let last = self.terms.iterations;
        if plan.start.cursor.iteration >= last && self.ledger.has(last) {
            self.closing += 1;
            if self.closing > MOST_CLOSING {
                log(actions, format!("the run is complete; its last pictures are given up: {reason}"));
                return self.end(Outcome::Succeeded { iteration: last }, actions);
            }
        }
        let world_size = plan.world_size();
        self.generation = self.generation.next();
        self.start = plan.start;
        let (generation, now) = (self.generation, self.now);
        let start = plan.start.cursor.iteration;
        let repeats = self.steps.finished().saturating_sub(start);
        self.repeated += repeats;
        self.evaluated = self.evaluated.filter(|iteration| *iteration <= start);

        let mut of_rank = Vec::with_capacity(plan.ranks.len());
        for (rank, stream) in (0u32..).zip(&plan.ranks) {
            let Some(member) = self.members.get_mut(*stream) else { continue };
            of_rank.push(member.id().clone());
            member.place = Some(Place { generation, rank });
            member.moved = now;
            member.waiting = false;
            // The state of all others is about to be overwritten: it counts again when they report it. That of the
            // source too where it is put together from slices, and others may turn out to hold newer ones.
            let is_source = plan.source == Source::Peer { rank };
            member.loaded = is_source && !self.terms.division.is_sliced();
            member.held = member.held.filter(|_| is_source);
            member.unheard = !member.loaded;
        }
        actions.push(Action::Persist(Record::GenerationOpened {
            generation,
            members: of_rank.iter().map(ToString::to_string).collect(),
            source: plan.source.clone(),
            start,
            repeats,
            reason: reason.clone(),
        }));
        if repeats > 0 {
            let last = self.steps.finished() - 1;
            log(
                actions,
                format!(
                    "no worker holds the result of iterations {start} to {last}: they are computed again"
                ),
            );
        }
        let closed = self.steps.open(world_size, plan.start);
        actions.extend(closed.into_iter().map(|totals| Action::Observe(Observation::Iteration(totals))));
        self.ledger.open(generation, world_size);
        self.stragglers.open(world_size);
        self.placed.extend(of_rank.iter().cloned());
        (self.named, self.awaited, self.unsure) = (of_rank, false, None);
        actions.push(Action::Observe(Observation::GenerationOpened {
            generation,
            world_size,
            source: plan.source.clone(),
            repeated: self.repeated,
            reason,
        }));
        let existing = Existing {
            evaluated: self.evaluated,
            saved: self.ledger.newest().map(|checkpoint| checkpoint.iteration),
        };
        for (stream, assignment) in
            plan.assignments(generation, self.terms.micro_batches, self.evaluate_teacher, existing)
        {
            send(actions, stream, ToWorker::Assignment(assignment));
        }
        let training = Training {
            ranks: plan.ranks,
            finished: BTreeMap::new(),
            yielding: None,
            look: now.after(self.terms.timeouts.hang_millis),
        };
        if self.stop.is_some() {
            self.request_stop(&training, actions);
        } else if !self.clients.is_empty() {
            self.request_checkpoint(&training, actions);
        }
        self.stage = Stage::Training(training);
    }
}
