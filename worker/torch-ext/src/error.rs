//! Errors of libtorch.

/// A failed operation. It reads, for example, `load CUDA: unavailable: libtorch_cuda.so: cannot open shared object file`.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{operation}: {cause}")]
pub struct Error {
    /// The operation.
    pub operation: &'static str,
    /// The cause, mostly libtorch's text.
    pub cause: String,
}
