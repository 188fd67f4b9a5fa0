//! Errors of libtorch.

use std::any::Any;

/// A failed operation. It reads, for example, `load CUDA: unavailable: libtorch_cuda.so: cannot open shared object file`.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{operation}: {cause}")]
pub struct Error {
    /// The operation.
    pub operation: &'static str,
    /// The cause, mostly libtorch's text.
    pub cause: String,
}

impl Error {
    /// An operation in which tch panicked.
    #[must_use]
    pub fn of_panic(operation: &'static str, panic: &(dyn Any + Send)) -> Self {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref().copied()).unwrap_or("a panic");
        // It has the error as `Debug` writes it, and the first line of that says what is wrong.
        Self { operation, cause: text.split("\\n").next().unwrap_or_default().to_owned() }
    }
}
