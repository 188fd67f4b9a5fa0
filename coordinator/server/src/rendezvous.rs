//! The keys and values through which the ranks of a generation find each other. They belong to the newest generation, which
//! alone its members can read and write, and are forgotten with it.

use std::collections::BTreeMap;

use potstill_core::StreamId;
use potstill_proto::{
    cursor::Generation,
    wire::{StoreOperation, StoreReply, StoreRequest},
};

/// Bytes of all keys and values of a generation: a rank's addresses are 150 bytes for each of its peers.
const ROOM: usize = 256 << 20;
/// Bytes of a key.
const KEY: usize = 1024;
/// Keys of a request: a rank waits for those of all ranks at once.
const KEYS: usize = 1 << 14;
/// Bytes that an entry takes beside its key and value.
const ENTRY: usize = 100;
/// Requests of one worker that wait. A worker has a few threads, and each has one request at a time.
const WAITING: usize = 64;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Rendezvous {
    generation: Generation,
    /// The streams that have a place in it.
    members: BTreeMap<StreamId, Vec<Waiting>>,
    values: BTreeMap<String, Vec<u8>>,
    bytes: usize,
}

/// A request that is answered when its keys exist.
#[derive(Debug)]
struct Waiting {
    id: u64,
    /// Those that have not existed yet.
    missing: Vec<String>,
    /// The key whose value is the answer.
    reads: Option<String>,
}

/// Replies, and who gets them.
pub type Replies = Vec<(StreamId, StoreReply)>;

impl Rendezvous {
    /// A worker gets a place in a generation. A newer one replaces an older one, with all that waits in it: its ranks leave
    /// it anyway.
    pub fn admit(&mut self, stream: StreamId, generation: Generation) {
        if generation > self.generation {
            *self = Self { generation, ..Self::default() };
        }
        if generation == self.generation {
            self.members.entry(stream).or_default();
        }
    }

    /// A stream has ended.
    pub fn leave(&mut self, stream: StreamId) {
        self.members.remove(&stream);
    }

    /// Executes a request.
    pub fn ask(&mut self, stream: StreamId, request: StoreRequest) -> Replies {
        let id = request.id;
        let adds = [StoreOperation::Set, StoreOperation::Add, StoreOperation::CompareSet];
        let adds = adds.contains(&request.operation());
        match self.execute(stream, request) {
            Ok(Some(reply)) => {
                let mut replies = vec![(stream, StoreReply { id, ..reply })];
                if adds {
                    replies.extend(self.woken());
                }
                replies
            }
            Ok(None) => Vec::new(),
            Err(error) => vec![(stream, StoreReply { id, error, ..StoreReply::default() })],
        }
    }

    /// The reply; none when the request waits.
    fn execute(&mut self, stream: StreamId, request: StoreRequest) -> Result<Option<StoreReply>, String> {
        let operation = request.operation();
        let StoreRequest { generation, id, keys, value, expected, amount, .. } = request;
        if generation != self.generation.0 {
            return Err(format!("generation {generation} is over: the newest is {}", self.generation));
        }
        let Some(waiting) = self.members.get_mut(&stream) else {
            return Err(format!("this worker has no place in generation {generation}"));
        };
        if let Some(key) = keys.iter().find(|key| key.len() > KEY) {
            return Err(format!("a key of {} bytes; {KEY} are accepted", key.len()));
        }
        if keys.len() > KEYS {
            return Err(format!("{} keys in a request; {KEYS} are accepted", keys.len()));
        }
        let key =
            || keys.first().cloned().ok_or_else(|| format!("{} without a key", operation.as_str_name()));
        let number = |number: i64| StoreReply { number, ..StoreReply::default() };
        let there = |key: &String| self.values.contains_key(key);
        Ok(Some(match operation {
            StoreOperation::Set => {
                self.put(key()?, value)?;
                StoreReply::default()
            }
            StoreOperation::Get | StoreOperation::Wait => {
                let reads = Some(key()?).filter(|_| operation == StoreOperation::Get);
                let missing: Vec<String> = keys.iter().filter(|key| !there(key)).cloned().collect();
                if !missing.is_empty() {
                    if waiting.len() == WAITING {
                        return Err(format!("{WAITING} requests of this worker wait already"));
                    }
                    waiting.push(Waiting { id, missing, reads });
                    return Ok(None);
                }
                let value = reads.and_then(|key| self.values.get(&key).cloned()).unwrap_or_default();
                StoreReply { value, ..StoreReply::default() }
            }
            StoreOperation::Add => {
                let key = key()?;
                let before = match self.values.get(&key) {
                    None => 0,
                    Some(text) => str::from_utf8(text)
                        .ok()
                        .and_then(|text| text.parse::<i64>().ok())
                        .ok_or_else(|| format!("the value of {key:?} is no number"))?,
                };
                let sum = before.checked_add(amount).ok_or_else(|| format!("{key:?} is too large"))?;
                self.put(key, sum.to_string().into_bytes())?;
                number(sum)
            }
            StoreOperation::CompareSet => {
                let key = key()?;
                let value = match self.values.get(&key) {
                    Some(found) if *found != expected => found.clone(),
                    None if !expected.is_empty() => expected,
                    _ => {
                        self.put(key, value.clone())?;
                        value
                    }
                };
                StoreReply { value, ..StoreReply::default() }
            }
            StoreOperation::Delete => {
                let key = key()?;
                let removed = self.values.remove(&key);
                self.bytes -= removed.as_ref().map_or(0, |value| size(&key, value));
                number(i64::from(removed.is_some()))
            }
            StoreOperation::Check => number(i64::from(keys.iter().all(there))),
            StoreOperation::Count => number(i64::try_from(self.values.len()).unwrap_or(i64::MAX)),
            StoreOperation::Unspecified => {
                return Err("an operation that this version does not support".to_owned());
            }
        }))
    }

    fn put(&mut self, key: String, value: Vec<u8>) -> Result<(), String> {
        let before = self.values.get(&key).map_or(0, |value| size(&key, value));
        let bytes = self.bytes - before + size(&key, &value);
        if bytes > ROOM {
            return Err(format!("the keys and values of a generation have room for {ROOM} bytes"));
        }
        self.bytes = bytes;
        self.values.insert(key, value);
        Ok(())
    }

    /// Answers the requests whose keys exist now.
    fn woken(&mut self) -> Replies {
        let Self { members, values, .. } = self;
        let mut replies = Vec::new();
        for (stream, waiting) in members {
            waiting.retain_mut(|request| {
                request.missing.retain(|key| !values.contains_key(key));
                if !request.missing.is_empty() {
                    return true;
                }
                let value =
                    request.reads.as_ref().and_then(|key| values.get(key).cloned()).unwrap_or_default();
                replies.push((*stream, StoreReply { id: request.id, value, ..StoreReply::default() }));
                false
            });
        }
        replies
    }
}

fn size(key: &str, value: &[u8]) -> usize {
    ENTRY + key.len() + value.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: StreamId = StreamId(1);
    const B: StreamId = StreamId(2);

    fn request(id: u64, operation: StoreOperation, keys: &[&str], value: &str) -> StoreRequest {
        StoreRequest {
            generation: 1,
            id,
            operation: operation.into(),
            keys: keys.iter().map(|&key| key.to_owned()).collect(),
            value: value.into(),
            ..StoreRequest::default()
        }
    }

    fn two_members() -> Rendezvous {
        let mut rendezvous = Rendezvous::default();
        rendezvous.admit(A, Generation(1));
        rendezvous.admit(B, Generation(1));
        rendezvous
    }

    fn value(id: u64, value: &str) -> StoreReply {
        StoreReply { id, value: value.into(), ..StoreReply::default() }
    }

    #[test]
    fn a_get_waits_for_its_key_and_a_wait_for_all_keys() {
        let mut rendezvous = two_members();
        assert_eq!(rendezvous.ask(A, request(1, StoreOperation::Get, &["x"], "")), []);
        assert_eq!(rendezvous.ask(A, request(2, StoreOperation::Wait, &["x", "y"], "")), []);
        let replies = rendezvous.ask(B, request(7, StoreOperation::Set, &["x"], "1"));
        assert_eq!(replies, [(B, value(7, "")), (A, value(1, "1"))]);
        let replies = rendezvous.ask(B, request(8, StoreOperation::Set, &["y"], "2"));
        assert_eq!(replies, [(B, value(8, "")), (A, value(2, ""))]);
        assert_eq!(rendezvous.ask(A, request(3, StoreOperation::Get, &["y"], "")), [(A, value(3, "2"))]);
    }

    #[test]
    fn numbers_are_added_and_values_compared_as_c10d_does() {
        let mut rendezvous = two_members();
        let mut add = |amount| {
            let request = StoreRequest { amount, ..request(1, StoreOperation::Add, &["n"], "") };
            rendezvous.ask(A, request)[0].1.number
        };
        assert_eq!((add(3), add(-1)), (3, 2));
        assert_eq!(rendezvous.ask(A, request(2, StoreOperation::Get, &["n"], "")), [(A, value(2, "2"))]);
        let mut exchange = |expected: &str, desired| {
            let request = request(3, StoreOperation::CompareSet, &["c"], desired);
            let reply = rendezvous.ask(A, StoreRequest { expected: expected.into(), ..request });
            String::from_utf8(reply[0].1.value.clone()).unwrap()
        };
        assert_eq!(exchange("old", "new"), "old");
        assert_eq!(exchange("", "first"), "first");
        assert_eq!(exchange("other", "second"), "first");
        assert_eq!(exchange("first", "second"), "second");
        let number = |rendezvous: &mut Rendezvous, operation, keys: &[&str]| {
            rendezvous.ask(A, request(4, operation, keys, ""))[0].1.number
        };
        assert_eq!(number(&mut rendezvous, StoreOperation::Count, &[]), 2);
        assert_eq!(number(&mut rendezvous, StoreOperation::Check, &["n", "c"]), 1);
        assert_eq!(number(&mut rendezvous, StoreOperation::Check, &["n", "d"]), 0);
        assert_eq!(number(&mut rendezvous, StoreOperation::Delete, &["n"]), 1);
        assert_eq!(number(&mut rendezvous, StoreOperation::Delete, &["n"]), 0);
        assert_eq!((rendezvous.bytes, rendezvous.values.len()), (size("c", b"second"), 1));
    }

    #[test]
    fn a_new_generation_forgets_the_old_one() {
        let mut rendezvous = two_members();
        rendezvous.ask(A, request(1, StoreOperation::Set, &["x"], "1"));
        rendezvous.admit(B, Generation(2));
        let old = rendezvous.ask(B, request(2, StoreOperation::Get, &["x"], ""));
        assert!(old[0].1.error.contains("generation 1 is over"), "{old:?}");
        let new = StoreRequest { generation: 2, ..request(3, StoreOperation::Check, &["x"], "") };
        assert_eq!(rendezvous.ask(B, new.clone())[0].1.number, 0);
        // A worker without a place in it learns and changes nothing.
        let reply = rendezvous.ask(A, new);
        assert!(reply[0].1.error.contains("no place"), "{reply:?}");
        // A late admission to the old generation changes nothing.
        rendezvous.admit(A, Generation(1));
        assert_eq!(rendezvous.members.len(), 1);
    }

    #[test]
    fn memory_is_bounded() {
        let mut rendezvous = two_members();
        for id in 0..WAITING as u64 {
            assert_eq!(rendezvous.ask(A, request(id, StoreOperation::Get, &["never"], "")), []);
        }
        let over = |replies: Replies| !replies[0].1.error.is_empty();
        assert!(over(rendezvous.ask(A, request(99, StoreOperation::Get, &["never"], ""))));
        assert!(over(
            rendezvous.ask(A, request(99, StoreOperation::Set, &["k".repeat(KEY + 1).as_str()], ""))
        ));
        assert!(over(rendezvous.ask(A, request(99, StoreOperation::Unspecified, &["k"], ""))));
        assert!(over(rendezvous.ask(A, request(99, StoreOperation::Set, &[], ""))));
        let large = StoreRequest { value: vec![0; ROOM], ..request(99, StoreOperation::Set, &["k"], "") };
        assert!(over(rendezvous.ask(A, large)));
        assert_eq!((rendezvous.bytes, rendezvous.values.len()), (0, 0));
        rendezvous.leave(A);
        assert_eq!(rendezvous.ask(B, request(1, StoreOperation::Set, &["never"], "")).len(), 1);
    }
}
