//! CUDA graphs: work that the host queues once, operation by operation, and repeats with one call.

use std::{
    cell::Cell,
    marker::PhantomData,
    panic::{AssertUnwindSafe, catch_unwind},
    ptr::{self, NonNull},
    rc::Rc,
};

use tch::Device;

use crate::{Error, ffi, shim::call};

/// A shared library; empty where it was built without CUDA's headers.
static LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libpotstill_cuda.so"));

fn failed(operation: &'static str) -> impl Fn(String) -> Error {
    move |cause| Error { operation, cause }
}

/// A CUDA stream beside the default one, and the memory of the graphs that are captured in it.
#[derive(Clone)]
pub struct GraphStream(Rc<Stream>);

struct Stream {
    functions: &'static ffi::CudaFunctions,
    raw: NonNull<ffi::Stream>,
    is_entered: Cell<bool>,
    /// The current stream belongs to the thread.
    not_send: PhantomData<*const ()>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: the pointer came from the library, is owned here, and is used no more.
        unsafe { (self.functions.stream_free)(self.raw.as_ptr()) }
    }
}

impl GraphStream {
    /// A stream of a CUDA device; of another device `None`.
    ///
    /// # Errors
    /// This program was built without CUDA's headers; libtorch's error.
    pub fn new(device: Device) -> Result<Option<Self>, Error> {
        let Device::Cuda(index) = device else { return Ok(None) };
        let failed = failed("make a CUDA stream");
        let index = i32::try_from(index).map_err(|error| failed(error.to_string()))?;
        let (mut functions, mut raw) = (ptr::null(), ptr::null_mut());
        call(|error| {
            // SAFETY: the bytes are a static and come with their true length.
            unsafe { ffi::potstill_cuda_open(LIBRARY.as_ptr(), LIBRARY.len(), &mut functions, error) }
        })
        .map_err(&failed)?;
        // SAFETY: the library, which is never closed, holds them.
        let functions: &'static ffi::CudaFunctions =
            unsafe { functions.as_ref() }.ok_or_else(|| failed("no functions".to_owned()))?;
        call(|error| {
            // SAFETY: the function takes plain values, and gives an object that is freed once.
            unsafe { (functions.stream_new)(index, &mut raw, error) }
        })
        .map_err(&failed)?;
        let raw = NonNull::new(raw).ok_or_else(|| failed("no stream".to_owned()))?;
        Ok(Some(Self(Rc::new(Stream {
            functions,
            raw,
            is_entered: Cell::new(false),
            not_send: PhantomData,
        }))))
    }

    /// Runs `body` with this as the current stream: after what is queued in the former one, and before what is queued there later.
    /// Inside of it `body` is simply run.
    ///
    /// # Errors
    /// libtorch's error.
    pub fn within<T>(&self, body: impl FnOnce() -> T) -> Result<T, Error> {
        struct Left<'a>(&'a Stream);
        impl Drop for Left<'_> {
            fn drop(&mut self) {
                self.0.is_entered.set(false);
                // Fails only where the device does: then all that follows fails too.
                let _ = call(|error| {
                    // SAFETY: the object is alive.
                    unsafe { (self.0.functions.stream_leave)(self.0.raw.as_ptr(), error) }
                });
            }
        }
        let stream = self.0.as_ref();
        if stream.is_entered.get() {
            return Ok(body());
        }
        call(|error| {
            // SAFETY: the object is alive.
            unsafe { (stream.functions.stream_enter)(stream.raw.as_ptr(), error) }
        })
        .map_err(failed("enter a CUDA stream"))?;
        stream.is_entered.set(true);
        let _left = Left(stream);
        Ok(body())
    }

    /// Runs `body` [within](Self::within) the stream, in the memory of its graphs: it needs no memory besides. What it gives must
    /// be copied before a graph is replayed, which overwrites it.
    ///
    /// # Errors
    /// libtorch's error.
    pub fn in_its_memory<T>(&self, body: impl FnOnce() -> T) -> Result<T, Error> {
        struct Left<'a>(&'a Stream);
        impl Drop for Left<'_> {
            fn drop(&mut self) {
                // Fails only where it was not entered.
                let _ = call(|error| {
                    // SAFETY: the object is alive.
                    unsafe { (self.0.functions.pool_leave)(self.0.raw.as_ptr(), error) }
                });
            }
        }
        let stream = self.0.as_ref();
        self.within(|| {
            call(|error| {
                // SAFETY: the object is alive.
                unsafe { (stream.functions.pool_enter)(stream.raw.as_ptr(), error) }
            })
            .map_err(failed("use the memory of CUDA graphs"))?;
            let _left = Left(stream);
            Ok(body())
        })?
    }
}

/// Recorded work of a stream. Its tensors lie where they lay when it was recorded, so what `body` made then, of tensors that live
/// on, is made again by each replay.
pub struct Graph {
    raw: NonNull<ffi::Graph>,
    stream: GraphStream,
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: the pointer came from the library, is owned here, and is used no more.
        unsafe { (self.stream.0.functions.graph_free)(self.raw.as_ptr()) }
    }
}

impl Graph {
    /// Records what `body` queues, also in its backward passes, **without doing it**. `body` must not wait for the device, and must
    /// have been run in this stream before: libraries take memory at their first use.
    ///
    /// # Errors
    /// Something cannot be recorded: CUDA's reason. Nothing has been done then.
    pub fn capture<T, E>(
        stream: &GraphStream,
        body: impl FnOnce() -> Result<T, E>,
    ) -> Result<Result<(Self, T), E>, Error> {
        let failed = failed("capture a CUDA graph");
        stream.within(|| {
            let functions = stream.0.functions;
            let mut raw = ptr::null_mut();
            call(|error| {
                // SAFETY: the stream is alive, and the graph that the function gives is freed once.
                unsafe { (functions.graph_begin)(stream.0.raw.as_ptr(), &mut raw, error) }
            })
            .map_err(&failed)?;
            let raw = NonNull::new(raw).ok_or_else(|| failed("no graph".to_owned()))?;
            let graph = Self { raw, stream: stream.clone() };
            // tch panics with libtorch's error. Whatever happens, what was begun must be ended.
            let made = catch_unwind(AssertUnwindSafe(body))
                .map_err(|panic| Error::of_panic("capture a CUDA graph", &*panic));
            let ended = call(|error| {
                // SAFETY: the object is alive.
                unsafe { (functions.graph_end)(graph.raw.as_ptr(), error) }
            });
            match made? {
                // What fails while it is recorded may be fine otherwise: its error is the caller's to judge.
                Err(error) => Ok(Err(error)),
                Ok(made) => ended.map(|()| Ok((graph, made))).map_err(&failed),
            }
        })?
    }

    /// Queues the work once more. Where two replays are under way, waits for the first.
    ///
    /// # Errors
    /// libtorch's error.
    pub fn replay(&self) -> Result<(), Error> {
        self.stream.within(|| {
            call(|error| {
                // SAFETY: the object is alive.
                unsafe { (self.stream.0.functions.graph_replay)(self.raw.as_ptr(), error) }
            })
            .map_err(failed("replay a CUDA graph"))
        })?
    }
}
