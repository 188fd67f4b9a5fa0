//! Process groups and their collectives.

use std::ffi::{CString, c_int};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use potstill_torch_ext::shim::call;
use tch::{Device, Kind, Tensor};

use crate::error::{Error, ErrorKind, Member, milliseconds};
use crate::ffi;
use crate::store::Store;

/// How often a wait on a device looks for an abort.
const LOOK: Duration = Duration::from_millis(10);

/// The NCCL part of the shim, a shared library; empty where it was built without NCCL.
static NCCL_LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libpotstill_nccl.so"));

/// The backend, which transfers the data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    /// Gloo, for tensors in main memory.
    Gloo {
        /// The host name or address of the network interface that peers reach this process at.
        host: String,
    },
    /// NCCL, for tensors on one CUDA device. Two ranks cannot share a device.
    Nccl {
        /// The index of the device.
        device: usize,
    },
}

/// How [`ProcessGroup::all_reduce`] combines elements. There is no mean, because Gloo has none: divide the
/// sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ReduceOp {
    /// The sum. Its bits are the same on all ranks, and in each execution with the same world size.
    Sum = 0,
    /// The smallest.
    Min = 3,
    /// The largest.
    Max = 4,
}

/// A `c10d` process group: the ranks of one generation, connected.
///
/// All ranks must issue the same operations in the same order;
/// [`Reducer::backward`](crate::Reducer::backward) counts as one. An operation that was issued runs by itself
/// in the background. Clones are handles to the same group. Any thread may use any of them; operations are
/// issued one at a time.
///
/// **After a failure** the group cannot be used any more: drop it, and join the next generation with a new one.
///
/// **Dropping** the last handle (works and reducers are handles too) of a group without failures waits for operations
/// in flight, at most for the group's timeout. After a failure or [`abort`](ProcessGroup::abort) it does not wait; so
/// call `abort` first to drop a group whose peers may be stuck.
#[derive(Debug, Clone)]
pub struct ProcessGroup {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    raw: NonNull<ffi::Group>,
    member: Member,
    device: Device,
    /// The number of operations issued. Locked while one is being issued, because c10d numbers them without a lock of
    /// its own.
    issued: Mutex<u64>,
    aborted: AtomicBool,
    failed: AtomicBool,
    /// The timeout of each operation.
    timeout: Mutex<Duration>,
}

// SAFETY: c10d's groups are bound to no thread. Issuing is serialized by `issued`; `abort` may run beside it,
// since it only closes connections (Gloo) or communicators (NCCL), each under the backend's own locks; the
// rest is atomic or immutable.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        let orderly = !self.failed.load(Ordering::Acquire);
        // SAFETY: the pointer came from the shim, is owned here, and is used no more.
        unsafe { ffi::potstill_group_free(self.raw.as_ptr(), orderly) }
    }
}

impl ProcessGroup {
    /// Joins the group of `world` processes that meet in `store`, as `rank`.
    ///
    /// With Gloo it waits until all have joined and connected, at most `timeout`; it cannot be aborted meanwhile, so
    /// run it on a thread that may block. With NCCL the first operation connects. `timeout` also bounds every operation
    /// of the group, until it gets [another](Self::set_timeout).
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] when a peer did not join, [`ErrorKind::PeerLost`] when one has ended, the store's error,
    /// [`ErrorKind::Unavailable`] for NCCL without CUDA, without a GPU, or in a program built without it.
    pub fn new(
        backend: &Backend,
        store: &Store,
        rank: usize,
        world: usize,
        timeout: Duration,
    ) -> Result<ProcessGroup, Error> {
        let member = Member { rank, world };
        let invalid = |cause: String| Error::invalid("join the group", Some(member), cause);
        if rank >= world {
            return Err(invalid("the rank must be less than the world size".to_owned()));
        }
        let (c_rank, c_world) = (to_c_int(rank).map_err(invalid)?, to_c_int(world).map_err(invalid)?);
        let (bound, timeout) = (timeout, milliseconds(timeout));
        let mut raw = ptr::null_mut();
        let (device, outcome) = match backend {
            Backend::Gloo { host } => {
                let host = CString::new(host.as_str()).map_err(|e| invalid(e.to_string()))?;
                let outcome = call(|error| {
                    // SAFETY: the store and `host` outlive the call, `host` ends with a zero byte, and the
                    // group takes its own reference to the store.
                    unsafe {
                        let (store, host) = (store.as_ptr(), host.as_ptr());
                        ffi::potstill_group_gloo(store, c_rank, c_world, timeout, host, &mut raw, error)
                    }
                });
                (Device::Cpu, outcome)
            }
            Backend::Nccl { device } => {
                let c_device = to_c_int(*device).map_err(invalid)?;
                let outcome = call(|error| {
                    // SAFETY: the store outlives the call, and the group takes its own reference to it; the
                    // library's bytes are a static and come with their true length.
                    unsafe {
                        ffi::potstill_group_nccl(
                            NCCL_LIBRARY.as_ptr(),
                            NCCL_LIBRARY.len(),
                            store.as_ptr(),
                            c_rank,
                            c_world,
                            timeout,
                            c_device,
                            &mut raw,
                            error,
                        )
                    }
                });
                (Device::Cuda(*device), outcome)
            }
        };
        let failed = |cause| Error::from_text("join the group", Some(member), cause);
        outcome.map_err(failed)?;
        let raw = NonNull::new(raw).ok_or_else(|| failed("no group".to_owned()))?;
        let inner = Inner {
            raw,
            member,
            device,
            issued: Mutex::new(0),
            aborted: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            timeout: Mutex::new(bound),
        };
        Ok(ProcessGroup { inner: Arc::new(inner) })
    }

    /// Bounds every operation that is issued from now on.
    ///
    /// # Errors
    /// c10d's error.
    pub fn set_timeout(&self, timeout: Duration) -> Result<(), Error> {
        call(|error| {
            // SAFETY: the group is alive as long as `self`.
            unsafe { ffi::potstill_group_set_timeout(self.as_ptr(), milliseconds(timeout), error) }
        })
        .map_err(|cause| self.failure("set the timeout", cause))?;
        *self.inner.timeout.lock().unwrap_or_else(PoisonError::into_inner) = timeout;
        Ok(())
    }

    /// This process's rank in the group.
    pub fn member(&self) -> Member {
        self.inner.member
    }

    /// Where the tensors of this group's operations must be.
    pub fn device(&self) -> Device {
        self.inner.device
    }

    /// Replaces `tensor`, of the same shape and kind on all ranks, by the combination of all ranks' tensors.
    ///
    /// Neither read nor write it before the work is done.
    pub fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work, Error> {
        self.issue("all_reduce", &[tensor], |group, out, error| {
            // SAFETY: the group and the tensor are alive during the call, and the work takes its own
            // reference to the tensor.
            unsafe { ffi::potstill_all_reduce(group, tensor.as_ptr(), op as u8, out, error) }
        })
    }

    /// Replaces `tensor`, of the same shape and kind on all ranks, by that of rank `root`.
    ///
    /// Neither read nor write it before the work is done.
    pub fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, Error> {
        let root = self.peer("broadcast", root)?;
        self.issue("broadcast", &[tensor], |group, out, error| {
            // SAFETY: as in `all_reduce`.
            unsafe { ffi::potstill_broadcast(group, tensor.as_ptr(), root, out, error) }
        })
    }

    /// Replaces `tensor` of rank `root`, of the same shape and kind on all ranks, by the sum of all ranks' tensors. Those of
    /// the others are undefined afterwards.
    ///
    /// Neither read nor write it before the work is done.
    pub fn reduce(&self, tensor: &Tensor, root: usize) -> Result<Work, Error> {
        let root = self.peer("reduce", root)?;
        self.issue("reduce", &[tensor], |group, out, error| {
            // SAFETY: as in `all_reduce`.
            unsafe { ffi::potstill_reduce(group, tensor.as_ptr(), root, out, error) }
        })
    }

    /// Collects all ranks' tensors, of the same shape and kind, in the order of ranks.
    ///
    /// The collected tensors are undefined until the work is done; until then do not change `tensor`.
    pub fn all_gather(&self, tensor: &Tensor) -> Result<(Work, Vec<Tensor>), Error> {
        // Checked before other tensors are made like it.
        self.check("all_gather", tensor)?;
        let outputs = (0..self.inner.member.world)
            .map(|_| tensor.f_empty_like())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| Error::from_text("all_gather", Some(self.inner.member), e.to_string()))?;
        let pointers: Vec<_> = outputs.iter().map(Tensor::as_ptr).collect();
        let work = self.issue("all_gather", &[tensor], |group, out, error| {
            // SAFETY: as in `all_reduce`; `pointers` holds as many live tensors as is said.
            unsafe {
                let (tensor, outputs, count) = (tensor.as_ptr(), pointers.as_ptr(), pointers.len());
                ffi::potstill_all_gather(group, tensor, outputs, count, out, error)
            }
        })?;
        Ok((work, outputs))
    }

    /// Sums all ranks' `input`s, which hold one piece for each rank, one after the other; this rank's sum comes into
    /// `output`. Until the work is done leave both as they are.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] when `input` has not exactly `world` times the elements of `output`.
    pub fn reduce_scatter(&self, output: &Tensor, input: &Tensor) -> Result<Work, Error> {
        if input.numel() != output.numel() * self.inner.member.world || input.kind() != output.kind() {
            return Err(self.invalid("reduce_scatter", "the input must hold one output for each rank"));
        }
        self.issue("reduce_scatter", &[output, input], |group, out, error| {
            // SAFETY: as in `all_reduce`.
            unsafe { ffi::potstill_reduce_scatter(group, output.as_ptr(), input.as_ptr(), out, error) }
        })
    }

    /// Collects all ranks' `input`s in `output`, one after the other; `input` may be this rank's own piece of it. The opposite of
    /// [`reduce_scatter`](Self::reduce_scatter). Until the work is done leave both as they are.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] when `output` has not exactly `world` times the elements of `input`.
    pub fn all_gather_into(&self, output: &Tensor, input: &Tensor) -> Result<Work, Error> {
        if output.numel() != input.numel() * self.inner.member.world || input.kind() != output.kind() {
            return Err(self.invalid("all_gather_into", "the output must hold one input of each rank"));
        }
        self.issue("all_gather_into", &[output, input], |group, out, error| {
            // SAFETY: as in `all_reduce`.
            unsafe { ffi::potstill_all_gather_into(group, output.as_ptr(), input.as_ptr(), out, error) }
        })
    }

    /// Sends `input` to rank `to`, and receives `output` from rank `from`, in the size that it is sent with; both may be empty.
    /// All ranks take part, and each sends to another one. Until the work is done leave both as they are.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a rank that does not exist, or tensors that differ in kind.
    pub fn exchange(&self, output: &Tensor, input: &Tensor, to: usize, from: usize) -> Result<Work, Error> {
        let (to, from) = (self.peer("exchange", to)?, self.peer("exchange", from)?);
        if output.kind() != input.kind() {
            return Err(self.invalid("exchange", "what is sent and what is received must be of one kind"));
        }
        self.issue("exchange", &[output, input], |group, out, error| {
            // SAFETY: as in `all_reduce`.
            unsafe { ffi::potstill_exchange(group, output.as_ptr(), input.as_ptr(), to, from, out, error) }
        })
    }

    /// Completes when all ranks have called it.
    pub fn barrier(&self) -> Result<Work, Error> {
        self.issue("barrier", &[], |group, out, error| {
            // SAFETY: the group is alive during the call.
            unsafe { ffi::potstill_barrier(group, out, error) }
        })
    }

    /// Whether the results of all operations that were issued so far may be used: they are complete, none has failed, and
    /// the group was not aborted. To be called after they were waited for, and before anything that lasts is made of them.
    ///
    /// With Gloo a wait that succeeds says as much, unless the group was aborted. With NCCL a wait only orders the current
    /// CUDA stream: an operation that [`abort`](Self::abort) or c10d's watchdog ends leaves a part of its result, and no
    /// error. So another operation follows the others on their stream, and the host waits for it.
    ///
    /// # Errors
    /// [`ErrorKind::Aborted`]; the failure of an operation; [`ErrorKind::Timeout`].
    pub fn settle(&self) -> Result<(), Error> {
        if matches!(self.inner.device, Device::Cuda(_)) && self.inner.member.world > 1 {
            let token = Tensor::f_zeros([1], (Kind::Float, self.inner.device))
                .map_err(|error| self.failure("settle", error.to_string()))?;
            let work = self.all_reduce(&token, ReduceOp::Max)?;
            let started = Instant::now();
            let timeout = *self.inner.timeout.lock().unwrap_or_else(PoisonError::into_inner);
            while !work.wait_for(LOOK)? {
                self.ensure_not_aborted()?;
                if started.elapsed() >= timeout {
                    return Err(self.failure("settle", format!("timed out after {timeout:?}")));
                }
            }
        }
        self.ensure_not_aborted()
    }

    fn ensure_not_aborted(&self) -> Result<(), Error> {
        match self.inner.aborted.load(Ordering::Acquire) {
            true => Err(self.failure("settle", "the group was aborted".to_owned())),
            false => Ok(()),
        }
    }

    /// Ends every operation in flight, here at once and on the peers as soon as they notice: each fails with
    /// [`ErrorKind::Aborted`] here. Does not wait. Any thread may call it, also while another waits for a work or is in
    /// [`Reducer::backward`](crate::Reducer::backward).
    pub fn abort(&self) -> Result<(), Error> {
        self.inner.aborted.store(true, Ordering::Release);
        self.inner.failed.store(true, Ordering::Release);
        call(|error| {
            // SAFETY: the group is alive as long as `self`, and `abort` may run beside any other operation.
            unsafe { ffi::potstill_group_abort(self.as_ptr(), error) }
        })
        .map_err(|cause| Error::from_text("abort the group", Some(self.inner.member), cause))
    }

    pub(crate) fn as_ptr(&self) -> *const ffi::Group {
        self.inner.raw.as_ptr()
    }

    /// Runs `operation` as the next one of this group, with its name and number.
    pub(crate) fn in_turn<T>(
        &self,
        name: &str,
        operation: impl FnOnce(&str) -> Result<T, Error>,
    ) -> Result<T, Error> {
        // A panic while it is locked leaves a valid number.
        let mut issued = self.inner.issued.lock().unwrap_or_else(PoisonError::into_inner);
        *issued += 1;
        let numbered = format!("{name} #{issued}");
        if self.inner.aborted.load(Ordering::Acquire) {
            return Err(self.failure(&numbered, "the group was aborted before".to_owned()));
        }
        operation(&numbered)
    }

    /// The error of an operation that failed on this group, which from now on counts as failed.
    pub(crate) fn failure(&self, operation: &str, cause: String) -> Error {
        self.inner.failed.store(true, Ordering::Release);
        let mut error = Error::from_text(operation, Some(self.inner.member), cause);
        if self.inner.aborted.load(Ordering::Acquire) {
            error.kind = ErrorKind::Aborted;
        }
        error
    }

    pub(crate) fn invalid(&self, operation: &str, cause: impl Into<String>) -> Error {
        Error::invalid(operation, Some(self.inner.member), cause)
    }

    /// A rank of this group, as c10d takes it.
    fn peer(&self, operation: &str, rank: usize) -> Result<c_int, Error> {
        if rank >= self.inner.member.world {
            return Err(self.invalid(operation, format!("there is no rank {rank}")));
        }
        to_c_int(rank).map_err(|cause| self.invalid(operation, cause))
    }

    fn issue(
        &self,
        name: &str,
        tensors: &[&Tensor],
        function: impl FnOnce(*const ffi::Group, *mut *mut ffi::Work, *mut ffi::ErrorText) -> bool,
    ) -> Result<Work, Error> {
        for tensor in tensors {
            self.check(name, tensor)?;
        }
        self.in_turn(name, |operation| {
            let mut raw = ptr::null_mut();
            call(|error| function(self.as_ptr(), &mut raw, error))
                .map_err(|cause| self.failure(operation, cause))?;
            let raw = NonNull::new(raw).ok_or_else(|| self.failure(operation, "no work".to_owned()))?;
            Ok(Work { raw, group: self.clone(), operation: operation.to_owned() })
        })
    }

    fn check(&self, operation: &str, tensor: &Tensor) -> Result<(), Error> {
        let cause = if !tensor.defined() {
            "the tensor is undefined"
        } else if tensor.is_sparse() {
            "the tensor is sparse"
        } else if !tensor.is_contiguous() {
            "the tensor is not contiguous"
        } else if tensor.device() != self.inner.device {
            return Err(self.invalid(
                operation,
                format!("the tensor is on {:?}, the group on {:?}", tensor.device(), self.inner.device),
            ));
        } else {
            return Ok(());
        };
        Err(self.invalid(operation, cause))
    }
}

/// Writes what c10d's flight recorder holds of this process's operations, the newest two thousand: which are complete, which are
/// under way, and their sizes. Those of NCCL for a CUDA device, else those of Gloo, of all groups.
/// `python -m torch.distributed.flight_recorder.fr_trace` compares the files of several ranks. To be called before
/// [`ProcessGroup::abort`], which ends what is under way.
///
/// Where the device does not answer it may block: call it on a thread of its own.
///
/// # Errors
/// The file cannot be written; [`ErrorKind::Unavailable`] where there is no NCCL.
pub fn write_flight_record(device: Device, file: &Path) -> Result<(), Error> {
    let wrong = |cause: String| Error::from_text("write the flight record", None, cause);
    let path = CString::new(file.as_os_str().as_bytes()).map_err(|error| wrong(error.to_string()))?;
    let library = if device.is_cuda() { NCCL_LIBRARY } else { &[] };
    if device.is_cuda() && library.is_empty() {
        return Err(wrong("unavailable: this program was built without NCCL".to_owned()));
    }
    call(|error| {
        // SAFETY: the library's bytes are a static and come with their true length, and `path` ends with a zero byte.
        unsafe { ffi::potstill_flight_record(library.as_ptr(), library.len(), path.as_ptr(), error) }
    })
    .map_err(wrong)
}

/// An operation under way. It keeps its tensors and its group alive. Dropping it does not end the operation.
#[derive(Debug)]
#[must_use = "the operation's tensors may be used only after `wait`"]
pub struct Work {
    raw: NonNull<ffi::Work>,
    group: ProcessGroup,
    operation: String,
}

// SAFETY: c10d's works are guarded by a lock of their own and bound to no thread, and the reference counts of
// the tensors in it are atomic.
unsafe impl Send for Work {}

impl Drop for Work {
    fn drop(&mut self) {
        // SAFETY: the pointer came from the shim, is owned here, and is used no more.
        unsafe { ffi::potstill_work_free(self.raw.as_ptr()) }
    }
}

impl Work {
    /// Name and number of the operation, for example `all_reduce #12`.
    pub fn operation(&self) -> &str {
        &self.operation
    }

    /// Whether the operation is over, successfully or not. Does not block.
    pub fn is_completed(&self) -> Result<bool, Error> {
        let mut completed = false;
        call(|error| {
            // SAFETY: the work is alive as long as `self`.
            unsafe { ffi::potstill_work_is_completed(self.raw.as_ptr(), &mut completed, error) }
        })
        .map_err(|cause| self.group.failure(&self.operation, cause))?;
        Ok(completed)
    }

    /// Waits until the operation is over.
    ///
    /// With a `timeout` (at least a millisecond), at most that long; then it fails with [`ErrorKind::Timeout`], and the
    /// operation continues and can be waited for again. Without one, Gloo blocks until the operation is over or the
    /// group's own timeout ends it; NCCL only makes the current CUDA stream wait, and does not block.
    ///
    /// # Errors
    /// The operation's own failure, or [`ErrorKind::Timeout`].
    pub fn wait(&self, timeout: Option<Duration>) -> Result<(), Error> {
        match timeout {
            None => self.wait_ms(0).map(drop),
            Some(timeout) if self.wait_for(timeout)? => Ok(()),
            Some(timeout) => Err(Error {
                kind: ErrorKind::Timeout,
                operation: self.operation.clone(),
                member: Some(self.group.member()),
                cause: format!("still under way after {timeout:?}"),
            }),
        }
    }

    /// Waits at most `timeout` (at least a millisecond), and returns whether the operation is over. For waiting in
    /// intervals while checking another condition.
    ///
    /// # Errors
    /// The operation's own failure.
    pub fn wait_for(&self, timeout: Duration) -> Result<bool, Error> {
        self.wait_ms(milliseconds(timeout))
    }

    fn wait_ms(&self, timeout: i64) -> Result<bool, Error> {
        let mut completed = false;
        call(|error| {
            // SAFETY: the work is alive as long as `self`.
            unsafe { ffi::potstill_work_wait(self.raw.as_ptr(), timeout, &mut completed, error) }
        })
        .map_err(|cause| self.group.failure(&self.operation, cause))?;
        Ok(completed)
    }
}

fn to_c_int(number: usize) -> Result<c_int, String> {
    c_int::try_from(number).map_err(|_| format!("{number} is too large"))
}
