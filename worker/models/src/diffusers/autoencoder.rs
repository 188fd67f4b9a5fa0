//! diffusers' `AutoencoderKL`: images ↔ latents (2112.10752).

use potstill_torch_ext::Block;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::{
    config::{self, ConfigError, Rest},
    layers::{Conv2d, GroupNorm, attention, enlarge, linear},
    resnet::{Resnet, ResnetShape},
};
use crate::{
    builder::{Binding, Declaration, Scope},
    layers::Linear,
    parameters::Parameters,
    weights::{self, LoadError, Named, Surplus},
};

/// Architecture, under the keys of `vae/config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AutoencoderConfig {
    /// Channels of an image.
    pub in_channels: i64,
    /// Channels of a decoded image.
    pub out_channels: i64,
    /// `DownEncoderBlock2D` for each level.
    pub down_block_types: Vec<String>,
    /// `UpDecoderBlock2D` for each level.
    pub up_block_types: Vec<String>,
    /// Channels, from the highest resolution to the lowest.
    pub block_out_channels: Vec<i64>,
    /// Residual blocks in each level of the encoder; the decoder has one more.
    pub layers_per_block: i64,
    /// `silu`.
    pub act_fn: String,
    /// Channels of a latent.
    pub latent_channels: i64,
    /// Groups of each normalization.
    pub norm_num_groups: i64,
    /// Height and width of the images that it was trained on, and of tiles.
    pub sample_size: i64,
    /// The factor of latents for the U-Net: 0.18215 for SD, 0.13025 for SDXL.
    pub scaling_factor: f64,
    /// The offset that is subtracted from latents before.
    pub shift_factor: Option<f64>,
    /// Whether half precision overflows in it, as in SDXL's: it then computes in fp32.
    pub force_upcast: bool,
    /// Whether there is a convolution after the encoder.
    pub use_quant_conv: bool,
    /// Whether there is a convolution before the decoder.
    pub use_post_quant_conv: bool,
    /// Whether the middle block has attention.
    pub mid_block_add_attention: bool,
    #[serde(flatten)]
    rest: Rest,
}

impl Default for AutoencoderConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec![DOWN.to_owned()],
            up_block_types: vec![UP.to_owned()],
            block_out_channels: vec![64],
            layers_per_block: 1,
            act_fn: "silu".to_owned(),
            latent_channels: 4,
            norm_num_groups: 32,
            sample_size: 32,
            scaling_factor: 0.18215,
            shift_factor: None,
            force_upcast: true,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
            rest: Rest::new(),
        }
    }
}

/// The class in diffusers.
pub(crate) const CLASS: &str = "AutoencoderKL";
const DOWN: &str = "DownEncoderBlock2D";
const UP: &str = "UpDecoderBlock2D";
const EPS: f64 = 1e-6;
/// Share of a tile that overlaps the next one, as in diffusers.
const OVERLAP: f64 = 0.25;

impl AutoencoderConfig {
    /// Reads `config.json`.
    ///
    /// [`ConfigError`]: names the keys that are not supported.
    /// [`ConfigError`]: what is not supported, by its key.
    pub fn parse(json: &str) -> Result<Self, ConfigError> {
        let config: Self = config::parse(json, CLASS, |config: &Self| &config.rest, &[])?;
        let levels = config.block_out_channels.len();
        let all = |types: &[String], name: &str| types.len() == levels && types.iter().all(|t| t == name);
        let mut problems = Vec::new();
        for (holds, problem) in [
            (levels > 0, "`block_out_channels` is empty".to_owned()),
            (
                all(&config.down_block_types, DOWN),
                format!("`down_block_types` must be {levels} times {DOWN}"),
            ),
            (all(&config.up_block_types, UP), format!("`up_block_types` must be {levels} times {UP}")),
            (
                ["silu", "swish"].contains(&config.act_fn.as_str()),
                format!("`act_fn` is {:?}; supported: silu", config.act_fn),
            ),
            (
                config.scaling_factor.is_finite() && config.scaling_factor > 0.0,
                "`scaling_factor` must be > 0".to_owned(),
            ),
        ] {
            if !holds {
                problems.push(problem);
            }
        }
        if problems.is_empty() { Ok(config) } else { Err(ConfigError::Problems { problems }) }
    }

    /// Number of parameters of such an autoencoder.
    ///
    /// # Errors
    /// The configuration is not that of a valid network.
    pub fn size(&self) -> Result<i64, ConfigError> {
        Ok(self.declare()?.numel())
    }

    /// Names and shapes of the tensors of such an autoencoder.
    ///
    /// # Errors
    /// The configuration is not that of a valid network.
    pub(crate) fn tensors(&self) -> Result<Vec<(String, Vec<i64>)>, ConfigError> {
        Ok(self.declare()?.named_shapes())
    }

    /// Pixels along one side of an element of the latent.
    #[must_use]
    pub fn downscale(&self) -> i64 {
        1 << (self.block_out_channels.len() - 1)
    }

    /// Channels, height and width of an image whose latent has this height and width.
    #[must_use]
    pub fn image_shape(&self, [height, width]: [i64; 2]) -> [i64; 3] {
        [self.out_channels, height * self.downscale(), width * self.downscale()]
    }

    fn declare(&self) -> Result<Declaration, ConfigError> {
        let mut declaration = Declaration::default();
        Network::new(&mut Scope::root(&mut declaration), self);
        match declaration.problems() {
            [] => Ok(declaration),
            problems => Err(ConfigError::Problems { problems: problems.to_vec() }),
        }
    }
}

/// Images ↔ latents, always in fp32; its weights take no gradient.
pub struct Autoencoder {
    config: AutoencoderConfig,
    parameters: Parameters,
    network: Network,
}

struct Network {
    encoder: Encoder,
    quant_conv: Option<Conv2d>,
    decoder: Decoder,
    post_quant_conv: Option<Conv2d>,
}

struct Encoder {
    conv_in: Conv2d,
    levels: Vec<(Vec<Resnet>, Option<Conv2d>)>,
    middle: Middle,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

struct Decoder {
    conv_in: Conv2d,
    middle: Middle,
    levels: Vec<(Vec<Resnet>, Option<Conv2d>)>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

struct Middle {
    first: Resnet,
    attention: Option<Attention>,
    last: Resnet,
}

/// One head over all positions.
struct Attention {
    norm: GroupNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
}

impl Autoencoder {
    /// An autoencoder from named tensors, which must be exactly those of the configuration. The names of attention's
    /// projections in files from before 2023 are accepted.
    ///
    /// # Errors
    /// [`LoadError`], with one line for each tensor that does not fit.
    pub fn from_tensors(
        config: AutoencoderConfig,
        tensors: Named,
        device: Device,
    ) -> Result<Self, LoadError> {
        let parameters = weights::assemble(
            config.declare()?,
            &present(tensors),
            Surplus::PassedOver,
            (Kind::Float, device),
        )?;
        let parameters = parameters.over(parameters.flat().shallow_clone(), false);
        let network = Network::new(&mut Scope::root(&mut Binding::new(&parameters)), &config);
        Ok(Self { config, parameters, network })
    }

    /// The architecture.
    #[must_use]
    pub fn config(&self) -> &AutoencoderConfig {
        &self.config
    }

    /// Its device.
    #[must_use]
    pub fn device(&self) -> Device {
        self.parameters.flat().device()
    }

    /// Number of parameters.
    #[must_use]
    pub fn size(&self) -> i64 {
        self.parameters.flat().numel() as i64
    }

    /// The latents of images fp32 [N, C, H, W] in [−1, 1], scaled for the U-Net: a draw from the encoder's Gaussian
    /// with the given `noise`, or its mean without.
    ///
    /// # Panics
    /// When the images' sides are not multiples of [`AutoencoderConfig::downscale`].
    pub fn encode(&self, images: &Tensor, noise: Option<&Tensor>) -> Tensor {
        let (mean, log_variance) = self.moments(images);
        match noise {
            Some(noise) => self.draw(&mean, &log_variance, noise),
            None => self.scaled(&mean),
        }
    }

    /// Scaled latents from the Gaussian of these [moments](Self::moments), by standard normal `noise`.
    pub fn draw(&self, mean: &Tensor, log_variance: &Tensor, noise: &Tensor) -> Tensor {
        self.scaled(&(mean + (log_variance * 0.5).exp() * noise))
    }

    fn scaled(&self, latents: &Tensor) -> Tensor {
        (latents - self.config.shift_factor.unwrap_or(0.0)) * self.config.scaling_factor
    }

    /// Mean and log variance of the encoder's Gaussian, each [N, channels, h, w], not scaled. Log variances are kept within
    /// [−30, 20], as the official code does.
    pub fn moments(&self, images: &Tensor) -> (Tensor, Tensor) {
        let x = self.network.encoder.forward(&images.to_kind(Kind::Float));
        let x = match &self.network.quant_conv {
            Some(conv) => conv.forward(&x),
            None => x,
        };
        let halves = x.chunk(2, 1);
        (halves[0].shallow_clone(), halves[1].clamp(-30.0, 20.0))
    }

    /// The images of scaled latents fp32 [N, C, h, w], approximately within [−1, 1].
    pub fn decode(&self, latents: &Tensor) -> Tensor {
        self.decode_unscaled(&self.unscaled(latents))
    }

    /// [`decode`](Self::decode) tile by tile, with blended seams: memory depends on `sample_size`, not on the image.
    /// Latents not larger than a tile are decoded at once.
    pub fn decode_tiled(&self, latents: &Tensor) -> Tensor {
        self.decode_unscaled_tiled(&self.unscaled(latents))
    }

    fn unscaled(&self, latents: &Tensor) -> Tensor {
        latents.to_kind(Kind::Float) / self.config.scaling_factor + self.config.shift_factor.unwrap_or(0.0)
    }

    fn decode_unscaled(&self, latents: &Tensor) -> Tensor {
        let latents = match &self.network.post_quant_conv {
            Some(conv) => conv.forward(latents),
            None => latents.shallow_clone(),
        };
        self.network.decoder.forward(&latents)
    }

    fn decode_unscaled_tiled(&self, latents: &Tensor) -> Tensor {
        let (pixels, tile) = (self.config.sample_size, self.config.sample_size / self.config.downscale());
        let [_, _, height, width] = latents.size()[..] else { unreachable!("latents are [N, C, h, w]") };
        if tile < 1 || (height <= tile && width <= tile) {
            return self.decode_unscaled(latents);
        }
        let stride = ((tile as f64 * (1.0 - OVERLAP)) as i64).max(1);
        let seam = (pixels as f64 * OVERLAP) as i64;
        let kept = pixels - seam;
        let part = |x: &Tensor, dimension, start: i64, length: i64, whole: i64| {
            x.narrow(dimension, start, length.min(whole - start))
        };
        let mut above: Vec<Tensor> = Vec::new();
        let mut rows = Vec::new();
        for top in (0..height).step_by(stride as usize) {
            let mut tiles: Vec<Tensor> = Vec::new();
            let mut row = Vec::new();
            for (column, left) in (0..width).step_by(stride as usize).enumerate() {
                let piece = part(&part(latents, 2, top, tile, height), 3, left, tile, width);
                let mut image = self.decode_unscaled(&piece);
                if let Some(above) = above.get(column) {
                    image = blended(above, &image, 2, seam);
                }
                if let Some(left) = tiles.last() {
                    image = blended(left, &image, 3, seam);
                }
                let size = image.size();
                row.push(image.narrow(2, 0, kept.min(size[2])).narrow(3, 0, kept.min(size[3])));
                tiles.push(image);
            }
            above = tiles;
            rows.push(Tensor::cat(&row, 3));
        }
        Tensor::cat(&rows, 2)
    }
}

/// `after` with its first rows or columns fading in from the last of `before`.
fn blended(before: &Tensor, after: &Tensor, dimension: i64, extent: i64) -> Tensor {
    let length = |x: &Tensor| x.size()[dimension as usize];
    let extent = extent.min(length(before)).min(length(after));
    if extent == 0 {
        return after.shallow_clone();
    }
    let mut shape = [1; 4];
    shape[dimension as usize] = extent;
    let share = (Tensor::arange(extent, (Kind::Float, after.device())) / extent as f64).view(shape);
    let old = before.narrow(dimension, length(before) - extent, extent);
    let new = after.narrow(dimension, 0, extent);
    let seam = old * (1.0 - &share) + new * share;
    let rest = after.narrow(dimension, extent, length(after) - extent);
    Tensor::cat(&[seam, rest], dimension)
}

/// Tensors of a file under the names of present files.
pub(crate) fn present(tensors: Named) -> Named {
    tensors.into_iter().map(|(name, tensor)| (present_name(&name), tensor)).collect()
}

/// Attention's projections had other names until 2023, which most public files still have.
fn present_name(name: &str) -> String {
    let Some((before, last)) = name.split_once("attentions.0.") else { return name.to_owned() };
    let present = [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")];
    match present.iter().find(|(old, _)| last.split('.').next() == Some(old)) {
        Some((old, new)) => format!("{before}attentions.0.{new}{}", &last[old.len()..]),
        None => name.to_owned(),
    }
}

impl Network {
    fn new(scope: &mut Scope, config: &AutoencoderConfig) -> Self {
        let latent = config.latent_channels;
        Self {
            encoder: Encoder::new(&mut scope.child("encoder"), config),
            decoder: Decoder::new(&mut scope.child("decoder"), config),
            quant_conv: config
                .use_quant_conv
                .then(|| Conv2d::same(scope.child("quant_conv"), 2 * latent, 2 * latent, 1)),
            post_quant_conv: config
                .use_post_quant_conv
                .then(|| Conv2d::same(scope.child("post_quant_conv"), latent, latent, 1)),
        }
    }
}

fn resnet(scope: &mut Scope, config: &AutoencoderConfig, inputs: i64, outputs: i64) -> Resnet {
    let shape = ResnetShape {
        inputs,
        outputs,
        embedding: 0,
        groups: config.norm_num_groups,
        eps: EPS,
        scale_shift: false,
        scale_factor: 1.0,
    };
    Resnet::new(scope, shape)
}

fn run(resnets: &[Resnet], mut x: Tensor) -> Tensor {
    for resnet in resnets {
        x = resnet.forward(&[x]);
    }
    x
}

impl Encoder {
    fn new(scope: &mut Scope, config: &AutoencoderConfig) -> Self {
        let channels = &config.block_out_channels;
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let conv_in = Conv2d::same(scope.child("conv_in"), config.in_channels, first, 3);
        let mut inputs = first;
        let mut levels = Vec::new();
        for (level, outputs) in channels.iter().copied().enumerate() {
            let mut scope = scope.child(format!("down_blocks.{level}"));
            let resnets = (0..config.layers_per_block)
                .map(|index| {
                    let from = std::mem::replace(&mut inputs, outputs);
                    resnet(&mut scope.child(format!("resnets.{index}")), config, from, outputs)
                })
                .collect();
            let halve = (level + 1 < channels.len())
                .then(|| Conv2d::new(scope.child("downsamplers.0.conv"), outputs, outputs, 3, 2, 0));
            levels.push((resnets, halve));
        }
        let outputs = 2 * config.latent_channels;
        Self {
            conv_in,
            levels,
            middle: Middle::new(&mut scope.child("mid_block"), config),
            norm_out: GroupNorm::new(scope.child("conv_norm_out"), config.norm_num_groups, last, EPS),
            conv_out: Conv2d::same(scope.child("conv_out"), last, outputs, 3),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let mut x = self.conv_in.forward(x);
        for (resnets, halve) in &self.levels {
            x = run(resnets, x);
            if let Some(conv) = halve {
                x = conv.forward(&x.constant_pad_nd([0, 1, 0, 1]));
            }
        }
        x = self.middle.forward(&x);
        self.conv_out.forward(&self.norm_out.forward(&x).silu())
    }
}

impl Decoder {
    fn new(scope: &mut Scope, config: &AutoencoderConfig) -> Self {
        let channels = &config.block_out_channels;
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let conv_in = Conv2d::same(scope.child("conv_in"), config.latent_channels, last, 3);
        let middle = Middle::new(&mut scope.child("mid_block"), config);
        let mut inputs = last;
        let mut levels = Vec::new();
        for (place, (level, outputs)) in channels.iter().copied().enumerate().rev().enumerate() {
            let mut scope = scope.child(format!("up_blocks.{place}"));
            let resnets = (0..=config.layers_per_block)
                .map(|index| {
                    let from = std::mem::replace(&mut inputs, outputs);
                    resnet(&mut scope.child(format!("resnets.{index}")), config, from, outputs)
                })
                .collect();
            let double =
                (level > 0).then(|| Conv2d::same(scope.child("upsamplers.0.conv"), outputs, outputs, 3));
            levels.push((resnets, double));
        }
        Self {
            conv_in,
            middle,
            levels,
            norm_out: GroupNorm::new(scope.child("conv_norm_out"), config.norm_num_groups, first, EPS),
            conv_out: Conv2d::same(scope.child("conv_out"), first, config.out_channels, 3),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let mut x = self.middle.forward(&self.conv_in.forward(x));
        for (resnets, double) in &self.levels {
            x = run(resnets, x);
            if let Some(conv) = double {
                let size = x.size();
                x = conv.forward(&enlarge(&x, [2 * size[2], 2 * size[3]]));
            }
        }
        self.conv_out.forward(&self.norm_out.forward(&x).silu())
    }
}

impl Middle {
    fn new(scope: &mut Scope, config: &AutoencoderConfig) -> Self {
        let channels = config.block_out_channels[config.block_out_channels.len() - 1];
        Self {
            first: resnet(&mut scope.child("resnets.0"), config, channels, channels),
            attention: config.mid_block_add_attention.then(|| {
                let mut scope = scope.child("attentions.0");
                let project =
                    |scope: &mut Scope, name: &str| linear(scope.child(name), channels, channels, true);
                Attention {
                    norm: GroupNorm::new(scope.child("group_norm"), config.norm_num_groups, channels, EPS),
                    query: project(&mut scope, "to_q"),
                    key: project(&mut scope, "to_k"),
                    value: project(&mut scope, "to_v"),
                    out: project(&mut scope, "to_out.0"),
                }
            }),
            last: resnet(&mut scope.child("resnets.1"), config, channels, channels),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let mut x = self.first.forward(&[x.shallow_clone()]);
        if let Some(attention) = &self.attention {
            x = attention.forward(&x);
        }
        self.last.forward(&[x])
    }
}

impl Attention {
    fn forward(&self, x: &Tensor) -> Tensor {
        let sequence = self.norm.forward(x).flatten(2, 3).transpose(1, 2);
        let [query, key, value] = [&self.query, &self.key, &self.value].map(|layer| layer.forward(&sequence));
        let attended = self.out.forward(&attention(&query, &key, &value, 1, false));
        attended.transpose(1, 2).reshape_as(x) + x
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_names_become_present_ones() {
        for (old, new) in [
            ("decoder.mid_block.attentions.0.query.weight", "decoder.mid_block.attentions.0.to_q.weight"),
            ("encoder.mid_block.attentions.0.proj_attn.bias", "encoder.mid_block.attentions.0.to_out.0.bias"),
            ("encoder.mid_block.attentions.0.to_k.bias", "encoder.mid_block.attentions.0.to_k.bias"),
            (
                "encoder.mid_block.attentions.0.group_norm.bias",
                "encoder.mid_block.attentions.0.group_norm.bias",
            ),
            ("decoder.conv_in.weight", "decoder.conv_in.weight"),
        ] {
            assert_eq!(present_name(old), new);
        }
    }
}
