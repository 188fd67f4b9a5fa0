//! The device of a rank.

use std::path::Path;

use anyhow::{Context, ensure};
use clap::ValueEnum;
use tch::{Cuda, Device};

/// The device that was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// A GPU of its own for each rank if the machine has GPUs, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU of its own for each rank.
    Cuda,
}

impl Choice {
    /// Its name on a command line.
    pub fn as_argument(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }

    /// Whether a GPU is wanted.
    fn wants_gpu(self) -> bool {
        // A file of the driver: without it, libtorch's CUDA libraries need not be loaded.
        self == Self::Cuda || (self == Self::Auto && Path::new("/dev/nvidiactl").exists())
    }

    /// The PCI addresses of the devices of this machine's ranks, as far as the driver says; `None` where they compute on the CPU.
    pub fn addresses(self, ranks: usize) -> Option<Vec<Option<String>>> {
        let address = |slot| potstill_torch_ext::device_address(slot).ok();
        let addresses: Vec<_> = self.wants_gpu().then(|| (0..ranks).map(address).collect())?;
        addresses.iter().any(Option::is_some).then_some(addresses)
    }

    /// The device of the rank in `slot` of this machine. Must be called before any other function of libtorch.
    ///
    /// # Errors
    /// A GPU is wanted and there is none for this slot; the machine has GPUs, but fewer than ranks: NCCL takes one rank on each.
    pub fn device(self, slot: usize) -> anyhow::Result<Device> {
        if !self.wants_gpu() {
            return Ok(Device::Cpu);
        }
        let loaded = potstill_torch_ext::load_cuda();
        let count = if loaded.is_ok() { usize::try_from(Cuda::device_count()).unwrap_or(0) } else { 0 };
        if count == 0 && self == Self::Auto {
            tracing::warn!("the machine has a GPU's driver, but libtorch finds no GPU: computing on the CPU");
            return Ok(Device::Cpu);
        }
        loaded.context("--device cuda")?;
        ensure!(
            slot < count,
            "rank {slot} of this machine has no GPU of its own: there are {count}{}, and NCCL takes one rank on each; start fewer \
             ranks and spares, or use --device cpu",
            visible()
        );
        Ok(Device::Cuda(slot))
    }
}

/// What limits the devices that CUDA shows, in brackets, where something does.
pub fn visible() -> String {
    let list = std::env::var("CUDA_VISIBLE_DEVICES");
    list.map_or_else(|_| String::new(), |list| format!(" (CUDA_VISIBLE_DEVICES={list})"))
}

/// A device's name, as in `cuda:0`.
pub fn name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_needs_no_gpu() {
        assert_eq!(Choice::Cpu.device(7).unwrap(), Device::Cpu);
        if !Path::new("/dev/nvidiactl").exists() {
            assert_eq!(Choice::Auto.device(7).unwrap(), Device::Cpu);
            let error = format!("{:#}", Choice::Cuda.device(0).unwrap_err());
            assert!(error.contains("--device cuda") || error.contains("no GPU"), "{error}");
        }
    }
}
