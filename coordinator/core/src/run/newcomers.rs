//! Workers that have not yet completed an iteration with their peers. One that cannot reach them, or fails while it loads,
//! must not cost the others their work: it is left out for a while, or sent away, and named.

use std::collections::BTreeSet;

use potstill_proto::{cursor::Cursor, message::ToWorker};

use super::{Actions, Core, Stage, log, seconds, send};
use crate::{Action, StreamId};

/// The pause after a failure doubles this number of times at most.
const MOST_DOUBLINGS: u32 = 6;
/// So many generations are tried with all workers before one is left out.
pub(super) const FAILED_WITH_ALL: u32 = 3;

impl Core {
    /// The generation has failed before it completed an iteration, and no worker died. Where some of its ranks are proven and
    /// others are not, these get no place for a while, which grows with each such failure; the first of them can try again
    /// soonest, so that one that cannot work does not keep out the others. Returns whether there were any.
    pub(super) fn bar_newcomers(&mut self, reason: &str, actions: &mut Actions) -> bool {
        let ranks: Vec<StreamId> = self
            .members
            .iter()
            .map(|(stream, _)| stream)
            .filter(|stream| self.rank(*stream).is_some())
            .collect();
        let proven = |stream: &StreamId| self.members.get(*stream).is_some_and(|member| member.proven);
        let (proven, mut new): (Vec<_>, Vec<_>) = ranks.into_iter().partition(proven);
        if proven.is_empty() {
            return false;
        }
        // In turn: where one of many is the cause, it is left out before another is left out again.
        new.sort_by_key(|stream| self.members.get(*stream).map(|member| member.fruitless));
        let timeouts = self.terms.timeouts;
        let mut turn = 0;
        for stream in new {
            // Asked for each in its turn: of several that hold the newest state, the last is needed.
            if self.is_needed(stream) {
                continue;
            }
            // Two of them may be both holders of a slice: the next is left out once the others hold all slices again.
            if self.terms.division.is_sliced() && turn > 0 {
                break;
            }
            let Some(member) = self.members.get_mut(stream) else { continue };
            let pause =
                (timeouts.hang_millis << member.fruitless.min(MOST_DOUBLINGS)) + turn * timeouts.hang_millis;
            member.fruitless += 1;
            turn += 1;
            let worker = member.describe();
            self.members.bar(stream, self.now.after(pause));
            log(
                actions,
                format!(
                    "{} failed before it completed an iteration with worker {worker}, which is new: the others go on without it, \
                     and it can join again in {:.1} s; check that it can reach them ({reason})",
                    self.generation,
                    seconds(pause)
                ),
            );
        }
        turn > 0
    }

    /// Generations fail in a row before any worker has proven itself, and there are more workers than the run needs: one of
    /// them is left out of the next generation, each in its turn, since one that cannot reach the others may be the cause.
    pub(super) fn leave_one_out(&mut self, actions: &mut Actions) {
        if let Some(before) = self.left_out.take() {
            self.members.release(before);
        }
        if self.failed_starts < FAILED_WITH_ALL || self.members.count() <= self.terms.min_workers {
            return;
        }
        let ranks = self.members.eligible().filter(|(stream, _)| self.rank(*stream).is_some());
        let next =
            ranks.filter(|(stream, _)| !self.is_needed(*stream)).min_by_key(|(_, member)| member.fruitless);
        let Some(stream) = next.map(|(stream, _)| stream) else { return };
        let Some(member) = self.members.get_mut(stream) else { return };
        member.fruitless += 1;
        let worker = member.describe();
        log(
            actions,
            format!(
                "{} generations in a row failed before they completed an iteration: the next one is tried without worker {worker}",
                self.failed_starts,
            ),
        );
        self.left_out = Some(stream);
        self.members.bar(stream, self.now.after(2 * self.terms.timeouts.hang_millis));
    }

    /// Whether a worker alone holds the newest state: it is never left out.
    fn is_needed(&self, stream: StreamId) -> bool {
        let saved = self.ledger.newest().map(|newest| Cursor::boundary(newest.iteration));
        let held = |stream: StreamId| self.members.get(stream).and_then(|member| member.held);
        let others =
            self.members.eligible().map(|(other, _)| other).filter(|other| *other != stream).map(held);
        held(stream) > others.max().flatten().max(saved)
    }

    /// A worker that was left out can be given a place again.
    pub(super) fn released(&mut self, stream: StreamId, actions: &mut Actions) {
        let Some(member) = self.members.get(stream) else { return };
        log(actions, format!("worker {} can be given a place again", member.describe()));
        self.can_be_placed(stream, actions);
    }

    /// Ends a worker that cannot take part. The run goes on without it.
    pub(super) fn send_away(&mut self, stream: StreamId, reason: String, actions: &mut Actions) {
        send(actions, stream, ToWorker::Stop { success: false, reason: reason.clone() });
        self.sent_away = Some(reason.clone());
        self.lost(stream, &reason, actions);
        actions.push(Action::Close { stream });
    }

    /// A worker could not read the checkpoint that its generation was to start from. The coordinator reads it for itself
    /// before anything is decided.
    pub(super) fn checkpoint_doubted(
        &mut self,
        stream: StreamId,
        manifest_key: &str,
        error: &str,
        actions: &mut Actions,
    ) {
        let worker = self.members.get(stream).map(|member| member.describe()).unwrap_or_default();
        let reason = format!("worker {worker} cannot read checkpoint {manifest_key}: {error}");
        if self.ledger.knows(manifest_key) {
            let doubting = self.doubted.entry(manifest_key.to_owned()).or_default();
            if doubting.is_empty() {
                log(actions, format!("{reason}; the coordinator reads it for itself"));
                actions.push(Action::Verify { manifest_key: manifest_key.to_owned() });
            }
            doubting.insert(stream);
        }
        if matches!(self.stage, Stage::Training(_)) {
            self.abandon(reason, None, actions);
        }
    }

    /// The coordinator has read a checkpoint that some workers could not read.
    pub(super) fn verified(
        &mut self,
        manifest_key: &str,
        result: Result<Option<String>, String>,
        actions: &mut Actions,
    ) {
        let doubting: BTreeSet<StreamId> = self.doubted.remove(manifest_key).unwrap_or_default();
        match result {
            Ok(Some(problem)) => {
                if self.ledger.mark_damaged(manifest_key) {
                    log(actions, format!("checkpoint {manifest_key} is damaged: {problem}; it is not used"));
                }
            }
            Ok(None) => {
                for stream in doubting {
                    let Some(member) = self.members.get(stream) else { continue };
                    let reason = format!(
                        "worker {} cannot read checkpoint {manifest_key}, which is whole where the coordinator reads it, in {}: \
                         its machine does not see the run's storage",
                        member.describe(),
                        self.storage_url
                    );
                    self.send_away(stream, reason, actions);
                }
            }
            Err(error) => self.fail(
                format!("a worker could not read checkpoint {manifest_key}, and the coordinator cannot either: {error}"),
                actions,
            ),
        }
    }
}
