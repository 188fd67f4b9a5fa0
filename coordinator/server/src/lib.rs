//! The gRPC coordinator: serves workers, keeps the journal, and drives the state machine of `potstill-core`.
//!
//! - `identity` is its certificate, and `listener` accepts connections with it;
//! - `opening` brings the run's folder, its journal and the state machine together;
//! - `service` turns streams into events;
//! - `rendezvous` holds the keys and values through which the ranks of a generation find each other;
//! - `shell` is the one task that owns the state machine and executes its actions.

pub mod address;
pub mod client;
mod clock;
mod error;
mod identity;
pub mod listener;
mod opening;
mod options;
mod rendezvous;
mod service;
mod shell;
mod storing;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use potstill_access::{Invitation, JoinKey, Role};
use potstill_core::observation::{Observation, Outcome};
use potstill_proto::{
    MAX_MESSAGE_BYTES,
    status::state_name,
    wire::{StatusReply, coordinator_server::CoordinatorServer},
};
use tokio::{
    net::TcpSocket,
    sync::{
        mpsc::{self, UnboundedReceiver, UnboundedSender},
        oneshot, watch,
    },
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;

use self::{
    clock::Clock,
    identity::Identity,
    service::{Input, Service},
    shell::Shell,
};
pub use self::{
    error::StartError,
    identity::Security,
    options::{Options, Resume},
};

/// Events that may wait for the shell; beyond it, streams are read more slowly.
const INBOX: usize = 4096;
/// Connections that may wait to be accepted: as many as a large run's workers open at once.
const BACKLOG: u32 = 4096;
/// How long workers have to receive their last message when a run ends.
const FAREWELL: Duration = Duration::from_secs(5);

/// A running coordinator. Dropping it ends it at once, as a crash would.
pub struct Running {
    /// The address on which it listens.
    pub address: SocketAddr,
    /// What a worker on this machine connects with.
    pub invitation: Invitation,
    /// By which others of its services let callers in; none where everybody is let in.
    pub join_key: Option<JoinKey>,
    /// TLS with its certificate; none without TLS.
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// Its observations, in order; the last is [`Observation::Ended`].
    pub observations: UnboundedReceiver<Observation>,
    control: UnboundedSender<Input>,
    outcome: watch::Receiver<Option<Outcome>>,
    /// Aborts its tasks when it is dropped.
    _tasks: JoinSet<()>,
}

/// Asks a coordinator in this process for its status.
#[derive(Clone)]
pub struct Asking(UnboundedSender<Input>);

impl Asking {
    /// The status with some of its members, from `first_member` on; none when the coordinator has ended.
    pub async fn status(&self, first_member: u32) -> Option<StatusReply> {
        let (reply, answer) = oneshot::channel();
        self.0.send(Input::Status { first_member, reply }).ok()?;
        answer.await.ok()
    }
}

/// Starts serving a run: checks the storage, freezes or compares the specification, opens the journal, listens.
///
/// # Errors
/// See [`StartError`]. No task is left running, and a run that existed is unchanged.
pub async fn start(options: Options) -> Result<Running, StartError> {
    // The address first: it fails most cheaply, and no run is created then. Connections are refused until the run is open,
    // which can take long: what tries to connect learns that there is no coordinator yet.
    let address = options.listen;
    let bind = |source| StartError::Listen { address, source };
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    };
    let socket = socket.map_err(bind)?;
    socket.set_reuseaddr(true).map_err(bind)?;
    socket.bind(address).map_err(bind)?;
    let listening = socket.local_addr().map_err(bind)?;

    let timeouts = opening::terms(&options.spec).timeouts;
    let identity = Identity::of(&options.security)?;
    let page = options.page.clone();
    let run_id = options.run_id.to_string();
    let fingerprint = identity.as_ref().map(|identity| identity.fingerprint);
    let opened = opening::open(options, &address::advertised(listening), fingerprint).await?;
    let key = opened.join_key.clone();
    let here = address::local(listening).to_string();
    let invitation = match (fingerprint, &key) {
        (Some(certificate), Some(key)) => {
            Invitation::to(&run_id, &here, certificate, key.token(Role::Worker))
        }
        _ => Invitation::insecure(&run_id, &here),
    };

    // As between two heartbeats: a shorter pause of the coordinator makes no worker look silent.
    let clock = Clock::start(Duration::from_millis(timeouts.heartbeat_millis.max(50)));
    let (inbox_sender, inbox) = mpsc::channel(INBOX);
    let (control, controls) = mpsc::unbounded_channel();
    let (observe, observations) = mpsc::unbounded_channel();
    let (decide, outcome) = watch::channel(None);
    let (farewell, over) = oneshot::channel::<()>();
    let mut shell = Shell::new(opened, page, clock.clone(), observe);
    // Before the first record: another process may have begun to listen. What connects waits for that record.
    let listener = socket.listen(BACKLOG).map_err(bind)?;
    shell.start().await?;

    let (accepted, connections) = mpsc::channel(1);
    let service = CoordinatorServer::new(Service::new(clock.clone(), inbox_sender, key.clone()))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    // Keepalive ends connections to machines that vanished: after the worker's own timeout, whose reason is clearer, and so
    // late that a coordinator that was stopped for a while keeps its connections.
    let dead = Duration::from_millis(timeouts.dead_millis);
    let server = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(dead))
        .http2_keepalive_timeout(Some(dead.saturating_mul(6)))
        .add_service(service)
        .serve_with_incoming_shutdown(ReceiverStream::new(connections), async {
            let _ = over.await;
        });
    let tls = identity.map(|identity| identity.tls);
    let mut tasks = JoinSet::new();
    tasks.spawn(listener::accept(listener, tls.clone(), accepted, listener::room()));
    tasks.spawn(clock.keep());
    tasks.spawn(async move {
        let mut server = std::pin::pin!(server);
        let outcome = tokio::select! {
            outcome = shell.run(inbox, controls) => {
                // Fails if the server has ended already.
                let _ = farewell.send(());
                if tokio::time::timeout(FAREWELL, server).await.is_err() {
                    tracing::warn!("some connections did not end with the run");
                }
                outcome
            }
            ended = &mut server => Outcome::Failed { reason: format!("the gRPC server ended: {ended:?}") },
        };
        decide.send_replace(Some(outcome));
    });
    Ok(Running {
        address: listening,
        invitation,
        join_key: key,
        tls,
        observations,
        control,
        outcome,
        _tasks: tasks,
    })
}

impl Running {
    /// Asks the run to save and stop.
    pub fn stop(&self, reason: String) {
        // When the shell is gone the run is over already.
        let _ = self.control.send(Input::Stop { reason });
    }

    /// Ends the run as failed because its workers cannot be started.
    pub fn fail(&self, reason: String) {
        let _ = self.control.send(Input::Fail { reason });
    }

    /// Asks for the status from within this process.
    #[must_use]
    pub fn asking(&self) -> Asking {
        Asking(self.control.clone())
    }

    /// How far the run is and what is saved, as text; and whether there is a checkpoint.
    pub async fn unfinished(&self) -> (String, bool) {
        match self.asking().status(0).await {
            Some(status) => {
                let saved = match status.committed_iteration {
                    Some(iteration) => format!("the newest checkpoint is of iteration {iteration}"),
                    None => "there is no checkpoint".to_owned(),
                };
                let state = state_name(status.state());
                let text =
                    format!("{saved}, the run has done {} ({state} {})", status.iteration, status.reason);
                (text, status.committed_iteration.is_some())
            }
            None => ("the coordinator's task has ended".to_owned(), false),
        }
    }

    /// Waits for the run's end and until its workers have received their last message.
    pub async fn outcome(&mut self) -> Outcome {
        let decided = self.outcome.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone());
        decided
            .unwrap_or_else(|| Outcome::Failed { reason: "the coordinator's task ended unexpectedly".into() })
    }
}
