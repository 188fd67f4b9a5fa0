//! Averages gradients over ranks during the backward pass.

use std::ptr::{self, NonNull};
use std::time::Duration;

use potstill_torch_ext::shim::call;
use tch::Tensor;

use crate::error::Error;
use crate::ffi;
use crate::group::ProcessGroup;

/// How gradients are grouped into buckets, each of which is one all-reduce. The defaults are those of PyTorch's
/// `DistributedDataParallel`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReducerOptions {
    /// The size of the first bucket in bytes, small so that communication starts early.
    pub first_bucket_bytes: usize,
    /// The size of the others in bytes. A single larger gradient gets a bucket of its own.
    pub bucket_bytes: usize,
    /// Whether gradients are views of the buckets. That saves their memory and one copy.
    pub gradient_as_bucket_view: bool,
}

impl Default for ReducerOptions {
    fn default() -> ReducerOptions {
        ReducerOptions { first_bucket_bytes: 1 << 20, bucket_bytes: 25 << 20, gradient_as_bucket_view: true }
    }
}

/// `c10d::Reducer`, the engine inside PyTorch's `DistributedDataParallel`.
///
/// One optimizer step goes like this, on every rank alike:
/// 1. [`zero_grad`](Reducer::zero_grad).
/// 2. For every micro-batch but the last, plain `backward` of tch: gradients add up locally.
/// 3. For the last one, [`Reducer::backward`]: gradients are added too, and each bucket is all-reduced as
///    soon as it is full. Afterwards each parameter's gradient is the **mean over ranks of the sum over
///    micro-batches**.
/// 4. The optimizer's step.
///
/// **Every parameter must get a gradient in the last micro-batch's backward.** One without fails that call; remove it
/// from `params`, or make the loss depend on it (add it to the loss times 0).
///
/// The layout of buckets is fixed at construction, by the order of `params` and the sizes alone. The bits of the result
/// therefore depend on ranks' gradients, world size and options only, from the first iteration on.
///
/// **After an error** the gradients are a mixture: drop the reducer, call [`potstill_torch_ext::clear_gradients`], and compute
/// the phase again with a new one. Dropping a reducer does not block while its group has another handle.
#[derive(Debug)]
pub struct Reducer {
    raw: NonNull<ffi::Reducer>,
    params: Vec<Tensor>,
    group: ProcessGroup,
}

// SAFETY: `c10d::Reducer` is bound to no thread (autograd calls its hooks from threads of its own) and guards
// its state with a lock. It is not `Sync`: two backwards at once make no sense.
unsafe impl Send for Reducer {}

impl Drop for Reducer {
    fn drop(&mut self) {
        // Here and not on another thread: this removes the hooks from the parameters, which others continue to use.
        // SAFETY: the pointer came from the shim, is owned here, and is used no more.
        unsafe { ffi::potstill_reducer_free(self.raw.as_ptr()) }
    }
}

impl Reducer {
    /// Prepares the gradients of `params` for averaging over `group`. A collective: all ranks call it, with parameters
    /// of the same shapes and kinds in the same order, preferably that of the forward pass.
    ///
    /// Blocks until the ranks have compared the shapes and agreed on the buckets.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) when a parameter is not a dense leaf that
    /// requires gradients on the group's device; otherwise that of the collectives, also when the ranks'
    /// parameters differ.
    pub fn new(params: &[Tensor], group: &ProcessGroup, options: ReducerOptions) -> Result<Reducer, Error> {
        if params.is_empty() {
            return Err(group.invalid("make a reducer", "no parameters"));
        }
        for (index, param) in params.iter().enumerate() {
            let cause = if !param.defined() {
                "is undefined"
            } else if param.is_sparse() {
                "is sparse"
            } else if !param.requires_grad() || !param.is_leaf() {
                "is not a leaf that requires gradients"
            } else if param.device() != group.device() {
                "is not on the group's device"
            } else {
                continue;
            };
            return Err(group.invalid("make a reducer", format!("parameter {index} {cause}")));
        }
        let bytes = |bytes: usize| i64::try_from(bytes.max(1)).unwrap_or(i64::MAX);
        let pointers: Vec<_> = params.iter().map(Tensor::as_ptr).collect();
        group.in_turn("make a reducer", |operation| {
            let mut raw = ptr::null_mut();
            call(|error| {
                // SAFETY: group and parameters are alive during the call, and `pointers` holds as many as is
                // said; the reducer takes its own references to all of them.
                unsafe {
                    ffi::potstill_reducer_new(
                        group.as_ptr(),
                        pointers.as_ptr(),
                        pointers.len(),
                        bytes(options.first_bucket_bytes),
                        bytes(options.bucket_bytes),
                        options.gradient_as_bucket_view,
                        &mut raw,
                        error,
                    )
                }
            })
            .map_err(|cause| group.failure(operation, cause))?;
            let raw = NonNull::new(raw).ok_or_else(|| group.failure(operation, "no reducer".to_owned()))?;
            let params = params.iter().map(Tensor::shallow_clone).collect();
            Ok(Reducer { raw, params, group: group.clone() })
        })
    }

    /// Backward of the step's last micro-batch: adds its gradients to those already there, and averages the
    /// sums over all ranks. A collective. Blocks until backward is over and the averages are in place (with
    /// NCCL: ordered into the current CUDA stream).
    ///
    /// Returns how long it waited for communication after the last gradient was computed: the part that did not overlap
    /// with the computation. With NCCL, where the host does not wait, zero.
    ///
    /// # Errors
    /// As for any collective, when a peer is lost, stuck, or this process aborts the group; also when the
    /// loss cannot be differentiated, or a parameter got no gradient.
    pub fn backward(&self, loss: &Tensor) -> Result<Duration, Error> {
        self.group.in_turn("backward", |operation| {
            let mut exposed = 0;
            call(|error| {
                // SAFETY: reducer and loss are alive during the call, and `self` is not shared with another
                // thread.
                unsafe {
                    ffi::potstill_reducer_backward(self.raw.as_ptr(), loss.as_ptr(), &mut exposed, error)
                }
            })
            .map_err(|cause| self.group.failure(operation, cause))?;
            Ok(Duration::from_nanos(exposed.max(0) as u64))
        })
    }

    /// [`potstill_torch_ext::clear_gradients`] of this reducer's parameters.
    pub fn zero_grad(&self) -> Result<(), Error> {
        Ok(potstill_torch_ext::clear_gradients(&self.params)?)
    }
}
