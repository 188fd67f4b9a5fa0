//! Who may speak to a coordinator, and how it is known that it is the coordinator.
//!
//! The storage is the root of trust: who may write a run may join it. Each coordinator makes a certificate, and states its
//! SHA-256 in the run's storage beside its address; what connects accepts this certificate and no other. The run's
//! [`JoinKey`] lies there too, readable for the owner of the storage alone. From it a token follows for each [`Role`], and
//! every call carries one. Both travel in an [`Invitation`] where a machine does not see the storage.
//!
//! - `key`: the join key, roles and tokens;
//! - `fingerprint`: a certificate's SHA-256, and TLS that accepts it alone;
//! - `invitation`: all that is needed to connect, and the connection;
//! - `locate`: where an invitation comes from;
//! - `machine`: the addresses of this machine;
//! - `worker`: a worker's id, which no other worker can claim.

pub mod address;
mod error;
mod fingerprint;
mod invitation;
mod key;
mod locate;
pub mod machine;
mod worker;

pub use error::AccessError;
pub use fingerprint::Fingerprint;
pub use invitation::{Authorized, Invitation, Patience};
pub use key::{JoinKey, Role, bearer};
pub use locate::Locator;
pub use worker::WorkerSecret;
