//! Worlds full of faults, one for each seed.
//!
//! `POTSTILL_SIM_SEED=17` runs that one alone and prints the actions of its coordinators;
//! `POTSTILL_SIM_SEEDS=5000..9000` runs other seeds than the usual ones.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

use std::{env, ops::Range};

use potstill_core::observation::Outcome;
use potstill_sim::{Scenario, Seed, replay, run, run_in};

/// Actions that are printed of a world with a violation.
const SHOWN: usize = 400;

fn seeds() -> Range<u64> {
    if let Ok(seed) = env::var("POTSTILL_SIM_SEED") {
        let seed = seed.parse().expect("POTSTILL_SIM_SEED is a number");
        return seed..seed + 1;
    }
    let Ok(seeds) = env::var("POTSTILL_SIM_SEEDS") else { return 0..5000 };
    let (from, to) = seeds.split_once("..").expect("POTSTILL_SIM_SEEDS is a range, as in 0..1000");
    from.parse().expect("a number")..to.parse().expect("a number")
}

#[test]
fn whatever_goes_wrong_the_invariants_hold_and_the_run_succeeds_once_faults_stop() {
    let seeds = seeds();
    let (mut broken, mut stopped, mut faults, mut generations) = (Vec::new(), 0, 0, 0);
    for seed in seeds.clone().map(Seed) {
        match run(seed) {
            Ok(report) => {
                stopped += u64::from(!matches!(report.outcome, Outcome::Succeeded { .. }));
                faults += report.faults;
                generations += report.generations;
            }
            Err(violation) => {
                println!("run(Seed({})) at {} ms: {}", seed.0, violation.millis, violation.what);
                broken.push(seed);
            }
        }
    }
    let worlds = seeds.end - seeds.start;
    println!("{worlds} worlds, {faults} faults, {generations} generations, {stopped} stopped when asked");
    if let Some(seed) = broken.first() {
        let scenario = Scenario::mixed(*seed);
        let violation = replay(&scenario, *seed, SHOWN).unwrap_err();
        panic!("{} of {worlds} worlds broke; the first: {scenario:?}\n{violation}", broken.len());
    }
    assert!(worlds < 1000 || faults > 5 * worlds, "too few faults were injected");
}

/// A coordinator whose record was answered with an error ends, and does not know whether its successor will read the
/// record.
#[test]
fn a_journal_that_answers_with_errors_costs_coordinators_and_not_the_run() {
    let (worlds, mut coordinators) = (1000, 0);
    for seed in (0..worlds).map(Seed) {
        let mut scenario = Scenario::mixed(seed);
        scenario.faults.journal = 0.2;
        match run_in(&scenario, seed) {
            Ok(report) => coordinators += report.coordinators as u64,
            Err(_) => panic!("{scenario:?}\n{}", replay(&scenario, seed, SHOWN).unwrap_err()),
        }
    }
    println!("{worlds} worlds, {coordinators} coordinators");
    assert!(coordinators > 2 * worlds, "too few coordinators were replaced");
}

#[test]
fn the_same_seed_gives_the_same_trace_and_another_one_another() {
    for seed in (0..100).map(Seed) {
        let report = run(seed).unwrap();
        assert_eq!(run(seed).unwrap(), report, "{seed:?}");
        assert_ne!(run(Seed(seed.0 + 1)).unwrap().trace, report.trace, "{seed:?}");
    }
}
