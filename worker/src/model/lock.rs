//! Files that one process of a machine makes while the others wait.

use std::{fs::File, path::Path};

use anyhow::Context;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

/// Waits until no other process holds the lock of what is made at `place`, and says so where one does.
///
/// # Errors
/// The file system cannot lock.
pub fn exclusive(lock: File, place: &Path) -> anyhow::Result<Flock<File>> {
    let locked = match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
        Err((lock, Errno::EWOULDBLOCK)) => {
            tracing::info!(place = %place.display(), "another process is making it: waiting for that");
            Flock::lock(lock, FlockArg::LockExclusive)
        }
        other => other,
    };
    locked.map_err(|(_, error)| error).with_context(|| format!("cannot lock {}", place.display()))
}
