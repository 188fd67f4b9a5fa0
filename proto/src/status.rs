//! What a run and its workers are doing, in words.

use crate::wire;

/// A run's state, as `potstill status` prints it.
#[must_use]
pub fn state_name(state: wire::RunState) -> &'static str {
    match state {
        wire::RunState::Unspecified => "unspecified",
        wire::RunState::Waiting => "waiting",
        wire::RunState::Training => "training",
        wire::RunState::Finishing => "finishing",
        wire::RunState::Succeeded => "succeeded",
        wire::RunState::Stopped => "stopped",
        wire::RunState::Failed => "failed",
    }
}

/// A worker's liveness, as `potstill status` prints it.
#[must_use]
pub fn liveness_name(liveness: wire::Liveness) -> &'static str {
    match liveness {
        wire::Liveness::Unspecified => "unspecified",
        wire::Liveness::Alive => "alive",
        wire::Liveness::Unknown => "unknown",
    }
}
