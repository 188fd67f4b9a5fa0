//! Potstill's data plane: libtorch's c10d, the engine that PyTorch's `DistributedDataParallel` runs on, with
//! Gloo for CPUs and NCCL for GPUs.
//!
//! Three layers: a C++ shim that catches every exception (`shim/`), its C interface (`ffi`), and the safe types of
//! this page. Unsafe code is in this crate and in `potstill-torch-ext` alone.
//!
//! A failure comes back as an [`Error`]. c10d also writes warnings with long stack traces to stderr;
//! `TORCH_CPP_LOG_LEVEL=ERROR` in the environment keeps them away.
//!
//! ```no_run
//! use std::time::Duration;
//! use potstill_c10d::{Backend, ProcessGroup, ReduceOp, Store};
//! use tch::{Device, Kind, Tensor};
//!
//! # fn main() -> Result<(), potstill_c10d::Error> {
//! let timeout = Duration::from_secs(30);
//! let store = Store::in_file("/tmp/group".as_ref(), timeout)?;
//! // The other rank, on this machine, does the same with rank 1.
//! let backend = Backend::Gloo { host: "127.0.0.1".to_owned() };
//! let group = ProcessGroup::new(&backend, &store.prefix("g1")?, 0, 2, timeout)?;
//! let tensor = Tensor::ones([4], (Kind::Float, Device::Cpu));
//! group.all_reduce(&tensor, ReduceOp::Sum)?.wait(None)?; // now [2, 2, 2, 2]
//! # Ok(())
//! # }
//! ```

mod error;
mod ffi;
mod group;
mod reducer;
mod store;

pub use error::{Error, ErrorKind, Member};
pub use group::{Backend, ProcessGroup, ReduceOp, Work, write_flight_record};
pub use reducer::{Reducer, ReducerOptions};
pub use store::{Answer, KeyValues, Operation, Store};
