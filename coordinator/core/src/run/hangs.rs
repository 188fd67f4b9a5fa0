//! Ranks that send heartbeats but make no progress.
//!
//! When one rank hangs, all others soon wait for it in a collective. So of the ranks that have made no progress for
//! long, those that do not wait in a collective hang: their processes are ended, to be started again. Where all wait
//! for each other, the network between them is at fault, and they form a new group. Where ranks hang again and again at
//! the same work, to start them again does not help, and the run ends.

use std::collections::BTreeMap;

use potstill_proto::message::ToWorker;

use super::{Actions, Cause, Core, Stage, seconds, send};
use crate::{Action, StreamId};

/// The run fails when ranks have hung this number of times at the same work, without an iteration completed meanwhile.
const MOST_ALIKE: u32 = 5;

impl Core {
    /// Looks at the ranks' progress, eight times within the timeout for a rank that makes none.
    pub(super) fn look_for_hangs(&mut self, actions: &mut Actions) {
        let patience = self.terms.timeouts.hang_millis;
        let now = self.now;
        let Stage::Training(training) = &mut self.stage else { return };
        if training.look > now {
            return;
        }
        training.look = now.after((patience / 8).max(1));
        let mut stuck = Vec::new();
        for (rank, stream) in (0u32..).zip(&training.ranks) {
            if training.finished.contains_key(&rank) {
                continue;
            }
            if let Some(member) = self.members.get(*stream)
                && member.moved.after(patience) <= now
            {
                stuck.push((rank, *stream, member.waiting));
            }
        }
        let guilty: Vec<_> = stuck.iter().filter(|(.., waiting)| !waiting).collect();
        if let Some((_, first, _)) = stuck.first()
            && guilty.is_empty()
        {
            let reason = format!("all ranks wait for each other: {}", self.no_progress(*first));
            return self.abandon_for(Cause::Stuck, reason, None, actions);
        }
        let guilty: Vec<_> = guilty.into_iter().map(|(_, stream, _)| *stream).collect();
        if let Some(first) = guilty.first()
            && let Some(reason) = self.hang_is_permanent(*first)
        {
            return self.fail(reason, actions);
        }
        for stream in guilty {
            let reason = format!("rank hung: {}", self.no_progress(stream));
            send(actions, stream, ToWorker::Restart { reason: reason.clone() });
            self.lost(stream, &reason, actions);
            actions.push(Action::Close { stream });
        }
    }

    /// Counts a hang. Returns why the run ends, where ranks have hung too often at what this one is doing.
    fn hang_is_permanent(&mut self, stream: StreamId) -> Option<String> {
        let activity = self.members.get(stream)?.activity.clone();
        let finished = self.steps.finished();
        if self.hangs.0 != finished {
            self.hangs = (finished, BTreeMap::new());
        }
        let times = self.hangs.1.entry(activity).or_default();
        *times += 1;
        let times = *times;
        (times >= MOST_ALIKE).then(|| {
            format!(
                "ranks hung {times} times at the same work after {finished} iterations, the last time worker {}: {}. If this work \
                 is only slow, raise cluster.failure_timeout: a rank is taken to hang when it completes nothing for four times \
                 that",
                self.members.get(stream).map(|member| member.describe()).unwrap_or_default(),
                self.no_progress(stream)
            )
        })
    }

    /// For how long a member has made no progress, what it is doing, and its cursor.
    fn no_progress(&self, stream: StreamId) -> String {
        let Some(member) = self.members.get(stream) else { return String::new() };
        format!(
            "heartbeats arrive, no progress for {:.1} s ({}, {})",
            seconds(self.now.0 - member.moved.0),
            if member.activity.is_empty() { "activity unknown" } else { &member.activity },
            member.cursor
        )
    }
}
