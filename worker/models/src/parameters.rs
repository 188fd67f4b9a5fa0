//! Weights of a network as views into one flat vector.

use std::{collections::BTreeMap, sync::Arc};

use tch::{Kind, Tensor};

/// The place of a parameter in the flat vector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Name, as in the public checkpoints of the architecture.
    pub name: String,
    /// Shape.
    pub shape: Vec<i64>,
    /// Index of its first element; elements follow in row-major order.
    pub offset: i64,
}

impl Entry {
    /// Number of elements.
    #[must_use]
    pub fn numel(&self) -> i64 {
        self.shape.iter().product()
    }
}

/// The parameters of one network, all of them views into one flat fp32 vector, without gaps.
///
/// So the optimizer, the average and a state transfer are a few operations on one tensor, and a checkpoint consists of
/// slices of it.
pub struct Parameters {
    entries: Arc<[Entry]>,
    flat: Tensor,
    leaves: Vec<Tensor>,
    buffers: BTreeMap<String, Tensor>,
}

impl Parameters {
    /// The parameters of a network from outside this crate: named fp32 tensors of one device, which are copied.
    #[must_use]
    pub fn from_named(tensors: &[(&str, Tensor)], trainable: bool) -> Self {
        let mut offset = 0;
        let entries: Vec<Entry> = tensors
            .iter()
            .map(|(name, tensor)| {
                let entry = Entry { name: (*name).to_owned(), shape: tensor.size(), offset };
                offset += entry.numel();
                entry
            })
            .collect();
        let flat: Vec<Tensor> =
            tensors.iter().map(|(_, tensor)| tensor.to_kind(Kind::Float).reshape([-1])).collect();
        Self::new(entries.into(), Tensor::cat(&flat, 0), BTreeMap::new(), trainable)
    }

    /// The same parameters as views into another vector, laid out like [`flat`](Self::flat).
    #[must_use]
    pub fn over(&self, flat: Tensor, trainable: bool) -> Self {
        let buffers = self.buffers.iter().map(|(name, b)| (name.clone(), b.shallow_clone()));
        Self::new(self.shared_entries(), flat, buffers.collect(), trainable)
    }

    /// Views into `flat`, which must have exactly the elements of `entries`.
    pub(crate) fn new(
        entries: Arc<[Entry]>,
        flat: Tensor,
        buffers: BTreeMap<String, Tensor>,
        trainable: bool,
    ) -> Self {
        let leaves = entries
            .iter()
            // Detached views share storage and version counter: autograd still notices an update between forward and
            // backward.
            .map(|entry| flat.narrow(0, entry.offset, entry.numel()).view(entry.shape.as_slice()).detach())
            .map(|view| view.set_requires_grad(trainable))
            .collect();
        Self { entries, flat, leaves, buffers }
    }

    /// Names, shapes and offsets, in the order in which the architecture registers its parameters.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    pub(crate) fn shared_entries(&self) -> Arc<[Entry]> {
        Arc::clone(&self.entries)
    }

    /// The vector itself: 1-D, takes no gradient; fp32, unless the network was put [over](crate::Denoiser::over)
    /// another. Weights are changed by changing it in place.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// The views with which the network computes, in the order of [`entries`](Self::entries): autograd leaves, which
    /// take gradients unless the network is frozen. A gradient reducer takes these.
    pub fn leaves(&self) -> &[Tensor] {
        &self.leaves
    }

    /// Constants that are saved with the weights but never trained: resampling filters, Fourier frequencies.
    #[must_use]
    pub fn buffers(&self) -> &BTreeMap<String, Tensor> {
        &self.buffers
    }

    /// The gradients as one new vector laid out like [`flat`](Self::flat); 0 where a leaf has none.
    pub fn flat_grad(&self) -> Tensor {
        let gradients: Vec<Tensor> = self
            .leaves
            .iter()
            .map(|leaf| {
                let gradient = leaf.grad();
                if gradient.defined() {
                    gradient.detach().reshape([-1])
                } else {
                    Tensor::zeros([leaf.numel() as i64], (Kind::Float, leaf.device()))
                }
            })
            .collect();
        Tensor::cat(&gradients, 0)
    }

    /// Sets the gradients to 0 in place, so that they remain views of a reducer's buckets.
    pub fn zero_grad(&self) {
        for leaf in &self.leaves {
            let gradient = leaf.grad();
            if gradient.defined() {
                let _ = gradient.detach().zero_();
            }
        }
    }
}
