//! Measures what ten thousand workers cost the state machine alone: CPU seconds until the first generation, for the
//! next one after a tenth of them is lost, and the share of a core that heartbeats at 1 Hz take.

#![allow(clippy::unwrap_used, reason = "a measurement may panic")]

use std::fs;

use potstill_core::{Action, Core, Event, Setup, StreamId, Tick};
use potstill_proto::{
    PROTOCOL,
    cursor::{Cursor, Generation},
    message::{FromWorker, Hello, ToWorker, WorkerId},
};
use potstill_sim::Scenario;

const WORKERS: u64 = 10_000;
/// Virtual seconds of heartbeats.
const BEATS: u64 = 60;

/// CPU time of this process' main thread.
fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/schedstat").unwrap();
    stat.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9
}

fn hello(number: u64) -> Hello {
    Hello {
        protocol: PROTOCOL,
        worker: WorkerId(format!("w{number}")),
        run_id: "run".into(),
        host: format!("host{number}"),
        pid: 1,
        device: "cpu".into(),
        held: None,
        place: None,
    }
}

/// Feeds one event to the core, which also makes the decisions that are due, and counts the assignments among its
/// actions.
fn step(core: &mut Core, at: u64, event: Event) -> usize {
    let mut actions = Vec::new();
    core.step(Tick(at), event, &mut actions);
    let assigned = |a: &&Action| matches!(a, Action::Send { message: ToWorker::Assignment(_), .. });
    actions.iter().filter(assigned).count()
}

fn main() {
    let workers = u32::try_from(WORKERS).unwrap();
    let scenario = Scenario { failure_millis: 5_000, ..Scenario::calm(workers - workers / 10, workers, 0) };
    let mut core = Core::new(Setup {
        coordinator: "c0".into(),
        address: "c0:1".into(),
        certificate: None,
        run_id: "run".into(),
        terms: scenario.terms(),
        specification: String::new(),
        storage_url: String::new(),
        history: Vec::new(),
        checkpoints: Vec::new(),
        from_teacher: false,
        ranks_may_live: false,
    });

    let start = cpu_seconds();
    let mut assigned = step(&mut core, 0, Event::Started);
    for number in 0..WORKERS {
        let stream = StreamId(number);
        assigned += step(&mut core, 1, Event::Attached { stream, hello: hello(number) });
        assigned += step(&mut core, 1, Event::Received { stream, message: FromWorker::Ready });
    }
    assert_eq!(assigned as u64, WORKERS);
    println!("first generation of {WORKERS}: {:.3} s of CPU", cpu_seconds() - start);

    let start = cpu_seconds();
    for second in 1..=BEATS {
        for number in 0..WORKERS {
            let message = FromWorker::Heartbeat {
                generation: Generation(1),
                cursor: Cursor::boundary(second),
                progress: second,
                activity: String::new(),
                waiting: false,
            };
            step(&mut core, second * 1000, Event::Received { stream: StreamId(number), message });
        }
        step(&mut core, second * 1000 + 500, Event::Timer);
    }
    println!("heartbeats at 1 Hz: {:.2} % of a core", (cpu_seconds() - start) / BEATS as f64 * 100.0);

    let start = cpu_seconds();
    let (lost, at) = (WORKERS / 10, BEATS * 1000 + 600);
    for number in 0..lost {
        let closed = Event::Closed { stream: StreamId(number), reason: "connection reset by peer".into() };
        step(&mut core, at, closed);
    }
    let mut assigned = 0;
    for number in lost..WORKERS {
        let message = FromWorker::CollectiveFailed {
            generation: Generation(1),
            cursor: Cursor::boundary(BEATS),
            error: "connection reset by peer".into(),
        };
        assigned += step(&mut core, at + 1, Event::Received { stream: StreamId(number), message });
    }
    assert_eq!(assigned as u64, WORKERS - lost);
    println!("next generation after a loss of {lost}: {:.3} s of CPU", cpu_seconds() - start);
}
