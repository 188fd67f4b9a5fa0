//! `[generator]`: the few-step generator.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problems::{Problems, positive};

/// The generator G_θ (docs/algorithm.md §2).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GeneratorSpec {
    /// K, the number of steps.
    pub steps: u32,
    /// Noise level of each step for the EDM family, falling; one for each step. The first is σ_init: 2.5 in SiD. SiDA's
    /// code for EDM2 has σ_init·(K − i)/K for step i, with final-step matching.
    pub sigmas: Vec<f64>,
    /// t_init of a text-to-image model, whose step i is at timestep ⌊t_init·(1 − i/K)⌋. By default 625 (SiD-LSG, 2406.01561), and
    /// 999 for a flow (SiD-DiT, 2509.25127), whose times are timesteps/999.
    pub initial_timestep: Option<u32>,
    /// Which step's output is matched.
    pub matching: Matching,
    /// With uniform-step matching: how often each step is chosen, relative to the others; one number for each step.
    /// Without it all steps are chosen equally often, as published (2505.12674).
    pub step_weights: Option<Vec<f64>>,
    /// An exported generator of the same architecture to start from, instead of a copy of the teacher: SiDA that continues
    /// SiD (2410.14919's SiD²A). In a run with `[lora]` a file of its adapters, in the names of PEFT or kohya's scripts.
    pub start_from: Option<PathBuf>,
}

/// The outputs of a K-step generator that are trained to match the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Matching {
    /// One step in each iteration, chosen at random; back-propagation through that step alone (2505.12674).
    #[default]
    UniformStep,
    /// The last step; back-propagation through all steps (SiD-LSG, 2406.01561).
    FinalStep,
}

impl Default for GeneratorSpec {
    fn default() -> Self {
        Self {
            steps: 1,
            sigmas: vec![2.5],
            initial_timestep: None,
            matching: Matching::UniformStep,
            step_weights: None,
            start_from: None,
        }
    }
}

impl GeneratorSpec {
    /// How often each step is chosen, relative to the others.
    #[must_use]
    pub fn weights(&self) -> Vec<f64> {
        self.step_weights.clone().unwrap_or_else(|| vec![1.0; self.steps as usize])
    }

    /// `reads`: whether the teacher is a text-to-image model.
    pub(crate) fn validate(&self, reads: bool, problems: &mut Problems) {
        let steps = self.steps;
        problems.require(steps >= 1, || "generator.steps is 0; it must be at least 1".into());
        if reads {
            problems.require(self.initial_timestep.is_none_or(|initial| initial >= steps), || {
                format!(
                    "generator.initial_timestep is {}, which leaves no {steps} different timesteps",
                    self.initial_timestep.unwrap_or_default()
                )
            });
        } else {
            problems.require(self.sigmas.len() == steps as usize, || {
                format!(
                    "generator.sigmas has {} noise levels, but generator.steps is {steps}: give one for each step",
                    self.sigmas.len()
                )
            });
        }
        problems.require(
            self.sigmas.iter().all(|s| positive(*s)) && self.sigmas.is_sorted_by(|a, b| a > b),
            || format!("generator.sigmas are {:?}; they must be > 0 and fall from step to step", self.sigmas),
        );
        if let Some(weights) = &self.step_weights {
            problems.require(
                weights.len() == steps as usize
                    && weights.iter().all(|w| w.is_finite() && *w >= 0.0)
                    && weights.iter().sum::<f64>() > 0.0,
                || {
                    format!(
                        "generator.step_weights are {weights:?}; give one number ≥ 0 for each of the {steps} steps, not \
                         all 0, or remove the key"
                    )
                },
            );
            problems.require(self.matching == Matching::UniformStep, || {
                "generator.step_weights are for uniform-step matching; final-step matching always matches the last step"
                    .into()
            });
        }
    }
}
