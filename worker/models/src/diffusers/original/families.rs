//! The models whose original layout is known, and their configurations, which a single file does not hold.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::names::{self, Place};
use crate::{
    diffusers::ModelFolder,
    weights::{LoadError, Named},
};

/// A family of models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Stable Diffusion 1.x.
    Sd1,
    /// Stable Diffusion 2.x.
    Sd2,
    /// SDXL's base model.
    Xl,
}

/// What stands before the names of each part.
pub(crate) const UNET: &str = "model.diffusion_model.";
pub(crate) const AUTOENCODER: &str = "first_stage_model.";
const FIRST_CLIP: &str = "cond_stage_model.transformer.text_model.";
const FIRST_OPEN_CLIP: &str = "cond_stage_model.model.";
const XL_CLIP: &str = "conditioner.embedders.0.transformer.text_model.";
const XL_OPEN_CLIP: &str = "conditioner.embedders.1.model.";
const REFINER_OPEN_CLIP: &str = "conditioner.embedders.0.model.";

/// A text encoder of a family.
#[derive(Clone, Copy)]
pub(crate) struct Text {
    /// Its folder in diffusers' layout.
    pub part: &'static str,
    /// What stands before its names in the original layout.
    pub prefix: &'static str,
    /// Whether it is OpenCLIP's.
    pub open: bool,
}

impl Text {
    /// The place of one of its tensors.
    pub fn place(self, name: &str) -> Option<Place> {
        if self.open { names::open_clip(name) } else { names::clip(name) }
    }
}

/// What a model predicts. Two kinds of SD 2.x have the same tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Prediction {
    Epsilon,
    V,
}

const ADAPTERS: &str = "low-rank adapters: name the base as teacher.model, and this file in teacher.loras";
const ORIGINAL_AUTOENCODER: &str = "one part of a model, its autoencoder: name the whole model's file";
const LONE_AUTOENCODER: &str =
    "one part of a model in diffusers' layout, its autoencoder: name the whole model's folder";
/// Other kinds of files by the beginnings of names that only they have, for messages.
const OTHERS: [(&str, &str); 15] = [
    ("joint_blocks.", "Stable Diffusion 3"),
    ("double_blocks.", "FLUX"),
    ("model.diffusion_model.joint_blocks.", "Stable Diffusion 3"),
    ("model.diffusion_model.double_blocks.", "FLUX"),
    (REFINER_OPEN_CLIP, "SDXL's refiner"),
    ("transformer_blocks.", "one part of a model in diffusers' layout"),
    ("down_blocks.", "one part of a model in diffusers' layout, its U-Net: name the whole model's folder"),
    ("encoder.down_blocks.", LONE_AUTOENCODER),
    ("decoder.up_blocks.", LONE_AUTOENCODER),
    ("encoder.down.", ORIGINAL_AUTOENCODER),
    ("decoder.up.", ORIGINAL_AUTOENCODER),
    ("vision_model.", "a whole CLIP model, of images and texts: name a diffusion model"),
    (
        "text_model.",
        "one part of a model in diffusers' layout, its text encoder: name the whole model's folder",
    ),
    ("control_model.", "a ControlNet"),
    ("lora_", ADAPTERS),
];

impl Family {
    /// The family of a file with these tensors.
    ///
    /// # Errors
    /// What the file is instead, as far as that can be told.
    pub(crate) fn of(tensors: &Named) -> Result<Self, String> {
        let has = |prefix: &str| begins(tensors, prefix);
        let family = if has(XL_OPEN_CLIP) && has(XL_CLIP) {
            Self::Xl
        } else if has(FIRST_OPEN_CLIP) {
            Self::Sd2
        } else if has(FIRST_CLIP) {
            Self::Sd1
        } else {
            let known = OTHERS.iter().find(|(prefix, _)| has(prefix)).map(|(_, what)| *what);
            let adapters = tensors.keys().any(|name| name.contains(".lora_") || name.contains(".lora."));
            let what = known.or_else(|| adapters.then_some(ADAPTERS));
            let without_text =
                has(UNET).then_some("a U-Net without text encoders, which cannot be trained alone");
            let autoencoder = has(AUTOENCODER).then_some(ORIGINAL_AUTOENCODER);
            return Err(match what.or(without_text).or(autoencoder) {
                Some(what) => format!("it is {what}"),
                None => format!(
                    "nothing in it is known, such as {}",
                    tensors.keys().take(3).map(String::as_str).collect::<Vec<_>>().join(", ")
                ),
            });
        };
        for (prefix, what) in [(UNET, "U-Net"), (AUTOENCODER, "autoencoder")] {
            if !has(prefix) {
                return Err(format!("it has no {what}: no name begins with {prefix}"));
            }
        }
        let inputs = tensors.get(&format!("{UNET}input_blocks.0.0.weight")).map(|first| first.shape());
        match inputs.as_deref().and_then(|shape| shape.get(1)) {
            Some(8 | 9) => {
                Err("its U-Net takes an image beside the noise: models for inpainting and editing are not \
                 supported"
                    .to_owned())
            }
            _ => Ok(family),
        }
    }

    /// The family of a folder in diffusers' layout: SDXL has two text encoders, and of the others SD 2.x has linear layers where
    /// SD 1.x has convolutions.
    ///
    /// # Errors
    /// The U-Net's configuration cannot be read.
    pub fn of_folder(folder: &ModelFolder) -> Result<Self, LoadError> {
        Ok(match (folder.is_xl(), folder.unet_config()?.use_linear_projection) {
            (true, _) => Self::Xl,
            (false, true) => Self::Sd2,
            (false, false) => Self::Sd1,
        })
    }

    /// Its text encoders.
    pub(crate) fn texts(self) -> Vec<Text> {
        let text = |part, prefix, open| Text { part, prefix, open };
        match self {
            Self::Sd1 => vec![text("text_encoder", FIRST_CLIP, false)],
            Self::Sd2 => vec![text("text_encoder", FIRST_OPEN_CLIP, true)],
            Self::Xl => {
                vec![text("text_encoder", XL_CLIP, false), text("text_encoder_2", XL_OPEN_CLIP, true)]
            }
        }
    }

    /// Its name by the Stability AI model metadata standard, `modelspec.architecture`, of a model that predicts v or not.
    #[must_use]
    pub fn architecture(self, predicts_v: bool) -> &'static str {
        match self {
            Self::Sd1 => "stable-diffusion-v1",
            Self::Sd2 if predicts_v => "stable-diffusion-v2-768-v",
            Self::Sd2 => "stable-diffusion-v2-512",
            Self::Xl => "stable-diffusion-xl-v1-base",
        }
    }

    /// What a file's model predicts: as the file says, or else as most of its family do. With it, whether the file says so.
    pub(crate) fn prediction(
        self,
        tensors: &Named,
        metadata: &BTreeMap<String, String>,
    ) -> (Prediction, bool) {
        let stated = metadata.get("modelspec.prediction_type").map(String::as_str);
        let scalar = |name: &str| {
            let found = tensors.get(name).filter(|one| one.shape().iter().product::<i64>() == 1);
            found.map(|one| one.tensor().reshape([1]).double_value(&[0]) as i64)
        };
        // The step at which stable-diffusion-2-base, whose file keeps it, was saved.
        let base = scalar("global_step") == Some(875_000);
        match (stated, self) {
            (Some("v" | "v_prediction"), _) => (Prediction::V, true),
            (Some("epsilon"), _) => (Prediction::Epsilon, true),
            _ if tensors.contains_key("v_pred") => (Prediction::V, true),
            (_, Self::Sd2) if base => (Prediction::Epsilon, true),
            (_, Self::Sd2) => (Prediction::V, false),
            _ => (Prediction::Epsilon, true),
        }
    }

    /// Files of configurations, by their paths in a folder.
    pub(crate) fn configurations(self, prediction: Prediction, zero_snr: bool) -> Vec<(String, Value)> {
        let mut files = vec![
            ("model_index.json".to_owned(), self.index()),
            ("unet/config.json".to_owned(), self.unet(prediction)),
            ("vae/config.json".to_owned(), self.autoencoder(prediction)),
            ("scheduler/scheduler_config.json".to_owned(), scheduler(prediction, zero_snr)),
        ];
        for text in self.texts() {
            files.push((format!("{}/config.json", text.part), self.text_encoder(text)));
            let tokenizer = text.part.replace("text_encoder", "tokenizer");
            // OpenCLIP's encoders were trained with 0 as padding, which is the token of "!".
            let pad = if text.open { "!" } else { "<|endoftext|>" };
            files.push((
                format!("{tokenizer}/tokenizer_config.json"),
                json!({
                    "tokenizer_class": "CLIPTokenizer",
                    "model_max_length": 77,
                    "do_lower_case": true,
                    "errors": "replace",
                    "add_prefix_space": false,
                    "bos_token": "<|startoftext|>",
                    "eos_token": "<|endoftext|>",
                    "unk_token": "<|endoftext|>",
                    "pad_token": pad,
                }),
            ));
            files.push((
                format!("{tokenizer}/special_tokens_map.json"),
                json!({
                    "bos_token": "<|startoftext|>",
                    "eos_token": "<|endoftext|>",
                    "unk_token": "<|endoftext|>",
                    "pad_token": pad,
                }),
            ));
        }
        files
    }

    fn index(self) -> Value {
        let mut index = json!({
            "_class_name": if self == Self::Xl { "StableDiffusionXLPipeline" } else { "StableDiffusionPipeline" },
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "scheduler": ["diffusers", "DDIMScheduler"],
        });
        if self == Self::Xl {
            index["text_encoder_2"] = json!(["transformers", "CLIPTextModelWithProjection"]);
            index["tokenizer_2"] = json!(["transformers", "CLIPTokenizer"]);
            index["force_zeros_for_empty_prompt"] = json!(true);
        } else {
            index["safety_checker"] = json!([null, null]);
            index["feature_extractor"] = json!([null, null]);
            index["requires_safety_checker"] = json!(false);
        }
        index
    }

    fn unet(self, prediction: Prediction) -> Value {
        let common = json!({
            "_class_name": "UNet2DConditionModel",
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "act_fn": "silu",
        });
        let own = match self {
            Self::Sd1 | Self::Sd2 => json!({
                "block_out_channels": [320, 640, 1280, 1280],
                "down_block_types":
                    ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
                "up_block_types":
                    ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
                "sample_size": self.side(prediction),
                "cross_attention_dim": if self == Self::Sd1 { 768 } else { 1024 },
                "attention_head_dim": if self == Self::Sd1 { json!(8) } else { json!([5, 10, 20, 20]) },
                "use_linear_projection": self == Self::Sd2,
            }),
            Self::Xl => json!({
                "block_out_channels": [320, 640, 1280],
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                "sample_size": self.side(prediction),
                "cross_attention_dim": 2048,
                "attention_head_dim": [5, 10, 20],
                "transformer_layers_per_block": [1, 2, 10],
                "use_linear_projection": true,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            }),
        };
        joined(common, own)
    }

    /// Side of the latents that it was trained on.
    fn side(self, prediction: Prediction) -> i64 {
        match (self, prediction) {
            (Self::Xl, _) => 128,
            (Self::Sd2, Prediction::V) => 96,
            _ => 64,
        }
    }

    fn autoencoder(self, prediction: Prediction) -> Value {
        json!({
            "_class_name": "AutoencoderKL",
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "act_fn": "silu",
            "down_block_types": vec!["DownEncoderBlock2D"; 4],
            "up_block_types": vec!["UpDecoderBlock2D"; 4],
            "sample_size": 8 * self.side(prediction),
            "scaling_factor": if self == Self::Xl { 0.13025 } else { 0.18215 },
            "force_upcast": true,
        })
    }

    fn text_encoder(self, text: Text) -> Value {
        let common = json!({
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "vocab_size": 49408,
            "max_position_embeddings": 77,
            "layer_norm_eps": 1e-5,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
        });
        let own = match (self, text.open) {
            (_, false) => json!({
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "hidden_act": "quick_gelu",
                "projection_dim": 768,
            }),
            // The model uses the states before the last of 24 layers.
            (Self::Sd1 | Self::Sd2, true) => json!({
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 23,
                "num_attention_heads": 16,
                "hidden_act": "gelu",
                "projection_dim": 1024,
            }),
            (Self::Xl, true) => json!({
                "architectures": ["CLIPTextModelWithProjection"],
                "hidden_size": 1280,
                "intermediate_size": 5120,
                "num_hidden_layers": 32,
                "num_attention_heads": 20,
                "hidden_act": "gelu",
                "projection_dim": 1280,
            }),
        };
        joined(common, own)
    }
}

/// All families were trained on the same noise levels.
fn scheduler(prediction: Prediction, zero_snr: bool) -> Value {
    json!({
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": if prediction == Prediction::V { "v_prediction" } else { "epsilon" },
        "rescale_betas_zero_snr": zero_snr,
        "timestep_spacing": if zero_snr { "trailing" } else { "leading" },
        "steps_offset": 1,
        "clip_sample": false,
        "set_alpha_to_one": false,
    })
}

fn joined(mut common: Value, own: Value) -> Value {
    if let (Value::Object(common), Value::Object(own)) = (&mut common, own) {
        common.extend(own);
    }
    common
}

pub(crate) fn begins(tensors: &Named, prefix: &str) -> bool {
    tensors.range(prefix.to_owned()..).next().is_some_and(|(name, _)| name.starts_with(prefix))
}

/// Names that a file may have beside its parts: a training program's own weights and tables, which a model does not need.
const PASSED_OVER: [&str; 18] = [
    "model_ema.",
    "betas",
    "alphas_cumprod",
    "sqrt_",
    "log_one_minus_alphas_cumprod",
    "posterior_",
    "lvlb_weights",
    "logvar",
    "denoiser.",
    "global_step",
    "scale_factor",
    "v_pred",
    "ztsnr",
    "edm_vpred.",
    "optimizer_states",
    "cond_stage_model.transformer.text_model.embeddings.position_ids",
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
    "first_stage_model.loss.",
];

/// Tensors of OpenCLIP that the encoder of a model does not use: the scale of similarities with images, the mask, SD 2.x's
/// projection.
const OPEN_CLIP_UNUSED: [&str; 3] = ["logit_scale", "attn_mask", "text_projection"];

/// Whether a tensor that belongs to no part may be passed over. `layers` is the number of layers that the text encoder uses.
pub(crate) fn is_passed_over(name: &str, text: &[(Text, i64)]) -> bool {
    let in_text = |(text, layers): &(Text, i64)| {
        let Some(rest) = name.strip_prefix(text.prefix).filter(|_| text.open) else { return false };
        let block = rest.strip_prefix("transformer.resblocks.").and_then(|rest| rest.split('.').next());
        let beyond = block.and_then(|index| index.parse().ok()).is_some_and(|index: i64| index >= *layers);
        beyond || OPEN_CLIP_UNUSED.contains(&rest)
    };
    // Of CLIP's whole model, some files keep the projection that only its pooled output needs.
    let clip = ["transformer.text_projection.weight", "logit_scale", "text_projection"];
    PASSED_OVER.iter().any(|known| name.starts_with(known))
        || text.iter().any(in_text)
        || clip.iter().any(|known| name == format!("cond_stage_model.{known}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusers::{AutoencoderConfig, TextEncoderConfig, UNetConfig};

    /// The published numbers of parameters.
    #[test]
    fn the_configurations_are_those_of_the_published_models() {
        for (family, unet, texts) in [
            (Family::Sd1, 859_520_964, vec![123_060_480]),
            (Family::Sd2, 865_910_724, vec![340_387_840]),
            (Family::Xl, 2_567_463_684, vec![123_060_480, 694_659_840]),
        ] {
            let files: BTreeMap<String, String> = family
                .configurations(Prediction::Epsilon, false)
                .into_iter()
                .map(|(name, content)| (name, content.to_string()))
                .collect();
            let config = UNetConfig::parse(&files["unet/config.json"]).unwrap();
            assert_eq!(config.size().unwrap(), unet);
            let all = config.tensors().unwrap();
            assert!(all.iter().all(|(name, _)| names::unet(&config, name).is_some()), "{family:?}");
            let config = AutoencoderConfig::parse(&files["vae/config.json"]).unwrap();
            assert_eq!(config.size().unwrap(), 83_653_863);
            assert!(config.tensors().unwrap().iter().all(|(name, _)| names::autoencoder(4, name).is_some()));
            for (text, size) in family.texts().into_iter().zip(texts) {
                let config = TextEncoderConfig::parse(&files[&format!("{}/config.json", text.part)]).unwrap();
                let projects = text.part == "text_encoder_2";
                assert_eq!(config.size(projects), size, "{family:?}: {}", text.part);
                assert!(config.tensors(projects).iter().all(|(name, _)| text.place(name).is_some()));
            }
        }
    }

    /// Names that the published files have.
    #[test]
    fn names_are_those_of_the_published_files() {
        let config =
            |family: Family| UNetConfig::parse(&family.unet(Prediction::Epsilon).to_string()).unwrap();
        for (family, name, original) in [
            (Family::Sd1, "down_blocks.1.downsamplers.0.conv.weight", "input_blocks.6.0.op.weight"),
            (
                Family::Sd1,
                "up_blocks.3.resnets.2.conv_shortcut.weight",
                "output_blocks.11.0.skip_connection.weight",
            ),
            (Family::Sd1, "up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.1.conv.weight"),
            (Family::Sd1, "up_blocks.1.upsamplers.0.conv.weight", "output_blocks.5.2.conv.weight"),
            (
                Family::Sd2,
                "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight",
                "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight",
            ),
            (
                Family::Xl,
                "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj.bias",
                "middle_block.1.transformer_blocks.9.ff.net.0.proj.bias",
            ),
            (Family::Xl, "add_embedding.linear_2.weight", "label_emb.0.2.weight"),
            (Family::Xl, "time_embedding.linear_1.bias", "time_embed.0.bias"),
        ] {
            assert_eq!(names::unet(&config(family), name).unwrap().name, original);
        }
        for (name, original) in [
            ("encoder.down_blocks.2.downsamplers.0.conv.bias", "encoder.down.2.downsample.conv.bias"),
            ("decoder.up_blocks.0.resnets.2.norm1.weight", "decoder.up.3.block.2.norm1.weight"),
            ("decoder.up_blocks.2.resnets.0.conv_shortcut.bias", "decoder.up.1.block.0.nin_shortcut.bias"),
            ("decoder.mid_block.attentions.0.to_out.0.weight", "decoder.mid.attn_1.proj_out.weight"),
            ("encoder.mid_block.resnets.1.conv2.weight", "encoder.mid.block_2.conv2.weight"),
        ] {
            assert_eq!(names::autoencoder(4, name).unwrap().name, original);
        }
        let query = names::open_clip("encoder.layers.9.self_attn.v_proj.bias").unwrap();
        assert_eq!(query.name, "transformer.resblocks.9.attn.in_proj_bias");
    }
}
