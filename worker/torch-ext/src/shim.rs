//! Error reporting of a C++ shim. Public for `potstill-c10d`, whose shim uses the same.

use std::ffi::{CStr, c_char};

/// `potstill_error`: a text that ends with a zero byte.
#[repr(C)]
pub struct ErrorText {
    /// The text.
    pub text: [c_char; 2048],
}

impl ErrorText {
    /// Writes a text, truncated where it is too long.
    pub fn write(&mut self, text: &str) {
        let room = self.text.len() - 1;
        let bytes = text.bytes().filter(|byte| *byte != 0).take(room);
        self.text.fill(0);
        for (to, byte) in self.text.iter_mut().zip(bytes) {
            *to = byte as c_char;
        }
    }
}

/// Runs one function of a shim, and turns its outcome into a result.
///
/// # Errors
/// The text that the shim wrote.
pub fn call(function: impl FnOnce(*mut ErrorText) -> bool) -> Result<(), String> {
    let mut error = ErrorText { text: [0; 2048] };
    if !function(&mut error) {
        return Ok(());
    }
    // SAFETY: `text` began as zeros, and the shim writes to it only through `snprintf` with its true size, so
    // it always ends with a zero byte.
    let text = unsafe { CStr::from_ptr(error.text.as_ptr()) };
    Err(text.to_string_lossy().trim_end().to_owned())
}
