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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_could_not_tell_is_refused() {
        let zeros = |numel: i64| Tensor::zeros([numel], (tch::Kind::Float, tch::Device::Cpu));
        let step = |betas| AdamStep { step: 1, learning_rate: 0.1, betas, epsilon: 1e-8 };
        let (x, three) = (zeros(4), zeros(3));
        assert!(step_adam(&x, &zeros(4), None, &zeros(4), step([0.0, 0.9])).is_ok());
        let error = step_adam(&x, &zeros(4), None, &zeros(4), step([0.5, 0.9])).unwrap_err();
        assert!(error.to_string().contains("no first moment, but its decay is 0.5"), "{error}");
        let error = step_adam(&x, &three, None, &zeros(4), step([0.0, 0.9])).unwrap_err();
        assert!(error.to_string().contains("another shape"), "{error}");
    }

    #[test]
    fn without_a_first_moment_the_gradient_keeps_its_values() {
        let values = Tensor::from_slice(&[1.0f32, -2.0, 3.0]);
        let gradient = Tensor::from_slice(&[0.5f32, 0.25, -1.0]);
        let (before, second) = (gradient.copy(), gradient.zeros_like());
        let step = AdamStep { step: 1, learning_rate: 0.1, betas: [0.0, 0.999], epsilon: 1e-8 };
        step_adam(&values, &gradient, None, &second, step).unwrap();
        assert_eq!(gradient, before);
    }
}
