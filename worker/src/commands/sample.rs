//! `sample`: makes images with a student, as a grid and one by one.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail, ensure};
use clap::Args;
use potstill_distill::{
    generator,
    random::{Purpose, Stream},
};
use potstill_logging::print;
use potstill_models::{Condition, Mode, weights};
use potstill_spec::PromptsSpec;
use tch::{Device, Kind, Tensor, no_grad};

use super::source::Source;
use crate::{
    evaluation::pictures,
    model::student::Student,
    model::{Space, Wanted},
    process::device::Choice,
};

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    source: Source,
    /// Number of images
    #[arg(long, value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    count: u32,
    /// Classes, used in turn, as in 0,1,2; by default all
    #[arg(long, value_name = "CLASSES", value_delimiter = ',')]
    labels: Vec<i64>,
    /// A prompt for a text-to-image model; several are used in turn
    #[arg(long = "prompt", value_name = "TEXT", conflicts_with_all = ["labels", "prompts"])]
    prompt: Vec<String>,
    /// A file of prompts: .txt with one a line; .jsonl, .csv or .parquet with a column "prompt"
    #[arg(long, value_name = "FILE", conflicts_with = "labels")]
    prompts: Option<String>,
    /// Also write the noise of every step to this file, [images, steps, C, H, W] in safetensors
    #[arg(long, value_name = "FILE")]
    save_noise: Option<PathBuf>,
    /// Device
    #[arg(long, value_enum, default_value_t)]
    device: Choice,
    /// Seed of the noise: image i of a seed is always the same
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Images in a row of the grid
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    columns: u32,
    /// Folder for grid.png and the single images, 000000.png and so on
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
}

pub fn main(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let device = arguments.device.device(0)?;
    let Student { model, times, origin, .. } = arguments.source.load(device)?;
    let classes = model.network.classes();
    if let Some(label) = arguments.labels.iter().find(|label| !(0..classes).contains(*label)) {
        bail!("class {label} is out of range: {origin} has {classes} classes, from 0");
    }
    let reads = model.latent.is_some();
    let asked = !arguments.prompt.is_empty() || arguments.prompts.is_some();
    ensure!(reads || !asked, "{origin} takes no prompts: name classes with --labels");
    ensure!(asked || !reads, "{origin} needs prompts: give them with --prompt or --prompts");
    let prompts = match &arguments.prompts {
        Some(file) => PromptsSpec { data: Some(file.clone()), ..PromptsSpec::default() },
        None => PromptsSpec::default(),
    };
    let wanted = match arguments.prompts {
        _ if !reads => None,
        Some(_) => Some(Wanted::File(&prompts)),
        None => Some(Wanted::These(arguments.prompt)),
    };
    let (network, space) = model.into_space(wanted, vec![], None)?;
    let channels = space.image_shape()[0];
    ensure!(
        channels == 1 || channels == 3,
        "{origin} makes images of {channels} channels, which cannot be written as pictures"
    );
    let labels = match arguments.labels.is_empty() {
        true => (0..classes).collect(),
        false => arguments.labels,
    };
    let out = arguments.out;
    std::fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let write = |path: &Path, bytes: Vec<u8>| {
        std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
    };

    let mut all_noises = Vec::new();
    let mut images = Vec::new();
    for index in 0..arguments.count {
        let noises = noises(space.sample, times.len(), arguments.seed, index, device);
        let condition = condition(&space, &labels, index, device);
        let sample =
            no_grad(|| generator::generate(network.as_ref(), &noises, &condition, &times, 0, Mode::Eval));
        let image = space.images(&sample).to_device(Device::Cpu);
        write(&out.join(format!("{index:06}.png")), pictures::single(&image)?)?;
        images.push(image);
        if arguments.save_noise.is_some() {
            all_noises.push(Tensor::cat(&noises, 0));
        }
    }
    write(&out.join("grid.png"), pictures::grid(&[&Tensor::cat(&images, 0)], arguments.columns)?)?;
    if let Some(path) = arguments.save_noise {
        let noises = Tensor::stack(&all_noises, 0);
        write(&path, weights::archive(&[("noise", &noises)], &BTreeMap::new())?)?;
    }
    print(format_args!("{} images from {origin} in {}", images.len(), out.display()));
    Ok(ExitCode::SUCCESS)
}

/// The noise of each step of image `index` of a seed, [1, C, H, W]; it does not depend on the number of images.
fn noises(
    [channels, height, width]: [i64; 3],
    steps: usize,
    seed: u64,
    index: u32,
    device: Device,
) -> Vec<Tensor> {
    (0..steps)
        .map(|step| {
            let mut stream = Stream::new(seed, step as u64, Purpose::Sampling, index, device);
            stream.normal(&[1, channels, height, width])
        })
        .collect()
}

fn condition(space: &Space, labels: &[i64], index: u32, device: Device) -> Condition {
    if let Some(prompts) = space.prompts() {
        return prompts.condition(&[i64::from(index) % prompts.len()], device);
    }
    match labels {
        [] => Condition::None,
        labels => {
            let label = Tensor::from_slice(&[labels[index as usize % labels.len()]]);
            Condition::Class(label.one_hot(space.classes).to_kind(Kind::Float).to_device(device))
        }
    }
}
