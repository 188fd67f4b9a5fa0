//! Tests the reducer's averages.

mod common;

use common::{LONG, Seat, run, seat};
use potstill_c10d::{ErrorKind, ProcessGroup, Reducer, ReducerOptions};
use tch::{Device, Kind, Tensor};

/// Small, so that a few parameters fill several buckets.
const SMALL: ReducerOptions =
    ReducerOptions { first_bucket_bytes: 64, bucket_bytes: 256, gradient_as_bucket_view: true };
const MICRO_BATCHES: usize = 3;
const STEPS: usize = 3;

/// Not a test by itself: the scenarios of child processes.
#[test]
fn rank() {
    match seat() {
        None => {}
        Some((scenario, seat)) => match scenario.as_str() {
            "mean_in_buckets" => mean(&seat, SMALL),
            "mean_beside_buckets" => mean(&seat, ReducerOptions { gradient_as_bucket_view: false, ..SMALL }),
            "same_bits" => same_bits(&seat),
            "missing" => missing(&seat),
            "mismatch" => mismatch(&seat),
            "wrong_params" => wrong_params(&seat),
            other => panic!("no scenario {other}"),
        },
    }
}

fn parameters() -> Vec<Tensor> {
    [vec![4, 6], vec![6], vec![6, 8], vec![8], vec![8, 3], vec![1]]
        .into_iter()
        .enumerate()
        .map(|(i, shape)| {
            let count: i64 = shape.iter().product();
            let values = Tensor::arange(count, (Kind::Float, Device::Cpu)) * 0.37 + i as f64;
            values.sin().reshape(&shape).set_requires_grad(true)
        })
        .collect()
}

/// A loss that differs by rank, step and micro-batch.
fn loss(params: &[Tensor], rank: usize, step: usize, micro_batch: usize) -> Tensor {
    let input = Tensor::arange(20, (Kind::Float, Device::Cpu)).reshape([5, 4]);
    let input = (input * (0.1 + rank as f64) + (step * MICRO_BATCHES + micro_batch) as f64).cos();
    let hidden = (input.matmul(&params[0]) + &params[1]).tanh();
    let hidden = (hidden.matmul(&params[2]) + &params[3]).tanh();
    (hidden.matmul(&params[4]) * &params[5]).square().mean(Kind::Float)
}

fn gradients(params: &[Tensor]) -> Vec<Tensor> {
    params.iter().map(|param| param.grad().detach().copy()).collect()
}

/// One step, as in training.
fn step(reducer: &Reducer, params: &[Tensor], rank: usize, step: usize) {
    reducer.zero_grad().expect("cleared");
    for micro_batch in 0..MICRO_BATCHES - 1 {
        loss(params, rank, step, micro_batch).backward();
    }
    reducer.backward(&loss(params, rank, step, MICRO_BATCHES - 1)).expect("backward");
}

#[test]
fn gradients_are_the_mean_over_ranks_of_the_sum_over_micro_batches() {
    for scenario in ["mean_in_buckets", "mean_beside_buckets"] {
        run(scenario, 2);
        run(scenario, 3);
    }
}

fn mean(seat: &Seat, options: ReducerOptions) {
    let group = seat.join("g1", LONG);
    let params = parameters();
    let reducer = Reducer::new(&params, &group, options).expect("a reducer");
    for number in 0..STEPS {
        step(&reducer, &params, seat.rank, number);
        // The same in one process, without a reducer.
        let reference = parameters();
        for rank in 0..seat.world {
            for micro_batch in 0..MICRO_BATCHES {
                loss(&reference, rank, number, micro_batch).backward();
            }
        }
        for (mean, sum) in gradients(&params).iter().zip(gradients(&reference)) {
            let expected = sum / seat.world as f64;
            assert!(mean.allclose(&expected, 1e-5, 1e-7, false), "step {number}: {mean} is not {expected}");
        }
    }
}

#[test]
fn a_new_reducer_gives_the_bits_of_a_used_one() {
    run("same_bits", 3);
}

fn same_bits(seat: &Seat) {
    let group = seat.join("g1", LONG);
    let params = parameters();
    // Another order than that of the gradients: c10d by itself would change its buckets after the first step.
    let unlike: Vec<_> = params.iter().rev().map(Tensor::shallow_clone).collect();
    let used = Reducer::new(&unlike, &group, SMALL).expect("a reducer");
    for number in 0..STEPS {
        step(&used, &params, seat.rank, number);
    }
    let expected = gradients(&params);
    assert_same_on_all_ranks(&group, &expected);
    drop(used);

    // As after a resume: the last step again, with a new reducer.
    let fresh = Reducer::new(&unlike, &group, SMALL).expect("a reducer");
    step(&fresh, &params, seat.rank, STEPS - 1);
    assert_eq!(gradients(&params), expected);
}

fn assert_same_on_all_ranks(group: &ProcessGroup, tensors: &[Tensor]) {
    for tensor in tensors {
        let (work, all) = group.all_gather(tensor).expect("issued");
        work.wait(None).expect("all_gather");
        assert!(all.iter().all(|other| other == tensor));
    }
}

#[test]
fn a_parameter_without_a_gradient_is_an_error_value() {
    run("missing", 2);
}

fn missing(seat: &Seat) {
    let group = seat.join("g1", LONG);
    let params = parameters();
    let reducer = Reducer::new(&params, &group, SMALL).expect("a reducer");
    let error = reducer.backward(&params[0].sum(Kind::Float)).expect_err("the others are missing");
    assert_eq!(error.kind, ErrorKind::Other, "{error}");
    assert!(error.cause.ends_with("without any: 1 2 3 4 5"), "{error}");
}

#[test]
fn ranks_with_other_parameters_are_found_out() {
    run("mismatch", 2);
}

fn mismatch(seat: &Seat) {
    let group = seat.join("g1", LONG);
    let params = [Tensor::zeros([2 + seat.rank as i64], (Kind::Float, Device::Cpu)).set_requires_grad(true)];
    let error = Reducer::new(&params, &group, SMALL).expect_err("refused");
    // Rank 0 only gets the error that the others left.
    assert!(seat.rank == 0 || error.cause.contains("appears not to match sizes"), "{error}");
}

#[test]
fn parameters_that_cannot_be_averaged_are_refused() {
    run("wrong_params", 1);
}

fn wrong_params(seat: &Seat) {
    let group = seat.join("g1", LONG);
    let leaf = Tensor::zeros([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let frozen = Tensor::zeros([2], (Kind::Float, Device::Cpu));
    for params in [vec![], vec![frozen], vec![&leaf * 2], vec![Tensor::new()]] {
        let error = Reducer::new(&params, &group, SMALL).expect_err("refused");
        assert_eq!(error.kind, ErrorKind::InvalidInput, "{error}");
    }
}
