//! A text-to-image student as one file in the original layout.

use std::path::Path;

use anyhow::Context;
use potstill_models::{diffusers::original, weights::Precision};

use super::header::header;
use crate::model::student::Student;

/// Writes generator, text encoders and autoencoder, in one data type.
///
/// # Errors
/// The student is no text-to-image model; numbers beyond the range of the data type; the file cannot be written.
pub fn write(student: &Student, out: &Path, precision: Precision) -> anyhow::Result<()> {
    let latent = student.model.latent.as_ref().with_context(|| {
        format!("{} is an EDM network, which is one file anyway: leave --format out", student.origin)
    })?;
    let header = header(student, "", "sgm")?;
    let parameters = student.model.network.parameters();
    let names = parameters.entries().iter().map(|entry| entry.name.clone());
    let unet = names.zip(parameters.leaves().iter().map(|leaf| leaf.detach())).collect();
    Ok(original::pack(&latent.folder, unet, precision, &header, out)?)
}
