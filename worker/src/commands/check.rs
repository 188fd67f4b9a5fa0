//! `check`: finds out before a run is started whether its files fit, so that bad input leaves nothing behind.

use std::process::ExitCode;

use potstill_spec::RunSpec;
use tch::Device;

use crate::training::Inputs;

/// Loads what the specification on standard input names.
pub fn main() -> anyhow::Result<ExitCode> {
    let specification = std::io::read_to_string(std::io::stdin())?;
    let mut spec = RunSpec::from_toml(&specification)?;
    // What is kept from run to run is computed by the workers, on their devices.
    if let Some(prompts) = &mut spec.prompts {
        prompts.cache = None;
    }
    if let Some(adversarial) = &mut spec.adversarial {
        adversarial.cache = None;
    }
    Inputs::load(&spec, Device::Cpu)?;
    Ok(ExitCode::SUCCESS)
}
