//! Lines of Python that make an image with what was exported.

use std::path::Path;

use super::format::Format;
use crate::model::{Latent, is_stock, student::Student};

/// How an image is made with diffusers.
pub fn python(student: &Student, latent: &Latent, format: Format, out: &Path) -> anyhow::Result<String> {
    let kind = if latent.folder.is_xl() { "StableDiffusionXLPipeline" } else { "StableDiffusionPipeline" };
    let (out, steps) = (out.display(), student.times.len());
    let stock = is_stock(&student.times, latent.folder.schedule()?.timesteps() as u64);
    let class = if format == Format::Diffusers { "" } else { ", LCMScheduler" };
    let mut lines = vec!["import torch".to_owned(), format!("from diffusers import {kind}{class}")];
    match format {
        Format::Diffusers => lines.push(format!("pipe = {kind}.from_pretrained({:?})", out.to_string())),
        Format::SingleFile => lines.push(format!("pipe = {kind}.from_single_file({:?})", out.to_string())),
        Format::LoraDiffusers | Format::LoraKohya => {
            let teacher = latent.folder.path().display().to_string();
            lines.push(format!("pipe = {kind}.from_pretrained({teacher:?})"));
            lines.push(format!("pipe.load_lora_weights({:?})", out.to_string()));
        }
    }
    if format != Format::Diffusers {
        let grid = if stock { format!(", original_inference_steps={steps}") } else { String::new() };
        lines.push(format!("pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config{grid})"));
    }
    if stock {
        // The pipeline's own noise is what the generator was trained from.
        lines.remove(0);
        lines.push(format!(
            "image = pipe(\"a prompt\", num_inference_steps={steps}, guidance_scale=0).images[0]"
        ));
        return Ok(lines.join("\n"));
    }
    let times: Vec<i64> = student.times.iter().map(|time| *time as i64).collect();
    let [channels, height, width] = student.model.network.sample_shape();
    lines.push(format!(
        "noise = torch.randn(1, {channels}, {height}, {width}) * (1 - pipe.scheduler.alphas_cumprod[{}]).sqrt()",
        times.first().copied().unwrap_or_default()
    ));
    lines.push(format!(
        "image = pipe(\"a prompt\", latents=noise, timesteps={times:?}, guidance_scale=0).images[0]"
    ));
    Ok(lines.join("\n"))
}
