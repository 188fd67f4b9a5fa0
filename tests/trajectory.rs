//! Tests that the result is always the same: resume is bit-identical, and the number of workers changes only float
//! sums.

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
        "fake_score_adam.exp_avg_sq/",
    ] {
        assert!(straight.keys().any(|name| name.starts_with(part)), "{part} is not in the checkpoint");
    }
    // The preset's decay of the first moment is 0: it would be the gradient.
    assert!(!straight.keys().any(|name| name.contains("adam.exp_avg/")));
    let kept = ["distillation.iterations=2", "optimizer.betas=[0.5, 0.999]"];
    cluster.succeed("momentum", 1, &kept, &[]);
    let momentum = cluster.checkpoint("momentum", 2);
    for part in ["generator_adam.exp_avg/", "fake_score_adam.exp_avg/"] {
        assert!(momentum.keys().any(|name| name.starts_with(part)), "{part} is not in the checkpoint");
    }
    assert_ne!(cluster.checkpoint("halves", 20), straight, "twenty iterations change something");
}

#[test]
fn one_and_two_and_three_workers_follow_the_same_trajectory() {
    let cluster = Cluster::default();
    // Four micro-batches: three workers share them unevenly.
    let sets = ["distillation.iterations=20", "distillation.micro_batch=2", "distillation.dropout=true"];
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
fn what_three_workers_saved_is_loaded_by_any_number_of_workers() {
    let cluster = Cluster::default();
    // Eight micro-batches: five workers share them unevenly.
    let micro_batch = "distillation.micro_batch=1";
    cluster.finish("straight", 1, &["distillation.iterations=6", micro_batch], &[]);
    cluster.finish("three", 3, &["distillation.iterations=3", micro_batch], &[]);
    let straight = cluster.checkpoint("straight", 6);
    for workers in [1, 2, 5] {
        let run = format!("by-{workers}");
        let copied = cluster
            .about("checkpoint restore", "three")
            .args(["--to", &run])
            .output()
            .expect("potstill starts");
        assert!(copied.status.success(), "{}", text(&copied.stderr));
        let log = cluster.finish(&run, workers, &["distillation.iterations=6", micro_batch], &["--resume"]);
        assert!(log.contains("state_from=checkpoints/000000000003/manifest.json"), "{log}");
        let resumed = cluster.checkpoint(&run, 6);
        for part in ["generator/", "fake_score/", "generator_ema/", "generator_adam.exp_avg_sq/"] {
            let difference = relative_difference(&resumed, &straight, part);
            assert!(difference <= 1e-4, "{run}: {part}: {difference}");
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
fn adversarial_runs_follow_the_same_trajectory_and_resume_bit_by_bit() {
    let cluster = Cluster::default();
    let sets = |iterations: &'static str| {
        [
            iterations,
            "adversarial.data=digits.safetensors",
            "adversarial.limit=100",
            // The generator steps from iteration 3 on and its term joins in iteration 5; the run in two halves resumes
            // between the two.
            "adversarial.join_images=32",
            "adversarial.approximate_r1=1",
            "distillation.generator_start_images=16",
            "optimizer.fake_score_clip_value=1.0",
            "guidance.preset=zero-cfg",
            "optimizer.clip_norm=1000.0",
            "optimizer.decay={start_images=25,end_images=100}",
        ]
    };
    cluster.succeed("w1", 1, &sets("distillation.iterations=8"), &[]);
    cluster.succeed("w2", 2, &sets("distillation.iterations=4"), &[]);
    cluster.succeed("w2", 2, &sets("distillation.iterations=8"), &["--resume"]);
    cluster.succeed("straight", 2, &sets("distillation.iterations=8"), &[]);
    let (halves, straight) = (cluster.checkpoint("w2", 8), cluster.checkpoint("straight", 8));
    assert!(halves == straight, "a resumed run differs");
    for part in ["generator/", "fake_score/"] {
        let difference = relative_difference(&straight, &cluster.checkpoint("w1", 8), part);
        assert!(difference <= 1e-4, "{part}: {difference}");
    }
    // On the CPU nothing is recorded, but each micro-batch is computed where the numbers of the first ones lay.
    let graphs = [&sets("distillation.iterations=8")[..], &["distillation.cuda_graphs=true"]].concat();
    cluster.succeed("graphs", 2, &graphs, &[]);
    assert!(cluster.checkpoint("graphs", 8) == straight, "numbers of one micro-batch went into another");
    let rows = cluster.metrics("straight");
    let last = rows.iter().rfind(|row| row["kind"] == "iteration").expect("iterations were measured");
    assert!(last["discriminator_loss"].as_f64().is_some_and(|loss| loss > 0.0), "{last}");
    assert!(last["generator_adversarial_loss"].as_f64().is_some_and(|loss| loss > 0.0), "{last}");
}

/// Adam's bias correction counts the generator's own steps: after any number of frozen iterations its first step is as
/// long as the learning rate, element by element (β₁ = 0), and so is the fake score's.
#[test]
fn the_first_step_after_a_freeze_is_as_long_as_any_first_step() {
    let cluster = Cluster::default();
    let sets = |iterations: &'static str| {
        [
            iterations,
            "distillation.generator_start_images=1568",
            "distillation.global_batch=32",
            "distillation.micro_batch=32",
            "optimizer.generator_learning_rate=1e-4",
        ]
    };
    cluster.succeed("frozen", 1, &sets("distillation.iterations=50"), &[]);
    cluster.succeed("frozen", 1, &sets("distillation.iterations=51"), &["--resume"]);
    let (before, after) = (cluster.checkpoint("frozen", 50), cluster.checkpoint("frozen", 51));
    let mut steps: Vec<f32> = before
        .iter()
        .filter(|(name, _)| name.starts_with("generator/"))
        .flat_map(|(name, values)| values.iter().zip(&after[name]).map(|(a, b)| (b - a).abs() / 1e-4))
        .collect();
    steps.sort_by(f32::total_cmp);
    let median = steps[steps.len() / 2];
    assert!((0.5..=1.05).contains(&median), "{median}");
    assert_eq!(before["counters/loss_scale_and_steps"], [1.0, 0.0, 0.0, 1.0, 0.0, 50.0]);
    assert_eq!(after["counters/loss_scale_and_steps"], [1.0, 0.0, 1.0, 1.0, 0.0, 51.0]);
}

#[test]
fn several_updates_of_the_fake_score_come_to_one_of_the_generator() {
    let cluster = Cluster::default();
    let sets = |iterations: &'static str| [iterations, "distillation.fake_score_updates=3"];
    cluster.succeed("halves", 1, &sets("distillation.iterations=4"), &[]);
    let counted = cluster.checkpoint("halves", 4)["counters/loss_scale_and_steps"].clone();
    assert_eq!((counted[2], counted[5]), (1.0, 4.0));
    cluster.succeed("halves", 1, &sets("distillation.iterations=7"), &["--resume"]);
    cluster.succeed("straight", 1, &sets("distillation.iterations=7"), &[]);
    let (halves, straight) = (cluster.checkpoint("halves", 7), cluster.checkpoint("straight", 7));
    assert!(halves == straight, "a resumed run differs");
    let counted = &straight["counters/loss_scale_and_steps"];
    assert_eq!((counted[2], counted[5]), (2.0, 7.0));
}

#[test]
fn a_frozen_generator_stays_the_teacher_while_the_fake_score_learns() {
    let cluster = Cluster::default();
    let sets = ["distillation.iterations=2", "distillation.generator_start_images=1000"];
    cluster.succeed("frozen", 1, &sets, &[]);
    cluster.succeed("other", 1, &["distillation.iterations=2"], &[]);
    let (frozen, other) = (cluster.checkpoint("frozen", 2), cluster.checkpoint("other", 2));
    assert_eq!(
        relative_difference(&frozen, &with_names_of(&frozen, "generator/", "generator_ema/"), "generator/"),
        0.0
    );
    assert!(relative_difference(&frozen, &other, "generator/") > 0.0);
    assert!(
        relative_difference(&frozen, &with_names_of(&frozen, "generator/", "fake_score/"), "generator/")
            > 0.0
    );
}

/// The tensors that begin with `from`, under names that begin with `to` instead.
fn with_names_of(
    tensors: &std::collections::BTreeMap<String, Vec<f32>>,
    to: &str,
    from: &str,
) -> std::collections::BTreeMap<String, Vec<f32>> {
    let renamed = tensors
        .iter()
        .filter_map(|(name, values)| Some((format!("{to}{}", name.strip_prefix(from)?), values.clone())));
    renamed.collect()
}

#[test]
fn lower_precisions_stay_close_and_resume_bit_by_bit() {
    let cluster = Cluster::default();
    // Small steps, so that one that fp16 skips while its loss scale settles makes little difference.
    let slow = "optimizer.fake_score_learning_rate=5e-5";
    cluster.succeed("fp32", 1, &["distillation.iterations=6", slow], &[]);
    let reference = cluster.checkpoint("fp32", 6);
    for precision in ["bf16", "fp16"] {
        let set = format!("distillation.precision={precision}");
        let halves = format!("{precision}-halves");
        cluster.succeed(precision, 1, &["distillation.iterations=6", slow, &set], &[]);
        cluster.succeed(&halves, 1, &["distillation.iterations=3", slow, &set], &[]);
        cluster.succeed(&halves, 1, &["distillation.iterations=6", slow, &set], &["--resume"]);
        let lower = cluster.checkpoint(precision, 6);
        assert!(lower == cluster.checkpoint(&halves, 6), "{precision}: a resumed run differs");
        for part in ["generator/", "fake_score/"] {
            let difference = relative_difference(&lower, &reference, part);
            assert!(difference > 0.0 && difference < 0.01, "{precision}: {part}: {difference}");
        }
        let counters = &lower["counters/loss_scale_and_steps"];
        let [scale, _, steps, _, _, fake_steps] = counters[..] else { panic!("{counters:?}") };
        assert_eq!(scale > 1.0, precision == "fp16", "{precision}: {scale}");
        // A step that fp16 skips does not count: each of them has halved the loss scale.
        let fake_scale = counters[3];
        for (scale, steps) in [(scale, steps), (fake_scale, fake_steps)] {
            let skipped = if precision == "fp16" { 16.0 - scale.log2() } else { 0.0 };
            assert_eq!(steps, 6.0 - skipped, "{precision}: {counters:?}");
        }
    }
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
