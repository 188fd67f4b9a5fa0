//! Measures how fast Gloo sums tensors of two processes of this machine, over loopback.
//!
//! `cargo run -q -p potstill-c10d --example all_reduce` prints one line for each size. A rate is the bytes of one
//! rank's tensor, which are the bytes that come out reduced, divided by the median time from issuing the
//! operation until it is done. This program runs itself again as the second process, which ends with the first,
//! however that one ends.

use std::env;
use std::error::Error;
use std::io::{self, Read};
use std::process::{self, Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use potstill_c10d::{Backend, ProcessGroup, ReduceOp, Store};
use tch::{Device, Kind, Tensor};

/// Bytes of a tensor, and how many operations are timed.
const PLAN: [(i64, usize); 3] = [(4 << 10, 4000), (4 << 20, 200), (64 << 20, 24)];
/// Timeout of each operation.
const PATIENCE: Duration = Duration::from_secs(60);
const HOST: &str = "127.0.0.1";
/// In the second process's environment: the file in which the two meet.
const STORE: &str = "POTSTILL_EXAMPLE_STORE";

/// The second process; it is killed when this value is dropped.
struct Second {
    child: Child,
    /// Held, never written to: the process ends when this closes. Waiting for the child would close it.
    _lifeline: Option<ChildStdin>,
}

impl Drop for Second {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    tch::set_num_threads(1);
    if let Ok(file) = env::var(STORE) {
        end_with_parent();
        return measure(&Store::in_file(file.as_ref(), PATIENCE)?, 1).map(drop);
    }

    let folder = tempfile::tempdir()?;
    let file = folder.path().join("store");
    let store = Store::in_file(&file, PATIENCE)?;
    let mut child = Command::new(env::current_exe()?).env(STORE, &file).stdin(Stdio::piped()).spawn()?;
    let lifeline = child.stdin.take();
    let mut second = Second { child, _lifeline: lifeline };
    let medians = measure(&store, 0)?;
    let status = second.child.wait()?;
    if !status.success() {
        return Err(format!("the second process failed: {status}").into());
    }
    println!("{:>10} {:>10} {:>12} {:>8}", "bytes", "operations", "median_us", "GB/s");
    for ((bytes, operations), median) in PLAN.into_iter().zip(medians) {
        let seconds = median.as_secs_f64();
        println!(
            "{bytes:>10} {operations:>10} {:>12.1} {:>8.4}",
            seconds * 1e6,
            bytes as f64 / seconds / 1e9
        );
    }
    Ok(())
}

/// Ends this process when the one that holds the other end of its standard input has ended.
fn end_with_parent() {
    thread::spawn(|| {
        let _ = io::stdin().read(&mut [0]);
        process::exit(1);
    });
}

/// The median time of an operation, for each size.
fn measure(store: &Store, rank: usize) -> Result<Vec<Duration>, Box<dyn Error>> {
    let backend = Backend::Gloo { host: HOST.to_owned() };
    let group = ProcessGroup::new(&backend, store, rank, 2, PATIENCE)?;
    PLAN.into_iter().map(|(bytes, operations)| median(&group, bytes, operations)).collect()
}

fn median(group: &ProcessGroup, bytes: i64, operations: usize) -> Result<Duration, Box<dyn Error>> {
    let mut tensor = Tensor::ones([bytes / 4], (Kind::Float, Device::Cpu));
    group.all_reduce(&tensor, ReduceOp::Sum)?.wait(None)?;
    let (least, most) = (tensor.min().double_value(&[]), tensor.max().double_value(&[]));
    if (least, most) != (2.0, 2.0) {
        return Err(format!("1 + 1 came out between {least} and {most}").into());
    }
    // Zeros stay zeros, however often they are summed.
    let _ = tensor.zero_();
    for _ in 0..operations / 10 {
        group.all_reduce(&tensor, ReduceOp::Sum)?.wait(None)?;
    }
    let mut times = Vec::with_capacity(operations);
    for _ in 0..operations {
        let started = Instant::now();
        group.all_reduce(&tensor, ReduceOp::Sum)?.wait(None)?;
        times.push(started.elapsed());
    }
    times.sort_unstable();
    Ok(times[operations / 2])
}
