//! Ends a child process with its parent.
//!
//! The parent holds the write end of the child's stdin and never writes. When the parent has ended, in whatever way,
//! the pipe is closed, and the child ends itself. On Linux the kernel is asked to signal the child as well, which also
//! reaches a child that is stopped.

use std::io::Read;

/// Ends this process when the parent that spawned it with a piped stdin has ended.
pub fn hold() {
    #[cfg(target_os = "linux")]
    if let Err(error) = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL) {
        tracing::warn!(%error, "cannot ask the kernel for a signal on the parent's death; relying on the pipe alone");
    }
    std::thread::spawn(|| {
        let mut byte = [0u8; 1];
        // Any other result than an interruption means that the pipe is closed.
        while matches!(std::io::stdin().read(&mut byte), Err(e) if e.kind() == std::io::ErrorKind::Interrupted)
        {
        }
        end_now();
    });
}

/// Ends this process at once. Not by exit(), whose handlers may wait for threads that are inside a collective.
pub fn end_now() {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
}
