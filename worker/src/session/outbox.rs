//! What a rank sends to the coordinator, from any of its threads, whether or not there is a stream at the moment.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use potstill_access::WorkerSecret;
use potstill_proto::{
    message::{FromWorker, Hello, Place, Source, ToWorker, proven},
    wire,
};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::{progress::Progress, retained::Retained};

/// Sends messages to the coordinator, from any thread, whether or not there is a stream at the moment.
#[derive(Clone, Default)]
pub struct Outbox(Arc<Mutex<Outgoing>>);

#[derive(Default)]
struct Outgoing {
    retained: Retained,
    stream: Option<UnboundedSender<wire::WorkerMessage>>,
    /// Whether the coordinator has answered the stream's hello.
    welcomed: bool,
}

impl Outbox {
    /// Sends a message; one that must not be lost is sent again after a lost stream.
    pub fn send(&self, message: FromWorker) {
        let mut outgoing = self.lock();
        outgoing.retained.keep(&message);
        if let Some(stream) = &outgoing.stream {
            // The link itself notices when a stream is lost.
            let _ = stream.send(message.into());
        }
    }

    /// Sends a request for keys and values; false where there is no stream whose hello was answered.
    pub fn ask(&self, request: wire::StoreRequest) -> bool {
        let message = wire::WorkerMessage { kind: Some(wire::worker_message::Kind::StoreRequest(request)) };
        let outgoing = self.lock();
        let stream = outgoing.stream.as_ref().filter(|_| outgoing.welcomed);
        stream.is_some_and(|stream| stream.send(message).is_ok())
    }

    /// Whether requests for keys and values can be sent from now on.
    pub(super) fn welcomed(&self, welcomed: bool) {
        self.lock().welcomed = welcomed;
    }

    /// Starts a stream: sends a hello, and all messages that a new coordinator may not have received.
    pub(super) fn begin(
        &self,
        mut hello: Hello,
        secret: &WorkerSecret,
        progress: &Progress,
    ) -> anyhow::Result<UnboundedReceiverStream<wire::WorkerMessage>> {
        let (sender, messages) = unbounded_channel();
        let mut outgoing = self.lock();
        hello.place = outgoing.retained.place;
        hello.held = progress.held().filter(|_| outgoing.retained.keeps_state(progress.loaded()));
        let closed = "the stream closed before the hello";
        sender.send(proven(hello, secret.bytes())).context(closed)?;
        for message in outgoing.retained.messages() {
            sender.send(message.clone().into()).context(closed)?;
        }
        outgoing.stream = Some(sender);
        Ok(UnboundedReceiverStream::new(messages))
    }

    /// The newest checkpoint that this rank was told of or has loaded.
    pub fn saved(&self) -> u64 {
        self.lock().retained.saved
    }

    /// This rank has loaded the checkpoint of this iteration.
    pub fn has_loaded(&self, iteration: u64) {
        let retained = &mut self.lock().retained;
        retained.saved = retained.saved.max(iteration);
    }

    pub(super) fn heard(&self, message: &ToWorker) {
        let retained = &mut self.lock().retained;
        match message {
            ToWorker::Assignment(a) => {
                let keeps_state = a.source == Source::Peer { rank: a.rank };
                retained.assigned(Place { generation: a.generation, rank: a.rank }, keeps_state);
            }
            ToWorker::Committed { iteration } => {
                retained.committed(*iteration);
                retained.saved = retained.saved.max(*iteration);
            }
            _ => {}
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Outgoing> {
        // A thread that panicked leaves consistent data: every change is a single push or retain.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
