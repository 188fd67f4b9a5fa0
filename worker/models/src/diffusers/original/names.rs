//! The names of tensors in the original layout, the public code's of latent diffusion (2112.10752) and of OpenCLIP, by their
//! names in diffusers' layout.

use crate::diffusers::unet::UNetConfig;

/// Where the values of a tensor of diffusers' layout are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The tensor there, without the prefix of its part.
    pub name: String,
    /// How it holds them.
    pub form: Form,
}

/// How a tensor of the original layout holds the values of one of diffusers'.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// In the same order, perhaps with trailing dimensions of 1.
    Same,
    /// Transposed.
    Transposed,
    /// As one third of the rows: query, key and value are one tensor.
    Third(usize),
}

impl Place {
    fn same(name: String) -> Self {
        Self { name, form: Form::Same }
    }
}

/// The place of a U-Net's tensor. `None` for what the layout does not have.
pub(crate) fn unet(config: &UNetConfig, name: &str) -> Option<Place> {
    let parts: Vec<&str> = name.split('.').collect();
    let blocks = config.block_out_channels.len();
    // A down block has so many entries and one for its downsampling; an up block as many, its upsampling is in the last.
    let layers = |block: usize| config.layers_per_block.at(block) as usize;
    let name = match parts[..] {
        ["conv_in", leaf] => format!("input_blocks.0.0.{leaf}"),
        ["conv_norm_out", leaf] => format!("out.0.{leaf}"),
        ["conv_out", leaf] => format!("out.2.{leaf}"),
        ["time_embedding", layer, leaf] => format!("time_embed.{}.{leaf}", linear(layer)?),
        ["add_embedding", layer, leaf] => format!("label_emb.0.{}.{leaf}", linear(layer)?),
        ["mid_block", "resnets", index, ref rest @ ..] => {
            format!("middle_block.{}.{}", 2 * number(index)?, resnet(rest)?)
        }
        ["mid_block", "attentions", "0", ref rest @ ..] => format!("middle_block.1.{}", rest.join(".")),
        ["down_blocks", block, what, index, ref rest @ ..] => {
            let (block, index) = (number(block)?, number(index)?);
            let start = 1 + (0..block).map(|before| layers(before) + 1).sum::<usize>();
            match what {
                "resnets" => format!("input_blocks.{}.0.{}", start + index, resnet(rest)?),
                "attentions" => format!("input_blocks.{}.1.{}", start + index, rest.join(".")),
                _ => {
                    let ["conv", leaf] = rest[..] else { return None };
                    format!("input_blocks.{}.0.op.{leaf}", start + layers(block))
                }
            }
        }
        ["up_blocks", block, what, index, ref rest @ ..] => {
            let (block, index) = (number(block)?, number(index)?);
            let last = |block: usize| layers(blocks - 1 - block);
            let start = (0..block).map(|before| last(before) + 1).sum::<usize>();
            match what {
                "resnets" => format!("output_blocks.{}.0.{}", start + index, resnet(rest)?),
                "attentions" => format!("output_blocks.{}.1.{}", start + index, rest.join(".")),
                _ => {
                    let at = 1 + usize::from(config.attends_up(block));
                    format!("output_blocks.{}.{at}.{}", start + last(block), rest.join("."))
                }
            }
        }
        _ => return None,
    };
    Some(Place::same(name))
}

fn number(text: &str) -> Option<usize> {
    text.parse().ok()
}

/// `linear_1` and `linear_2`, between which there is an activation.
fn linear(layer: &str) -> Option<usize> {
    match layer {
        "linear_1" => Some(0),
        "linear_2" => Some(2),
        _ => None,
    }
}

fn resnet(rest: &[&str]) -> Option<String> {
    let [layer, leaf] = rest[..] else { return None };
    let layer = match layer {
        "norm1" => "in_layers.0",
        "conv1" => "in_layers.2",
        "time_emb_proj" => "emb_layers.1",
        "norm2" => "out_layers.0",
        "conv2" => "out_layers.3",
        "conv_shortcut" => "skip_connection",
        _ => return None,
    };
    Some(format!("{layer}.{leaf}"))
}

/// The place of an autoencoder's tensor, of one with so many levels.
pub(crate) fn autoencoder(levels: usize, name: &str) -> Option<Place> {
    let parts: Vec<&str> = name.split('.').collect();
    let name = match parts[..] {
        ["quant_conv" | "post_quant_conv", _] => name.to_owned(),
        [half @ ("encoder" | "decoder"), ref rest @ ..] => {
            let inner = match rest[..] {
                ["conv_in" | "conv_out", leaf] => format!("{}.{leaf}", rest[0]),
                ["conv_norm_out", leaf] => format!("norm_out.{leaf}"),
                ["mid_block", "resnets", index, ref rest @ ..] => {
                    format!("mid.block_{}.{}", number(index)? + 1, shortcut(rest))
                }
                ["mid_block", "attentions", "0", ref rest @ ..] => {
                    let layer = match rest[..rest.len() - 1] {
                        ["group_norm"] => "norm",
                        ["to_q"] => "q",
                        ["to_k"] => "k",
                        ["to_v"] => "v",
                        ["to_out", "0"] => "proj_out",
                        _ => return None,
                    };
                    format!("mid.attn_1.{layer}.{}", rest[rest.len() - 1])
                }
                ["down_blocks", level, "resnets", index, ref rest @ ..] => {
                    format!("down.{level}.block.{index}.{}", shortcut(rest))
                }
                ["down_blocks", level, "downsamplers", "0", ref rest @ ..] => {
                    format!("down.{level}.downsample.{}", rest.join("."))
                }
                // Counted from the highest resolution.
                ["up_blocks", level, what, index, ref rest @ ..] => {
                    let level = levels.checked_sub(1 + number(level)?)?;
                    match what {
                        "resnets" => format!("up.{level}.block.{index}.{}", shortcut(rest)),
                        _ => format!("up.{level}.upsample.{}", rest.join(".")),
                    }
                }
                _ => return None,
            };
            format!("{half}.{inner}")
        }
        _ => return None,
    };
    Some(Place::same(name))
}

fn shortcut(rest: &[&str]) -> String {
    rest.join(".").replace("conv_shortcut", "nin_shortcut")
}

/// The place of a tensor of a text encoder that is OpenCLIP's.
pub(crate) fn open_clip(name: &str) -> Option<Place> {
    let parts: Vec<&str> = name.split('.').collect();
    let (name, form) = match parts[..] {
        ["embeddings", "token_embedding", "weight"] => ("token_embedding.weight".to_owned(), Form::Same),
        ["embeddings", "position_embedding", "weight"] => ("positional_embedding".to_owned(), Form::Same),
        ["final_layer_norm", leaf] => (format!("ln_final.{leaf}"), Form::Same),
        ["text_projection", "weight"] => ("text_projection".to_owned(), Form::Transposed),
        ["encoder", "layers", index, ref rest @ ..] => {
            let (layer, form) = match rest[..] {
                ["layer_norm1", leaf] => (format!("ln_1.{leaf}"), Form::Same),
                ["layer_norm2", leaf] => (format!("ln_2.{leaf}"), Form::Same),
                ["mlp", "fc1", leaf] => (format!("mlp.c_fc.{leaf}"), Form::Same),
                ["mlp", "fc2", leaf] => (format!("mlp.c_proj.{leaf}"), Form::Same),
                ["self_attn", "out_proj", leaf] => (format!("attn.out_proj.{leaf}"), Form::Same),
                ["self_attn", which, leaf] => {
                    let third = ["q_proj", "k_proj", "v_proj"].iter().position(|name| *name == which)?;
                    (format!("attn.in_proj_{leaf}"), Form::Third(third))
                }
                _ => return None,
            };
            (format!("transformer.resblocks.{index}.{layer}"), form)
        }
        _ => return None,
    };
    Some(Place { name, form })
}

/// The place of a tensor of a text encoder that is OpenAI's CLIP.
pub(crate) fn clip(name: &str) -> Option<Place> {
    Some(Place::same(name.to_owned()))
}

/// The names of a U-Net's layers in the original layout, and those in diffusers'.
pub(crate) fn modules<'a>(
    config: &'a UNetConfig,
    modules: impl Iterator<Item = &'a str> + 'a,
) -> impl Iterator<Item = (String, &'a str)> + 'a {
    modules.filter_map(|module| {
        let place = unet(config, &format!("{module}.weight"))?;
        Some((place.name.strip_suffix(".weight")?.to_owned(), module))
    })
}
