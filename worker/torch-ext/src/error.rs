//! What libtorch refused.

/// A failed operation. It reads, for example, `load CUDA: unavailable: libtorch_cuda.so: cannot open shared object file`.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{operation}: {cause}")]
pub struct Error {
    /// What was being done.
    pub operation: &'static str,
    /// The cause, mostly in libtorch's words.
    pub cause: String,
}
