//! The error type: which operation failed, on which rank, and the kind of failure.

use std::fmt;
use std::time::Duration;

/// The kind of failure, by which a caller decides what to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The timeout is over: a peer is slow, stopped, unreachable, or did not join.
    Timeout,
    /// A connection was refused, reset or closed: a peer, or a store's server, has ended.
    PeerLost,
    /// This process aborted the group.
    Aborted,
    /// The backend or its device is not available: no CUDA, no NCCL, no GPU.
    Unavailable,
    /// The arguments are invalid; nothing was sent.
    InvalidInput,
    /// libtorch cannot allocate a tensor.
    OutOfMemory,
    /// Any other failure; see the cause.
    Other,
}

/// A process's rank in its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// From 0 to `world` − 1.
    pub rank: usize,
    /// The number of processes in the group.
    pub world: usize,
}

/// A failed operation.
///
/// It reads, for example, `all_reduce #12 on rank 1 of 3: peer lost: Connection closed by peer
/// [10.0.0.7]:41382`. The number is the position of the operation in its group, which counts equally on all
/// ranks.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{operation}{}: {kind}: {cause}", member.map(|m| format!(" on {m}")).unwrap_or_default())]
pub struct Error {
    /// The kind of failure.
    pub kind: ErrorKind,
    /// The operation.
    pub operation: String,
    /// The rank on which it failed; `None` outside a group.
    pub member: Option<Member>,
    /// The cause, mostly libtorch's text.
    pub cause: String,
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ErrorKind::Timeout => "timeout",
            ErrorKind::PeerLost => "peer lost",
            ErrorKind::Aborted => "aborted",
            ErrorKind::Unavailable => "unavailable",
            ErrorKind::InvalidInput => "invalid input",
            ErrorKind::OutOfMemory => "out of memory",
            ErrorKind::Other => "failed",
        })
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {}", self.rank, self.world)
    }
}

impl From<potstill_torch_ext::Error> for Error {
    fn from(error: potstill_torch_ext::Error) -> Error {
        Error::from_text(error.operation, None, error.cause)
    }
}

impl Error {
    /// Parses libtorch's text. c10d throws a plain `std::exception` for most failures in Gloo, so only the text tells a
    /// timeout from a lost peer.
    pub(crate) fn from_text(operation: impl Into<String>, member: Option<Member>, cause: String) -> Error {
        Error { kind: classify(&cause), operation: operation.into(), member, cause }
    }

    pub(crate) fn invalid(
        operation: impl Into<String>,
        member: Option<Member>,
        cause: impl Into<String>,
    ) -> Error {
        Error { kind: ErrorKind::InvalidInput, operation: operation.into(), member, cause: cause.into() }
    }
}

fn classify(cause: &str) -> ErrorKind {
    const KINDS: [(ErrorKind, &[&str]); 4] = [
        (ErrorKind::OutOfMemory, &["cuda out of memory", "can't allocate memory"]),
        (ErrorKind::Unavailable, &["unavailable", "no gpus found", "no cuda gpus", "no nvidia driver"]),
        (ErrorKind::Timeout, &["timed out", "timeout"]),
        (
            ErrorKind::PeerLost,
            &[
                "connection reset",
                "connection closed",
                "connection was likely closed",
                "connection refused",
                "broken pipe",
                "socket closed",
                "remote process exited",
                "ncclremoteerror",
            ],
        ),
    ];
    let cause = cause.to_lowercase();
    let found = KINDS.iter().find(|(_, words)| words.iter().any(|word| cause.contains(word)));
    found.map_or(ErrorKind::Other, |(kind, _)| *kind)
}

/// A timeout in milliseconds for the shim, where 0 means "no limit" and a larger number than this would overflow the
/// clock's.
pub(crate) fn milliseconds(timeout: Duration) -> i64 {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
    timeout.clamp(Duration::from_millis(1), YEAR).as_millis() as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_tells_the_kind() {
        for (text, kind) in [
            ("[unbound_buffer.cc:78] Timed out waiting 2000ms for recv operation", ErrorKind::Timeout),
            ("wait timeout after 300ms, keys: /g1/0/rank_0", ErrorKind::Timeout),
            ("[pair.cc:547] Connection closed by peer [127.0.0.1]:4242", ErrorKind::PeerLost),
            ("writev [127.0.0.1]:4242: Broken pipe", ErrorKind::PeerLost),
            ("ProcessGroupNCCL is only supported with GPUs, no GPUs found!", ErrorKind::Unavailable),
            (
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
                ErrorKind::OutOfMemory,
            ),
            ("CUDA out of memory. Tried to allocate 20.00 MiB.", ErrorKind::OutOfMemory),
            ("socket: Cannot allocate memory", ErrorKind::Other),
            ("Invalid scalar type", ErrorKind::Other),
        ] {
            assert_eq!(classify(text), kind, "{text}");
        }
    }

    #[test]
    fn an_error_says_what_who_and_why() {
        let member = Some(Member { rank: 1, world: 3 });
        let error = Error::from_text("all_reduce #12", member, "read: Connection reset by peer".to_owned());
        assert_eq!(
            error.to_string(),
            "all_reduce #12 on rank 1 of 3: peer lost: read: Connection reset by peer"
        );
    }
}
