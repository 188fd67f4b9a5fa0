//! The same result whatever happens: resume is bit-identical, and the number of workers changes only float sums.

use potstill_tests::{Cluster, relative_difference, text};

#[test]
fn twenty_and_twenty_more_equal_forty_bit_by_bit() {
    let cluster = Cluster::default();
    cluster.succeed("straight", 2, &["distillation.iterations=40"], &[]);
    cluster.succeed("halves", 2, &["distillation.iterations=20"], &[]);
    cluster.succeed("halves", 2, &["distillation.iterations=40"], &["--resume"]);
    let (straight, halves) = (cluster.checkpoint("straight", 40), cluster.checkpoint("halves", 40));
    assert_eq!(straight.keys().collect::<Vec<_>>(), halves.keys().collect::<Vec<_>>());
    for (name, values) in &straight {
        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(values), bits(&halves[name]), "{name}");
    }
    for part in [
        "generator/",
        "generator_ema/",
        "fake_score/",
        "generator_adam.exp_avg_sq/",
        "fake_score_adam.exp_avg/",
    ] {
        assert!(straight.keys().any(|name| name.starts_with(part)), "{part} is not in the checkpoint");
    }
    assert_ne!(cluster.checkpoint("halves", 20), straight, "twenty iterations change something");
}

#[test]
fn one_and_two_and_three_workers_follow_the_same_trajectory() {
    let cluster = Cluster::default();
    // Four micro-batches: three workers share them unevenly.
    let sets = ["distillation.iterations=20", "distillation.micro_batch=8", "distillation.dropout=true"];
    for workers in [1, 2, 3] {
        cluster.succeed(&format!("w{workers}"), workers, &sets, &[]);
    }
    let one = cluster.checkpoint("w1", 20);
    for other in ["w2", "w3"] {
        let other = cluster.checkpoint(other, 20);
        for part in ["generator/", "fake_score/", "generator_ema/"] {
            let difference = relative_difference(&other, &one, part);
            assert!(difference <= 1e-4, "{part}: {difference}");
        }
    }
}

#[test]
fn guided_generators_of_two_steps_follow_the_same_trajectory_too() {
    let cluster = Cluster::default();
    let sets = [
        "distillation.iterations=10",
        "generator.steps=2",
        "generator.sigmas=[2.5, 0.8]",
        "guidance.preset=lsg",
        "guidance.scale=1.5",
    ];
    for workers in [1, 2] {
        cluster.succeed(&format!("w{workers}"), workers, &sets, &[]);
    }
    let difference =
        relative_difference(&cluster.checkpoint("w2", 10), &cluster.checkpoint("w1", 10), "generator/");
    assert!(difference <= 1e-4, "{difference}");
}

#[test]
fn another_seed_gives_another_result() {
    let cluster = Cluster::default();
    cluster.succeed("a", 1, &["distillation.iterations=3"], &[]);
    cluster.succeed("b", 1, &["distillation.iterations=3", "distillation.seed=1"], &[]);
    let (a, b) = (cluster.checkpoint("a", 3), cluster.checkpoint("b", 3));
    assert!(relative_difference(&a, &b, "generator/") > 0.0);
    let output =
        cluster.run_to_end("a", 1, &["distillation.iterations=6", "distillation.seed=1"], &["--resume"]);
    assert!(!output.status.success());
    let message = text(&output.stderr);
    assert!(message.contains("distillation.seed"), "{message}");
}
