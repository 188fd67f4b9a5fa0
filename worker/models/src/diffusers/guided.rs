//! U-Nets that take the guidance scale as an input, as latent consistency models do (2310.04378, section 4.2): at one scale each is an
//! ordinary U-Net. The embedding of the scale is added, through a linear layer without bias, to the embedding of the time
//! before the first layer of that, so that all of it goes into this layer's bias.

use std::path::Path;

use serde_json::Value;
use tch::{Device, Kind, Tensor, no_grad};

use super::ModelFolder;
use crate::weights::{self, LoadError, SaveError, Stored};

/// The guidance scale of the U-Net that is made: that of diffusers' pipeline for latent consistency models where none is given.
pub const SCALE: f64 = 8.5;

/// The key of the width of the embedded scale.
const WIDTH: &str = "time_cond_proj_dim";
const PROJECTION: &str = "time_embedding.cond_proj.weight";
const LAYER: &str = "time_embedding.linear_1";

/// Whether the U-Net in a model's folder takes the guidance scale; false where its configuration cannot be read.
#[must_use]
pub fn takes_guidance(folder: &Path) -> bool {
    config(folder).is_ok_and(|config| width(&config).is_some())
}

fn width(config: &Value) -> Option<i64> {
    config[WIDTH].as_i64()
}

fn config(folder: &Path) -> Result<Value, LoadError> {
    weights::json(&folder.join("unet/config.json"))
}

/// Makes the U-Net in a model's folder one that takes no guidance scale, and that predicts what it predicts at [`SCALE`].
///
/// # Errors
/// It is not one that takes the scale; the folder cannot be written.
pub fn fix_guidance(folder: &Path) -> Result<(), LoadError> {
    let model = ModelFolder::open(folder)?;
    let mut config = config(folder)?;
    let Some(width) = width(&config) else { return Ok(()) };
    let (mut tensors, place) = model.weights("unet")?;
    let missing = |name: &str| LoadError::Folder(format!("{name} is missing")).in_file(&place);
    let projection = tensors.remove(PROJECTION).ok_or_else(|| missing(PROJECTION))?;
    let [weight, bias] = [".weight", ".bias"].map(|end| format!("{LAYER}{end}"));
    let weight = tensors.get(&weight).ok_or_else(|| missing(&weight))?.tensor().to_kind(Kind::Double);
    let old = tensors.get(&bias).ok_or_else(|| missing(&bias))?.tensor().to_kind(Kind::Double);
    let projection = projection.tensor().to_kind(Kind::Double);
    let fits = projection.size().get(1) == Some(&width)
        && weight.size().get(1) == projection.size().first()
        && weight.size().first() == old.size().first();
    if !fits {
        let shapes = format!("{:?} and {:?}", projection.size(), weight.size());
        let problem =
            format!("{PROJECTION} and {LAYER}.weight of shapes {shapes} do not fit `{WIDTH}` {width}");
        return Err(LoadError::Folder(problem).in_file(&place));
    }
    let embedded = embedding(SCALE - 1.0, width).to_kind(Kind::Double);
    let new = no_grad(|| old + weight.matmul(&projection.matmul(&embedded)));
    tensors.insert(bias, Stored::Memory(new.to_kind(Kind::Float)));
    model.replace("unet", tensors)?;
    config[WIDTH] = Value::Null;
    let mut index = model.index().clone();
    index["_class_name"] =
        Value::from(if model.is_xl() { "StableDiffusionXLPipeline" } else { "StableDiffusionPipeline" });
    for (name, value) in [("unet/config.json", &config), ("model_index.json", &index)] {
        let path = folder.join(name);
        std::fs::write(&path, format!("{value:#}"))
            .map_err(|source| SaveError::Unwritable { path, source })?;
    }
    Ok(())
}

/// Sines and cosines of a thousand times `w`, fp32 `[width]`: diffusers' `get_guidance_scale_embedding`, in whose data type and order
/// of operations, since the arguments are large.
fn embedding(w: f64, width: i64) -> Tensor {
    let half = width / 2;
    let step = Tensor::from(10_000f32).log() / (half - 1) as f64;
    let frequencies = (Tensor::arange(half, (Kind::Float, Device::Cpu)) * -step).exp();
    let angles = Tensor::from((w * 1000.0) as f32) * frequencies;
    let both = Tensor::cat(&[angles.sin(), angles.cos()], 0);
    if width % 2 == 1 { both.constant_pad_nd([0, 1]) } else { both }
}
