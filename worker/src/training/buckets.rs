//! Gradients that are summed in fp32 and reduced in buckets, while the backward pass goes on.
//!
//! A bucket is a stretch of the flat parameters. As soon as all its gradients of a micro-batch are there, they are added to
//! the sum and released; in a phase's last micro-batch the bucket's reduction starts then. All ranks start the reductions
//! in one order, whatever order autograd has.

use std::{
    collections::VecDeque,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use potstill_c10d::{Error, ReduceOp, Work};
use potstill_distill::state::Slice;
use potstill_models::Parameters;
use potstill_torch_ext::{GradientHooks, clear_gradients, on_gradients};
use tch::{Kind, Tensor, no_grad};

use super::groups::Groups;
use crate::session::Progress;

/// Elements of a bucket, at most, unless a single tensor is larger: 25 MiB of fp32, as in PyTorch's
/// `DistributedDataParallel`.
const LARGEST: i64 = (25 << 20) / 4;
/// Buckets of a network, at least, where they do not become smaller than this.
const FEWEST: i64 = 16;
const SMALLEST: i64 = 1 << 12;
/// Buckets whose reductions are under way, at most, where something follows them: they need memory of their own, or are passed
/// on.
pub const UNDER_WAY: usize = 2;

/// The slices of a gradient that a rank needs, and the rank that needs its own too.
#[derive(Clone, Copy, Debug)]
pub struct Shares {
    /// The rank's own.
    pub slice: Slice,
    /// The one that it holds a copy of.
    pub copy: Option<Slice>,
    /// The rank that holds a copy of its own.
    pub copied_by: usize,
    /// Whether each rank holds no more of the sum than its own slice, so that every micro-batch is reduced.
    pub sharded_sum: bool,
    /// Micro-batches of the rank that has the most.
    pub rounds: usize,
}

/// A stretch of the flat parameters that ends where a parameter does.
struct Bucket {
    leaves: Range<usize>,
    elements: Range<i64>,
}

/// Elements of a bucket of a network with this many parameters, at most, unless a single tensor is larger.
pub fn elements(numel: i64) -> i64 {
    (numel / FEWEST).clamp(SMALLEST, LARGEST)
}

fn buckets(sizes: &[i64]) -> Vec<Bucket> {
    let most = elements(sizes.iter().sum());
    let (mut buckets, mut offset) = (Vec::<Bucket>::new(), 0);
    for (leaf, size) in sizes.iter().enumerate() {
        match buckets.last_mut() {
            Some(last) if last.elements.end - last.elements.start + size <= most => {
                last.leaves.end = leaf + 1;
                last.elements.end += size;
            }
            _ => buckets.push(Bucket { leaves: leaf..leaf + 1, elements: offset..offset + size }),
        }
        offset += size;
    }
    buckets
}

/// Memory of a sum of gradients of `parameters`, which the networks use in turn: of the sum over this rank's micro-batches, with
/// room for the slices of all ranks, which have equal lengths; or only that of the rank's own slice, over all ranks'
/// micro-batches.
pub fn memory(parameters: &Parameters, shares: Shares) -> Tensor {
    let flat = parameters.flat();
    let width = shares.slice.width(flat.numel() as i64);
    let room = if shares.sharded_sum { width } else { width * shares.slice.world as i64 };
    Tensor::zeros([room], (Kind::Float, flat.device()))
}

/// A bucket whose reduction is under way: a part of the sum, or memory of its own.
struct Launched {
    /// They keep their tensors alive.
    works: Vec<Work>,
    /// A place in the sum, and the stretch that is to be added to it.
    added: Option<(Tensor, Tensor)>,
    elements: Range<i64>,
    /// Whether it completes the bucket's sum over the phase.
    last: bool,
}

struct Pass {
    leaves: Vec<Tensor>,
    sum: Tensor,
    /// Gradients of each bucket that are still missing in this micro-batch.
    missing: Vec<usize>,
    /// Buckets of this micro-batch below this number are not yet taken.
    left: usize,
    /// Micro-batches of this phase so far, with this one.
    begun: usize,
    /// Whether a bucket is reduced when it is taken.
    reduces: bool,
    /// Whether this micro-batch's gradients count.
    counts: bool,
    launched: VecDeque<Launched>,
    /// What follows the reductions: owners' parts of buckets on their way to the ranks that hold copies, or sums between groups.
    followed: Vec<Work>,
    /// How long this micro-batch has waited for peers.
    waited: Duration,
    failure: Option<Error>,
}

struct Shared {
    buckets: Vec<Bucket>,
    /// The bucket of each leaf.
    of_leaf: Vec<usize>,
    numel: i64,
    shares: Shares,
    groups: Groups,
    progress: Arc<Progress>,
    pass: Mutex<Pass>,
}

/// See the module's documentation.
pub struct Bucketed {
    shared: Arc<Shared>,
    _hooks: GradientHooks,
}

impl Bucketed {
    /// For one network; `sum` is [memory] for it.
    ///
    /// # Errors
    /// libtorch's error.
    pub fn new(
        parameters: &Parameters,
        sum: Tensor,
        shares: Shares,
        groups: &Groups,
        progress: &Arc<Progress>,
    ) -> Result<Self, Error> {
        let sizes: Vec<i64> = parameters.entries().iter().map(potstill_models::Entry::numel).collect();
        let buckets = buckets(&sizes);
        let number = |(number, bucket): (usize, &Bucket)| vec![number; bucket.leaves.len()];
        let of_leaf = buckets.iter().enumerate().flat_map(number).collect();
        let pass = Pass {
            leaves: parameters.leaves().iter().map(Tensor::shallow_clone).collect(),
            sum,
            missing: vec![],
            left: 0,
            begun: 0,
            reduces: false,
            counts: true,
            launched: VecDeque::new(),
            followed: vec![],
            waited: Duration::ZERO,
            failure: None,
        };
        let shared = Arc::new(Shared {
            buckets,
            of_leaf,
            numel: sizes.iter().sum(),
            shares,
            groups: groups.clone(),
            progress: Arc::clone(progress),
            pass: Mutex::new(pass),
        });
        let told = Arc::clone(&shared);
        let hooks = on_gradients(parameters.leaves(), move |leaf| told.arrived(leaf))?;
        Ok(Self { shared, _hooks: hooks })
    }

    /// Before the backward pass of a micro-batch; `last` is the phase's last one on this rank. One that does not count is
    /// computed only because others compute one.
    pub fn begin(&self, last: bool, counts: bool) {
        let mut pass = self.shared.pass();
        pass.missing = self.shared.buckets.iter().map(|bucket| bucket.leaves.len()).collect();
        pass.left = self.shared.buckets.len();
        pass.begun += 1;
        pass.reduces = last || self.shared.shares.sharded_sum;
        pass.counts = counts;
        pass.waited = Duration::ZERO;
    }

    /// After the backward pass: takes the buckets some of whose parameters got no gradient. Returns how long the pass waited for
    /// peers.
    ///
    /// # Errors
    /// A collective failed.
    pub fn end(&self) -> Result<Duration, Error> {
        let mut pass = self.shared.pass();
        while pass.left > 0 {
            self.shared.take(&mut pass);
        }
        pass.failure.take().map_or(Ok(pass.waited), Err)
    }

    /// The slices of the sum over all ranks that this rank needs. `computed`: its micro-batches, with those that do not count.
    ///
    /// # Errors
    /// A collective failed.
    pub fn finish(&self, computed: usize) -> Result<Vec<Tensor>, Error> {
        let Shares { slice, copy, copied_by, sharded_sum, rounds } = self.shared.shares;
        if sharded_sum {
            // Others have more micro-batches.
            for _ in computed..rounds {
                self.begin(true, false);
                self.end()?;
            }
        }
        let mut pass = self.shared.pass();
        while let Some(launched) = pass.launched.pop_front() {
            self.shared.complete(&mut pass, launched)?;
        }
        for work in pass.followed.drain(..) {
            work.wait(None)?;
        }
        pass.begun = 0;
        let (numel, alone) = (self.shared.numel, self.shared.groups.all.member().world == 1);
        if slice.world == 1 {
            return Ok(vec![pass.sum.narrow(0, 0, numel)]);
        }
        let width = slice.width(numel);
        let of = |slice: Slice| match sharded_sum {
            true => pass.sum.narrow(0, 0, width),
            false => pass.sum.narrow(0, slice.rank as i64 * width, width),
        };
        let own = of(slice);
        let copied = match copy {
            Some(copy) if sharded_sum && !alone => {
                // The owner's bits, so that both make the same step. Only now: until here there is no memory for it.
                let copied = own.empty_like();
                // In pieces: with Gloo one exchange of two ranks goes in one direction after the other.
                let piece = elements(numel);
                let exchange = |from: i64| {
                    let part = |whole: &Tensor| whole.narrow(0, from, piece.min(width - from));
                    self.shared.groups.all.exchange(&part(&copied), &part(&own), copied_by, copy.rank)
                };
                let works: Vec<Work> =
                    (0..width).step_by(piece as usize).map(exchange).collect::<Result<_, _>>()?;
                works.iter().try_for_each(|work| work.wait(None))?;
                Some((copy, copied))
            }
            // One rank is measured alone, as if it were one of several.
            Some(copy) if sharded_sum => Some((copy, of(copy).copy())),
            copy => copy.map(|copy| (copy, of(copy))),
        };
        let cut = |(slice, room): (Slice, Tensor)| {
            let range = slice.range(numel);
            room.narrow(0, 0, range.end - range.start)
        };
        Ok([(slice, own)].into_iter().chain(copied).map(cut).collect())
    }

    /// Clears the gradients that a backward pass which was not completed has left.
    ///
    /// # Errors
    /// libtorch's error.
    pub fn discard(&self) -> Result<(), Error> {
        let mut pass = self.shared.pass();
        pass.failure = None;
        Ok(clear_gradients(&pass.leaves)?)
    }

    /// Clears the sum of a phase that is over.
    pub fn clear(&self) {
        let pass = self.shared.pass();
        let _ = no_grad(|| pass.sum.shallow_clone().zero_());
    }
}

impl Shared {
    fn pass(&self) -> std::sync::MutexGuard<'_, Pass> {
        self.pass.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The gradient of a leaf is there. Buckets are taken from the last to the first, as the backward pass completes them.
    fn arrived(&self, leaf: usize) {
        let mut pass = self.pass();
        let bucket = self.of_leaf[leaf];
        pass.missing[bucket] = pass.missing[bucket].saturating_sub(1);
        while pass.left > 0 && pass.missing[pass.left - 1] == 0 {
            self.take(&mut pass);
        }
    }

    /// Takes the next bucket's gradients. Nothing is taken after a failure.
    fn take(&self, pass: &mut Pass) {
        pass.left -= 1;
        if pass.failure.is_some() {
            return;
        }
        // tch panics with libtorch's error, which must not leave autograd's thread.
        let taken = catch_unwind(AssertUnwindSafe(|| self.try_take(pass, pass.left)));
        pass.failure = match taken {
            Ok(taken) => taken.err(),
            Err(panic) => Some(potstill_torch_ext::Error::of_panic("add gradients up", &*panic).into()),
        };
    }

    fn try_take(&self, pass: &mut Pass, bucket: usize) -> Result<(), Error> {
        let Bucket { leaves, elements } = &self.buckets[bucket];
        let (whole, parts) = no_grad(|| self.accumulated(pass, leaves, elements));
        clear_gradients(&pass.leaves[leaves.clone()])?;
        if !pass.reduces {
            return Ok(());
        }
        let Shares { slice, sharded_sum, rounds, .. } = self.shares;
        let last = !sharded_sum || pass.begun >= rounds;
        let mut launched = Launched { works: vec![], added: None, elements: elements.clone(), last };
        let Groups { all, shards, .. } = &self.groups;
        if all.member().world > 1 {
            launched.works = match slice.world {
                1 => vec![all.all_reduce(&whole, ReduceOp::Sum)?],
                // Two ranks reduce to both of them in the time in which they reduce to one.
                2 => vec![shards.all_reduce(&whole, ReduceOp::Sum)?],
                _ => parts
                    .iter()
                    .map(|(part, owner, _)| shards.reduce(part, *owner))
                    .collect::<Result<_, _>>()?,
            };
        }
        if let Some((part, _, first)) =
            parts.into_iter().find(|(_, owner, _)| sharded_sum && *owner == slice.rank)
        {
            let length = part.numel() as i64;
            launched.added = Some((pass.sum.narrow(0, first, length), part));
        }
        pass.launched.push_back(launched);
        let follows = sharded_sum || self.passes_on() || self.groups.replicas.is_some();
        while follows && pass.launched.len() > UNDER_WAY {
            if let Some(launched) = pass.launched.pop_front() {
                let waiting = Instant::now();
                self.progress.while_waiting(|| self.complete(pass, launched))?;
                pass.waited += waiting.elapsed();
            }
        }
        Ok(())
    }

    /// Waits for the reduction of a bucket, and does what follows it.
    fn complete(&self, pass: &mut Pass, launched: Launched) -> Result<(), Error> {
        let Launched { works, added, elements, last } = launched;
        for work in works {
            work.wait(None)?;
        }
        if let Some((mut place, part)) = added {
            let _ = no_grad(|| place.g_add_(&part));
        }
        if !last {
            return Ok(());
        }
        let Shares { slice, copied_by, sharded_sum, .. } = self.shares;
        // The bucket's part of a slice.
        let part = |slice: Slice| {
            let range = slice.range(self.numel);
            let from = elements.start.max(range.start).min(range.end);
            let length = elements.end.min(range.end).max(from) - from;
            pass.sum.narrow(0, if sharded_sum { from - range.start } else { from }, length)
        };
        if let Some(copy) = self.shares.copy.filter(|_| self.passes_on()) {
            // The owner's bits, so that both make the same step.
            let work = self.groups.all.exchange(&part(copy), &part(slice), copied_by, copy.rank)?;
            pass.followed.push(work);
        }
        if let Some(replicas) = &self.groups.replicas {
            let own = part(slice);
            if own.numel() > 0 {
                // The same bits for each of them.
                let work = replicas.all_reduce(&own, ReduceOp::Sum)?;
                pass.followed.push(work);
            }
        }
        Ok(())
    }

    /// Whether the owners' parts of each bucket are passed on to the ranks that hold copies while other buckets are reduced. Two
    /// ranks have both slices.
    fn passes_on(&self) -> bool {
        let Shares { slice, copy, sharded_sum, .. } = self.shares;
        copy.is_some() && !sharded_sum && slice.world > 2 && self.groups.all.member().world > 1
    }

    /// Adds a bucket's gradients to the sum. Gives them, and their parts that belong to one slice each, with its rank and the
    /// place in it.
    fn accumulated(
        &self,
        pass: &Pass,
        leaves: &Range<usize>,
        elements: &Range<i64>,
    ) -> (Tensor, Vec<(Tensor, usize, i64)>) {
        let Shares { slice, sharded_sum, .. } = self.shares;
        let length = elements.end - elements.start;
        let whole = match sharded_sum {
            true => Tensor::zeros([length], (Kind::Float, pass.sum.device())),
            false => pass.sum.narrow(0, elements.start, length),
        };
        let mut offset = 0;
        for leaf in &pass.leaves[leaves.clone()] {
            let (size, gradient) = (leaf.numel() as i64, leaf.grad());
            if pass.counts && gradient.defined() {
                let _ = whole.narrow(0, offset, size).g_add_(&gradient.reshape([-1]));
            }
            offset += size;
        }
        if slice.world == 1 {
            return (whole, vec![]);
        }
        let width = slice.width(self.numel);
        let owners = elements.start / width..=(elements.end - 1) / width;
        let part = |owner: i64| {
            let from = elements.start.max(owner * width);
            let to = elements.end.min((owner + 1) * width);
            let part = whole.narrow(0, from - elements.start, to - from);
            (part, owner as usize, from - owner * width)
        };
        let parts = owners.map(part).collect();
        (whole, parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_stretches_of_whole_parameters() {
        for sizes in [vec![10], vec![5; 100_000], vec![LARGEST * 2, 1, 3], vec![1, 1, LARGEST + 1, 7]] {
            let numel: i64 = sizes.iter().sum();
            let buckets = buckets(&sizes);
            assert_eq!((buckets[0].leaves.start, buckets[0].elements.start), (0, 0));
            let last = &buckets[buckets.len() - 1];
            assert_eq!((last.leaves.end, last.elements.end), (sizes.len(), numel));
            for pair in buckets.windows(2) {
                assert_eq!(pair[0].leaves.end, pair[1].leaves.start);
                assert_eq!(pair[0].elements.end, pair[1].elements.start);
            }
            for bucket in &buckets {
                let length: i64 = sizes[bucket.leaves.clone()].iter().sum();
                assert_eq!(bucket.elements.end - bucket.elements.start, length);
                assert!(bucket.leaves.len() == 1 || length <= LARGEST);
            }
        }
        assert_eq!(buckets(&vec![1000; 1000]).len(), 17, "{FEWEST}, and a rest");
    }
}
