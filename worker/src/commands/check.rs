//! `check`: loads the files of a run before the run is started, so that invalid ones are found before anything is
//! written.

use std::process::ExitCode;

use potstill_spec::RunSpec;
use tch::Device;

use crate::{process::environment, training::Inputs};

/// Loads the files that the specification on standard input names.
pub fn main() -> anyhow::Result<ExitCode> {
    let specification = std::io::read_to_string(std::io::stdin())?;
    let mut spec = RunSpec::from_toml(&specification)?;
    // Caches are filled by the workers, on their devices.
    if let Some(prompts) = &mut spec.prompts {
        prompts.cache = None;
    }
    if let Some(adversarial) = &mut spec.adversarial {
        adversarial.cache = None;
    }
    environment::check()?;
    Inputs::load(&spec, Device::Cpu)?;
    Ok(ExitCode::SUCCESS)
}
