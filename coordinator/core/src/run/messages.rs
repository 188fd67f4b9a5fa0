//! Messages of workers after their hello. A message of an older generation only renews its sender's lease.
//!
//! A generation that was abandoned is still the newest until the next one is opened: what its survivors completed
//! counts.

use potstill_proto::{
    cursor::{Cursor, Generation},
    message::FromWorker,
    scores, wire,
};

use super::{Actions, Cause, Core, Stage, log};
use crate::{
    Action, StreamId,
    membership::Member,
    observation::Observation,
    record::{Evaluation, Record},
    steps::Reported,
};

impl Core {
    pub(super) fn received(&mut self, stream: StreamId, message: FromWorker, actions: &mut Actions) {
        if self.members.heard(self.now, stream).is_none() || matches!(self.stage, Stage::Ended(_)) {
            return;
        }
        match message {
            FromWorker::Heartbeat { generation, cursor, progress, activity, waiting } => {
                let current = self.rank(stream).is_some() && generation == self.generation;
                self.members.progressed(self.now, stream, progress);
                if let Some(member) = self.members.get_mut(stream) {
                    member.activity = activity;
                    member.cursor = cursor;
                    member.waiting = waiting;
                    if current && member.loaded {
                        self.reached(stream, cursor);
                    }
                }
            }
            FromWorker::Ready => self.ready(stream, actions),
            FromWorker::Leaving { reason } => self.leaving(stream, reason, actions),
            FromWorker::Yielded { generation, cursor } => {
                if self.spoken_rank(stream, generation, "a yielding", actions).is_some() {
                    self.reached(stream, cursor);
                    self.yielded(stream, cursor, actions);
                }
            }
            FromWorker::StepReport(report) => {
                let generation = Generation(report.generation);
                if let Some(rank) = self.spoken_rank(stream, generation, "a step report", actions) {
                    self.step_report(stream, rank, report, actions);
                }
            }
            FromWorker::Evaluation(report) => {
                match self.spoken_rank(stream, report.generation, "an evaluation", actions) {
                    Some(0) => self.evaluated(report, actions),
                    Some(rank) => {
                        log(actions, format!("ignored: an evaluation by rank {rank}, which is not 0"))
                    }
                    None => {}
                }
            }
            FromWorker::ShardReceipt(receipt) => {
                let generation = Generation(receipt.generation);
                if let Some(rank) = self.spoken_rank(stream, generation, "a shard's receipt", actions) {
                    let (iteration, last) = (receipt.iteration, self.terms.iterations);
                    if iteration > last {
                        let worker = self.members.get(stream).map(|m| m.id().to_string()).unwrap_or_default();
                        return log(
                            actions,
                            format!(
                                "ignored: a receipt of iteration {iteration} of {last} from worker {worker}"
                            ),
                        );
                    }
                    match self.ledger.receipt(rank, receipt) {
                        Ok(complete) => actions.extend(complete.map(Action::Commit)),
                        Err(reason) => log(actions, format!("ignored: {reason}")),
                    }
                }
            }
            FromWorker::ShardFailed(failure) => {
                let generation = Generation(failure.generation);
                if self.spoken_rank(stream, generation, "a shard's failure", actions).is_some() {
                    self.shard_failed(failure, actions);
                }
            }
            FromWorker::CollectiveFailed { generation, cursor, error } => {
                self.collective_failed(stream, generation, cursor, &error, actions);
            }
            FromWorker::Finished { generation, cursor } => {
                if let Some(rank) = self.spoken_rank(stream, generation, "an end", actions) {
                    self.reached(stream, cursor);
                    match &mut self.stage {
                        Stage::Training(training) => {
                            training.finished.insert(rank, cursor);
                        }
                        Stage::Reattaching(reattaching) => {
                            reattaching.finished.insert(rank, cursor);
                        }
                        _ => {}
                    }
                    self.conclude(actions);
                }
            }
            FromWorker::CheckpointDamaged { generation, manifest_key, error } => {
                if self.spoken_rank(stream, generation, "a damaged checkpoint", actions).is_some() {
                    if let Some(member) = self.members.get_mut(stream) {
                        member.left(Cursor::default());
                    }
                    self.checkpoint_doubted(stream, &manifest_key, &error, actions);
                    self.spoke(stream, Cursor::default());
                }
            }
            FromWorker::StateIncomplete { generation, cursor, error } => {
                self.state_incomplete(stream, generation, cursor, &error, actions);
            }
            FromWorker::Failed { generation, error } => {
                self.worker_failed(stream, generation, &error, actions)
            }
        }
    }

    /// The sender's rank, if the message is of the newest generation; otherwise the message is ignored.
    fn spoken_rank(
        &self,
        stream: StreamId,
        generation: Generation,
        what: &str,
        actions: &mut Actions,
    ) -> Option<u32> {
        let rank = self.rank(stream).filter(|_| generation == self.generation);
        if rank.is_none() {
            let worker = self.members.get(stream).map(|m| m.id().to_string()).unwrap_or_default();
            log(actions, format!("ignored: {what} of {generation}, which is over, from worker {worker}"));
        }
        rank
    }

    /// A member of the newest generation is known to hold this state completely.
    fn reached(&mut self, stream: StreamId, cursor: Cursor) {
        if let Some(member) = self.members.get_mut(stream) {
            (member.loaded, member.unheard) = (true, false);
            // Messages of two threads may overtake each other: the further cursor is right.
            if Some(cursor) > member.held {
                member.hold(cursor);
            }
        }
        self.keeps(stream, cursor);
    }

    /// Notes whether a survivor of an abandoned generation still holds the state from which that started, or a further
    /// one.
    pub(super) fn keeps(&mut self, stream: StreamId, cursor: Cursor) {
        if let Stage::Settling(settling) = &mut self.stage {
            if cursor >= self.start.cursor {
                settling.holders.insert(stream);
            } else {
                settling.holders.remove(&stream);
            }
        }
    }

    fn step_report(&mut self, stream: StreamId, rank: u32, report: wire::StepReport, actions: &mut Actions) {
        let iteration = report.iteration;
        match self.steps.report(rank, report) {
            Ok(reported) => {
                self.reached(stream, Cursor::boundary(iteration + 1));
                if let Some(member) = self.members.get_mut(stream) {
                    // Alone it proves nothing.
                    member.proven |= self.steps.world_size() > 1;
                    member.fruitless = 0;
                }
                match reported {
                    Reported::Incomplete => {}
                    Reported::Finished { totals, paces } => {
                        actions.push(Action::Observe(Observation::Iteration(totals)));
                        self.look_for_stragglers(&paces, actions);
                    }
                    Reported::Repeated => {
                        log(actions, format!("ignored: rank {rank} reported iteration {iteration} already"));
                    }
                }
            }
            Err(violation) => self.fail(violation.to_string(), actions),
        }
    }

    fn shard_failed(&mut self, failure: wire::ShardFailed, actions: &mut Actions) {
        let wire::ShardFailed { iteration, rank, key, error, .. } = failure;
        let reason = format!("rank {rank} could not write {key}: {error}");
        if self.ledger.has(iteration) || self.ledger.is_committing(iteration) {
            return log(
                actions,
                format!("ignored: {reason}: iteration {iteration} has all its shards already"),
            );
        }
        // Without this shard the others' shards are of no use, so their failures are only logged.
        let known = self.ledger.failure(iteration).is_some();
        self.ledger.shard_failed(iteration, reason.clone());
        if known {
            log(
                actions,
                format!("the checkpoint of iteration {iteration} failed on another rank too: {reason}"),
            );
        } else {
            self.checkpoint_failed(iteration, reason, actions);
        }
    }

    fn evaluated(&mut self, report: scores::Evaluation, actions: &mut Actions) {
        let evaluation = Evaluation::from(report);
        let scored = evaluation.order();
        if self.scored.is_some_and(|newest| newest >= scored) {
            return log(actions, "ignored: an evaluation that is in the journal already".to_owned());
        }
        self.scored = Some(scored);
        if evaluation.of_teacher {
            self.evaluate_teacher = false;
            self.teacher_diversity = evaluation.scores.diversity;
        } else {
            self.evaluated = Some(evaluation.iteration);
        }
        let collapse = self.collapse(&evaluation);
        actions.push(Action::Persist(Record::Evaluated(evaluation)));
        actions.push(Action::Observe(Observation::Evaluated(report)));
        if let Some(reason) = collapse {
            self.fail(reason, actions);
        }
    }

    /// Why training should stop after this evaluation of the student: its samples of one condition have become alike.
    /// Before the first iteration there is no student yet.
    fn collapse(&self, evaluation: &Evaluation) -> Option<String> {
        let of_teacher = self.teacher_diversity?;
        let least = of_teacher * self.terms.collapse_share;
        let diversity = evaluation.scores.diversity?;
        let low = diversity < least;
        if evaluation.of_teacher || evaluation.iteration == 0 || !low {
            return None;
        }
        let newest = match self.ledger.newest() {
            Some(checkpoint) => {
                format!("the newest checkpoint, of iteration {}, is older", checkpoint.iteration)
            }
            None => "there is no older checkpoint".to_owned(),
        };
        Some(format!(
            "the student has collapsed: after iteration {} its diversity is {:.3}, below {:.3} (evaluation.collapse_share \
             {} of the teacher's {:.3}); {newest}. Lower the learning rates or the guidance, or set \
             evaluation.collapse_share",
            evaluation.iteration, diversity, least, self.terms.collapse_share, of_teacher
        ))
    }

    fn collective_failed(
        &mut self,
        stream: StreamId,
        generation: Generation,
        cursor: Cursor,
        error: &str,
        actions: &mut Actions,
    ) {
        let held = cursor;
        let cursor = if generation > self.incomplete { held } else { Cursor::default() };
        let Some(rank) = self.left_rank(stream, generation, cursor, actions) else { return };
        if let Some(member) = self.members.get_mut(stream)
            && held > cursor
        {
            // What it holds does not count as a whole state. It may be slices of an earlier one.
            member.unheard = true;
        }
        let worker = self.members.get(stream).map(|member| member.describe()).unwrap_or_default();
        if matches!(self.stage, Stage::Training(_)) {
            let reason = format!("a collective failed on rank {rank}, worker {worker}: {error}");
            self.abandon(reason, Some(stream), actions);
        } else {
            self.spoke(stream, cursor);
        }
    }

    /// The slices of a generation's state cannot be put together, as all its ranks have found; perhaps those of an earlier
    /// one. The cause is known, and says nothing against workers that are new. Where every rank holds the whole state, it is
    /// one rank's word about itself.
    fn state_incomplete(
        &mut self,
        stream: StreamId,
        generation: Generation,
        cursor: Cursor,
        error: &str,
        actions: &mut Actions,
    ) {
        let nothing = Cursor::default();
        if !self.terms.division.is_sliced() {
            return self.collective_failed(stream, generation, nothing, error, actions);
        }
        let first = self.incomplete != generation;
        let Some(rank) = self.rank(stream).filter(|_| generation == self.generation) else {
            self.left_rank(stream, generation, nothing, actions);
            return;
        };
        if first {
            self.incomplete = generation;
            let placed =
                |(stream, member): (StreamId, &Member)| member.place.or(member.hello.place).map(|_| stream);
            for holder in self.members.iter().filter_map(placed).collect::<Vec<_>>() {
                let is_rank = self.rank(holder).is_some();
                if let Some(member) = self.members.get_mut(holder) {
                    member.left(nothing);
                    // Each rank says whether it holds slices of an earlier state, or has said something else by then.
                    member.unheard = is_rank;
                }
            }
        }
        self.left_rank(stream, generation, cursor, actions);
        if matches!(self.stage, Stage::Training(_)) {
            let reason = format!("rank {rank} found that {error}");
            let observed = Observation::GenerationAbandoned { generation, reason: reason.clone() };
            actions.push(Action::Observe(observed));
            self.await_ranks(Cause::Incomplete, reason);
        } else if let Stage::Settling(settling) = &mut self.stage {
            // Others may have noticed first that this rank left the group.
            if settling.cause == Cause::Unexplained {
                settling.cause = Cause::Incomplete;
            }
            if first {
                settling.holders.clear();
            }
        }
        self.spoke(stream, cursor);
    }

    /// A worker says that it left its group, with this state. Returns its rank, if it is one of the newest generation.
    fn left_rank(
        &mut self,
        stream: StreamId,
        generation: Generation,
        cursor: Cursor,
        actions: &mut Actions,
    ) -> Option<u32> {
        let rank = self.rank(stream).filter(|_| generation == self.generation);
        let member = self.members.get_mut(stream)?;
        // What a worker that was taken for lost reports of its own state still counts, until it is given a new place.
        if member.place.or(member.hello.place).is_some_and(|place| place.generation == generation) {
            member.left(cursor);
        }
        if rank.is_none() {
            let worker = member.id();
            log(actions, format!("worker {worker} has left {generation}, which is over"));
        }
        rank
    }

    fn worker_failed(
        &mut self,
        stream: StreamId,
        generation: Generation,
        error: &str,
        actions: &mut Actions,
    ) {
        let Some(member) = self.members.get(stream) else { return };
        let place = member.place.map(|place| place.generation);
        let reason = format!("worker {} failed: {error}", member.describe());
        let new = !member.proven && self.members.iter().any(|(_, other)| other.proven);
        if place.is_none() || (new && place == Some(generation)) {
            self.send_away(stream, reason, actions);
        } else if place == Some(generation) {
            self.fail(reason, actions);
        } else {
            log(actions, format!("ignored: a failure in {generation}, which is over: {error}"));
        }
    }
}
