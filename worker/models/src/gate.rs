//! Networks whose weights are in memory only while they are needed, one block at a time.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

/// Brings the weights of a network's blocks into the leaves of its [base](crate::Denoiser::base), and lets go of them. A block
/// computes between the two calls only.
pub trait Gate: Send + Sync {
    /// Before a block computes, in the order of the forward pass or, with `backward`, in the opposite one. The calling thread
    /// may be autograd's.
    fn enter(&self, block: usize, backward: bool);

    /// After a block has computed.
    fn leave(&self, block: usize);
}

/// A gate, and the number of a block there.
pub(crate) type Place = (Arc<dyn Gate>, usize);

/// A vector of as many elements in the memory of one, which is 0: the weights of a network that has none in memory. The
/// network's leaves must be [redirected](redirect) before it computes.
pub fn absent(numel: i64, options: (Kind, Device)) -> Tensor {
    Tensor::zeros([1], options).expand([numel], false)
}

/// Lets a leaf have the values of `values`, whose memory it shares from now on. To autograd it stays the same leaf: what has
/// been saved of it for a backward pass has the new values too.
///
/// # Panics
/// When shape, data type or device differ.
pub fn redirect(leaf: &Tensor, values: &Tensor) {
    let same = |tensor: &Tensor| (tensor.size(), tensor.kind(), tensor.device());
    assert_eq!(same(leaf), same(values), "values of another form");
    leaf.shallow_clone().set_data(values);
}
