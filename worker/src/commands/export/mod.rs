//! `export`: writes the averaged generator of a checkpoint in a form that other programs load: one file for an EDM
//! network; for a text-to-image model a folder in the layout of diffusers or one file in the original layout; or the adapters of
//! either in one file.

mod folder;
mod format;
mod header;
mod lora;
mod recipe;
mod single_file;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use potstill_logging::print;
use potstill_models::{lora::file::Naming, weights::Precision};
use tch::Device;

use self::format::Format;
use super::source::Source;

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    source: Source,
    /// The file to write; for a whole text-to-image model the folder, which must not exist
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// What is written
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Data type of the generator's weights, of the adapters, or of everything in a single file, of a text-to-image model
    #[arg(long, value_enum, default_value_t)]
    dtype: Dtype,
    /// Link to the teacher's text encoders, tokenizers and autoencoder instead of copying them
    #[arg(long)]
    link: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Dtype {
    #[default]
    Fp32,
    Bf16,
    Fp16,
}

pub fn main(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let Arguments { source, out, format, dtype, link } = arguments;
    ensure!(!link || format == Format::Diffusers, "--link is for a whole model's folder: leave it out");
    let student = source.load(Device::Cpu)?;
    let precision = match dtype {
        Dtype::Fp32 => Precision::Fp32,
        Dtype::Bf16 => Precision::Bf16,
        Dtype::Fp16 => Precision::Fp16,
    };
    let file = |bytes: Vec<u8>| {
        std::fs::write(&out, bytes).with_context(|| format!("cannot write {}", out.display()))
    };
    match (&student.model.latent, format) {
        (Some(latent), Format::Diffusers) => folder::write(&student, latent, &out, link, precision)?,
        (_, Format::SingleFile) => single_file::write(&student, &out, precision)?,
        (_, Format::LoraDiffusers) => file(lora::bytes(&student, Naming::Peft, precision)?)?,
        (_, Format::LoraKohya) => file(lora::bytes(&student, Naming::Kohya, precision)?)?,
        (None, Format::Diffusers) => {
            ensure!(dtype == Dtype::Fp32, "an EDM network is written in fp32: leave --dtype out");
            file(student.to_safetensors()?)?;
        }
    }
    print(format_args!(
        "{} from {}: {} step(s), at {:?}",
        out.display(),
        student.origin,
        student.times.len(),
        student.times
    ));
    if let Some(latent) = &student.model.latent {
        print(format_args!("\n{}", recipe::python(&student, latent, format, &out)?));
    }
    Ok(ExitCode::SUCCESS)
}
