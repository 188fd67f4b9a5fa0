//! The numbers of a row of metrics by name, as trackers of experiments show them.

use super::metrics::{Evaluation, Row, Training};

/// The iteration of a row, the wall seconds of the run at that moment, and its numbers: group and name, and value.
#[must_use]
pub fn of(row: &Row) -> (u64, f64, Vec<(String, f64)>) {
    match row {
        Row::Iteration(training) => (training.iteration, training.wall_seconds, of_training(training)),
        Row::Evaluation(evaluation) => {
            (evaluation.iteration, evaluation.wall_seconds, of_evaluation(evaluation))
        }
    }
}

fn of_training(row: &Training) -> Vec<(String, f64)> {
    let mut numbers = vec![
        ("loss/fake_score", row.fake_score_loss),
        ("loss/generator", row.generator_loss),
        ("loss/score_difference", row.score_difference),
        ("gradient_norm/fake_score", row.fake_score_grad_norm),
        ("gradient_norm/generator", row.generator_grad_norm),
        ("speed/images_per_second", row.images_per_second),
        ("speed/iteration_seconds", row.seconds.total),
        ("speed/compute_seconds", row.seconds.compute),
        ("speed/communication_seconds", row.seconds.communication),
        ("speed/optimizer_seconds", row.seconds.optimizer),
        ("progress/images", row.images as f64),
        ("progress/ranks", row.world_size.into()),
        ("progress/non_finite_samples", row.non_finite_samples as f64),
    ];
    numbers.extend(row.discriminator_loss.map(|loss| ("loss/discriminator", loss)));
    numbers.extend(row.generator_adversarial_loss.map(|loss| ("loss/generator_adversarial", loss)));
    numbers.extend(row.memory_peak_bytes.map(|bytes| ("memory/peak_bytes", bytes as f64)));
    if let Some([fake_score, generator]) = row.loss_scales {
        numbers.extend([("loss_scale/fake_score", fake_score), ("loss_scale/generator", generator)]);
    }
    numbers.into_iter().map(|(name, number)| (name.to_owned(), number)).collect()
}

fn of_evaluation(row: &Evaluation) -> Vec<(String, f64)> {
    let speed = ("images_per_second", row.scores.images_per_second);
    let all = row.scores.named().into_iter().chain([speed]);
    let measured = all.filter_map(|(name, number)| Some((name, number?)));
    measured.map(|(name, number)| (format!("{}/{name}", row.subject), number)).collect()
}
