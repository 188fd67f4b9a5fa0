//! Settings that decide a micro-batch besides the networks.

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

/// Settings that decide a micro-batch besides the networks.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Seed of all random numbers.
    pub seed: u64,
    /// Samples per micro-batch.
    pub micro_batch: i64,
    /// Time of each of the generator's steps.
    pub times: Vec<f64>,
    /// The outputs of the generator that are matched.
    pub matching: Matching,
    /// α of the generator loss.
    pub alpha: f64,
    /// ω of the generator loss.
    pub weighting: Weighting,
    /// Noise distribution of the fake-score phase.
    pub fake_score_times: NoiseDistribution,
    /// Noise distribution of the generator phase.
    pub generator_times: NoiseDistribution,
    /// λ_sid: weight of the score identity loss; halved once the adversarial term has joined. SiD, SiDA and SiD-DiT:
    /// 100; SiD-LSG: 1. With Adam it sets the scale of ε.
    pub score_identity_weight: f64,
    /// Guidance scales.
    pub guidance: Guidance,
    /// EDM's augmentation of the samples from which the fake score learns.
    pub augmentation: Option<Augmentation>,
    /// The adversarial loss, if there is one.
    pub adversarial: Option<Adversarial>,
    /// When the generator and its adversarial term start.
    pub schedule: Schedule,
    /// Whether dropout is active in the network that trains.
    pub training_mode: Mode,
    /// The networks' device.
    pub device: Device,
}

impl Settings {
    /// The generator's steps in an iteration.
    #[must_use]
    pub fn unroll(&self, iteration: u64) -> Unroll {
        Unroll::of(&self.matching, self.times.len(), self.seed, iteration)
    }
}
