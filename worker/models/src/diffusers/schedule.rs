//! `scheduler/scheduler_config.json`: the forward process of a model. The scheduler's sampling method is ignored.

use serde::{Deserialize, Serialize};

use super::config::ConfigError;
use crate::process::{DdpmPrediction, ForwardProcess};

/// The part of a scheduler's configuration that describes the forward process; the defaults are diffusers'.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ScheduleConfig {
    #[serde(rename = "_class_name")]
    class: String,
    beta_start: f64,
    beta_end: f64,
    beta_schedule: String,
    trained_betas: Option<Vec<f64>>,
    num_train_timesteps: usize,
    prediction_type: String,
    rescale_betas_zero_snr: bool,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self {
            class: String::new(),
            beta_start: 1e-4,
            beta_end: 0.02,
            beta_schedule: "linear".to_owned(),
            trained_betas: None,
            num_train_timesteps: 1000,
            prediction_type: "epsilon".to_owned(),
            rescale_betas_zero_snr: false,
        }
    }
}

/// Scheduler classes of DDPM processes.
pub(super) const KNOWN: [&str; 16] = [
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
    "TCDScheduler",
];

impl ScheduleConfig {
    /// Reads `scheduler_config.json`.
    ///
    /// # Errors
    /// [`ConfigError`]: a class, schedule or prediction that is not known.
    pub fn parse(json: &str) -> Result<Self, ConfigError> {
        let config: Self = serde_json::from_str(json)?;
        let mut problems = Vec::new();
        if !KNOWN.contains(&config.class.as_str()) {
            problems.push(format!(
                "`_class_name` is {:?}; known are the schedulers of DDPM processes: {}",
                config.class,
                KNOWN.join(", ")
            ));
        }
        if config.trained_betas.is_none()
            && !["linear", "scaled_linear", "squaredcos_cap_v2"].contains(&config.beta_schedule.as_str())
        {
            problems.push(format!(
                "`beta_schedule` is {:?}; supported: linear, scaled_linear, squaredcos_cap_v2",
                config.beta_schedule
            ));
        }
        if !["epsilon", "v_prediction", "sample"].contains(&config.prediction_type.as_str()) {
            problems.push(format!(
                "`prediction_type` is {:?}; supported: epsilon, v_prediction, sample",
                config.prediction_type
            ));
        }
        if config.prediction_type == "epsilon" && config.rescale_betas_zero_snr {
            problems.push(
                "`rescale_betas_zero_snr` with `prediction_type` epsilon: at the last timestep the noise does not determine the \
                 image"
                    .to_owned(),
            );
        }
        if config.num_train_timesteps < 2
            || config.trained_betas.as_ref().is_some_and(|betas| betas.len() != config.num_train_timesteps)
        {
            problems
                .push("`num_train_timesteps` must be at least 2, and as many as `trained_betas`".to_owned());
        }
        if problems.is_empty() {
            let alphas = config.alphas_cumprod();
            // Each step keeps less of the image than the one before; at the last timestep nothing may be left.
            let falls = alphas.windows(2).all(|pair| pair[1] < pair[0]);
            if !(falls && alphas[0] < 1.0 && alphas.last().is_some_and(|last| *last >= 0.0)) {
                problems.push(
                    "`beta_start`, `beta_end` and `trained_betas`: each β must be between 0 and 1".to_owned(),
                );
            }
        }
        if problems.is_empty() { Ok(config) } else { Err(ConfigError::Problems { problems }) }
    }

    /// The number of timesteps.
    #[must_use]
    pub fn timesteps(&self) -> usize {
        self.num_train_timesteps
    }

    /// The forward process.
    #[must_use]
    pub fn process(&self) -> ForwardProcess {
        ForwardProcess::Ddpm {
            alphas_cumprod: self.alphas_cumprod().into(),
            prediction: match self.prediction_type.as_str() {
                "v_prediction" => DdpmPrediction::V,
                "sample" => DdpmPrediction::Sample,
                _ => DdpmPrediction::Epsilon,
            },
        }
    }

    fn alphas_cumprod(&self) -> Vec<f64> {
        let steps = self.num_train_timesteps;
        let share = |i: usize| i as f64 / (steps - 1) as f64;
        let between = |from: f64, to: f64, i: usize| from + share(i) * (to - from);
        let (first, last) = (self.beta_start, self.beta_end);
        // The cosine schedule (2102.09672, eq. 17), with the cap of its section 3.2.
        let cosine = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
        let beta = |i: usize| match (&self.trained_betas, self.beta_schedule.as_str()) {
            (Some(betas), _) => betas[i],
            (None, "scaled_linear") => between(first.sqrt(), last.sqrt(), i).powi(2),
            (None, "squaredcos_cap_v2") => {
                let (from, to) = (i as f64 / steps as f64, (i + 1) as f64 / steps as f64);
                (1.0 - cosine(to) / cosine(from)).min(0.999)
            }
            (None, _) => between(first, last, i),
        };
        let mut product = 1.0;
        let alphas: Vec<f64> = (0..steps)
            .map(|i| {
                product *= 1.0 - beta(i);
                product
            })
            .collect();
        if self.rescale_betas_zero_snr { to_zero_snr(&alphas) } else { alphas }
    }
}

/// Shifts and scales √ᾱ so that no signal is left at the last timestep (2305.08891, algorithm 1).
fn to_zero_snr(alphas: &[f64]) -> Vec<f64> {
    let (first, last) = (alphas[0].sqrt(), alphas[alphas.len() - 1].sqrt());
    alphas.iter().map(|alpha| ((alpha.sqrt() - last) * first / (first - last)).powi(2)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_named() {
        for (json, named) in [
            (r#"{"_class_name": "FlowMatchEulerDiscreteScheduler"}"#, "FlowMatchEulerDiscreteScheduler"),
            (r#"{"_class_name": "DDIMScheduler", "beta_schedule": "laplace"}"#, "laplace"),
            (r#"{"_class_name": "DDIMScheduler", "prediction_type": "flow"}"#, "flow"),
            (r#"{"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": true}"#, "zero_snr"),
            (r#"{"_class_name": "DDIMScheduler", "trained_betas": [0.1]}"#, "trained_betas"),
            (r#"{"_class_name": "DDIMScheduler", "beta_start": 2.0}"#, "each β"),
            (r#"{"_class_name": "DDIMScheduler", "beta_end": -0.1}"#, "each β"),
            ("{}", "_class_name"),
        ] {
            let error = ScheduleConfig::parse(json).unwrap_err().to_string();
            assert!(error.contains(named), "{json}: {error}");
        }
    }
}
