//! Observations like those of a real run, for this module's tests.

use potstill_core::observation::IterationTotals;
use potstill_proto::{
    cursor::Generation,
    scores::{Evaluation, Scores, Subject},
    wire,
};
use potstill_spec::RunSpec;

/// A valid specification with a global batch of 128.
pub fn spec(iterations: u64) -> RunSpec {
    let mut spec = RunSpec::default();
    spec.teacher.weights = Some("teacher.safetensors".into());
    spec.distillation.iterations = iterations;
    spec
}

/// A plausible iteration: losses that fall, with a wobble that repeats.
pub fn totals(iteration: u64) -> IterationTotals {
    let progress = iteration as f64 / 200.0;
    let wobble = 1.0 + 0.08 * (iteration as f64 * 2.3).sin() + 0.05 * (iteration as f64 * 0.71).cos();
    IterationTotals {
        iteration,
        world_size: 2,
        samples: 128,
        fake_score_loss: wobble * (210.0 + 90.0 * (-progress).exp()),
        generator_loss: wobble * (1800.0 * (-progress * 1.5).exp() - 120.0),
        score_difference: wobble * 0.4,
        fake_score_grad_norm: 3.0,
        generator_grad_norm: 7.0,
        non_finite_samples: 0,
        non_finite_gradients: 0,
        discriminator_loss: None,
        generator_adversarial_loss: None,
        loss_scales: [1.0; 2],
        memory_peak: Some(3 << 30),
        seconds: wire::StepSeconds { compute: 0.25, communication: 0.04, optimizer: 0.02, total: 0.31 },
    }
}

/// Scores of `subject` with this FID.
pub fn evaluation(subject: Subject, iteration: u64, fid: f64) -> Evaluation {
    Evaluation {
        generation: Generation(1),
        iteration,
        subject,
        scores: Scores {
            fid: Some(fid),
            agreement: Some(0.931),
            precision: Some(0.71),
            recall: Some(0.412),
            diversity: Some(7.5),
            clip_score: None,
            evaluations_per_image: Some(if subject == Subject::Teacher { 35.0 } else { 1.0 }),
            images_per_second: Some(if subject == Subject::Teacher { 38.2 } else { 1310.0 }),
            samples: 2000,
        },
    }
}
