//! The store through which the processes of a group find each other.

use std::ffi::{CString, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::time::Duration;

use potstill_torch_ext::shim::call;

use crate::error::{Error, milliseconds};
use crate::ffi::{self, ErrorText};

/// The patience of an operation without a timeout.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// A `c10d::Store`: keys and values, in which the ranks of a group leave their addresses.
#[derive(Debug)]
pub struct Store(NonNull<ffi::Store>);

// SAFETY: c10d's stores guard each operation with a lock, and their reference count is atomic, so any thread may use and
// drop one. What is behind a store of `KeyValues` is `Send` and `Sync`.
unsafe impl Send for Store {}
// SAFETY: as above; nothing else is changed through a shared reference.
unsafe impl Sync for Store {}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: the pointer came from the shim, is owned here, and is used no more.
        unsafe { ffi::potstill_store_free(self.0.as_ptr()) }
    }
}

/// Keys and values that all ranks of a group share, wherever they are kept.
pub trait KeyValues: Send + Sync + 'static {
    /// Executes one operation. Those that wait do so for `patience` at most. Any thread may call it.
    ///
    /// # Errors
    /// Why it failed, as text; "timed out" in it makes the error one of [`ErrorKind::Timeout`](crate::ErrorKind::Timeout).
    fn execute(&self, operation: Operation<'_>, patience: Duration) -> Result<Answer, String>;
}

/// An operation on [`KeyValues`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields of an operation on keys and values")]
pub enum Operation<'a> {
    /// Sets a value. Answer: [`Answer::Done`].
    Set { key: &'a str, value: &'a [u8] },
    /// Waits for a key. Answer: its value.
    Get { key: &'a str },
    /// Adds to a value that is a decimal number; a missing one is 0. Answer: the sum.
    Add { key: &'a str, amount: i64 },
    /// Sets a value if it is the expected one, or if there is none and none is expected (no bytes). Answer: the value after
    /// it; the expected one where there is none.
    CompareSet { key: &'a str, expected: &'a [u8], value: &'a [u8] },
    /// Removes a key. Answer: whether it existed, 1 or 0.
    Delete { key: &'a str },
    /// Whether all keys exist. Answer: 1 or 0.
    Check { keys: Vec<&'a str> },
    /// Waits until all keys exist. Answer: [`Answer::Done`].
    Wait { keys: Vec<&'a str> },
    /// Answer: the number of keys.
    Count,
}

/// The answer to an [`Operation`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is done.
    Done,
    /// A value.
    Value(Vec<u8>),
    /// A number.
    Number(i64),
}

impl Store {
    /// A store for a group of one process, or of threads of one process.
    ///
    /// # Errors
    /// libtorch's.
    pub fn alone(timeout: Duration) -> Result<Self, Error> {
        made("make a store", |raw, error| {
            // SAFETY: both point to live variables.
            unsafe { ffi::potstill_store_alone(milliseconds(timeout), raw, error) }
        })
    }

    /// A store for processes of one machine, in a file which all of them can write; the caller removes it. Its folder must
    /// exist until all of these stores are dropped. `timeout` bounds each operation that waits.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn in_file(path: &Path, timeout: Duration) -> Result<Self, Error> {
        let what = format!("open the store {}", path.display());
        let name = CString::new(path.as_os_str().as_bytes())
            .map_err(|e| Error::invalid(what.clone(), None, e.to_string()))?;
        made(&what, |raw, error| {
            // SAFETY: `name` ends with a zero byte and outlives the call; the others point to live variables.
            unsafe { ffi::potstill_store_file(name.as_ptr(), milliseconds(timeout), raw, error) }
        })
    }

    /// A store whose operations `values` executes. `timeout` bounds each operation that waits.
    ///
    /// # Errors
    /// libtorch's.
    pub fn of(values: Arc<dyn KeyValues>, timeout: Duration) -> Result<Self, Error> {
        // A thin pointer, as C has it.
        let context = Box::into_raw(Box::new(values)).cast_const().cast::<c_void>();
        made("make a store", |raw, error| {
            // SAFETY: `context` is the `Box` that `execute` and `end` expect, and the shim owns it from here on; the others
            // point to live variables.
            unsafe { ffi::potstill_store_of(execute, end, context, milliseconds(timeout), raw, error) }
        })
    }

    /// The part of the store under `prefix`, for example `g7` for generation 7, which does not see the keys of another.
    ///
    /// # Errors
    /// libtorch's.
    pub fn prefix(&self, prefix: &str) -> Result<Self, Error> {
        let what = format!("open {prefix} in a store");
        let name = CString::new(prefix).map_err(|e| Error::invalid(what.clone(), None, e.to_string()))?;
        made(&what, |raw, error| {
            // SAFETY: the store is alive as long as `self`; `name` ends with a zero byte and outlives the call.
            unsafe { ffi::potstill_store_prefix(self.as_ptr(), name.as_ptr(), raw, error) }
        })
    }

    pub(crate) fn as_ptr(&self) -> *const ffi::Store {
        self.0.as_ptr()
    }
}

fn made(what: &str, make: impl FnOnce(*mut *mut ffi::Store, *mut ErrorText) -> bool) -> Result<Store, Error> {
    let mut raw = ptr::null_mut();
    let failed = |cause: String| Error::from_text(what.to_owned(), None, cause);
    call(|error| make(&mut raw, error)).map_err(failed)?;
    NonNull::new(raw).map(Store).ok_or_else(|| failed("no store".to_owned()))
}

/// What the shim calls for each operation.
///
/// # Safety
/// `context` comes from [`Store::of`]; the others are valid during the call, as `ffi` says.
unsafe extern "C" fn execute(
    context: *const c_void,
    call: *const ffi::StoreCall,
    number: *mut i64,
    sink: *mut ffi::Sink,
    error: *mut ErrorText,
) -> bool {
    // SAFETY: as above; the shim calls it only before `end`.
    let (values, call) = unsafe { (&*context.cast::<Arc<dyn KeyValues>>(), &*call) };
    // SAFETY: the shim's bytes live during the call.
    let outcome = unsafe { read(call) }.and_then(|operation| {
        // 0 is c10d's "no timeout".
        let patience = u64::try_from(call.timeout_ms).ok().filter(|&millis| millis > 0);
        values.execute(operation, patience.map_or(FOREVER, Duration::from_millis))
    });
    match outcome {
        Ok(Answer::Done) => false,
        Ok(Answer::Number(answer)) => {
            // SAFETY: a variable of the shim.
            unsafe { *number = answer };
            false
        }
        Ok(Answer::Value(bytes)) => {
            // SAFETY: the shim copies the bytes during this call; the others are its own.
            unsafe { ffi::potstill_sink_write(sink, bytes.as_ptr(), bytes.len(), error) }
        }
        Err(text) => {
            // SAFETY: memory of the shim.
            unsafe { (*error).write(&text) };
            true
        }
    }
}

/// What the shim calls when it has used the context for the last time.
///
/// # Safety
/// `context` comes from [`Store::of`], and is used no more.
unsafe extern "C" fn end(context: *const c_void) {
    // SAFETY: as above.
    drop(unsafe { Box::from_raw(context.cast_mut().cast::<Arc<dyn KeyValues>>()) });
}

/// # Safety
/// The pointers of `call` are valid for `'a`.
unsafe fn read<'a>(call: &ffi::StoreCall) -> Result<Operation<'a>, String> {
    // SAFETY: as above.
    let bytes = |bytes: &ffi::Bytes| unsafe { slice::<u8>(bytes.data, bytes.length) };
    // SAFETY: as above.
    let keys: Result<Vec<&str>, _> =
        unsafe { slice(call.keys, call.key_count) }.iter().map(|key| str::from_utf8(bytes(key))).collect();
    let keys = keys.map_err(|e| format!("a key is no text: {e}"))?;
    let key = keys.first().copied().unwrap_or_default();
    Ok(match call.operation {
        0 => Operation::Set { key, value: bytes(&call.value) },
        1 => Operation::Get { key },
        2 => Operation::Add { key, amount: call.amount },
        3 => Operation::CompareSet { key, expected: bytes(&call.expected), value: bytes(&call.value) },
        4 => Operation::Delete { key },
        5 => Operation::Check { keys },
        6 => Operation::Wait { keys },
        7 => Operation::Count,
        other => return Err(format!("the shim asks for operation {other}, which is not known")),
    })
}

/// # Safety
/// `data` points to `length` values that live for `'a`, unless `length` is 0.
unsafe fn slice<'a, T>(data: *const T, length: usize) -> &'a [T] {
    match length {
        0 => &[],
        // SAFETY: as above.
        _ => unsafe { std::slice::from_raw_parts(data, length) },
    }
}
