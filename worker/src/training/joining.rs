//! The start of a generation: joins the group and takes over the state from the assignment's source.

use std::{sync::mpsc, thread, time::Duration};

use potstill_c10d::{Backend, ProcessGroup};
use potstill_distill::{
    gradient::Sums,
    state::{Layout, Slice, State},
};
use potstill_proto::{
    cursor::{Cursor, Generation},
    message::{Assignment, Source},
};
use tch::Device;

use super::{
    claims::{self, Claim, Cut, Decision},
    groups::Groups,
    interruption::Interruption,
    job::Job,
    step::{Prepared, Recipe},
    transfer,
};
use crate::{checkpoint, session::Session};
use potstill_logging::chain;

/// How often a rank that waits to join checks for other orders.
const LOOK: Duration = Duration::from_millis(20);

/// The state a rank holds between generations.
#[derive(Default)]
pub struct Holding {
    /// `None`: there is no state to keep.
    pub state: Option<State>,
    /// Its cursor; the start when there is no state.
    pub cursor: Cursor,
    /// The generation whose slices it holds of the state.
    cut: Generation,
    /// Slices of the same state that were taken over in a generation that failed before all ranks had theirs.
    other: Option<(Generation, State)>,
    /// The step that is under way, where each rank holds slices.
    pub pending: Pending,
}

/// The step that is under way, and the one before. A rank's group may fail when it has made a step that others have only
/// prepared, or the other way round: then they come together by these.
#[derive(Default)]
pub struct Pending {
    /// A step that is prepared and not made.
    pub prepared: Option<Prepared>,
    /// The sums of the gradient of the step that led to a cursor.
    pub made: Option<(Cursor, Sums)>,
}

/// Joins the groups. Waiting for the other ranks cannot be interrupted, so a thread of its own does it, which is
/// abandoned when the coordinator orders this rank to leave.
pub(super) fn join(
    job: &Job,
    session: &mut Session,
    assignment: &Assignment,
    host: &str,
    timeout: Duration,
) -> Result<Groups, Interruption> {
    let backend = match job.recipe.settings.device {
        Device::Cuda(device) => Backend::Nccl { device },
        _ => Backend::Gloo { host: host.to_owned() },
    };
    let (store, assigned) = (session.store(assignment.generation), assignment.clone());
    let (joined, joining) = mpsc::channel();
    thread::spawn(move || {
        let _ = joined.send(Groups::join(&backend, &store, &assigned, timeout));
    });
    loop {
        match joining.recv_timeout(LOOK) {
            Ok(groups) => return Ok(groups?),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                return Err(anyhow::anyhow!("the thread that joins the groups ended").into());
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
) -> Result<(), Interruption> {
    let mut held = std::mem::take(holding);
    let cut = assignment.generation;
    if !matches!(assignment.source, Source::Peer { .. }) {
        // Before there is memory for others.
        (held.other, held.pending) = Default::default();
    }
    match &assignment.source {
        Source::Fresh => {
            drop(held);
            let state = Some(job.first_state(assignment));
            *holding = Holding { state, cut, ..Holding::default() };
        }
        Source::Checkpoint { manifest_key } => {
            session.progress.set_activity("loading a checkpoint");
            session.progress.state_is_torn();
            let wanted = job.slices(assignment);
            let fits = |state: &State| (state.layout().slice, state.layout().copy) == wanted;
            let mut state = held.state.filter(fits).unwrap_or_else(|| job.first_state(assignment));
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
            state.settle();
            session.outbox().has_loaded(cursor.iteration);
            *holding = Holding { state: Some(state), cursor, cut, ..Holding::default() };
        }
        Source::Peer { rank } => {
            session.progress.set_activity("taking the state from a peer");
            if job.is_sliced() {
                return take_slices(job, session, holding, held, assignment, group);
            }
            if *rank != assignment.rank {
                session.progress.state_is_torn();
            }
            let root = *rank as usize;
            let mut state = held.state.unwrap_or_else(|| job.first_state(assignment));
            let sent =
                session.progress.while_waiting(|| transfer::broadcast(group, root, &mut state, held.cursor));
            let (cursor, failure) = match sent {
                Ok(cursor) => (cursor, None),
                Err(error) if *rank == assignment.rank => (held.cursor, Some(error)),
                Err(error) => return Err(error.into()),
            };
            *holding = Holding { state: Some(state), cursor, cut, ..Holding::default() };
            if let Some(error) = failure {
                return Err(error.into());
            }
        }
    }
    Ok(())
}

/// Puts this generation's slices together from those that its ranks hold.
fn take_slices(
    job: &Job,
    session: &Session,
    holding: &mut Holding,
    held: Holding,
    assignment: &Assignment,
    group: &ProcessGroup,
) -> Result<(), Interruption> {
    let progress = &session.progress;
    let wanted = job.slices(assignment);
    let claim = held.claim(&job.recipe, wanted);
    let claims = match progress.while_waiting(|| transfer::exchange_claims(group, &claim)) {
        Ok(claims) => claims,
        Err(error) => {
            *holding = held;
            return Err(error.into());
        }
    };
    let numel = job.trained_parameters();
    let error = || "a slice of the state is gone with both of the ranks that held it".to_owned();
    let Some(decision) = claims::decide(&claims, |slice| !slice.range(numel).is_empty()) else {
        progress.state_is_torn();
        return Err(Interruption::Incomplete { cursor: Cursor::default(), error: error() });
    };
    let reached = claim.reaches(&decision);
    if !reached {
        progress.state_is_torn();
    }
    if decision.cursor < assignment.start {
        // The coordinator has to know before the ranks go on from there.
        let cursor = if reached { decision.cursor } else { Cursor::default() };
        *holding = if reached { held } else { Holding::default() };
        return Err(Interruption::Incomplete { cursor, error: error() });
    }
    let (mut kept, memory) = held.reach(&job.recipe, &decision, reached);
    if kept.state.is_some() {
        progress.set_cursor(kept.cursor);
    }
    if decision.fits {
        if let Some(state) = &mut kept.state {
            // The weights may be those of another moment.
            state.settle();
        }
        // It stays the earlier generation's cut: a rank whose exchange of claims failed knows no other name of it.
        *holding = kept;
        return Ok(());
    }
    let memory = memory.filter(|_| kept.state.is_none());
    let base = kept.state.as_ref().or(memory.as_ref());
    let mut state = match base {
        Some(base) => base.relaid(wanted.0, wanted.1),
        None => job.first_state(assignment),
    };
    drop(memory);
    let sent =
        progress.while_waiting(|| transfer::reshard(group, &decision.senders, kept.state.as_ref(), &state));
    if let Err(error) = sent {
        *holding = kept;
        return Err(error.into());
    }
    state.settle();
    // The old slices are kept until all ranks have the new ones.
    match progress.while_waiting(|| group.barrier()?.wait(None).and_then(|()| group.settle())) {
        Ok(()) => {
            let (cursor, cut) = (decision.cursor, assignment.generation);
            let pending = Pending { prepared: None, made: decision.made.map(|sums| (cursor, sums)) };
            *holding = Holding { state: Some(state), cursor, cut, other: None, pending };
            Ok(())
        }
        Err(error) => {
            kept.other = Some((assignment.generation, state));
            if kept.state.is_none() {
                kept.state = kept.other.take().map(|(_, state)| state);
                (kept.cut, kept.cursor) = (assignment.generation, decision.cursor);
                progress.set_cursor(kept.cursor);
            }
            *holding = kept;
            Err(error.into())
        }
    }
}

impl Holding {
    /// What this rank can give to a generation that wants these slices of it.
    fn claim(&self, recipe: &Recipe, wanted: (Slice, Option<Slice>)) -> Claim {
        let cut = |(generation, state): (Generation, &State)| {
            let Layout { slice, copy, .. } = state.layout();
            Cut { generation, slice, copy, fits: (slice, copy) == wanted }
        };
        let own = self.state.as_ref().map(|state| (self.cut, state));
        let other = self.other.as_ref().map(|(generation, state)| (*generation, state));
        Claim {
            cursor: self.cursor,
            cuts: own.into_iter().chain(other).map(cut).collect(),
            prepared: self.pending.prepared.as_ref().map(|prepared| prepared.to(recipe)),
            made: self.pending.made.filter(|(cursor, _)| *cursor == self.cursor).map(|(_, sums)| sums),
        }
    }

    /// Makes the step that others have made, if it is needed, and lets go of everything that is not sent. What this rank
    /// holds of another state, or another cut, comes second: only its memory is of use.
    fn reach(self, recipe: &Recipe, decision: &Decision, reached: bool) -> (Self, Option<State>) {
        let Self { state, mut cursor, cut, other, pending } = self;
        let own = state.map(|state| (cut, state));
        let (mut kept, mut memory) = (None, None);
        for (cut, state) in own.into_iter().chain(other) {
            match reached && cut == decision.generation {
                true => kept = Some(state),
                false => memory = Some(state),
            }
        }
        if let (Some(state), Some(prepared), Some(sums)) = (&mut kept, pending.prepared, decision.made)
            && cursor != decision.cursor
        {
            cursor = prepared.make(recipe, state, sums).cursor;
            tracing::info!(%cursor, "this rank makes the step that others have made");
        }
        let pending = Pending { prepared: None, made: decision.made.map(|sums| (decision.cursor, sums)) };
        let (cursor, cut) = match &kept {
            Some(_) => (cursor, decision.generation),
            None => Default::default(),
        };
        (Self { state: kept, cursor, cut, other: None, pending }, memory)
    }
}
