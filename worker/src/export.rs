//! `export`: the averaged generator of a checkpoint as one file.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::Args;
use tch::Device;

use crate::student::Source;

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    source: Source,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

pub fn main(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let student = arguments.source.load(Device::Cpu)?;
    let out = arguments.out;
    std::fs::write(&out, student.to_safetensors()?)
        .with_context(|| format!("cannot write {}", out.display()))?;
    println!(
        "{} from {}: {} step(s), at {:?}",
        out.display(),
        student.origin,
        student.times.len(),
        student.times
    );
    Ok(ExitCode::SUCCESS)
}
