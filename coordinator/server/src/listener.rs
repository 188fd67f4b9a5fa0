//! Accepts connections. What connects costs a bounded amount, whether or not it has a token: a handshake has a deadline, a
//! connection has one for its first call with a token, and the number of connections has a limit below that of the
//! process's descriptors.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::{Instant, Sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tonic::transport::server::Connected;

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long a connection may be open without a call that is let in.
const PROOF: Duration = Duration::from_secs(30);
/// Descriptors that are left for everything but connections.
const RESERVED: u64 = 256;
/// Connections where the system states no limit of descriptors.
const MOST: u64 = 1 << 20;
/// The pause after the system refuses to accept a connection, as when descriptors have run out.
const PAUSE: Duration = Duration::from_millis(100);
/// How often a refusal is logged.
const SAY: Duration = Duration::from_secs(10);

/// A connection that tonic serves.
pub struct Connection {
    stream: Box<dyn Stream>,
    peer: Peer,
    /// When it must have been let in; its memory is freed then.
    deadline: Option<Pin<Box<Sleep>>>,
    _place: OwnedSemaphorePermit,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// What a call knows of its connection.
#[derive(Clone)]
pub struct Peer {
    /// Its address.
    pub address: SocketAddr,
    let_in: Arc<AtomicBool>,
}

impl Peer {
    /// A call on this connection was let in: it may stay open.
    pub fn let_in(&self) {
        self.let_in.store(true, Ordering::Relaxed);
    }
}

impl Connection {
    /// What a call on it knows of it.
    #[must_use]
    pub fn peer(&self) -> Peer {
        self.peer.clone()
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

/// The connections that this process has room for.
#[must_use]
pub fn room() -> usize {
    usize::try_from(descriptors().saturating_sub(RESERVED)).unwrap_or(Semaphore::MAX_PERMITS).max(1)
}

/// Accepts connections, `most` at a time, and sends them to `accepted`, until that is closed.
pub async fn accept(
    listener: TcpListener,
    tls: Option<Arc<ServerConfig>>,
    accepted: mpsc::Sender<io::Result<Connection>>,
    most: usize,
) {
    let places = Arc::new(Semaphore::new(most));
    let tls = tls.map(TlsAcceptor::from);
    let mut said: Option<Instant> = None;
    let mut say = |what: String| {
        if said.is_none_or(|said| said.elapsed() >= SAY) {
            said = Some(Instant::now());
            tracing::warn!("{what}");
        }
    };
    loop {
        let (stream, address) = tokio::select! {
            connection = listener.accept() => match connection {
                Ok(connection) => connection,
                Err(error) => {
                    say(format!("a connection cannot be accepted: {error}"));
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            },
            () = accepted.closed() => return,
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            say(format!(
                "a connection from {address} is refused: {most} are open. Raise the limit of open files (ulimit -n) if they are all workers'"
            ));
            continue;
        };
        let (tls, accepted) = (tls.clone(), accepted.clone());
        tokio::spawn(async move {
            match timeout(HANDSHAKE, shaken(stream, tls)).await {
                Ok(Ok(stream)) => {
                    let peer = Peer { address, let_in: Arc::default() };
                    let deadline = Some(Box::pin(tokio::time::sleep(PROOF)));
                    // It fails when the server has ended.
                    let _ = accepted.send(Ok(Connection { stream, peer, deadline, _place: place })).await;
                }
                Ok(Err(error)) => tracing::debug!(%address, %error, "a connection failed in its handshake"),
                Err(_) => tracing::debug!(%address, "a connection did not complete its handshake"),
            }
        });
    }
}

async fn shaken(stream: TcpStream, tls: Option<TlsAcceptor>) -> io::Result<Box<dyn Stream>> {
    stream.set_nodelay(true)?;
    Ok(match tls {
        None => Box::new(stream),
        Some(tls) => Box::new(tls.accept(stream).await?),
    })
}

/// The number of descriptors that this process may have, raised as far as it may raise it.
fn descriptors() -> u64 {
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) => {
            let raised = hard.min(MOST).max(soft);
            match setrlimit(Resource::RLIMIT_NOFILE, raised, hard) {
                Ok(()) => raised.min(MOST),
                Err(_) => soft.min(MOST),
            }
        }
        Err(_) => 1024,
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.deadline.is_some() && self.peer.let_in.load(Ordering::Relaxed) {
            self.deadline = None;
        }
        if let Some(deadline) = &mut self.deadline
            && deadline.as_mut().poll(context).is_ready()
        {
            // It may have been let in since the last read.
            if !self.peer.let_in.load(Ordering::Relaxed) {
                let problem = format!("no call was let in within {} s", PROOF.as_secs());
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, problem)));
            }
            self.deadline = None;
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use potstill_access::Fingerprint;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_rustls::TlsConnector;

    use super::*;
    use crate::identity::{Identity, Security};

    struct Lab {
        address: SocketAddr,
        fingerprint: Fingerprint,
        accepted: mpsc::Receiver<io::Result<Connection>>,
    }

    async fn lab(most: usize) -> Lab {
        let identity = Identity::of(&Security::Own).unwrap().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, accepted) = mpsc::channel(1);
        tokio::spawn(accept(listener, Some(identity.tls), sender, most));
        Lab { address, fingerprint: identity.fingerprint, accepted }
    }

    impl Lab {
        async fn handshake(&self) -> tokio_rustls::client::TlsStream<TcpStream> {
            let stream = TcpStream::connect(self.address).await.unwrap();
            let connector = TlsConnector::from(self.fingerprint.client().unwrap());
            connector.connect("potstill".try_into().unwrap(), stream).await.unwrap()
        }
    }

    /// Reads until the other side closes; a reset is an end too.
    async fn ended(stream: &mut TcpStream) {
        let _ = stream.read_to_end(&mut Vec::new()).await;
    }

    /// With the clock paused, time passes as soon as nothing else happens.
    #[tokio::test(start_paused = true)]
    async fn a_socket_that_stays_silent_is_closed() {
        let lab = lab(10).await;
        let mut silent = TcpStream::connect(lab.address).await.unwrap();
        let started = Instant::now();
        ended(&mut silent).await;
        assert!(started.elapsed() >= HANDSHAKE);
    }

    #[tokio::test]
    async fn what_is_no_tls_is_closed() {
        let lab = lab(10).await;
        let mut stranger = TcpStream::connect(lab.address).await.unwrap();
        stranger.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        ended(&mut stranger).await;
    }

    #[tokio::test]
    async fn a_connection_lasts_from_its_first_call_that_is_let_in() {
        let mut lab = lab(10).await;
        let mut client = lab.handshake().await;
        let mut connection = lab.accepted.recv().await.unwrap().unwrap();
        // From here on no time passes but that of timers.
        tokio::time::pause();
        let peer = connection.connect_info();
        let mut buffer = [0; 8];
        let error = connection.read(&mut buffer).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        peer.let_in();
        client.write_all(b"a call").await.unwrap();
        client.flush().await.unwrap();
        tokio::time::resume();
        assert_eq!(connection.read(&mut buffer).await.unwrap(), 6);
    }

    #[tokio::test]
    async fn there_is_room_for_a_bounded_number_of_connections() {
        let mut lab = lab(1).await;
        let first = lab.handshake().await;
        let connection = lab.accepted.recv().await.unwrap().unwrap();
        let mut second = TcpStream::connect(lab.address).await.unwrap();
        ended(&mut second).await;
        drop((first, connection));
        let _third = lab.handshake().await;
        lab.accepted.recv().await.unwrap().unwrap();
    }

    #[test]
    fn the_limit_of_descriptors_is_raised() {
        let room = room();
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert_eq!(soft, hard.min(MOST).max(soft));
        assert!(room as u64 <= soft);
    }
}
