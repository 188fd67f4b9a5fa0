//! `export`: the averaged generator of a checkpoint as one file.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::Args;
use tch::Device;

use crate::student::{Source, Student};

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    source: Source,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

pub fn main(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let student = Student::load(&arguments.source, Device::Cpu)?;
    let out = arguments.out;
    std::fs::write(&out, student.to_safetensors()?)
        .with_context(|| format!("cannot write {}", out.display()))?;
    println!(
        "{} from {}: {} step(s), σ {:?}",
        out.display(),
        student.origin,
        student.sigmas.len(),
        student.sigmas
    );
    Ok(ExitCode::SUCCESS)
}
