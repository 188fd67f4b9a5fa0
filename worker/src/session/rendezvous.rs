//! The keys and values of a generation, as the coordinator keeps them: each operation is a request on the stream. What waits
//! is ended at once when the stream is lost or when the rank is called away.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::Duration,
};

use potstill_c10d::{Answer, KeyValues, Operation};
use potstill_proto::{
    cursor::Generation,
    wire::{StoreOperation, StoreReply, StoreRequest},
};

use super::outbox::Outbox;

/// Why a request of a generation that is over fails.
const CALLED_OFF: &str = "the generation was called off";

/// The requests of this rank that wait for their replies.
#[derive(Clone, Default)]
pub struct Calls(Arc<Mutex<Waiting>>);

#[derive(Default)]
struct Waiting {
    next: u64,
    /// The newest generation that was called off.
    left: Generation,
    calls: HashMap<u64, (Generation, mpsc::Sender<Result<StoreReply, String>>)>,
}

impl Calls {
    /// A reply has arrived.
    pub fn answer(&self, reply: StoreReply) {
        if let Some((_, waiting)) = self.lock().calls.remove(&reply.id) {
            // It may have given up.
            let _ = waiting.send(Ok(reply));
        }
    }

    /// Ends all requests: the stream is lost.
    pub fn lost(&self) {
        self.end(|_| true, "the coordinator was lost while the group formed");
    }

    /// Ends the requests of generations before `generation`, and its own where it was called off.
    pub fn leave(&self, up_to: Generation) {
        let mut waiting = self.lock();
        waiting.left = waiting.left.max(up_to);
        drop(waiting);
        self.end(|generation| generation <= up_to, CALLED_OFF);
    }

    fn end(&self, which: impl Fn(Generation) -> bool, reason: &str) {
        self.lock().calls.retain(|_, (generation, waiting)| {
            let ends = which(*generation);
            if ends {
                let _ = waiting.send(Err(reason.to_owned()));
            }
            !ends
        });
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting> {
        // A thread that panicked leaves consistent data: every change is a single insertion or removal.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The keys and values of one generation.
#[derive(Clone)]
pub struct GenerationStore {
    pub(super) outbox: Outbox,
    pub(super) calls: Calls,
    pub(super) generation: Generation,
    /// What the keys begin with: groups of some of the ranks have keys of their own.
    pub(super) prefix: String,
}

impl KeyValues for GenerationStore {
    fn execute(&self, operation: Operation<'_>, patience: Duration) -> Result<Answer, String> {
        let (mut request, kind) = request(&operation);
        request.keys.iter_mut().for_each(|key| key.insert_str(0, &self.prefix));
        let reply = match self.ask(request, patience) {
            Ok(reply) if reply.error.is_empty() => reply,
            Ok(reply) => return unanswered(kind, reply.error),
            Err(error) => return unanswered(kind, error),
        };
        Ok(match kind {
            StoreOperation::Get | StoreOperation::CompareSet => Answer::Value(reply.value),
            StoreOperation::Add | StoreOperation::Delete | StoreOperation::Check | StoreOperation::Count => {
                Answer::Number(reply.number)
            }
            StoreOperation::Set | StoreOperation::Wait | StoreOperation::Unspecified => Answer::Done,
        })
    }
}

impl GenerationStore {
    /// The keys of a group of some of the ranks.
    pub fn of_group(&self, name: &str) -> Self {
        Self { prefix: format!("{}{name}/", self.prefix), ..self.clone() }
    }

    /// Sends a request and waits for its reply.
    fn ask(&self, mut request: StoreRequest, patience: Duration) -> Result<StoreReply, String> {
        // Without values, which may be secret.
        let what = format!("{} of {:?}", request.operation().as_str_name(), request.keys);
        let (tell, told) = mpsc::channel();
        let id = {
            let mut waiting = self.calls.lock();
            if self.generation <= waiting.left {
                return Err(CALLED_OFF.to_owned());
            }
            waiting.next += 1;
            let id = waiting.next;
            waiting.calls.insert(id, (self.generation, tell));
            id
        };
        (request.id, request.generation) = (id, self.generation.0);
        if !self.outbox.ask(request) {
            self.calls.lock().calls.remove(&id);
            return Err("there is no connection to the coordinator".to_owned());
        }
        told.recv_timeout(patience).unwrap_or_else(|_| {
            self.calls.lock().calls.remove(&id);
            Err(format!("timed out after {:.1} s: {what} in {}", patience.as_secs_f64(), self.generation))
        })
    }
}

/// NCCL looks now and then for a key that a failing rank sets, also after the group has formed, when the coordinator may have
/// been replaced: there is no such key then.
fn unanswered(kind: StoreOperation, error: String) -> Result<Answer, String> {
    match kind {
        StoreOperation::Check => Ok(Answer::Number(0)),
        _ => Err(error),
    }
}

/// The request for an operation, and its kind.
fn request(operation: &Operation<'_>) -> (StoreRequest, StoreOperation) {
    let mut request = StoreRequest::default();
    let one = |key: &str| vec![key.to_owned()];
    let all = |keys: &[&str]| keys.iter().map(|&key| key.to_owned()).collect();
    let kind = match operation {
        Operation::Set { key, value } => {
            (request.keys, request.value) = (one(key), value.to_vec());
            StoreOperation::Set
        }
        Operation::Get { key } => {
            request.keys = one(key);
            StoreOperation::Get
        }
        Operation::Add { key, amount } => {
            (request.keys, request.amount) = (one(key), *amount);
            StoreOperation::Add
        }
        Operation::CompareSet { key, expected, value } => {
            (request.keys, request.expected, request.value) = (one(key), expected.to_vec(), value.to_vec());
            StoreOperation::CompareSet
        }
        Operation::Delete { key } => {
            request.keys = one(key);
            StoreOperation::Delete
        }
        Operation::Check { keys } => {
            request.keys = all(keys);
            StoreOperation::Check
        }
        Operation::Wait { keys } => {
            request.keys = all(keys);
            StoreOperation::Wait
        }
        Operation::Count => StoreOperation::Count,
    };
    request.set_operation(kind);
    (request, kind)
}
