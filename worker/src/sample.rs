//! `sample`: images from a student, as a grid and one by one.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, ensure};
use clap::Args;
use potstill_distill::{
    generator,
    random::{Purpose, Stream},
};
use potstill_models::{Condition, Mode};
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
    pictures,
    student::{Source, Student},
};

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    source: Source,
    /// How many images
    #[arg(long, value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    count: u32,
    /// Classes to go round, as in 0,1,2; by default all
    #[arg(long, value_name = "CLASSES", value_delimiter = ',')]
    labels: Vec<i64>,
    /// Decides the noise: image i of a seed is always the same
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
    let student = arguments.source.load(Device::Cpu)?;
    let classes = student.network.classes();
    if let Some(label) = arguments.labels.iter().find(|label| !(0..classes).contains(*label)) {
        anyhow::bail!("class {label} is out of range: {} knows {classes} classes, from 0", student.origin);
    }
    let labels = match arguments.labels.is_empty() {
        true => (0..classes).collect(),
        false => arguments.labels,
    };
    ensure!(
        student.network.sample_shape()[0] == 1 || student.network.sample_shape()[0] == 3,
        "{} makes images of {} channels, which is no picture",
        student.origin,
        student.network.sample_shape()[0]
    );
    let out = arguments.out;
    std::fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let write = |name: &str, bytes: Vec<u8>| {
        let path = out.join(name);
        std::fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
    };

    let images: Vec<Tensor> =
        (0..arguments.count).map(|index| image(&student, &labels, arguments.seed, index)).collect();
    for (index, image) in images.iter().enumerate() {
        write(&format!("{index:06}.png"), pictures::single(image)?)?;
    }
    write("grid.png", pictures::grid(&[Tensor::cat(&images, 0)], arguments.columns)?)?;
    println!("{} images from {} in {}", images.len(), student.origin, out.display());
    Ok(ExitCode::SUCCESS)
}

/// Image `index` of a seed, [1, C, H, W]: made by itself, so that it does not depend on how many are made.
fn image(student: &Student, labels: &[i64], seed: u64, index: u32) -> Tensor {
    let network = student.network.as_ref();
    let [channels, height, width] = network.sample_shape();
    let noises: Vec<Tensor> = (0..student.times.len())
        .map(|step| {
            let mut stream = Stream::new(seed, step as u64, Purpose::Sampling, index, Device::Cpu);
            stream.normal(&[1, channels, height, width])
        })
        .collect();
    let condition = match labels {
        [] => Condition::None,
        labels => {
            let label = Tensor::from_slice(&[labels[index as usize % labels.len()]]);
            Condition::Class(label.one_hot(network.classes()).to_kind(Kind::Float))
        }
    };
    no_grad(|| generator::generate(network, &noises, &condition, &student.times, 0, Mode::Eval))
}
