//! The contract between Potstill's coordinator and its workers.
//!
//! - [`wire`]: what travels over gRPC, generated from `potstill/v1/attach.proto`.
//! - [`message`]: the same as types that cannot be half-filled, and the conversions between the two.
//! - [`cursor`], [`micro_batches`]: where a run stands, and which rank computes what.
//! - [`scores`]: how good samples are.
//! - [`status`]: what a run is doing, in words.

pub mod cursor;
pub mod message;
pub mod micro_batches;
pub mod scores;
pub mod status;

/// Messages and service stubs generated from `potstill/v1/attach.proto`.
pub mod wire {
    #![allow(missing_docs, clippy::all)]
    tonic::include_proto!("potstill.v1");
}

/// Version of the protocol. A worker with another version is refused at its hello.
pub const PROTOCOL: u32 = 7;

/// The largest gRPC message that either side accepts, in bytes. The largest regular ones are a page of the status
/// and, with thousands of ranks on CPUs, a rank's addresses; tensors are never sent in these messages.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;
