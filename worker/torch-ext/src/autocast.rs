//! Automatic mixed precision, which tch offers for one device and one kind only.

use std::cell::Cell;
use std::marker::PhantomData;

use tch::Device;

use crate::{Error, ffi, shim::call};

/// The lower precision of [`Autocast`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LowerPrecision {
    /// bfloat16.
    BFloat16,
    /// IEEE half.
    Half,
}

/// Until it is dropped, this thread's convolutions, matrix products and attention on a device compute in lower
/// precision; libtorch's list decides which operations do and which stay in fp32. Weights are unchanged and get fp32
/// gradients. Backward passes must not run inside.
pub struct Autocast {
    before: Setting,
    /// The setting belongs to the thread.
    not_send: PhantomData<*const ()>,
}

/// The data types of a thread's computations.
type Setting = Option<(Device, LowerPrecision)>;

thread_local! {
    static SETTING: Cell<Setting> = const { Cell::new(None) };
}

impl Autocast {
    /// Turns it on.
    ///
    /// # Errors
    /// libtorch has no mixed precision for the device.
    pub fn enter(device: Device, precision: LowerPrecision) -> Result<Self, Error> {
        Self::change(Some((device, precision)))
    }

    /// Turns it off until the guard is dropped, whether or not it was on.
    ///
    /// # Errors
    /// libtorch's error.
    pub fn pause() -> Result<Self, Error> {
        Self::change(None)
    }

    fn change(to: Setting) -> Result<Self, Error> {
        let before = SETTING.get();
        set(before, to)?;
        Ok(Self { before, not_send: PhantomData })
    }
}

impl Drop for Autocast {
    fn drop(&mut self) {
        // A valid setting can be set again.
        let _ = set(SETTING.get(), self.before);
    }
}

fn set(from: Setting, to: Setting) -> Result<(), Error> {
    let switch = |(device, precision): (Device, LowerPrecision), on: bool| {
        call(|error| {
            let half = precision == LowerPrecision::Half;
            // SAFETY: the function takes plain values and changes settings of this thread only.
            unsafe { ffi::potstill_autocast(device.is_cuda(), on, half, error) }
        })
        .map_err(|cause| Error { operation: "autocast", cause })
    };
    if let Some(from) = from {
        switch(from, false)?;
    }
    SETTING.set(None);
    if let Some(to) = to {
        switch(to, true)?;
    }
    SETTING.set(to);
    Ok(())
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
                {
                    let _paused = Autocast::pause().unwrap();
                    assert_eq!(x.matmul(&w).kind(), Kind::Float);
                }
                // Used without gradient first, as in a generator's early steps.
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
