//! What the run is doing.

use potstill_proto::wire::{self, RunState};

use super::{Core, Stage};
use crate::{
    StreamId,
    membership::{Liveness, Member},
    observation::Outcome,
};

impl Core {
    /// The answer to a request for the run's status.
    #[must_use]
    pub fn status(&self) -> wire::StatusReply {
        let (state, reason) = match &self.stage {
            Stage::Gathering(gathering) => (RunState::Waiting, self.waiting_reason(gathering)),
            Stage::Reattaching(reattaching) => (RunState::Waiting, self.missing_ranks(reattaching)),
            Stage::Settling(settling) => (RunState::Waiting, settling.reason.clone()),
            Stage::Training(training) => match &self.stop {
                Some(reason) => (RunState::Finishing, reason.clone()),
                None if !training.finished.is_empty() => {
                    (RunState::Finishing, "the last checkpoint is being saved".into())
                }
                None => (RunState::Training, String::new()),
            },
            Stage::Ended(Outcome::Succeeded { .. }) => (RunState::Succeeded, String::new()),
            Stage::Ended(Outcome::Stopped { reason, .. }) => (RunState::Stopped, reason.clone()),
            Stage::Ended(Outcome::Failed { reason }) => (RunState::Failed, reason.clone()),
        };
        let pace = |stream| self.stragglers.of(self.rank(stream)?);
        let member = |(stream, m): (StreamId, &Member)| wire::Member {
            worker_id: m.id().to_string(),
            host: m.hello.host.clone(),
            pid: m.hello.pid,
            device: m.hello.device.clone(),
            rank: self.rank(stream),
            cursor: Some(m.cursor.into()),
            progress: m.progress,
            activity: m.activity.clone(),
            liveness: match m.liveness {
                Liveness::Alive => wire::Liveness::Alive,
                Liveness::Unknown => wire::Liveness::Unknown,
            }
            .into(),
            compute_seconds: pace(stream).map(|(seconds, _)| seconds),
            straggles: pace(stream).is_some_and(|(_, straggles)| straggles),
        };
        wire::StatusReply {
            run_id: self.run_id.clone(),
            state: state.into(),
            reason,
            generation: self.generation.0,
            members: self.members.iter().map(member).collect(),
            member_count: u32::try_from(self.members.iter().count()).unwrap_or(u32::MAX),
            iteration: self.steps.finished(),
            iterations: self.terms.iterations,
            repeated_iterations: self.repeated,
            committed_iteration: self.ledger.newest().map(|checkpoint| checkpoint.iteration),
            // Known to the process that serves it.
            page: String::new(),
        }
    }
}
