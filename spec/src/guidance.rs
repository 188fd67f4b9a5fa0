//! `[guidance]`: the trade-off between alignment and diversity.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problems::Problems;

/// Guidance (docs/algorithm.md §4): the prediction at scale κ is `u + κ·(c − u)`, u unconditional, c conditional.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GuidanceSpec {
    /// The preset of the three scales.
    pub preset: GuidancePreset,
    /// κ of `lsg` (1.5, 2, 3 or 4.5 in SiD-LSG); the strength s of `anti-cfg`, for which no value is published: 1 is
    /// Potstill's.
    pub scale: f64,
    /// κ₁ of `custom`: the fake score while it trains.
    pub fake_score_training: f64,
    /// κ₂ = κ₃ of `custom`: the fake score in the generator's loss.
    pub fake_score: f64,
    /// κ₄ of `custom`: the teacher.
    pub teacher: f64,
    /// Share of the fake score's samples that are generated and learned without their condition, where κ₁ or κ₂ is not
    /// 1 and κ₁ is not 0. By default 0.1 for `lsg` and `custom` (SiD-LSG), except on flows (SiD-DiT), and 0 for the
    /// others.
    pub condition_dropout: Option<f64>,
}

/// Presets of the three scales.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum GuidancePreset {
    /// 1, 1, 1 (SiD).
    #[default]
    None,
    /// κ, κ, κ (SiD-LSG, 2406.01561).
    Lsg,
    /// 0, 0, 1: teacher without guidance, fake score without the condition (2505.12674).
    ZeroCfg,
    /// −s, −s, 1: negative guidance in the fake score (2505.12674).
    AntiCfg,
    /// The scales of the keys below.
    Custom,
}

impl Default for GuidanceSpec {
    fn default() -> Self {
        Self {
            preset: GuidancePreset::None,
            scale: 1.0,
            fake_score_training: 1.0,
            fake_score: 1.0,
            teacher: 1.0,
            condition_dropout: None,
        }
    }
}

impl GuidanceSpec {
    /// κ₁, κ₂ = κ₃ and κ₄.
    #[must_use]
    pub fn scales(&self) -> [f64; 3] {
        match self.preset {
            GuidancePreset::None => [1.0; 3],
            GuidancePreset::Lsg => [self.scale; 3],
            GuidancePreset::ZeroCfg => [0.0, 0.0, 1.0],
            GuidancePreset::AntiCfg => [-self.scale, -self.scale, 1.0],
            GuidancePreset::Custom => [self.fake_score_training, self.fake_score, self.teacher],
        }
    }

    /// Share of conditions that are dropped; `flow`: whether the teacher is a flow.
    #[must_use]
    pub fn dropout(&self, flow: bool) -> f64 {
        let published = matches!(self.preset, GuidancePreset::Lsg | GuidancePreset::Custom) && !flow;
        self.condition_dropout.unwrap_or(if published { 0.1 } else { 0.0 })
    }

    pub(crate) fn validate(&self, problems: &mut Problems) {
        problems.require(self.scales().iter().all(|scale| scale.abs() <= 100.0), || {
            format!("guidance scales are {:?}; they must lie in [-100, 100]", self.scales())
        });
        problems.require(self.preset != GuidancePreset::AntiCfg || self.scale > 0.0, || {
            format!("guidance.scale is {}; anti-cfg needs a strength > 0", self.scale)
        });
        let dropout = self.condition_dropout.unwrap_or_default();
        problems.require((0.0..1.0).contains(&dropout), || {
            format!("guidance.condition_dropout is {dropout}; it must lie in [0, 1)")
        });
    }
}
