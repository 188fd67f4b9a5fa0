//! State from a peer: the rank that is furthest broadcasts its cursor and its state, the others take them.

use potstill_c10d::{Error, ProcessGroup};
use potstill_distill::state::State;
use potstill_proto::cursor::{Cursor, Phase};
use tch::{Device, Kind, Tensor};

/// Makes everybody's state and cursor those of rank `root`.
///
/// # Errors
/// A collective failed. The state may then be a mixture of the two: the caller must not use it.
pub fn broadcast(group: &ProcessGroup, root: usize, state: &State, cursor: Cursor) -> Result<Cursor, Error> {
    let phase = i64::from(cursor.phase == Phase::Generator);
    let sent = Tensor::from_slice(&[cursor.iteration as i64, phase]).to_device(group.device());
    let mut works = vec![group.broadcast(&sent, root)?];
    for part in state.parts() {
        works.push(group.broadcast(part.flat, root)?);
    }
    for work in works {
        work.wait(None)?;
    }
    let sent = sent.to_device(Device::Cpu).to_kind(Kind::Int64);
    let phase = if sent.int64_value(&[1]) == 0 { Phase::FakeScore } else { Phase::Generator };
    Ok(Cursor { iteration: sent.int64_value(&[0]) as u64, phase })
}
