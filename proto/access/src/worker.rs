//! A worker's id, which follows from a secret of its process: another worker cannot claim it.

use ring::digest::{SHA256, digest};

use crate::{
    AccessError,
    key::{random, to_hex},
};

/// Before the secret in what is hashed.
const CONTEXT: &[u8] = b"potstill worker ";
/// Bytes of the hash in the id.
const ID: usize = 16;

/// What a worker process proves its id with. It travels to the coordinator only.
#[derive(Clone)]
pub struct WorkerSecret([u8; 32]);

impl std::fmt::Debug for WorkerSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WorkerSecret(secret)")
    }
}

impl WorkerSecret {
    /// A new one.
    ///
    /// # Errors
    /// The system gives no random numbers.
    pub fn generate() -> Result<Self, AccessError> {
        random().map(Self)
    }

    /// Its bytes, for the hello.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The id of the worker with this secret.
    #[must_use]
    pub fn id(&self) -> String {
        Self::id_of(&self.0)
    }

    /// The id of the worker whose secret has these bytes.
    #[must_use]
    pub fn id_of(secret: &[u8]) -> String {
        let hash = digest(&SHA256, &[CONTEXT, secret].concat());
        to_hex(&hash.as_ref()[..ID])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_belongs_to_one_secret() {
        let (a, b) = (WorkerSecret::generate().unwrap(), WorkerSecret::generate().unwrap());
        assert_eq!(a.id(), WorkerSecret::id_of(a.bytes()));
        assert_ne!(a.id(), b.id());
        assert_eq!(a.id().len(), 32);
        assert!(!format!("{a:?}").contains(&to_hex(a.bytes())[..8]));
    }
}
