//! The gRPC service: streams become events, in the order in which each worker sent its messages.

use std::{
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll},
    time::Duration,
};

use futures::Stream;
use potstill_access::{JoinKey, Role, WorkerSecret, bearer};
use potstill_core::{StreamId, Tick};
use potstill_proto::{
    message::{FromWorker, Hello, Malformed, prose, secret},
    wire::{self, coordinator_server::Coordinator, worker_message::Kind},
};
use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status, Streaming};

use crate::{clock::Clock, listener::Peer};

/// How long a new stream may take to send its hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Messages that may be queued for a worker that does not read them.
const OUTBOX: usize = 256;

/// The queue of messages to a worker. When it is dropped the stream ends after the queued messages.
pub type Outbox = mpsc::Sender<Result<wire::CoordinatorMessage, Status>>;

/// What the service reports to the shell, and when it happened, so that time spent in the queue does not count.
pub struct Arrival {
    /// When it happened.
    pub at: Tick,
    /// What happened.
    pub input: Input,
}

/// See [`Arrival`].
pub enum Input {
    /// A worker sent its hello.
    Attached {
        /// Its stream.
        stream: StreamId,
        /// The hello.
        hello: Hello,
        /// The queue for answers.
        outbox: Outbox,
    },
    /// A worker sent another message.
    Received {
        /// Its stream.
        stream: StreamId,
        /// The message.
        message: FromWorker,
    },
    /// A worker asks for its generation's keys and values.
    Store {
        /// Its stream.
        stream: StreamId,
        /// The operation.
        request: wire::StoreRequest,
    },
    /// A stream has ended.
    Closed {
        /// The stream.
        stream: StreamId,
        /// Why, as text.
        reason: String,
        /// The gRPC status that its worker gets, if the worker is at fault.
        status: Option<Status>,
    },
    /// A client asks for the status.
    Status {
        /// The first member to list.
        first_member: u32,
        /// For the answer.
        reply: oneshot::Sender<wire::StatusReply>,
    },
    /// A client asks for a checkpoint; the answer is its iteration, or why there is none.
    Checkpoint(oneshot::Sender<Result<u64, String>>),
    /// The run is to save and stop.
    Stop {
        /// Who asks for it, and why.
        reason: String,
    },
    /// The run cannot go on: its workers cannot be kept alive.
    Fail {
        /// Why.
        reason: String,
    },
}

/// The service.
pub struct Service {
    clock: Clock,
    inbox: mpsc::Sender<Arrival>,
    streams: AtomicU64,
    /// What lets callers in; none where everybody is let in.
    key: Option<JoinKey>,
}

impl Service {
    /// A service that reports to `inbox`.
    pub fn new(clock: Clock, inbox: mpsc::Sender<Arrival>, key: Option<JoinKey>) -> Self {
        Self { clock, inbox, streams: AtomicU64::new(0), key }
    }

    /// Lets a call in whose token is that of one of these roles.
    fn admit<T>(&self, request: &Request<T>, roles: &[Role]) -> Result<(), Status> {
        if let Some(key) = &self.key {
            let value = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
            let role = value.and_then(bearer).and_then(|token| key.role_of(token));
            match role {
                Some(role) if roles.contains(&role) => {}
                Some(role) => {
                    let allowed: Vec<_> = roles.iter().map(|role| role.name()).collect();
                    let problem =
                        format!("the token is of a {role}; this takes one of a {}", allowed.join(" or "));
                    return Err(Status::permission_denied(problem));
                }
                None => {
                    return Err(Status::unauthenticated(
                        "the call carries no token of this run's join key: give --storage, or an invitation of this run",
                    ));
                }
            }
        }
        if let Some(peer) = request.extensions().get::<Peer>() {
            peer.let_in();
        }
        Ok(())
    }

    async fn ask(&self, input: Input) -> Result<(), Status> {
        let arrival = Arrival { at: self.clock.now(), input };
        self.inbox.send(arrival).await.map_err(|_| over())
    }
}

#[tonic::async_trait]
impl Coordinator for Service {
    type AttachStream = Answers;

    async fn attach(
        &self,
        request: Request<Streaming<wire::WorkerMessage>>,
    ) -> Result<Response<Answers>, Status> {
        self.admit(&request, &[Role::Worker])?;
        let peer = request.extensions().get::<Peer>();
        let peer = peer.map_or_else(|| "unknown address".to_owned(), |peer| peer.address.to_string());
        let (outbox, answers) = mpsc::channel(OUTBOX);
        let (open, over) = oneshot::channel();
        let mut reader = Reader {
            stream: StreamId(self.streams.fetch_add(1, Ordering::Relaxed)),
            clock: self.clock.clone(),
            inbox: self.inbox.clone(),
            messages: request.into_inner(),
        };
        tokio::spawn(async move {
            let reason = tokio::select! {
                () = reader.run(outbox, &peer) => None,
                // The answers have ended, or the worker's connection has.
                _ = over => Some("its connection has ended".to_owned()),
            };
            if let Some(reason) = reason {
                reader.tell(Input::Closed { stream: reader.stream, reason, status: None }).await;
            }
        });
        Ok(Response::new(Answers { answers, _open: open }))
    }

    async fn status(
        &self,
        request: Request<wire::StatusRequest>,
    ) -> Result<Response<wire::StatusReply>, Status> {
        self.admit(&request, &Role::ALL)?;
        let first_member = request.into_inner().first_member;
        let (reply, answer) = oneshot::channel();
        self.ask(Input::Status { first_member, reply }).await?;
        answer.await.map(Response::new).map_err(|_| over())
    }

    async fn checkpoint(
        &self,
        request: Request<wire::CheckpointRequest>,
    ) -> Result<Response<wire::CheckpointReply>, Status> {
        self.admit(&request, &[Role::Operator])?;
        let (reply, answer) = oneshot::channel();
        self.ask(Input::Checkpoint(reply)).await?;
        let iteration = answer.await.map_err(|_| over())?.map_err(Status::failed_precondition)?;
        Ok(Response::new(wire::CheckpointReply { iteration }))
    }

    async fn cancel(
        &self,
        request: Request<wire::CancelRequest>,
    ) -> Result<Response<wire::CancelReply>, Status> {
        self.admit(&request, &[Role::Operator])?;
        self.ask(Input::Stop { reason: prose(&request.into_inner().reason) }).await?;
        Ok(Response::new(wire::CancelReply {}))
    }
}

fn over() -> Status {
    Status::unavailable("the run is over")
}

/// The messages to a worker, as a stream. When it ends, or its connection does, the reader of the worker's messages
/// ends too.
pub struct Answers {
    answers: mpsc::Receiver<Result<wire::CoordinatorMessage, Status>>,
    _open: oneshot::Sender<()>,
}

impl Stream for Answers {
    type Item = Result<wire::CoordinatorMessage, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.answers.poll_recv(context)
    }
}

/// Reads one worker's messages.
struct Reader {
    stream: StreamId,
    clock: Clock,
    inbox: mpsc::Sender<Arrival>,
    messages: Streaming<wire::WorkerMessage>,
}

impl Reader {
    async fn run(&mut self, outbox: Outbox, peer: &str) {
        let hello = match tokio::time::timeout(HELLO_TIMEOUT, self.hello()).await {
            Ok(Ok(hello)) => hello,
            Ok(Err(status)) => return refuse(&outbox, peer, status).await,
            Err(_) => {
                let waited = format!("no Hello within {} s", HELLO_TIMEOUT.as_secs());
                return refuse(&outbox, peer, Status::deadline_exceeded(waited)).await;
            }
        };
        tracing::debug!(worker = %hello.worker, %peer, stream = self.stream.0, "hello");
        let stream = self.stream;
        self.tell(Input::Attached { stream, hello, outbox }).await;
        let (reason, status) = loop {
            match self.messages.message().await {
                Ok(Some(wire::WorkerMessage { kind: Some(Kind::StoreRequest(request)) })) => {
                    self.tell(Input::Store { stream, request }).await;
                }
                Ok(Some(message)) => match FromWorker::try_from(message) {
                    Ok(message) => self.tell(Input::Received { stream, message }).await,
                    Err(error) => break (error.to_string(), Some(malformed(&error))),
                },
                Ok(None) => break ("it closed its stream".to_owned(), None),
                Err(status) => break (format!("its stream failed: {}", status.message()), Some(status)),
            }
        };
        self.tell(Input::Closed { stream, reason, status }).await;
    }

    async fn hello(&mut self) -> Result<Hello, Status> {
        let first = self.messages.message().await?;
        let first = first.ok_or_else(|| Status::invalid_argument("the stream ended before its Hello"))?;
        let id = WorkerSecret::id_of(secret(&first));
        let hello = Hello::try_from(first).map_err(|error| malformed(&error))?;
        if hello.worker.0 != id {
            return Err(Status::permission_denied(format!(
                "worker_id {} does not belong to its secret",
                hello.worker
            )));
        }
        Ok(hello)
    }

    async fn tell(&self, input: Input) {
        let arrival = Arrival { at: self.clock.now(), input };
        // When the shell has ended the run is over, and the stream ends soon.
        let _ = self.inbox.send(arrival).await;
    }
}

fn malformed(error: &Malformed) -> Status {
    Status::invalid_argument(error.to_string())
}

async fn refuse(outbox: &Outbox, peer: &str, status: Status) {
    tracing::warn!(%peer, reason = status.message(), "a stream was refused before its hello");
    let _ = outbox.send(Err(status)).await;
}
