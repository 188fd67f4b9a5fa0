//! The C interface of `shim/shim.cpp`, one declaration for each function there. Functions that return `bool` return
//! true when they failed and then have written the reason to `error`; only otherwise have they written the
//! out-parameters.

use std::ffi::{c_char, c_int, c_void};
use std::marker::{PhantomData, PhantomPinned};

pub use potstill_torch_ext::shim::ErrorText;
use torch_sys::C_tensor;

/// An opaque C++ object. Neither `Send` nor `Sync`; the safe owners declare what they are, and why.
#[repr(C)]
pub struct Opaque<Tag> {
    bytes: [u8; 0],
    marker: PhantomData<(*mut u8, PhantomPinned, Tag)>,
}

pub struct StoreTag;
pub struct GroupTag;
pub struct WorkTag;
pub struct ReducerTag;
pub type Store = Opaque<StoreTag>;
pub type Group = Opaque<GroupTag>;
pub type Work = Opaque<WorkTag>;
pub type Reducer = Opaque<ReducerTag>;

pub struct SinkTag;
/// Where the bytes go that an operation on a store returns.
pub type Sink = Opaque<SinkTag>;

/// Bytes that the caller owns. `data` may be null where there are none.
#[repr(C)]
pub struct Bytes {
    pub data: *const u8,
    pub length: usize,
}

/// One operation on a store that Rust implements.
#[repr(C)]
pub struct StoreCall {
    /// 0 set, 1 get, 2 add, 3 compare and set, 4 delete, 5 check, 6 wait, 7 count.
    pub operation: u8,
    pub keys: *const Bytes,
    pub key_count: usize,
    pub value: Bytes,
    pub expected: Bytes,
    pub amount: i64,
    pub timeout_ms: i64,
}

pub type StoreCallFn = unsafe extern "C" fn(
    context: *const c_void,
    call: *const StoreCall,
    number: *mut i64,
    sink: *mut Sink,
    error: *mut ErrorText,
) -> bool;
pub type StoreEndFn = unsafe extern "C" fn(context: *const c_void);

unsafe extern "C" {
    pub fn potstill_store_alone(timeout_ms: i64, out: *mut *mut Store, error: *mut ErrorText) -> bool;
    pub fn potstill_store_file(
        path: *const c_char,
        timeout_ms: i64,
        out: *mut *mut Store,
        error: *mut ErrorText,
    ) -> bool;
    /// Takes `context` over: it calls `end` once when nothing uses it any more, also when it fails.
    pub fn potstill_store_of(
        call: StoreCallFn,
        end: StoreEndFn,
        context: *const c_void,
        timeout_ms: i64,
        out: *mut *mut Store,
        error: *mut ErrorText,
    ) -> bool;
    pub fn potstill_sink_write(
        sink: *mut Sink,
        bytes: *const u8,
        length: usize,
        error: *mut ErrorText,
    ) -> bool;
    pub fn potstill_store_prefix(
        store: *const Store,
        prefix: *const c_char,
        out: *mut *mut Store,
        error: *mut ErrorText,
    ) -> bool;
    pub fn potstill_store_free(store: *mut Store);

    pub fn potstill_group_gloo(
        store: *const Store,
        rank: c_int,
        world: c_int,
        timeout_ms: i64,
        host: *const c_char,
        out: *mut *mut Group,
        error: *mut ErrorText,
    ) -> bool;
    pub fn potstill_group_nccl(
        image: *const u8,
        length: usize,
        store: *const Store,
        rank: c_int,
        world: c_int,
        timeout_ms: i64,
        device: c_int,
        out: *mut *mut Group,
        error: *mut ErrorText,
    ) -> bool;
    pub fn potstill_group_set_timeout(group: *const Group, timeout_ms: i64, error: *mut ErrorText) -> bool;
    pub fn potstill_group_abort(group: *const Group, error: *mut ErrorText) -> bool;
    pub fn potstill_flight_record(
        image: *const u8,
        length: usize,
        path: *const c_char,
        error: *mut ErrorText,
    ) -> bool;
    pub fn potstill_group_free(group: *mut Group, orderly: bool);

    pub fn potstill_all_reduce(
        group: *const Group,
        tensor: *const C_tensor,
        op: u8,
        out: *mut *mut Work,
        error: *mut ErrorText,
    ) -> bool;
    pub fn potstill_broadcast(
        group: *const Group,
        tensor: *const C_tensor,
        root: c_int,
        out: *mut *mut Work,
        error: *mut ErrorText,
    ) -> bool;
    pub fn potstill_reduce(
        group: *const Group,
        tensor: *const C_tensor,
        root: c_int,
        out: *mut *mut Work,
        error: *mut ErrorText,
    ) -> bool;
    pub fn potstill_all_gather(
        group: *const Group,
        tensor: *const C_tensor,
        outputs: *const *const C_tensor,
        count: usize,
        out: *mut *mut Work,
        error: *mut ErrorText,
    ) -> bool;
    pub fn potstill_reduce_scatter(
        group: *const Group,
        output: *const C_tensor,
        input: *const C_tensor,
        out: *mut *mut Work,
        error: *mut ErrorText,
    ) -> bool;
    pub fn potstill_all_gather_into(
        group: *const Group,
        output: *const C_tensor,
        input: *const C_tensor,
        out: *mut *mut Work,
        error: *mut ErrorText,
    ) -> bool;
    pub fn potstill_exchange(
        group: *const Group,
        output: *const C_tensor,
        input: *const C_tensor,
        to: c_int,
        from: c_int,
        out: *mut *mut Work,
        error: *mut ErrorText,
    ) -> bool;
    pub fn potstill_barrier(group: *const Group, out: *mut *mut Work, error: *mut ErrorText) -> bool;

    pub fn potstill_work_is_completed(work: *const Work, completed: *mut bool, error: *mut ErrorText)
    -> bool;
    pub fn potstill_work_wait(
        work: *const Work,
        timeout_ms: i64,
        completed: *mut bool,
        error: *mut ErrorText,
    ) -> bool;
    pub fn potstill_work_free(work: *mut Work);

    pub fn potstill_reducer_new(
        group: *const Group,
        params: *const *const C_tensor,
        count: usize,
        first_bucket_bytes: i64,
        bucket_bytes: i64,
        gradient_as_bucket_view: bool,
        out: *mut *mut Reducer,
        error: *mut ErrorText,
    ) -> bool;
    pub fn potstill_reducer_backward(
        reducer: *mut Reducer,
        loss: *const C_tensor,
        exposed_ns: *mut i64,
        error: *mut ErrorText,
    ) -> bool;
    pub fn potstill_reducer_free(reducer: *mut Reducer);
}
