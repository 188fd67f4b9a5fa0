//! Tests what the survivors see when a peer dies, stops, or does not join.

mod common;

use std::thread;
use std::time::{Duration, Instant};

use common::{LONG, Seat, launch, launch_with, run, say, seat, wait_for_test};
use nix::sys::signal::{Signal, kill};
use potstill_c10d::{Backend, Error, ErrorKind, ProcessGroup, ReduceOp, Reducer, ReducerOptions, Work};
use tch::{Device, Kind, Tensor};

/// Not a test by itself: the scenarios of child processes.
#[test]
fn rank() {
    match seat() {
        None => {}
        Some((scenario, seat)) => match scenario.as_str() {
            "killed" => killed(&seat),
            "killed_in_backward" => killed_in_backward(&seat),
            "regroup" => regroup(&seat),
            "stopped" => stopped(&seat),
            "stopped_in_backward" => stopped_in_backward(&seat),
            "timeout" => timeout(&seat),
            "late" => late(&seat),
            "no_peer_joins" => no_peer_joins(&seat),
            "waiting_beside" => waiting_beside(&seat),
            "strangers" => strangers(&seat),
            "other_transport" => other_transport(&seat),
            other => panic!("no scenario {other}"),
        },
    }
}

fn all_reduce(group: &ProcessGroup) -> Result<Work, Error> {
    group.all_reduce(&Tensor::ones([1 << 16], (Kind::Float, Device::Cpu)), ReduceOp::Sum)
}

/// The last rank in most scenarios: it joins the group, and issues no operation after that.
fn be_absent() {
    say("absent");
    wait_for_test();
}

/// Kills the last rank once all ranks are ready, and expects each survivor to report a lost peer in less than a second.
fn kill_last(scenario: &str, world: usize) {
    let mut cluster = launch(scenario, world);
    for rank in &mut cluster.ranks {
        rank.hear();
    }
    let mut victim = cluster.ranks.pop().expect("a rank");
    let killed = Instant::now();
    victim.kill();
    for rank in &mut cluster.ranks {
        assert_eq!(rank.hear(), "PeerLost");
        let elapsed = killed.elapsed();
        println!("{scenario}: {elapsed:?} from the kill to the error");
        assert!(elapsed < Duration::from_secs(1), "{elapsed:?}");
    }
    for rank in cluster.ranks {
        rank.finish();
    }
}

#[test]
fn a_killed_peer_is_an_error_value_at_once() {
    kill_last("killed", 2);
    kill_last("killed", 3);
}

fn killed(seat: &Seat) {
    let group = seat.join("g1", LONG);
    all_reduce(&group).expect("issued").wait(None).expect("all are there");
    if seat.rank == seat.world - 1 {
        return be_absent();
    }
    let work = all_reduce(&group).expect("issued");
    say("waiting");
    let error = work.wait(None).expect_err("a lost peer");
    // Before the message, so that the next rank fails at the same time as this one.
    drop((work, group));
    say(&format!("{:?}", error.kind));
    let expected = format!("all_reduce #2 on rank {} of {}: peer lost: ", seat.rank, seat.world);
    assert!(error.to_string().starts_with(&expected), "{error}");
}

#[test]
fn a_peer_killed_in_backward_is_an_error_value_at_once() {
    kill_last("killed_in_backward", 2);
}

fn reducer(group: &ProcessGroup) -> (Tensor, Reducer) {
    let param = Tensor::ones([1 << 16], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let reducer =
        Reducer::new(&[param.shallow_clone()], group, ReducerOptions::default()).expect("a reducer");
    (param, reducer)
}

fn killed_in_backward(seat: &Seat) {
    let group = seat.join("g1", LONG);
    let (param, reducer) = reducer(&group);
    reducer.backward(&param.sum(Kind::Float)).expect("all are there");
    reducer.zero_grad().expect("cleared");
    if seat.rank == 1 {
        return be_absent();
    }
    say("waiting");
    let error = reducer.backward(&param.sum(Kind::Float)).expect_err("a lost peer");
    say(&format!("{:?}", error.kind));
    assert!(error.to_string().starts_with("backward #3 on rank 0 of 2: peer lost: "), "{error}");
}

#[test]
fn survivors_form_the_next_generation_on_the_same_store() {
    kill_last("regroup", 3);
}

fn regroup(seat: &Seat) {
    let first = seat.join("g1", LONG);
    let (param, reducer_1) = reducer(&first);
    if seat.rank == 2 {
        return be_absent();
    }
    say("waiting");
    let error = reducer_1.backward(&param.sum(Kind::Float)).expect_err("a lost peer");
    drop((reducer_1, first));
    say(&format!("{:?}", error.kind));

    potstill_torch_ext::clear_gradients(&[param.shallow_clone()]).expect("cleared");
    let second = seat.try_join("g2", seat.rank, 2, LONG).expect("a group");
    let options = ReducerOptions::default();
    let reducer_2 = Reducer::new(&[param.shallow_clone()], &second, options).expect("a reducer");
    reducer_2.backward(&(&param * (seat.rank as f64)).sum(Kind::Float)).expect("both are there");
    assert_eq!(param.grad(), param.full_like(0.5));
}

/// Stops the last rank with SIGSTOP, and expects rank 0 to leave by itself.
fn stop_last(scenario: &str) {
    let mut cluster = launch(scenario, 2);
    for rank in &mut cluster.ranks {
        rank.hear();
    }
    kill(cluster.ranks[1].pid(), Signal::SIGSTOP).expect("a signal");
    cluster.ranks.remove(0).finish();
}

/// The error must come from the abort, and not from the group's timeout long after.
fn assert_aborted(error: &Error) {
    assert_eq!(error.kind, ErrorKind::Aborted, "{error}");
    assert!(!error.cause.contains("Timed out"), "{error}");
}

#[test]
fn a_stopped_peer_does_not_hold_a_rank_that_aborts() {
    stop_last("stopped");
}

fn stopped(seat: &Seat) {
    let group = seat.join("g1", LONG);
    all_reduce(&group).expect("issued").wait(None).expect("all are there");
    if seat.rank == 1 {
        return be_absent();
    }
    say("waiting");
    wait_for_test();
    let works = [all_reduce(&group).expect("issued"), all_reduce(&group).expect("issued")];
    assert!(!works[0].wait_for(Duration::from_millis(20)).expect("no failure yet"));
    group.abort().expect("aborted");
    for work in &works {
        assert_aborted(&work.wait(None).expect_err("aborted"));
    }
    assert_aborted(&all_reduce(&group).expect_err("aborted"));
}

#[test]
fn a_stopped_peer_holds_no_backward_that_is_aborted() {
    stop_last("stopped_in_backward");
}

#[expect(clippy::disallowed_methods, reason = "another process is watched, which tells nothing by itself")]
fn stopped_in_backward(seat: &Seat) {
    let group = seat.join("g1", LONG);
    let (param, reducer) = reducer(&group);
    if seat.rank == 1 {
        return be_absent();
    }
    say("waiting");
    wait_for_test();
    let handle = group.clone();
    let (issued, is_issued) = std::sync::mpsc::channel();
    let aborter = thread::spawn(move || {
        is_issued.recv().expect("a signal");
        // Most likely in the middle of backward; correct in any case.
        thread::sleep(Duration::from_millis(50));
        handle.abort()
    });
    let loss = param.sum(Kind::Float);
    issued.send(()).expect("a signal");
    assert_aborted(&reducer.backward(&loss).expect_err("aborted"));
    aborter.join().expect("no panic").expect("aborted");
}

#[test]
fn a_collective_that_a_peer_never_joins_times_out() {
    let mut cluster = launch("timeout", 2);
    assert_eq!(cluster.ranks[1].hear(), "absent");
    let absent = cluster.ranks.pop().expect("a rank");
    cluster.ranks.remove(0).finish();
    absent.finish();
}

fn timeout(seat: &Seat) {
    let group = seat.join("g1", LONG);
    group.set_timeout(Duration::from_secs(1)).expect("a timeout");
    if seat.rank == 1 {
        return be_absent();
    }
    let work = all_reduce(&group).expect("issued");
    let error = work.wait(Some(Duration::from_millis(20))).expect_err("not yet");
    assert_eq!(error.kind, ErrorKind::Timeout, "{error}");
    assert!(!work.is_completed().expect("no failure yet"));
    let error = work.wait(None).expect_err("too late");
    assert_eq!(error.kind, ErrorKind::Timeout, "{error}");
    assert!(work.is_completed().expect("over"));
}

#[test]
fn a_slow_peer_is_waited_for_as_long_as_the_timeout_says() {
    let mut cluster = launch("late", 2);
    assert_eq!(cluster.ranks[0].hear(), "waiting");
    // The later rank first.
    while let Some(rank) = cluster.ranks.pop() {
        rank.finish();
    }
}

fn late(seat: &Seat) {
    const SHORT: Duration = Duration::from_millis(300);
    let group = seat.join("g1", LONG);
    group.set_timeout(SHORT).expect("a timeout");
    group.set_timeout(LONG).expect("a timeout");
    if seat.rank == 1 {
        wait_for_test();
    }
    let work = all_reduce(&group).expect("issued");
    if seat.rank == 0 {
        assert!(!work.wait_for(2 * SHORT).expect("no failure yet"));
        say("waiting");
    }
    work.wait(None).expect("both are there");
}

#[test]
fn a_group_whose_members_do_not_come_times_out() {
    run("no_peer_joins", 1);
}

fn no_peer_joins(seat: &Seat) {
    let error = seat.try_join("g1", 0, 2, Duration::from_millis(500)).expect_err("too late");
    assert_eq!(error.kind, ErrorKind::Timeout, "{error}");
    assert!(error.to_string().starts_with("join the group on rank 0 of 2: timeout: "), "{error}");
}

#[test]
fn a_group_that_waits_for_its_members_holds_up_no_other() {
    run("waiting_beside", 2);
}

fn waiting_beside(seat: &Seat) {
    if seat.rank == 0 {
        let store = seat.store.prefix("g1").expect("a prefix");
        let backend = Backend::Gloo { host: "127.0.0.1".to_owned() };
        thread::spawn(move || ProcessGroup::new(&backend, &store, 0, 3, LONG));
    }
    // Several joins, so that by the last of them the one above is certainly waiting.
    for generation in 2..6 {
        let group = seat.join(&format!("g{generation}"), LONG);
        group.barrier().expect("issued").wait(None).expect("barrier");
    }
}

#[test]
fn strangers_cannot_connect_to_a_group_that_has_formed() {
    run("strangers", 2);
}

fn strangers(seat: &Seat) {
    let group = seat.join("g1", LONG);
    let barrier = || group.barrier().expect("issued").wait(None).expect("barrier");
    barrier();
    let descriptors = || std::fs::read_dir("/proc/self/fd").expect("descriptors").count();
    let before = descriptors();
    // Every socket of this process that listens: state 0A of the kernel's table.
    let inodes: Vec<String> = std::fs::read_dir("/proc/self/fd")
        .expect("descriptors")
        .filter_map(|entry| Some(std::fs::read_link(entry.ok()?.path()).ok()?.display().to_string()))
        .collect();
    let table = std::fs::read_to_string("/proc/net/tcp").expect("the kernel's table");
    let ports: Vec<u16> = table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let own = inodes.contains(&format!("socket:[{}]", fields[9]));
            (fields[3] == "0A" && own).then(|| u16::from_str_radix(&fields[1][9..], 16).expect("a port"))
        })
        .collect();
    assert!(!ports.is_empty(), "Gloo listens");
    for port in ports {
        let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));
        for _ in 0..3 {
            let error = std::net::TcpStream::connect_timeout(&address, Duration::from_millis(50));
            assert!(error.is_err(), "a stranger has connected to port {port}");
        }
    }
    assert_eq!(descriptors(), before);
    barrier();
}

/// libtorch's Gloo takes certificates for this transport, and sends everything in the clear.
#[test]
fn a_transport_that_only_seems_to_encrypt_is_refused() {
    let variables = [("GLOO_DEVICE_TRANSPORT", "TCP_TLS")];
    for rank in launch_with("other_transport", 2, &variables).ranks.drain(..) {
        rank.finish();
    }
}

fn other_transport(seat: &Seat) {
    let error = seat.try_join("g1", seat.rank, seat.world, LONG).expect_err("it is refused");
    assert_eq!(error.kind, ErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("TCP_TLS this libtorch sends everything in the clear"), "{error}");
}
