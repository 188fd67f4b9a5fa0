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

    /// The device of the rank in `slot` of this machine. Must be called before any other function of libtorch.
    ///
    /// # Errors
    /// A GPU is wanted and there is none for this slot; the machine has GPUs, but fewer than ranks: NCCL takes one rank on each.
    pub fn device(self, slot: usize) -> anyhow::Result<Device> {
        // A file of the driver: without it, libtorch's CUDA libraries need not be loaded.
        let wanted = self == Self::Cuda || (self == Self::Auto && Path::new("/dev/nvidiactl").exists());
        if !wanted {
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
            "rank {slot} of this machine has no GPU of its own: there are {count}, and NCCL takes one rank on each; start fewer \
             ranks and spares, or use --device cpu"
        );
        Ok(Device::Cuda(slot))
    }
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
