//! The cost of ten thousand workers.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use potstill_core::observation::Outcome;
use potstill_sim::{Scenario, Seed, run_in, scenario::Faults};

#[test]
fn ten_thousand_workers_of_which_a_tenth_are_lost() {
    let calm = Scenario { iterations: 3, ..Scenario::calm(8_000, 10_000, 0) };
    let undisturbed = run_in(&calm, Seed(0)).unwrap();
    assert_eq!(undisturbed.generations, 1);

    let faults = Faults { every_millis: 1_500, crash: 1, crash_share: 0.1, ..Faults::default() };
    let scenario = Scenario { faults, faulty_millis: 5_000, iterations: 6, ..calm };
    let report = run_in(&scenario, Seed(1)).unwrap();
    println!("{report:?}");
    assert_eq!(report.outcome, Outcome::Succeeded { iteration: 6 });
    assert!(report.faults > 0 && report.generations > 1, "{report:?}");
}
