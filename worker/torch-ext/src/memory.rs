//! The memory of tensors in bytes, as libtorch's allocators count it.

use std::marker::PhantomData;
use std::ptr::{self, NonNull};

use tch::Device;

use crate::{Error, ffi, shim::call};

/// Counts, until it is dropped, how many bytes of a device's memory tensors hold. On the host it counts the allocations
/// of this thread and of the backward passes that it starts, and a thread can have only one meter; on a GPU it counts
/// the whole process.
#[derive(Debug)]
pub struct MemoryMeter {
    raw: NonNull<ffi::Memory>,
    /// On the host it belongs to the thread.
    not_send: PhantomData<*const ()>,
}

impl MemoryMeter {
    /// Starts counting.
    ///
    /// # Errors
    /// libtorch has no such device.
    pub fn start(device: Device) -> Result<Self, Error> {
        let index = match device {
            Device::Cuda(index) => i32::try_from(index).unwrap_or(i32::MAX),
            _ => -1,
        };
        let mut raw = ptr::null_mut();
        let begun = call(|error| {
            // SAFETY: the function takes plain values, and gives an object that is ended once.
            unsafe { ffi::potstill_memory_begin(index, &mut raw, error) }
        });
        let failed = |cause| Error { operation: "measure memory", cause };
        begun.map_err(failed)?;
        let raw = NonNull::new(raw).ok_or_else(|| failed("no meter".to_owned()))?;
        Ok(Self { raw, not_send: PhantomData })
    }

    /// The peak in bytes since the start, beyond the bytes that were allocated then.
    ///
    /// # Errors
    /// libtorch's error.
    pub fn peak(&self) -> Result<u64, Error> {
        let mut bytes = 0;
        call(|error| {
            // SAFETY: the object is alive.
            unsafe { ffi::potstill_memory_peak(self.raw.as_ptr(), &mut bytes, error) }
        })
        .map_err(|cause| Error { operation: "measure memory", cause })?;
        Ok(u64::try_from(bytes).unwrap_or(0))
    }
}

impl Drop for MemoryMeter {
    fn drop(&mut self) {
        // SAFETY: the pointer came from the shim and is used no more.
        unsafe { ffi::potstill_memory_end(self.raw.as_ptr()) }
    }
}

#[cfg(test)]
mod tests {
    use tch::{Kind, Tensor};

    use super::*;

    #[test]
    fn the_most_at_a_time_is_counted_and_not_what_came_and_went() {
        let options = (Kind::Float, Device::Cpu);
        let before = Tensor::zeros([1 << 20], options);
        let meter = MemoryMeter::start(Device::Cpu).unwrap();
        for _ in 0..3 {
            let _ = Tensor::zeros([1 << 20], options);
        }
        drop(before);
        let kept = Tensor::zeros([1 << 20], options).set_requires_grad(true);
        kept.square().sum(Kind::Float).backward();
        let peak = meter.peak().unwrap();
        let megabytes = peak >> 20;
        assert!(
            (8..=24).contains(&megabytes),
            "a tensor, its square, its gradient, and what that needs: {peak}"
        );
        drop(meter);
        let meter = MemoryMeter::start(Device::Cpu).unwrap();
        assert_eq!(meter.peak().unwrap(), 0);
    }
}
