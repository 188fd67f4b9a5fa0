//! The process groups of a generation: that of all ranks, and where the state is divided within groups of them, those.

use std::{sync::Arc, time::Duration};

use potstill_c10d::{Backend, Error, ProcessGroup, Store};
use potstill_distill::state::Slice;
use potstill_proto::message::{Assignment, Replica};

use crate::session::GenerationStore;

/// The collectives of a generation have no timeout of their own: a rank that computes for long does not let its peers fail.
/// The coordinator finds ranks that are dead or hang, and ends the generation of those that wait for them; without a
/// coordinator a rank leaves its groups when its patience is over.
const COLLECTIVES: Duration = Duration::MAX;

/// See the module's documentation. All ranks start the operations of all groups in one order.
#[derive(Clone)]
pub struct Groups {
    /// All ranks.
    pub all: ProcessGroup,
    /// The ranks that hold all slices of the state together, in the order of the slices.
    pub shards: ProcessGroup,
    /// The ranks that hold the same slice, one of each replica of the state, where there are several.
    pub replicas: Option<ProcessGroup>,
}

impl From<ProcessGroup> for Groups {
    /// The ranks hold the state once.
    fn from(all: ProcessGroup) -> Self {
        Self { shards: all.clone(), all, replicas: None }
    }
}

impl Groups {
    /// Waits until the ranks of an assignment have met in its generation's store.
    ///
    /// # Errors
    /// As [`ProcessGroup::new`].
    pub fn join(
        backend: &Backend,
        store: &GenerationStore,
        assignment: &Assignment,
        timeout: Duration,
    ) -> Result<Self, Error> {
        let group = |store: GenerationStore, rank: u32, world: u32| -> Result<ProcessGroup, Error> {
            let store = Store::of(Arc::new(store), timeout)?;
            let group = ProcessGroup::new(backend, &store, rank as usize, world as usize, timeout)?;
            group.set_timeout(COLLECTIVES)?;
            Ok(group)
        };
        let world = assignment.world_size;
        let all = group(store.clone(), assignment.rank, world)?;
        let Some(Replica { number, slice, slices }) = assignment.replica else { return Ok(all.into()) };
        let shards = group(store.of_group(&format!("replica-{number}")), slice, slices)?;
        let replicas = group(store.of_group(&format!("slice-{slice}")), number, world / slices)?;
        Ok(Self { all, shards, replicas: Some(replicas) })
    }

    /// Every group, that of all ranks first.
    pub fn every(&self) -> Vec<ProcessGroup> {
        let parts = self.replicas.iter().flat_map(|replicas| [&self.shards, replicas]);
        [&self.all].into_iter().chain(parts).cloned().collect()
    }

    /// Which replica of the state this rank belongs to, and how many there are.
    pub fn replica(&self) -> Slice {
        self.replicas.as_ref().map_or(Slice::WHOLE, |replicas| {
            let member = replicas.member();
            Slice { rank: member.rank, world: member.world }
        })
    }

    /// As [`ProcessGroup::settle`], of every group.
    ///
    /// # Errors
    /// That of a group.
    pub fn settle(&self) -> Result<(), Error> {
        self.every().iter().try_for_each(ProcessGroup::settle)
    }
}
