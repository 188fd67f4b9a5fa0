//! The weights of a network in files, of which any range can be read.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::stored::{Named, Stored};
use crate::parameters::Entry;

/// The flat vector of a network's weights, in its files until a range of it is needed.
#[derive(Debug)]
pub struct Mapped {
    /// In the order of the vector, each with the index of its first element.
    tensors: Vec<(i64, Stored)>,
}

impl Mapped {
    /// `tensors` must have all of `entries`.
    pub(crate) fn new(entries: &[Entry], mut tensors: Named) -> Self {
        let found = |entry: &Entry| tensors.remove(&entry.name).map(|stored| (entry.offset, stored));
        Self { tensors: entries.iter().filter_map(found).collect() }
    }

    /// Elements of the vector: fp32, 1-D, on the host. No more than one tensor is read at a time.
    pub fn range(&self, range: Range<i64>) -> Tensor {
        let values = Tensor::zeros([range.end - range.start], (Kind::Float, tch::Device::Cpu));
        for (first, stored) in &self.tensors {
            let numel: i64 = stored.shape().iter().product();
            let (from, to) = (range.start.max(*first), range.end.min(first + numel));
            if from < to {
                let part = stored.tensor().reshape([-1]).narrow(0, from - first, to - from);
                values.narrow(0, from - range.start, to - from).copy_(&part);
            }
        }
        values
    }

    /// The name of the first of these tensors with a value that is not finite, among `entries`, which are those of the network.
    pub fn first_not_finite<'a>(&self, entries: &'a [Entry]) -> Option<&'a str> {
        let finite = |stored: &Stored| stored.tensor().isfinite().all().int64_value(&[]) != 0;
        let found = self.tensors.iter().zip(entries).find(|((_, stored), _)| !finite(stored));
        found.map(|(_, entry)| entry.name.as_str())
    }
}
