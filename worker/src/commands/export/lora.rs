//! A student's adapters as one file.

use anyhow::Context;
use potstill_models::{
    lora::file::{Naming, named},
    weights::{Precision, archive_in},
};
use tch::Tensor;

use super::header::header;
use crate::model::student::{Adapters, Student};

/// The file's bytes.
///
/// # Errors
/// The student has no adapters; numbers beyond the range of the data type.
pub fn bytes(student: &Student, naming: Naming, precision: Precision) -> anyhow::Result<Vec<u8>> {
    let Adapters { lora, network } = student.adapters.as_ref().with_context(|| {
        format!("{} holds whole networks: only a run with [lora] has adapters to write", student.origin)
    })?;
    let tensors = named(network.parameters(), lora, naming);
    let tensors: Vec<(&str, &Tensor)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    Ok(archive_in(precision, &tensors, &header(student, "/lora", "diffusers")?)?)
}
