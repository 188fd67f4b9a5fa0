//! `[optimizer]`: Adam and the generator's average.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problems::{Problems, positive};

/// Adam for both networks, and the generator's average (docs/algorithm.md §6).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerSpec {
    /// Learning rate of the generator.
    pub generator_learning_rate: f64,
    /// Learning rate of the fake score network.
    pub fake_score_learning_rate: f64,
    /// β₁, β₂.
    pub betas: [f64; 2],
    /// β₁, β₂ of the generator, where they differ: SiD's for FFHQ has β₁ = 0.9 there.
    pub generator_betas: Option<[f64; 2]>,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Half-life of G_ema in images; bounded by 5 % of the images seen.
    pub ema_half_life_images: f64,
    /// Gradients with a larger L2 norm are scaled down to this one; without it they are not scaled (SiD).
    pub clip_norm: Option<f64>,
    /// Elements of the generator's gradient are limited to ± this; without it they are not limited (SiD, SiDA).
    pub generator_clip_value: Option<f64>,
    /// Elements of the gradient of the fake score, which is the discriminator too, are limited to ± this; without it
    /// they are not limited (SiD). SiDA: 1.
    pub fake_score_clip_value: Option<f64>,
    /// Decay of both learning rates; without it they are constant (SiD).
    pub decay: Option<DecaySpec>,
}

impl Default for OptimizerSpec {
    fn default() -> Self {
        Self {
            generator_learning_rate: 1e-5,
            fake_score_learning_rate: 1e-5,
            betas: [0.0, 0.999],
            generator_betas: None,
            epsilon: 1e-8,
            ema_half_life_images: 500_000.0,
            clip_norm: None,
            generator_clip_value: None,
            fake_score_clip_value: None,
            decay: None,
        }
    }
}

/// Learning rates fall linearly between two points of the run, counted in images so that more iterations or another
/// number of workers do not change the trajectory before them. Not in SiD; an addition of Potstill for runs of fixed
/// length.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DecaySpec {
    /// Images seen when the decay begins.
    pub start_images: u64,
    /// Images seen when the decay ends.
    pub end_images: u64,
    /// Factor of the learning rates from then on; with 0 the networks no longer change, so the run cannot be extended.
    #[serde(default)]
    pub end_factor: f64,
}

impl DecaySpec {
    /// The factor of the learning rates after `images`.
    #[must_use]
    pub fn factor(&self, images: u64) -> f64 {
        let length = (self.end_images - self.start_images) as f64;
        let left = self.end_images.saturating_sub(images) as f64;
        self.end_factor + (1.0 - self.end_factor) * (left / length).min(1.0)
    }

    fn validate(&self, images: u64, problems: &mut Problems) {
        let Self { start_images: start, end_images: end, end_factor } = *self;
        problems.require(start < end, || {
            format!("optimizer.decay.end_images ({end}) must be greater than start_images ({start})")
        });
        problems.require((0.0..1.0).contains(&end_factor), || {
            format!("optimizer.decay.end_factor is {end_factor}; it must lie in [0, 1)")
        });
        problems.require(end_factor > 0.0 || end >= images, || {
            format!(
                "optimizer.decay.end_images is {end}, but the run sees {images} images (iterations × global_batch): \
                 nothing would be learned after the decay; raise it, or set optimizer.decay.end_factor above 0"
            )
        });
    }
}

impl OptimizerSpec {
    /// `images`: images of the whole run.
    pub(crate) fn validate(&self, images: u64, problems: &mut Problems) {
        for (name, bound) in [
            ("clip_norm", self.clip_norm),
            ("generator_clip_value", self.generator_clip_value),
            ("fake_score_clip_value", self.fake_score_clip_value),
        ] {
            problems.require(bound.is_none_or(positive), || {
                format!("optimizer.{name} is {}; it must be > 0", bound.unwrap_or_default())
            });
        }
        for (name, rate) in [
            ("generator_learning_rate", self.generator_learning_rate),
            ("fake_score_learning_rate", self.fake_score_learning_rate),
            ("epsilon", self.epsilon),
            ("ema_half_life_images", self.ema_half_life_images),
        ] {
            problems.require(positive(rate), || format!("optimizer.{name} is {rate}; it must be > 0"));
        }
        if let Some(decay) = &self.decay {
            decay.validate(images, problems);
        }
        for (name, betas) in [("betas", Some(self.betas)), ("generator_betas", self.generator_betas)] {
            let betas = betas.unwrap_or_default();
            problems.require(betas.iter().all(|b| (0.0..1.0).contains(b)), || {
                format!("optimizer.{name} are {betas:?}; each must lie in [0, 1)")
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::DecaySpec;

    #[test]
    fn learning_rates_fall_between_two_points() {
        let decay = DecaySpec { start_images: 100, end_images: 300, end_factor: 0.0 };
        let factors = [0, 100, 150, 200, 300, 400].map(|images| decay.factor(images));
        assert_eq!(factors, [1.0, 1.0, 0.75, 0.5, 0.0, 0.0]);
        let decay = DecaySpec { end_factor: 0.5, ..decay };
        assert_eq!([0, 200, 300, 400].map(|images| decay.factor(images)), [1.0, 0.75, 0.5, 0.5]);
    }
}
