//! Stores that Rust implements, as c10d uses them.

#![allow(clippy::expect_used, clippy::unwrap_used)] // A panic here is a failed test.

use std::{
    collections::BTreeMap,
    sync::{Arc, Condvar, Mutex, Weak},
    thread,
    time::Duration,
};

use potstill_c10d::{Answer, Backend, ErrorKind, KeyValues, Operation, ProcessGroup, ReduceOp, Store};
use tch::{Device, Kind, Tensor};

const LONG: Duration = Duration::from_secs(60);

/// Keys and values of the ranks of one process, which are threads.
#[derive(Default)]
struct Shared {
    values: Mutex<BTreeMap<String, Vec<u8>>>,
    changed: Condvar,
}

impl KeyValues for Shared {
    fn execute(&self, operation: Operation<'_>, patience: Duration) -> Result<Answer, String> {
        let mut values = self.values.lock().unwrap();
        let wait = |keys: &[&str], values| {
            let missing =
                |values: &mut BTreeMap<String, Vec<u8>>| keys.iter().any(|key| !values.contains_key(*key));
            let (values, ended) = self.changed.wait_timeout_while(values, patience, missing).unwrap();
            if ended.timed_out() { Err(format!("timed out: {keys:?}")) } else { Ok(values) }
        };
        Ok(match operation {
            Operation::Set { key, value } => {
                values.insert(key.to_owned(), value.to_vec());
                self.changed.notify_all();
                Answer::Done
            }
            Operation::Get { key } => Answer::Value(wait(&[key], values)?[key].clone()),
            Operation::Wait { keys } => {
                drop(wait(&keys, values)?);
                Answer::Done
            }
            Operation::Check { keys } => {
                Answer::Number(i64::from(keys.iter().all(|key| values.contains_key(*key))))
            }
            Operation::Count => Answer::Number(values.len() as i64),
            other => return Err(format!("{other:?} is not needed")),
        })
    }
}

fn join(values: &Arc<Shared>, rank: usize, timeout: Duration) -> Result<ProcessGroup, potstill_c10d::Error> {
    let store = Store::of(values.clone(), timeout).unwrap();
    let backend = Backend::Gloo { host: "127.0.0.1".to_owned() };
    ProcessGroup::new(&backend, &store, rank, 3, timeout)
}

#[test]
fn ranks_meet_in_a_store_that_rust_implements() {
    let values = Arc::<Shared>::default();
    thread::scope(|scope| {
        for rank in 0..3 {
            let values = &values;
            scope.spawn(move || {
                let group = join(values, rank, LONG).unwrap();
                let tensor = Tensor::full([4], rank as i64 + 1, (Kind::Float, Device::Cpu));
                group.all_reduce(&tensor, ReduceOp::Sum).unwrap().wait(None).unwrap();
                assert_eq!(Vec::<f32>::try_from(tensor).unwrap(), [6.0; 4]);
            });
        }
    });
    assert!(values.values.lock().unwrap().len() >= 3);
}

#[test]
fn its_errors_are_those_of_the_group() {
    let error = join(&Arc::default(), 0, Duration::from_millis(300)).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Timeout, "{error}");
    struct Broken;
    impl KeyValues for Broken {
        fn execute(&self, _: Operation<'_>, _: Duration) -> Result<Answer, String> {
            Err(format!("broken {}", "…".repeat(4000)))
        }
    }
    let store = Store::of(Arc::new(Broken), LONG).unwrap();
    let backend = Backend::Gloo { host: "127.0.0.1".to_owned() };
    let error = ProcessGroup::new(&backend, &store, 0, 2, LONG).unwrap_err();
    assert!(error.cause.contains("broken"), "{error}");
}

#[test]
fn it_is_dropped_with_the_last_that_uses_it() {
    let values = Arc::<Shared>::default();
    let weak: Weak<Shared> = Arc::downgrade(&values);
    let store = Store::of(values, LONG).unwrap();
    let part = store.prefix("g1").unwrap();
    drop(store);
    assert!(weak.upgrade().is_some());
    drop(part);
    assert!(weak.upgrade().is_none());
}
