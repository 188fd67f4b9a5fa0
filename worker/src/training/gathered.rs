//! Weights of which each rank holds a slice. A block's are gathered before it computes and let go of afterwards, in the
//! forward pass and again in the backward pass (ZeRO stage 3, 1910.02054); those that belong to no block are gathered for a
//! phase.
//!
//! Gathering is collective: all ranks must compute the same blocks in the same order.

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use potstill_c10d::{Error, ProcessGroup, Work};
use potstill_distill::state::Slice;
use potstill_models::{
    Denoiser,
    gate::{Gate, redirect},
};
use potstill_torch_ext::upload;
use tch::{Kind, Tensor, no_grad};

use crate::session::Progress;

/// A flat vector of which each rank holds a slice.
#[derive(Debug)]
pub struct Sliced {
    /// This rank's slice. It may be of another data type than the weights: fp32 masters of bf16 weights.
    pub own: Tensor,
    /// Which one it is.
    pub slice: Slice,
    /// Length of the whole vector.
    pub numel: i64,
    /// Data type of the weights.
    pub kind: Kind,
}

impl Sliced {
    /// Starts to gather a range of the weights: each part of it comes from the rank that owns it.
    fn gather(&self, group: &ProcessGroup, elements: Range<i64>) -> Result<Incoming, Error> {
        let Self { own, slice, numel, kind } = self;
        let width = slice.width(*numel);
        let values = Tensor::zeros([elements.end - elements.start], (*kind, group.device()));
        let mut works = Vec::new();
        for owner in elements.start / width..=(elements.end - 1) / width {
            let first = owner * width;
            let (from, to) = (elements.start.max(first), elements.end.min(first + width));
            let mut part = values.narrow(0, from - elements.start, to - from);
            if owner as usize == slice.rank {
                let own = own.narrow(0, from - first, to - from);
                no_grad(|| match own.device() == part.device() {
                    true => part.copy_(&own),
                    // Half as many bytes.
                    false => part.copy_(&upload(&own.to_kind(*kind), part.device())),
                });
            }
            // One rank is measured alone, as if it were one of several.
            if group.member().world > 1 {
                works.push(group.broadcast(&part, owner as usize)?);
            }
        }
        Ok(Incoming { values, works })
    }
}

/// Weights that are on their way.
struct Incoming {
    values: Tensor,
    works: Vec<Work>,
}

impl Incoming {
    fn wait(self) -> Result<Tensor, Error> {
        for work in self.works {
            work.wait(None)?;
        }
        Ok(self.values)
    }
}

/// The gate of one network in one generation.
pub struct Gathered {
    group: ProcessGroup,
    progress: Arc<Progress>,
    /// Leaves of each block.
    blocks: Vec<Range<usize>>,
    /// Leaves between the blocks.
    rest: Vec<Range<usize>>,
    pass: Mutex<Pass>,
}

struct Pass {
    weights: Sliced,
    leaves: Vec<Leaf>,
    /// The block after the one that computes.
    ahead: Option<(usize, Incoming)>,
    waited: Duration,
    failure: Option<Error>,
}

struct Leaf {
    tensor: Tensor,
    /// Its values while it has none.
    absent: Tensor,
    elements: Range<i64>,
}

impl Gathered {
    /// The gate of a network whose leaves have no values yet, for the weights of its base.
    pub fn new(
        network: &dyn Denoiser,
        weights: Sliced,
        group: &ProcessGroup,
        progress: &Arc<Progress>,
    ) -> Arc<Self> {
        let (blocks, base) = (network.blocks(), network.base());
        let ends = blocks.iter().map(|block| block.end);
        let starts = blocks.iter().map(|block| block.start).chain([base.leaves().len()]);
        let rest = [0].into_iter().chain(ends).zip(starts).map(|(from, to)| from..to);
        let rest = rest.filter(|leaves| !leaves.is_empty()).collect();
        let leaf = |(entry, tensor): (&potstill_models::Entry, &Tensor)| Leaf {
            tensor: tensor.shallow_clone(),
            absent: tensor.detach(),
            elements: entry.offset..entry.offset + entry.numel(),
        };
        let leaves = base.entries().iter().zip(base.leaves()).map(leaf).collect();
        let pass = Pass { weights, leaves, ahead: None, waited: Duration::ZERO, failure: None };
        let (group, progress) = (group.clone(), Arc::clone(progress));
        let made = Arc::new(Self { group, progress, blocks, rest, pass: Mutex::new(pass) });
        let gate: Arc<dyn Gate> = Arc::clone(&made) as _;
        network.set_gate(&gate);
        made
    }

    fn pass(&self) -> MutexGuard<'_, Pass> {
        self.pass.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gathers the weights that belong to no block.
    ///
    /// # Errors
    /// A collective failed.
    pub fn enter_rest(&self) -> Result<(), Error> {
        let mut pass = self.pass();
        for leaves in &self.rest {
            let incoming = pass.weights.gather(&self.group, pass.elements(leaves))?;
            self.place(&mut pass, leaves, incoming)?;
        }
        Ok(())
    }

    /// Lets go of them. Returns how long the passes since the last call waited for peers.
    ///
    /// # Errors
    /// A collective in a pass failed, whose results must not be used.
    pub fn leave_rest(&self) -> Result<Duration, Error> {
        let mut pass = self.pass();
        if let Some((_, incoming)) = pass.ahead.take() {
            self.progress.while_waiting(|| incoming.wait().map(drop))?;
        }
        for leaves in &self.rest {
            pass.clear(leaves);
        }
        let waited = std::mem::take(&mut pass.waited);
        pass.failure.take().map_or(Ok(waited), Err)
    }

    /// Waits for weights and gives them to their leaves.
    fn place(&self, pass: &mut Pass, leaves: &Range<usize>, incoming: Incoming) -> Result<(), Error> {
        let waiting = Instant::now();
        let values = self.progress.while_waiting(|| incoming.wait())?;
        pass.waited += waiting.elapsed();
        let first = pass.elements(leaves).start;
        for Leaf { tensor, elements, .. } in &pass.leaves[leaves.clone()] {
            let part = values.narrow(0, elements.start - first, elements.end - elements.start);
            redirect(tensor, &part.view(tensor.size().as_slice()));
        }
        Ok(())
    }

    fn try_enter(&self, pass: &mut Pass, block: usize, backward: bool) -> Result<(), Error> {
        let gather =
            |pass: &Pass, block: usize| pass.weights.gather(&self.group, pass.elements(&self.blocks[block]));
        let incoming = match pass.ahead.take() {
            Some((ahead, incoming)) if ahead == block => incoming,
            other => {
                // A pass ended with the block before, as that of an encoder does.
                if let Some((_, unused)) = other {
                    self.progress.while_waiting(|| unused.wait().map(drop))?;
                }
                gather(pass, block)?
            }
        };
        self.place(pass, &self.blocks[block], incoming)?;
        let next = match backward {
            true => block.checked_sub(1),
            false => Some(block + 1).filter(|next| *next < self.blocks.len()),
        };
        if let Some(next) = next {
            pass.ahead = Some((next, gather(pass, next)?));
        }
        Ok(())
    }
}

impl Pass {
    fn elements(&self, leaves: &Range<usize>) -> Range<i64> {
        self.leaves[leaves.start].elements.start..self.leaves[leaves.end - 1].elements.end
    }

    fn clear(&self, leaves: &Range<usize>) {
        for Leaf { tensor, absent, .. } in &self.leaves[leaves.clone()] {
            redirect(tensor, absent);
        }
    }
}

impl Gate for Gathered {
    fn enter(&self, block: usize, backward: bool) {
        let mut pass = self.pass();
        // After a failure the pass goes on without the weights, and its results are not used: autograd has no way to end it.
        if pass.failure.is_none()
            && let Err(error) = self.try_enter(&mut pass, block, backward)
        {
            pass.failure = Some(error);
        }
    }

    fn leave(&self, block: usize) {
        self.pass().clear(&self.blocks[block]);
    }
}
