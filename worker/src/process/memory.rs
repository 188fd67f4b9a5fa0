//! The memory that this process has needed.

use nix::sys::resource::{UsageWho, getrusage};
use potstill_torch_ext::MemoryMeter;
use tch::Device;

/// The device on which this process computes.
pub struct Memory {
    device: Device,
    /// libtorch's count, on a GPU.
    meter: Option<MemoryMeter>,
}

impl Memory {
    /// To be called before anything is on the device.
    pub fn of(device: Device) -> Self {
        let meter = device.is_cuda().then(|| MemoryMeter::start(device)).and_then(|meter| {
            // A run is not ended because it cannot be measured.
            meter.inspect_err(|error| tracing::warn!(%error, "the memory on the GPU is not counted")).ok()
        });
        Self { device, meter }
    }

    /// The most so far, in bytes: on a GPU of all tensors at a time, on a CPU of the process's resident set. 0: not known.
    pub fn peak(&self) -> u64 {
        match &self.meter {
            Some(meter) => meter.peak().unwrap_or(0),
            None if self.device.is_cuda() => 0,
            // Linux counts it in KiB.
            None => getrusage(UsageWho::RUSAGE_SELF).map_or(0, |usage| usage.max_rss().unsigned_abs() * 1024),
        }
    }
}
