//! Adam's step in one pass over memory.

use std::ptr;

use tch::Tensor;

use crate::{Error, ffi, shim::call};

/// The numbers of one step of Adam (1412.6980).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamStep {
    /// The step's number, from 1.
    pub step: u64,
    /// Step size.
    pub learning_rate: f64,
    /// Decay of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the square root of the second moment.
    pub epsilon: f64,
}

/// Steps `values` with `gradient`, in place; the moments follow. All are 1-D and have the same length, data type and device.
/// Without a first moment its decay must be 0, and `gradient` must have memory of its own, which keeps its values.
///
/// # Errors
/// libtorch's error.
pub fn step_adam(
    values: &Tensor,
    gradient: &Tensor,
    first: Option<&Tensor>,
    second: &Tensor,
    step: AdamStep,
) -> Result<(), Error> {
    let operation = "step Adam";
    let [beta1, beta2] = step.betas;
    if first.is_none() && beta1 != 0.0 {
        let cause = format!("there is no first moment, but its decay is {beta1}");
        return Err(Error { operation, cause });
    }
    let fits =
        |x: &Tensor| (x.size(), x.kind(), x.device()) == (values.size(), values.kind(), values.device());
    if ![Some(gradient), first, Some(second)].into_iter().flatten().all(fits) {
        return Err(Error {
            operation,
            cause: "gradient and moments are of another shape, kind or device".into(),
        });
    }
    call(|error| {
        // SAFETY: the tensors live, and have equal shapes, data types and devices.
        unsafe {
            ffi::potstill_adam(
                values.as_ptr(),
                gradient.as_ptr(),
                first.map_or(ptr::null(), |first| first.as_ptr()),
                second.as_ptr(),
                step.step,
                step.learning_rate,
                beta1,
                beta2,
                step.epsilon,
                error,
            )
        }
    })
    .map_err(|cause| Error { operation, cause })
}
