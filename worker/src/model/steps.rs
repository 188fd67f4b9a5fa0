//! The times of a generator's steps.

use potstill_distill::generator::{ddpm_times, flow_times};
use potstill_models::process::ForwardProcess;
use potstill_spec::RunSpec;

/// t_init; by default the published value of the model's family.
pub fn initial_timestep(spec: &RunSpec, process: &ForwardProcess) -> u32 {
    let published = if *process == ForwardProcess::Flow { 999 } else { 625 };
    spec.generator.initial_timestep.unwrap_or(published)
}

/// Times of the generator's steps in a forward process.
pub fn times(spec: &RunSpec, process: &ForwardProcess) -> Vec<f64> {
    match process {
        ForwardProcess::Edm { .. } => spec.generator.sigmas.clone(),
        ForwardProcess::Ddpm { .. } => ddpm_times(initial_timestep(spec, process), spec.generator.steps),
        ForwardProcess::Flow => flow_times(initial_timestep(spec, process), spec.generator.steps),
    }
}

/// Whether diffusers' LCM scheduler has these times for as many steps by itself: it divides the schedule evenly and ends each
/// part with its last timestep (2310.04378; `LCMScheduler.set_timesteps` with `original_inference_steps` equal to the steps).
pub fn is_stock(times: &[f64], timesteps: u64) -> bool {
    let steps = times.len() as u64;
    let part = timesteps / steps.max(1);
    (1..=steps).rev().zip(times).all(|(index, time)| (index * part - 1) as f64 == *time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_from_the_last_timestep_are_those_of_the_public_scheduler() {
        for steps in [1, 2, 4, 5, 8] {
            assert!(is_stock(&ddpm_times(999, steps), 1000), "{steps}");
            assert!(!is_stock(&ddpm_times(625, steps), 1000), "{steps}");
        }
        // 1,000 is no multiple of 3.
        assert!(!is_stock(&ddpm_times(999, 3), 1000));
    }
}
