//! Files that one process of a machine makes while the others wait.

use std::{fs::File, path::Path, thread, time::Duration};

use anyhow::Context;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

use crate::process::work;

/// How often a process that waits looks whether it may go on.
const LOOK: Duration = Duration::from_millis(200);

/// Waits until no other process holds the lock of what is made at `place`, or first at the same place with the extension `partial`,
/// and says so where one does. While that grows, the process that waits makes progress, too.
///
/// # Errors
/// The file system cannot lock.
pub fn exclusive(lock: File, place: &Path) -> anyhow::Result<Flock<File>> {
    locked(lock, place, work::complete)
}

#[expect(clippy::disallowed_methods, reason = "a rank that loads has a thread of its own for heartbeats")]
fn locked(mut lock: File, place: &Path, progress: impl Fn()) -> anyhow::Result<Flock<File>> {
    let sizes = || (size(place), size(&place.with_extension("partial")));
    let mut seen = None;
    loop {
        lock = match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => return Ok(locked),
            Err((lock, Errno::EWOULDBLOCK)) => lock,
            Err((_, error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", place.display()));
            }
        };
        let now = Some(sizes());
        match seen {
            None => {
                tracing::info!(place = %place.display(), "another process is making it: waiting for that")
            }
            Some(_) if seen != now => progress(),
            Some(_) => {}
        }
        seen = now;
        thread::sleep(LOOK);
    }
}

/// Bytes and files of a file or a folder; 0 where it is not there.
fn size(place: &Path) -> u64 {
    match std::fs::read_dir(place) {
        Ok(entries) => entries.flatten().map(|entry| 1 + size(&entry.path())).sum(),
        Err(_) => place.metadata().map_or(0, |file| file.len()),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        sync::atomic::{AtomicU64, Ordering::Relaxed},
    };

    use super::*;

    #[test]
    fn a_process_that_waits_makes_progress_while_the_other_one_does() {
        let folder = tempfile::tempdir().unwrap();
        let (place, calls) = (folder.path().join("model"), AtomicU64::new(0));
        let file = || File::create(folder.path().join("lock")).unwrap();
        let progress = || {
            calls.fetch_add(1, Relaxed);
        };
        for path in ["model.partial", "model/000000.safetensors"].map(|name| folder.path().join(name)) {
            let held = locked(file(), &place, progress).unwrap();
            assert_eq!(calls.swap(0, Relaxed), 0, "it has not waited");
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let waiting = file();
            thread::scope(|scope| {
                let waiter = scope.spawn(|| locked(waiting, &place, progress));
                let mut content = Vec::new();
                while calls.load(Relaxed) < 2 {
                    content.push(b'x');
                    fs::write(&path, &content).unwrap();
                    thread::yield_now();
                }
                drop(held);
                waiter.join().unwrap().unwrap();
            });
            calls.store(0, Relaxed);
        }
    }
}
