//! Low-rank adapters of a run: the first ones, and those of a finished student.

use std::path::Path;

use anyhow::Context;
use potstill_distill::random::{Purpose, Stream};
use potstill_models::{Denoiser, Lora, lora::file, weights::Archive};
use potstill_spec::LoraSpec;
use tch::{Device, Kind, Tensor};

/// The adapters that a specification describes.
pub fn described(spec: &LoraSpec) -> Lora {
    let LoraSpec { rank, alpha, targets, dropout } = spec.clone();
    Lora { rank: rank.get().into(), alpha, targets, dropout }
}

/// The teacher with new adapters, for fake score and generator. Both compute what the teacher computes; A is drawn from
/// streams named by the seed and the network.
///
/// # Errors
/// The teacher cannot have these adapters.
pub fn first(teacher: &dyn Denoiser, spec: &LoraSpec, seed: u64) -> anyhow::Result<[Box<dyn Denoiser>; 2]> {
    let lora = described(spec);
    let adapted = |index| {
        let mut stream = Stream::new(seed, 0, Purpose::Adapters, index, Device::Cpu);
        teacher.adapted(&lora, &mut |shape| stream.normal(shape)).context("[lora]")
    };
    Ok([adapted(0)?, adapted(1)?])
}

/// The teacher with the adapters of a file, in the names of PEFT or kohya's scripts.
///
/// # Errors
/// The file cannot be read, or has adapters of another network, of other layers, or of another rank.
pub fn read(teacher: &dyn Denoiser, spec: &LoraSpec, path: &Path) -> anyhow::Result<Box<dyn Denoiser>> {
    let file = Archive::read(path).context("a run with [lora] starts from a file of adapters")?;
    let adapted = empty(teacher, spec)?;
    let updates = file::parse(&file.tensors, &file.metadata, &[teacher.layers()])?;
    file::fill(&updates, &described(spec), adapted.parameters())?;
    Ok(adapted)
}

/// The teacher with adapters of 0, whose values are to be filled in.
///
/// # Errors
/// As [`first`].
pub fn empty(teacher: &dyn Denoiser, spec: &LoraSpec) -> anyhow::Result<Box<dyn Denoiser>> {
    let zeros = &mut |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    teacher.adapted(&described(spec), zeros).context("[lora]")
}
