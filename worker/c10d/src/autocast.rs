//! Automatic mixed precision, which tch offers for one device and one kind only.

use std::marker::PhantomData;

use tch::Device;

use crate::{Error, error::call, ffi};

/// The lower precision of [`Autocast`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LowerPrecision {
    /// bfloat16.
    BFloat16,
    /// IEEE half.
    Half,
}

/// While it lives, this thread's convolutions, matrix products and attention on a device compute in lower precision;
/// libtorch's list says which operations do and which stay in fp32. Weights stay as they are and get fp32 gradients.
/// Backward passes belong outside.
pub struct Autocast {
    device: Device,
    /// The setting belongs to the thread.
    not_send: PhantomData<*const ()>,
}

impl Autocast {
    /// Turns it on.
    ///
    /// # Errors
    /// When libtorch refuses, which it does for devices without mixed precision.
    pub fn enter(device: Device, precision: LowerPrecision) -> Result<Self, Error> {
        set(device, true, precision == LowerPrecision::Half)?;
        Ok(Self { device, not_send: PhantomData })
    }
}

impl Drop for Autocast {
    fn drop(&mut self) {
        // What could be turned on can be turned off.
        let _ = set(self.device, false, false);
    }
}

fn set(device: Device, on: bool, half: bool) -> Result<(), Error> {
    call(|error| {
        // SAFETY: the function takes plain values and changes settings of this thread only.
        unsafe { ffi::potstill_autocast(device.is_cuda(), on, half, error) }
    })
    .map_err(|cause| Error::from_text("autocast", None, cause))
}

#[cfg(test)]
mod tests {
    use tch::{Kind, Tensor};

    use super::*;

    #[test]
    fn products_are_of_lower_precision_and_gradients_are_not() {
        let options = (Kind::Float, Device::Cpu);
        for (precision, kind) in
            [(LowerPrecision::BFloat16, Kind::BFloat16), (LowerPrecision::Half, Kind::Half)]
        {
            let x = Tensor::rand([4, 4], options);
            let w = Tensor::rand([4, 4], options).set_requires_grad(true);
            let product = {
                let _autocast = Autocast::enter(Device::Cpu, precision).unwrap();
                // Used without gradient first, as a generator's early steps use it.
                let _ = tch::no_grad(|| x.matmul(&w));
                x.matmul(&w)
            };
            assert_eq!(product.kind(), kind);
            product.sum(Kind::Float).backward();
            assert_eq!(w.grad().kind(), Kind::Float);
            assert!(w.grad().abs().sum(Kind::Float).double_value(&[]) > 0.0);
            assert_eq!(x.matmul(&w).kind(), Kind::Float, "it ends with its guard");
        }
    }
}
