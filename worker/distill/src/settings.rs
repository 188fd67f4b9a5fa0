//! What decides a micro-batch besides the networks.

use potstill_models::Mode;
use tch::Device;

use crate::{
    adversarial::Adversarial,
    augmentation::Augmentation,
    generator::{Matching, Unroll},
    guidance::Guidance,
    loss::Weighting,
    noise_distribution::NoiseDistribution,
    schedule::Schedule,
};

/// What decides a micro-batch besides the networks.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Decides every random number.
    pub seed: u64,
    /// Samples per micro-batch.
    pub micro_batch: i64,
    /// Time of each of the generator's steps.
    pub times: Vec<f64>,
    /// Which of its outputs are matched.
    pub matching: Matching,
    /// α of the generator loss.
    pub alpha: f64,
    /// ω of the generator loss.
    pub weighting: Weighting,
    /// Law of the times at which the fake score learns.
    pub fake_score_times: NoiseDistribution,
    /// Law of the times at which the generator phase compares scores.
    pub generator_times: NoiseDistribution,
    /// λ_sid: weight of the score identity loss; halved once the adversarial term has joined. SiD, SiDA and SiD-DiT: 100; SiD-LSG:
    /// 1. With Adam it decides what ε means.
    pub score_identity_weight: f64,
    /// Scales of the predictions.
    pub guidance: Guidance,
    /// EDM's augmentation of what the fake score learns from.
    pub augmentation: Option<Augmentation>,
    /// The adversarial loss, if there is one.
    pub adversarial: Option<Adversarial>,
    /// When what begins.
    pub schedule: Schedule,
    /// Dropout on or off in the network that trains.
    pub training_mode: Mode,
    /// Where the networks are.
    pub device: Device,
}

impl Settings {
    /// How far an iteration runs the generator.
    #[must_use]
    pub fn unroll(&self, iteration: u64) -> Unroll {
        Unroll::of(&self.matching, self.times.len(), self.seed, iteration)
    }
}
