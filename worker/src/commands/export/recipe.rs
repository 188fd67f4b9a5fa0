//! Lines of Python that make an image with what was exported.

use std::path::Path;

use super::format::Format;
use crate::model::{Latent, is_stock, student::Student};

/// How an image is made with diffusers.
///
/// # Errors
/// The teacher's schedule cannot be read.
pub fn python(student: &Student, latent: &Latent, format: Format, out: &Path) -> anyhow::Result<String> {
    let kind = if latent.folder.is_xl() { "StableDiffusionXLPipeline" } else { "StableDiffusionPipeline" };
    let (steps, quoted) = (student.times.len(), |path: &Path| format!("{:?}", path.display().to_string()));
    let stock = is_stock(&student.times, latent.folder.schedule()?.timesteps() as u64);
    let mut lines = Vec::new();
    match format {
        Format::Diffusers => {
            lines.push(format!("from diffusers import {kind}"));
            lines.push(format!("pipe = {kind}.from_pretrained({})", quoted(out)));
        }
        Format::SingleFile | Format::LoraDiffusers | Format::LoraKohya => {
            lines.push(format!("from diffusers import {kind}, LCMScheduler"));
            if format == Format::SingleFile {
                // diffusers knows the configurations of the published models alone.
                let config = quoted(latent.folder.path());
                lines.push(format!("pipe = {kind}.from_single_file({}, config={config})", quoted(out)));
            } else {
                lines.push(format!("pipe = {kind}.from_pretrained({})", quoted(latent.folder.path())));
                lines.push(format!("pipe.load_lora_weights({})", quoted(out)));
            }
            let grid = if stock { format!(", original_inference_steps={steps}") } else { String::new() };
            lines.push(format!("pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config{grid})"));
        }
    }
    let how = if stock {
        // The pipeline's own noise is what the generator was trained from.
        format!("num_inference_steps={steps}")
    } else {
        let times: Vec<i64> = student.times.iter().map(|time| *time as i64).collect();
        let [channels, height, width] = student.model.network.sample_shape();
        lines.insert(0, "import torch".to_owned());
        lines.push(format!(
            "noise = torch.randn(1, {channels}, {height}, {width}) * (1 - pipe.scheduler.alphas_cumprod[{}]).sqrt()",
            times.first().copied().unwrap_or_default()
        ));
        format!("latents=noise, timesteps={times:?}")
    };
    lines.push(format!("image = pipe(\"a prompt\", {how}, guidance_scale=0).images[0]"));
    Ok(lines.join("\n"))
}
