//! A text-to-image student as a folder in the layout of diffusers.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, ensure};
use potstill_models::{
    Denoiser,
    weights::{self, Precision},
};
use serde_json::{Value, json};
use tch::Tensor;

use crate::{
    model::student::{FOLDER_TIMES_KEY, SCHEDULER, Student},
    model::{Latent, is_stock},
};

const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

/// A complete folder: the generator as U-Net, a scheduler that makes its steps, and the other parts of the teacher.
pub fn write(
    student: &Student,
    latent: &Latent,
    out: &Path,
    link: bool,
    precision: Precision,
) -> anyhow::Result<()> {
    ensure!(!out.exists(), "{} exists already: name a folder that does not", out.display());
    let weights = unet(student.model.network.as_ref(), precision)?;
    let source = latent.folder.path();
    for file in latent.folder.files()? {
        let to = out.join(&file);
        let folder = to.parent().unwrap_or(out);
        std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        if file.starts_with("unet") || file == Path::new(SCHEDULER) || file == Path::new("model_index.json") {
            continue;
        }
        // Copies the target of a link in a hub's cache, not the link.
        let from = source.join(&file).canonicalize().with_context(|| format!("{}", file.display()))?;
        let done = match link {
            true => std::os::unix::fs::symlink(&from, &to),
            false => std::fs::copy(&from, &to).map(|_| ()),
        };
        done.with_context(|| format!("cannot write {}", to.display()))?;
    }
    let write = |name: &str, bytes: &[u8]| {
        let path = out.join(name);
        std::fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
    };
    write(&format!("unet/{WEIGHTS}"), &weights)?;
    let config = std::fs::read_to_string(source.join("unet/config.json"))?;
    let mut config: Value = serde_json::from_str(&config)?;
    // The run's images may have another size than the teacher's.
    let [_, height, width] = student.model.network.sample_shape();
    config["sample_size"] = if height == width { json!(height) } else { json!([height, width]) };
    write("unet/config.json", &serde_json::to_vec_pretty(&config)?)?;
    let teachers = std::fs::read_to_string(source.join(SCHEDULER))?;
    let mut scheduler = few_step_scheduler(serde_json::from_str(&teachers)?, &student.times);
    if is_stock(&student.times, latent.folder.schedule()?.timesteps() as u64) {
        scheduler["original_inference_steps"] = json!(student.times.len());
    }
    write(SCHEDULER, &serde_json::to_vec_pretty(&scheduler)?)?;
    let mut index = latent.folder.index().clone();
    index["scheduler"] = json!(["diffusers", "LCMScheduler"]);
    // Parts that are not exported: the safety checker and its like.
    if let Some(parts) = index.as_object_mut() {
        let kept: Vec<&str> = latent.folder.parts().collect();
        for (name, part) in parts.iter_mut().filter(|(_, part)| part.is_array()) {
            if !kept.contains(&name.as_str()) {
                *part = json!([null, null]);
            }
        }
        parts.insert("requires_safety_checker".to_owned(), json!(false));
        if latent.folder.is_xl() {
            parts.remove("requires_safety_checker");
        }
    }
    write("model_index.json", &serde_json::to_vec_pretty(&index)?)
}

fn unet(network: &dyn Denoiser, precision: Precision) -> anyhow::Result<Vec<u8>> {
    let parameters = network.parameters();
    let names = parameters.entries().iter().map(|entry| entry.name.as_str());
    let tensors: Vec<(&str, &Tensor)> = names.zip(parameters.leaves()).collect();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    Ok(weights::archive_in(precision, &tensors, &metadata)?)
}

/// diffusers' LCM scheduler makes the same steps as the generator: it predicts x0 and adds new noise for the next of
/// the given timesteps. Its boundary condition (2310.04378, section 4.1) is the identity at these times to within 1e-6.
/// Only the start may differ: a pipeline's own noise has level 1, the generator's first input √(1−ᾱ) where it does not begin at
/// the last timestep, and then callers give the latents.
fn few_step_scheduler(teachers: Value, times: &[f64]) -> Value {
    let kept = |key: &str, default: Value| teachers.get(key).cloned().unwrap_or(default);
    let times: Vec<i64> = times.iter().map(|time| *time as i64).collect();
    json!({
        "_class_name": "LCMScheduler",
        "num_train_timesteps": kept("num_train_timesteps", json!(1000)),
        "beta_start": kept("beta_start", json!(1e-4)),
        "beta_end": kept("beta_end", json!(0.02)),
        "beta_schedule": kept("beta_schedule", json!("linear")),
        "trained_betas": kept("trained_betas", Value::Null),
        "prediction_type": kept("prediction_type", json!("epsilon")),
        "rescale_betas_zero_snr": kept("rescale_betas_zero_snr", json!(false)),
        "clip_sample": false,
        "set_alpha_to_one": true,
        FOLDER_TIMES_KEY: times,
    })
}
