//! Tests the results of collectives.

mod common;

use common::{LONG, Seat, run, seat};
use potstill_c10d::{Backend, Error, ErrorKind, ProcessGroup, ReduceOp, Store, write_flight_record};
use tch::{Device, Kind, Tensor};

/// Not a test by itself: the scenarios of child processes.
#[test]
fn rank() {
    match seat() {
        None => {}
        Some((scenario, seat)) => match scenario.as_str() {
            "results" => results(&seat),
            "wrong_tensors" => wrong_tensors(&seat),
            "nccl" => nccl(&seat),
            "record" => record(&seat),
            other => panic!("no scenario {other}"),
        },
    }
}

#[test]
fn collectives_give_their_results() {
    run("results", 2);
    run("results", 3);
}

fn results(seat: &Seat) {
    let group = seat.join("g1", LONG);
    let (rank, world) = (seat.rank as i64, seat.world as i64);
    for (op, expected) in
        [(ReduceOp::Sum, world * (world - 1) / 2), (ReduceOp::Min, 0), (ReduceOp::Max, world - 1)]
    {
        for kind in [Kind::Float, Kind::Double, Kind::Int64] {
            let tensor = Tensor::full([3, 5], rank, (kind, Device::Cpu));
            group.all_reduce(&tensor, op).expect("issued").wait(None).expect("all_reduce");
            assert_eq!(tensor, Tensor::full([3, 5], expected, (kind, Device::Cpu)), "{op:?} of {kind:?}");
        }
    }

    let tensor = Tensor::full([4], rank, (Kind::Float, Device::Cpu));
    group.broadcast(&tensor, seat.world - 1).expect("issued").wait(None).expect("broadcast");
    assert_eq!(tensor, Tensor::full([4], world - 1, (Kind::Float, Device::Cpu)));

    let (work, all) = group.all_gather(&Tensor::from_slice(&[rank, rank * rank])).expect("issued");
    work.wait(Some(LONG)).expect("all_gather");
    assert!(work.is_completed().expect("no failure"));
    let expected: Vec<_> = (0..world).map(|rank| Tensor::from_slice(&[rank, rank * rank])).collect();
    assert_eq!(all, expected);

    // Two elements for each rank; rank r has r in all places.
    let all = Tensor::full([2 * world], rank, (Kind::Float, Device::Cpu));
    let own = all.narrow(0, 2 * rank, 2).copy();
    group.reduce_scatter(&own, &all).expect("issued").wait(None).expect("reduce_scatter");
    assert_eq!(own, Tensor::full([2], world * (world - 1) / 2, (Kind::Float, Device::Cpu)));
    for kind in [Kind::Float, Kind::BFloat16] {
        let all = Tensor::full([2 * world], rank, (kind, Device::Cpu));
        let own = all.narrow(0, 2 * rank, 2);
        group.all_gather_into(&all, &own).expect("issued").wait(None).expect("all_gather_into");
        let expected: Vec<f32> = (0..2 * world).map(|place| (place / 2) as f32).collect();
        assert_eq!(all.to_kind(Kind::Float), Tensor::from_slice(&expected));
    }

    let last = world - 1;
    let sum = Tensor::full([3], rank, (Kind::Float, Device::Cpu));
    group.reduce(&sum, last as usize).expect("issued").wait(None).expect("reduce");
    if rank == last {
        assert_eq!(sum, Tensor::full([3], world * (world - 1) / 2, (Kind::Float, Device::Cpu)));
    }
    // Each sends its rank to the next one.
    let own = Tensor::full([3], rank, (Kind::Float, Device::Cpu));
    let received = own.zeros_like();
    let (next, previous) = ((rank + 1) % world, (rank + world - 1) % world);
    let work = group.exchange(&received, &own, next as usize, previous as usize).expect("issued");
    work.wait(None).expect("exchange");
    assert_eq!(received, Tensor::full([3], previous, (Kind::Float, Device::Cpu)));
    // In sizes of their own: the first of them sends nothing.
    let own = Tensor::full([rank], rank, (Kind::Float, Device::Cpu));
    let received = Tensor::zeros([previous], (Kind::Float, Device::Cpu));
    let work = group.exchange(&received, &own, next as usize, previous as usize).expect("issued");
    work.wait(None).expect("exchange");
    assert_eq!(received, Tensor::full([previous], previous, (Kind::Float, Device::Cpu)));

    let work = group.barrier().expect("issued");
    work.wait(None).expect("barrier");
    // 9 all-reduces, a broadcast, three all-gathers, a reduce-scatter, a reduce and two exchanges came before.
    assert_eq!(work.operation(), "barrier #18");
}

#[test]
fn wrong_tensors_are_refused() {
    run("wrong_tensors", 1);
}

fn wrong_tensors(seat: &Seat) {
    let group = seat.join("g1", LONG);
    let matrix = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu));
    let sparse = matrix.to_sparse_sparse_dim(2);
    for (tensor, cause) in [(Tensor::new(), "undefined"), (matrix.tr(), "not contiguous"), (sparse, "sparse")]
    {
        let error = group.all_reduce(&tensor, ReduceOp::Sum).expect_err("refused");
        assert_eq!(error.kind, ErrorKind::InvalidInput);
        assert!(error.to_string().starts_with("all_reduce on rank 0 of 1: invalid input"), "{error}");
        assert!(error.cause.contains(cause), "{error}");
    }
    assert_eq!(kind(group.broadcast(&matrix, 1)), ErrorKind::InvalidInput);
    assert_eq!(kind(seat.try_join("g2", 2, 2, LONG)), ErrorKind::InvalidInput);
    assert_eq!(kind(Store::in_file("a\0b".as_ref(), LONG)), ErrorKind::InvalidInput);
}

#[test]
fn nccl_without_a_gpu_is_an_error_value() {
    run("nccl", 1);
}

fn nccl(seat: &Seat) {
    // Fails where libtorch has no CUDA, and then the group below fails too.
    let _ = potstill_torch_ext::load_cuda();
    if tch::Cuda::is_available() {
        return;
    }
    let store = seat.store.prefix("g1").expect("a prefix");
    let error = ProcessGroup::new(&Backend::Nccl { device: 0 }, &store, 0, 1, LONG).expect_err("refused");
    assert_eq!(error.kind, ErrorKind::Unavailable, "{error}");
}

#[test]
fn the_flight_record_names_operations_that_are_under_way() {
    run("record", 1);
}

fn record(seat: &Seat) {
    let group = seat.join("g1", LONG);
    let issued = || {
        group.all_reduce(&Tensor::ones([3, 7], (Kind::Float, Device::Cpu)), ReduceOp::Sum).expect("issued")
    };
    issued().wait(None).expect("all_reduce");
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("rank-0");
    let holds = |what: &str| {
        let bytes = std::fs::read(&file).expect("a record");
        bytes.windows(what.len()).any(|part| part == what.as_bytes())
    };
    write_flight_record(Device::Cpu, &file).expect("a record");
    assert!(holds("gloo:all_reduce") && holds("input_sizes"));
    // NCCL's recorder answers without a device too, where libtorch has NCCL.
    if potstill_torch_ext::load_cuda().is_ok() {
        write_flight_record(Device::Cuda(0), &file).expect("a record");
        assert!(holds("entries") && !holds("gloo:all_reduce"));
    }
    let error = write_flight_record(Device::Cpu, &folder.path().join("no/rank-0")).expect_err("no folder");
    assert!(error.to_string().contains("cannot write"), "{error}");
}

fn kind<T: std::fmt::Debug>(result: Result<T, Error>) -> ErrorKind {
    result.expect_err("refused").kind
}
