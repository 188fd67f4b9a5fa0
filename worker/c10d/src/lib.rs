//! Potstill's data plane: libtorch's c10d, the engine that PyTorch's `DistributedDataParallel` runs on, with
//! Gloo for CPUs and NCCL for GPUs.
//!
//! Beside it stands what else needs unsafe code: activation checkpointing ([`checkpoint`]), mixed precision ([`Autocast`]),
//! files mapped into memory ([`MappedFile`]), and the count of what tensors take ([`MemoryMeter`]).
//!
//! Three layers: a C++ shim that catches every exception (`shim/`), its C face (`ffi`), and the safe types of
//! this page. This is the only crate of the workspace with unsafe code.
//!
//! Whatever goes wrong comes back as an [`Error`]. c10d also writes warnings with long stack traces to stderr;
//! `TORCH_CPP_LOG_LEVEL=ERROR` in the environment keeps them away.
//!
//! ```no_run
//! use std::time::Duration;
//! use potstill_c10d::{Backend, ProcessGroup, ReduceOp, TcpStore};
//! use tch::{Device, Kind, Tensor};
//!
//! # fn main() -> Result<(), potstill_c10d::Error> {
//! let timeout = Duration::from_secs(30);
//! let store = TcpStore::serve("127.0.0.1", 0, timeout)?;
//! // The other rank does the same with rank 1 and `TcpStore::connect("127.0.0.1", port, timeout)`.
//! let backend = Backend::Gloo { host: "127.0.0.1".to_owned() };
//! let group = ProcessGroup::new(&backend, &store.prefix("g1")?, 0, 2, timeout)?;
//! let tensor = Tensor::ones([4], (Kind::Float, Device::Cpu));
//! group.all_reduce(&tensor, ReduceOp::Sum)?.wait(None)?; // now [2, 2, 2, 2]
//! # Ok(())
//! # }
//! ```

mod autocast;
mod checkpoint;
mod error;
mod ffi;
mod group;
mod map;
mod memory;
mod reducer;
mod store;

pub use autocast::{Autocast, LowerPrecision};
pub use checkpoint::{Block, SharedBlock, checkpoint};
pub use error::{Error, ErrorKind, Member};
pub use group::{Backend, ProcessGroup, ReduceOp, Work};
pub use map::MappedFile;
pub use memory::MemoryMeter;
pub use reducer::{Reducer, ReducerOptions, clear_gradients};
pub use store::{Store, TcpStore};

/// Loads libtorch's CUDA half into this process.
///
/// It is not linked, because it would cost every process 0.1 s and 235 MB, also where there is no GPU. A
/// process that uses CUDA calls this **before anything else of libtorch**: the first look for devices settles
/// for good whether there are any.
///
/// # Errors
/// [`ErrorKind::Unavailable`] where libtorch came without CUDA, or its libraries cannot be loaded. That there
/// is a device is not checked; ask [`tch::Cuda::device_count`].
pub fn load_cuda() -> Result<(), Error> {
    error::call(|error| {
        // SAFETY: the function takes nothing else.
        unsafe { ffi::potstill_load_cuda(error) }
    })
    .map_err(|cause| Error::from_text("load CUDA", None, cause))
}
