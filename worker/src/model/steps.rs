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
