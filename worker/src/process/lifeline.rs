//! Ends a child process with its parent.
//!
//! The parent holds the other end of the child's stdin, and writes nothing to it but one line at the start, where the child
//! is to read one. When the parent has ended, in whatever way,
//! the connection is closed, and the child ends itself. On Linux the kernel is asked to signal the child as well, which
//! also reaches a child that is stopped. Where stdin is a socket, as an agent's ranks have it, the child can tell its
//! parent through it that it works.

use std::{
    io::Read,
    os::fd::AsRawFd,
    sync::atomic::{AtomicBool, Ordering},
};

use nix::sys::socket::{MsgFlags, send};

/// Bytes of the longest line that is accepted.
const LONGEST_LINE: usize = 1 << 16;

/// The first line of standard input, without what follows it.
///
/// # Errors
/// It cannot be read, or ends before the line does.
pub fn first_line() -> std::io::Result<String> {
    let (mut line, mut byte) = (Vec::new(), [0]);
    let mut input = std::io::stdin().lock();
    while line.len() < LONGEST_LINE {
        input.read_exact(&mut byte)?;
        if byte[0] == b'\n' {
            return String::from_utf8(line).map_err(std::io::Error::other);
        }
        line.push(byte[0]);
    }
    Err(std::io::Error::other("its first line is too long"))
}

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

/// Tells the agent, once, that this rank has completed an iteration: it can work, whatever ends it later.
pub fn worked() {
    static TOLD: AtomicBool = AtomicBool::new(false);
    if !TOLD.swap(true, Ordering::Relaxed) {
        // Without an agent stdin is no socket, and this does nothing.
        let _ = send(std::io::stdin().as_raw_fd(), b".", MsgFlags::MSG_NOSIGNAL);
    }
}

/// Ends this process at once. Not by exit(), whose handlers may wait for threads that are inside a collective.
pub fn end_now() {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
}
