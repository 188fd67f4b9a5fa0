//! Ends a child process with its parent.
//!
//! The parent holds the other end of the child's stdin, and writes nothing to it but one line at the start, where the child
//! is to read one. When the parent has ended, in whatever way,
//! the connection is closed, and the child ends itself. On Linux the kernel is asked to signal the child as well, which
//! also reaches a child that is stopped. Where stdin is a socket, as an agent's ranks have it, the child can tell its
//! parent through it that it works.

use std::{
    io::{ErrorKind, Read},
    os::{fd::AsRawFd, unix::net::UnixStream},
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
        while matches!(std::io::stdin().read(&mut byte), Err(e) if e.kind() == ErrorKind::Interrupted) {}
        end_now();
    });
}

/// Tells the agent that this rank has completed the run's iteration with this number.
pub fn completed(iteration: u64) {
    // Without an agent stdin is no socket, and this does nothing. An agent that is stopped does not stop its ranks: it misses
    // some numbers.
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    let _ = send(std::io::stdin().as_raw_fd(), &iteration.to_le_bytes(), flags);
}

/// Waits until the rank at the other end of this connection has ended. Returns the number of the iteration that it completed
/// last.
pub fn last_completed(mut rank: &UnixStream) -> Option<u64> {
    let (mut last, mut number) = (None, [0; 8]);
    while rank.read_exact(&mut number).is_ok() {
        last = Some(u64::from_le_bytes(number));
    }
    last
}

/// Ends this process at once. Not by exit(), whose handlers may wait for threads that are inside a collective.
pub fn end_now() {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
}
