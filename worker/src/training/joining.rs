//! The start of a generation: joins the group and takes over the state from the assignment's source.

use std::{
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use potstill_c10d::{Backend, ProcessGroup, Store};
use potstill_distill::state::{Slice, State};
use potstill_proto::{
    cursor::Cursor,
    message::{Assignment, Source},
};
use tch::Device;

use super::{interruption::Interruption, job::Job, transfer};
use crate::{checkpoint, session::Session};
use potstill_logging::chain;

/// The collectives of a generation have no timeout of their own: a rank that computes for long does not let its peers fail.
/// The coordinator finds ranks that are dead or hang, and ends the generation of those that wait for them; without a
/// coordinator a rank leaves its group when its patience is over.
const COLLECTIVES: Duration = Duration::MAX;

/// How often a rank that waits to join checks for other orders.
const LOOK: Duration = Duration::from_millis(20);

/// The state a rank holds between generations.
#[derive(Default)]
pub struct Holding {
    /// `None`: there is no state to keep.
    pub state: Option<State>,
    /// Its cursor; the start when there is no state.
    pub cursor: Cursor,
}

/// Joins the group. Waiting for the other ranks cannot be interrupted, so a thread of its own does it, which is
/// abandoned when the coordinator orders this rank to leave.
pub(super) fn join(
    job: &Job,
    session: &mut Session,
    assignment: &Assignment,
    host: &str,
    timeout: Duration,
) -> Result<ProcessGroup, Interruption> {
    let backend = match job.recipe.settings.device {
        Device::Cuda(device) => Backend::Nccl { device },
        _ => Backend::Gloo { host: host.to_owned() },
    };
    let store = Arc::new(session.store(assignment.generation));
    let (rank, world_size) = (assignment.rank as usize, assignment.world_size as usize);
    let (joined, joining) = mpsc::channel();
    thread::spawn(move || {
        let group = Store::of(store, timeout)
            .and_then(|store| ProcessGroup::new(&backend, &store, rank, world_size, timeout))
            .and_then(|group| group.set_timeout(COLLECTIVES).map(|()| group));
        let _ = joined.send(group);
    });
    loop {
        match joining.recv_timeout(LOOK) {
            Ok(group) => return Ok(group?),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                return Err(anyhow::anyhow!("the thread that joins the group ended").into());
            }
        }
        if let Some(reason) = session.orders()?.interruption(assignment.generation) {
            return Err(Interruption::Left(reason));
        }
    }
}

/// Takes over the state from the assignment's source. On failure the rank is left with a complete state or with none.
pub(super) fn obtain_state(
    job: &Job,
    session: &Session,
    holding: &mut Holding,
    assignment: &Assignment,
    group: &ProcessGroup,
) -> Result<(State, Cursor), Interruption> {
    let held = std::mem::take(holding);
    let slice = job.slice(assignment);
    match &assignment.source {
        Source::Fresh => Ok((job.first_state(slice), Cursor::default())),
        Source::Checkpoint { manifest_key } => {
            session.progress.set_activity("loading a checkpoint");
            session.progress.state_is_torn();
            let fitting = held.state.filter(|state| state.layout().slice == slice);
            let mut state = fitting.unwrap_or_else(|| job.first_state(slice));
            let restoring = checkpoint::restore(&job.run, manifest_key, &mut state);
            let cursor = match job.runtime.block_on(session.progress.while_busy(restoring)) {
                Ok(cursor) => cursor,
                Err(error) => {
                    return Err(match error.downcast_ref() {
                        Some(potstill_storage::Error::Damaged { .. }) => {
                            Interruption::Damaged { manifest_key: manifest_key.clone(), error: chain(&error) }
                        }
                        _ => Interruption::Fatal(error),
                    });
                }
            };
            session.progress.while_waiting(|| transfer::publish(group, &mut state))?;
            session.outbox().has_loaded(cursor.iteration);
            Ok((state, cursor))
        }
        Source::Peer { rank } => {
            session.progress.set_activity("taking the state from a peer");
            if *rank != assignment.rank {
                session.progress.state_is_torn();
            }
            let root = *rank as usize;
            if job.spec.memory.shard_optimizer {
                return take_slices(job, session, holding, held, slice, group, root);
            }
            let mut state = held.state.unwrap_or_else(|| job.first_state(slice));
            let sent =
                session.progress.while_waiting(|| transfer::broadcast(group, root, &mut state, held.cursor));
            match sent {
                Ok(cursor) => Ok((state, cursor)),
                Err(error) => {
                    if *rank == assignment.rank {
                        *holding = Holding { state: Some(state), cursor: held.cursor };
                    }
                    Err(error.into())
                }
            }
        }
    }
}

/// Assembles this generation's slices from those of an earlier one.
fn take_slices(
    job: &Job,
    session: &Session,
    holding: &mut Holding,
    mut held: Holding,
    slice: Slice,
    group: &ProcessGroup,
    root: usize,
) -> Result<(State, Cursor), Interruption> {
    let mut state = match &held.state {
        Some(held) => held.relaid(slice),
        None => job.first_state(slice),
    };
    let taken = session
        .progress
        .while_waiting(|| transfer::reshard(group, root, held.state.as_mut(), held.cursor, &mut state));
    match taken {
        Ok(Some(cursor)) => Ok((state, cursor)),
        Ok(None) => {
            session.progress.state_is_torn();
            let error = "a slice of the state is gone with the rank that held it";
            Err(Interruption::Incomplete(error.to_owned()))
        }
        Err(error) => {
            if held.state.as_ref().is_some_and(|state| !state.torn) {
                session.progress.set_cursor(held.cursor);
                *holding = held;
            }
            Err(error.into())
        }
    }
}
