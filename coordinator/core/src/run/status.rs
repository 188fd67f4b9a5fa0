//! What the run is doing, for people and scripts.

use potstill_proto::wire;

use super::{Core, Stage};
use crate::{
    StreamId,
    membership::{Liveness, Member},
    observation::Outcome,
};

impl Core {
    /// What the run is doing, for people and scripts.
    #[must_use]
    pub fn status(&self) -> wire::StatusReply {
        let (state, reason) = match &self.stage {
            Stage::Gathering(gathering) => ("waiting", self.waiting_reason(gathering)),
            Stage::Reattaching(reattaching) => ("waiting", self.missing_ranks(reattaching)),
            Stage::Settling(settling) => ("waiting", settling.reason.clone()),
            Stage::Training(training) => match &self.stop {
                Some(reason) => ("finishing", reason.clone()),
                None if !training.finished.is_empty() => ("finishing", "the last checkpoint is saved".into()),
                None => ("training", String::new()),
            },
            Stage::Ended(Outcome::Succeeded { .. }) => ("succeeded", String::new()),
            Stage::Ended(Outcome::Stopped { reason, .. }) => ("stopped", reason.clone()),
            Stage::Ended(Outcome::Failed { reason }) => ("failed", reason.clone()),
        };
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
                Liveness::Alive => "alive",
                Liveness::Unknown => "unknown",
            }
            .into(),
        };
        wire::StatusReply {
            run_id: self.run_id.clone(),
            state: state.into(),
            reason,
            generation: self.generation.0,
            members: self.members.iter().map(member).collect(),
            iteration: self.steps.finished(),
            iterations: self.terms.iterations,
            repeated_iterations: self.repeated,
            committed_iteration: self.ledger.newest().map(|checkpoint| checkpoint.iteration),
        }
    }
}
