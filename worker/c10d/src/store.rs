//! The store through which the processes of a group find each other.

use std::ffi::CString;
use std::ptr::{self, NonNull};
use std::time::Duration;

use potstill_torch_ext::shim::call;

use crate::error::{Error, milliseconds};
use crate::ffi;

/// An owned `c10d::Store` of any kind.
#[derive(Debug)]
struct Handle(NonNull<ffi::Store>);

// SAFETY: c10d's TCP store guards each operation with a lock, and its reference count is atomic, so any
// thread may use and drop it.
unsafe impl Send for Handle {}
// SAFETY: as above; nothing else is changed through a shared reference.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the pointer came from the shim, is owned here, and is used no more.
        unsafe { ffi::potstill_store_free(self.0.as_ptr()) }
    }
}

/// `c10d::TCPStore`: a key-value store over TCP, in which the ranks of a group leave their addresses.
///
/// It knows no authentication, and its server listens on all interfaces: keep it inside the cluster's
/// network.
#[derive(Debug)]
pub struct TcpStore {
    handle: Handle,
    host: String,
    port: u16,
}

/// A part of a [`TcpStore`] below a prefix, with a connection of its own. Each generation of a group uses a new prefix,
/// so that it does not see the keys of an older one.
#[derive(Debug)]
pub struct Store(Handle);

impl TcpStore {
    /// Starts a server in this process, and connects to it. The server runs until this value is dropped.
    /// `host` is a name or address of this machine (the one that peers are given); `port` 0 lets the system choose.
    /// `timeout` bounds this call and each operation on the store.
    pub fn serve(host: &str, port: u16, timeout: Duration) -> Result<TcpStore, Error> {
        TcpStore::open("serve a store", host, port, true, timeout)
    }

    /// Connects to the server at `host` and `port`, with repeated attempts until it answers or the timeout is over.
    pub fn connect(host: &str, port: u16, timeout: Duration) -> Result<TcpStore, Error> {
        TcpStore::open("connect to a store", host, port, false, timeout)
    }

    fn open(what: &str, host: &str, port: u16, serve: bool, timeout: Duration) -> Result<TcpStore, Error> {
        let operation = || format!("{what} at {host}:{port}");
        let name = CString::new(host).map_err(|e| Error::invalid(operation(), None, e.to_string()))?;
        let (mut raw, mut bound) = (ptr::null_mut(), 0);
        call(|error| {
            // SAFETY: `name` ends with a zero byte and outlives the call; the others point to live variables.
            unsafe {
                let timeout = milliseconds(timeout);
                ffi::potstill_store_open(name.as_ptr(), port, serve, timeout, &mut raw, &mut bound, error)
            }
        })
        .map_err(|cause| Error::from_text(operation(), None, cause))?;
        Ok(TcpStore { handle: owned(raw, operation)?, host: host.to_owned(), port: bound })
    }

    /// The name or address that was given.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port that the server listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The part of the store under `prefix`, for example `g7` for generation 7. Opens one more connection, so that a
    /// group that still waits for its peers does not block the next one.
    pub fn prefix(&self, prefix: &str) -> Result<Store, Error> {
        let operation = || format!("open {prefix} in the store at {}:{}", self.host, self.port);
        let name = CString::new(prefix).map_err(|e| Error::invalid(operation(), None, e.to_string()))?;
        let mut raw = ptr::null_mut();
        call(|error| {
            // SAFETY: the store is alive as long as `self`; `name` ends with a zero byte and outlives the
            // call.
            unsafe { ffi::potstill_store_prefix(self.handle.0.as_ptr(), name.as_ptr(), &mut raw, error) }
        })
        .map_err(|cause| Error::from_text(operation(), None, cause))?;
        Ok(Store(owned(raw, operation)?))
    }
}

impl Store {
    pub(crate) fn as_ptr(&self) -> *const ffi::Store {
        self.0.0.as_ptr()
    }
}

fn owned(raw: *mut ffi::Store, operation: impl Fn() -> String) -> Result<Handle, Error> {
    NonNull::new(raw).map(Handle).ok_or_else(|| Error::from_text(operation(), None, "no store".to_owned()))
}
