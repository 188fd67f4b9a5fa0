//! The few functions of libtorch that tch lacks: mixed precision ([`Autocast`]), recomputation of blocks in the
//! backward pass ([`recompute`]), the memory of tensors ([`MemoryMeter`]), clearing gradients ([`clear_gradients`])
//! and using each as soon as it is there ([`on_gradients`]), Adam in one pass ([`step_adam`]), CUDA on demand ([`load_cuda`]), its
//! graphs ([`Graph`]), the addresses of devices ([`device_address`]), and files mapped into memory ([`MappedFile`]).
//!
//! Three layers, as in `potstill-c10d`: a C++ shim that catches every exception (`shim/`), its C interface (`ffi`), and
//! the safe types of this page. Unsafe code is in these two crates alone.
//!
//! ```
//! use potstill_torch_ext::{Autocast, LowerPrecision};
//! use tch::{Device, Kind, Tensor};
//!
//! let x = Tensor::ones([2, 2], (Kind::Float, Device::Cpu));
//! let product = {
//!     let _autocast = Autocast::enter(Device::Cpu, LowerPrecision::BFloat16)?;
//!     x.matmul(&x)
//! };
//! assert_eq!(product.kind(), Kind::BFloat16);
//! # Ok::<(), potstill_torch_ext::Error>(())
//! ```

mod adam;
mod autocast;
mod error;
mod ffi;
mod graph;
mod hooks;
mod map;
mod memory;
mod recompute;
pub mod shim;
mod upload;

use std::ffi::{CStr, c_char, c_int};

use tch::Tensor;

pub use adam::{AdamStep, step_adam};
pub use autocast::{Autocast, LowerPrecision};
pub use error::Error;
pub use graph::{Graph, GraphStream};
pub use hooks::{GradientHooks, on_gradients};
pub use map::MappedFile;
pub use memory::MemoryMeter;
pub use recompute::{Block, SharedBlock, recompute};
pub use upload::upload;

/// Loads libtorch's CUDA half into this process.
///
/// It is not linked, because it would cost every process 0.1 s and 235 MB, also where there is no GPU. A process that
/// uses CUDA calls this **before any other function of libtorch**: the first query for devices fixes whether there are
/// any.
///
/// # Errors
/// libtorch came without CUDA, or its libraries cannot be loaded. Whether there is a device is not checked; use
/// [`tch::Cuda::device_count`].
pub fn load_cuda() -> Result<(), Error> {
    shim::call(|error| {
        // SAFETY: the function takes nothing else.
        unsafe { ffi::potstill_load_cuda(error) }
    })
    .map_err(|cause| Error { operation: "load CUDA", cause })
}

/// The PCI address of a CUDA device, as in `0000:3b:00.0`. Asks the driver alone: libtorch's CUDA half need not be loaded. `index`
/// counts as CUDA does, so it follows `CUDA_VISIBLE_DEVICES`.
///
/// # Errors
/// There is no driver, or no such device.
pub fn device_address(index: usize) -> Result<String, Error> {
    let wrong = |cause: String| Error { operation: "ask for a device's address", cause };
    let index = c_int::try_from(index).map_err(|error| wrong(error.to_string()))?;
    let mut text: [c_char; 64] = [0; 64];
    shim::call(|error| {
        // SAFETY: `text` is as long as is said, and the driver ends what it writes with a zero byte.
        unsafe { ffi::potstill_device_address(index, text.as_mut_ptr(), text.len() as c_int, error) }
    })
    .map_err(wrong)?;
    // SAFETY: as above; without a word from the driver it is zeros.
    let address = unsafe { CStr::from_ptr(text.as_ptr()) };
    Ok(address.to_string_lossy().to_lowercase())
}

/// Fills `mask` with ones, of this probability, and zeros that follow from `seed` alone. libtorch's own generator is not touched.
///
/// # Errors
/// libtorch's error.
pub fn bernoulli(mask: &Tensor, probability: f64, seed: u64) -> Result<(), Error> {
    shim::call(|error| {
        // SAFETY: `mask` is a live tensor, of which only the elements are written.
        unsafe { ffi::potstill_bernoulli(mask.as_ptr(), probability, seed, error) }
    })
    .map_err(|cause| Error { operation: "draw a mask", cause })
}

/// Makes the gradients of `params` undefined, like PyTorch's `zero_grad(set_to_none=True)`. tch can only set them to
/// zero, which fails for a gradient that is a view of a reducer's bucket.
///
/// # Errors
/// libtorch's error.
pub fn clear_gradients(params: &[Tensor]) -> Result<(), Error> {
    let pointers: Vec<_> = params.iter().map(Tensor::as_ptr).collect();
    shim::call(|error| {
        // SAFETY: `pointers` holds as many live tensors as is said.
        unsafe { ffi::potstill_clear_gradients(pointers.as_ptr(), pointers.len(), error) }
    })
    .map_err(|cause| Error { operation: "clear gradients", cause })
}
