//! The C interface of `shim/torch_ext.cpp`, one declaration for each function there. Functions that return `bool`
//! return true when they failed and then have written the reason to `error`; only otherwise have they written the
//! out-parameters.

use std::ffi::{c_char, c_int, c_void};
use std::marker::{PhantomData, PhantomPinned};

use torch_sys::C_tensor;

use crate::shim::ErrorText;

/// A memory meter, which is opaque to Rust.
#[repr(C)]
pub struct Memory {
    bytes: [u8; 0],
    marker: PhantomData<(*mut u8, PhantomPinned)>,
}

/// Hooks of gradients, which are opaque to Rust.
#[repr(C)]
pub struct Hooks {
    bytes: [u8; 0],
    marker: PhantomData<(*mut u8, PhantomPinned)>,
}

/// A CUDA stream and the memory of its graphs, which are opaque to Rust.
#[repr(C)]
pub struct Stream {
    bytes: [u8; 0],
    marker: PhantomData<(*mut u8, PhantomPinned)>,
}

/// A CUDA graph, which is opaque to Rust.
#[repr(C)]
pub struct Graph {
    bytes: [u8; 0],
    marker: PhantomData<(*mut u8, PhantomPinned)>,
}

/// `potstill_cuda_functions`.
#[repr(C)]
pub struct CudaFunctions {
    pub stream_new: unsafe extern "C" fn(device: c_int, out: *mut *mut Stream, error: *mut ErrorText) -> bool,
    pub stream_enter: unsafe extern "C" fn(stream: *mut Stream, error: *mut ErrorText) -> bool,
    pub stream_leave: unsafe extern "C" fn(stream: *mut Stream, error: *mut ErrorText) -> bool,
    pub pool_enter: unsafe extern "C" fn(stream: *mut Stream, error: *mut ErrorText) -> bool,
    pub pool_leave: unsafe extern "C" fn(stream: *mut Stream, error: *mut ErrorText) -> bool,
    pub stream_free: unsafe extern "C" fn(stream: *mut Stream),
    pub graph_begin:
        unsafe extern "C" fn(stream: *mut Stream, out: *mut *mut Graph, error: *mut ErrorText) -> bool,
    pub graph_end: unsafe extern "C" fn(graph: *mut Graph, error: *mut ErrorText) -> bool,
    pub graph_replay: unsafe extern "C" fn(graph: *mut Graph, error: *mut ErrorText) -> bool,
    pub graph_free: unsafe extern "C" fn(graph: *mut Graph),
}

unsafe extern "C" {
    pub fn potstill_load_cuda(error: *mut ErrorText) -> bool;

    /// The functions live as long as the process.
    pub fn potstill_cuda_open(
        image: *const u8,
        length: usize,
        out: *mut *const CudaFunctions,
        error: *mut ErrorText,
    ) -> bool;

    /// Writes at most `length` bytes with a zero byte at the end.
    pub fn potstill_device_address(
        index: c_int,
        address: *mut c_char,
        length: c_int,
        error: *mut ErrorText,
    ) -> bool;

    pub fn potstill_recompute(
        tensors: *const *const C_tensor,
        count: usize,
        inputs: usize,
        context: *mut c_void,
        call: unsafe extern "C" fn(*mut c_void, *const *mut C_tensor, usize, bool) -> *mut C_tensor,
        leave: unsafe extern "C" fn(*mut c_void),
        drop: unsafe extern "C" fn(*mut c_void),
        out: *mut *mut C_tensor,
        error: *mut ErrorText,
    ) -> bool;

    pub fn potstill_memory_begin(device: c_int, out: *mut *mut Memory, error: *mut ErrorText) -> bool;

    pub fn potstill_memory_peak(memory: *const Memory, bytes: *mut i64, error: *mut ErrorText) -> bool;

    pub fn potstill_memory_end(memory: *mut Memory);

    pub fn potstill_autocast(cuda: bool, on: bool, half: bool, error: *mut ErrorText) -> bool;

    pub fn potstill_bernoulli(
        mask: *const C_tensor,
        probability: f64,
        seed: u64,
        error: *mut ErrorText,
    ) -> bool;

    pub fn potstill_adam(
        values: *const C_tensor,
        gradient: *const C_tensor,
        first: *const C_tensor,
        second: *const C_tensor,
        step: u64,
        rate: f64,
        beta1: f64,
        beta2: f64,
        epsilon: f64,
        error: *mut ErrorText,
    ) -> bool;

    pub fn potstill_on_gradients(
        leaves: *const *const C_tensor,
        count: usize,
        context: *const c_void,
        call: unsafe extern "C" fn(*const c_void, usize),
        out: *mut *mut Hooks,
        error: *mut ErrorText,
    ) -> bool;

    pub fn potstill_hooks_free(hooks: *mut Hooks);

    pub fn potstill_clear_gradients(
        params: *const *const C_tensor,
        count: usize,
        error: *mut ErrorText,
    ) -> bool;
}
