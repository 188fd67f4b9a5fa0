//! diffusers' `UNet2DConditionModel`: the U-Net of Stable Diffusion 1.x, 2.x and SDXL, with the same parameter names.

mod activations;
pub(crate) mod config;
mod embeddings;
mod inputs;
mod transformer;

use tch::Tensor;

pub use self::{
    activations::{Kept, Pass},
    config::{SampleSize, TransformerLayers, UNetConfig},
    inputs::UNetInputs,
};
use self::{
    embeddings::Embeddings,
    transformer::{Transformer, TransformerShape},
};
use super::{
    layers::{Conv2d, GroupNorm, enlarge},
    resnet::{Resnet, ResnetShape},
};
use crate::{
    builder::Scope,
    recomputed::{AnyBlock, Recomputed},
};

/// The layers of the network.
pub(crate) struct UNet {
    embeddings: Embeddings,
    conv_in: Conv2d,
    down: Vec<DownBlock>,
    middle: Option<Middle>,
    up: Vec<UpBlock>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
    center_input: bool,
}

struct DownBlock {
    resnets: Vec<Recomputed<Resnet>>,
    transformers: Vec<Recomputed<Transformer>>,
    downsampler: Option<Downsampler>,
}

struct UpBlock {
    resnets: Vec<Recomputed<Resnet>>,
    transformers: Vec<Recomputed<Transformer>>,
    upsampler: Option<Conv2d>,
}

struct Middle {
    first: Recomputed<Resnet>,
    attending: Option<(Recomputed<Transformer>, Recomputed<Resnet>)>,
}

/// Halves height and width.
struct Downsampler {
    conv: Conv2d,
    padding: i64,
}

/// The outputs of the down blocks, which the up blocks take.
struct Encoded {
    bottleneck: Tensor,
    skips: Vec<Tensor>,
}

/// The inputs of every block.
struct Context<'a> {
    /// After its activation.
    embedding: Tensor,
    states: &'a Tensor,
    recompute: bool,
}

impl UNet {
    pub fn new(scope: &mut Scope, config: &UNetConfig) -> Self {
        let channels = &config.block_out_channels;
        let last = channels.len() - 1;
        let (groups, eps) = (config.groups(), config.norm_eps);
        let embedding_width = match config.class_embeddings_concat && config.class_embedding().is_some() {
            true => 2 * config.time_embedding_width(),
            false => config.time_embedding_width(),
        };
        let resnet = |inputs, outputs, scale_factor| ResnetShape {
            inputs,
            outputs,
            embedding: embedding_width,
            groups,
            eps,
            scale_shift: config.resnet_time_scale_shift == "scale_shift",
            scale_factor,
        };
        // Up blocks are counted from the lowest resolution in the file, from the highest here.
        let transformer = |level: usize, layers: i64, only_cross: bool| TransformerShape {
            channels: channels[level],
            heads: config.attention_head_dim.at(level),
            layers,
            text_width: config.cross_attention_dim.at(level),
            groups,
            linear: config.use_linear_projection,
            only_cross,
        };

        let conv_in = Conv2d::same(scope.child("conv_in"), config.in_channels, channels[0], 3);
        let embeddings = Embeddings::new(scope, config);
        let mut skips = vec![channels[0]];
        let mut inputs = channels[0];
        let mut down = Vec::new();
        for (level, outputs) in channels.iter().copied().enumerate() {
            let mut scope = scope.child(format!("down_blocks.{level}"));
            let (mut resnets, mut transformers) = (Vec::new(), Vec::new());
            for index in 0..config.layers_per_block.at(level) as usize {
                let shape = resnet(inputs, outputs, 1.0);
                resnets.push(residual(scope.child(format!("resnets.{index}")), shape));
                if config.attends_down(level) {
                    let layers = config.layers_down(level, index);
                    let shape = transformer(level, layers, config.only_cross_attention.at(level));
                    transformers.push(attending(scope.child(format!("attentions.{index}")), shape));
                }
                inputs = outputs;
                skips.push(outputs);
            }
            let downsampler = (level < last).then(|| {
                skips.push(outputs);
                let padding = config.downsample_padding;
                Downsampler {
                    conv: Conv2d::new(scope.child("downsamplers.0.conv"), outputs, outputs, 3, 2, padding),
                    padding,
                }
            });
            down.push(DownBlock { resnets, transformers, downsampler });
        }

        let middle = config.mid_block_type.as_ref().map(|_| {
            let mut scope = scope.child("mid_block");
            let shape = resnet(inputs, inputs, config.mid_block_scale_factor);
            Middle {
                first: residual(scope.child("resnets.0"), shape),
                attending: config.layers_middle().map(|layers| {
                    let shapes = transformer(last, layers, false);
                    let transformer = attending(scope.child("attentions.0"), shapes);
                    (transformer, residual(scope.child("resnets.1"), shape))
                }),
            }
        });

        let mut up = Vec::new();
        for (place, level) in (0..=last).rev().enumerate() {
            let mut scope = scope.child(format!("up_blocks.{place}"));
            let outputs = channels[level];
            let (mut resnets, mut transformers) = (Vec::new(), Vec::new());
            for index in 0..=config.layers_per_block.at(level) as usize {
                let shape = resnet(inputs + skips.pop().unwrap_or(0), outputs, 1.0);
                resnets.push(residual(scope.child(format!("resnets.{index}")), shape));
                if config.attends_up(place) {
                    let layers = config.layers_up(place, index);
                    let shape = transformer(level, layers, config.only_cross_attention.at(level));
                    transformers.push(attending(scope.child(format!("attentions.{index}")), shape));
                }
                inputs = outputs;
            }
            let upsampler =
                (level > 0).then(|| Conv2d::same(scope.child("upsamplers.0.conv"), outputs, outputs, 3));
            up.push(UpBlock { resnets, transformers, upsampler });
        }
        Self {
            embeddings,
            conv_in,
            down,
            middle,
            up,
            norm_out: GroupNorm::new(scope.child("conv_norm_out"), groups, channels[0], eps),
            conv_out: Conv2d::same(scope.child("conv_out"), channels[0], config.out_channels, 3),
            center_input: config.center_input_sample,
        }
    }

    /// Its blocks, in the order of the forward pass.
    pub fn blocks(&self) -> Vec<&dyn AnyBlock> {
        let mut blocks: Vec<&dyn AnyBlock> = Vec::new();
        for DownBlock { resnets, transformers, .. } in &self.down {
            in_turn(&mut blocks, resnets, transformers);
        }
        if let Some(Middle { first, attending }) = &self.middle {
            blocks.push(first);
            if let Some((transformer, last)) = attending {
                blocks.extend([transformer as &dyn AnyBlock, last]);
            }
        }
        for UpBlock { resnets, transformers, .. } in &self.up {
            in_turn(&mut blocks, resnets, transformers);
        }
        blocks
    }

    /// The native prediction [N, C, H, W] for `x` of that shape, and the bottleneck: the output of the middle block.
    pub fn forward(&self, x: &Tensor, inputs: &UNetInputs) -> (Tensor, Tensor) {
        let context = self.context(x, inputs);
        let encoded = self.encode(x, &context);
        let bottleneck = encoded.bottleneck.shallow_clone();
        (self.decode(encoded, &context), bottleneck)
    }

    /// The bottleneck alone.
    pub fn bottleneck(&self, x: &Tensor, inputs: &UNetInputs) -> Tensor {
        self.encode(x, &self.context(x, inputs)).bottleneck
    }

    fn context<'a>(&self, x: &Tensor, inputs: &UNetInputs<'a>) -> Context<'a> {
        let embedding = self.embeddings.forward(x.size()[0], inputs).silu();
        Context { embedding, states: inputs.states, recompute: inputs.recompute }
    }

    fn encode(&self, x: &Tensor, context: &Context) -> Encoded {
        let x = if self.center_input { x * 2.0 - 1.0 } else { x.shallow_clone() };
        let mut x = self.conv_in.forward(&x);
        let mut skips = vec![x.shallow_clone()];
        for block in &self.down {
            for (index, resnet) in block.resnets.iter().enumerate() {
                x = context.step(&x, resnet, block.transformers.get(index));
                skips.push(x.shallow_clone());
            }
            if let Some(downsampler) = &block.downsampler {
                x = downsampler.forward(&x);
                skips.push(x.shallow_clone());
            }
        }
        if let Some(middle) = &self.middle {
            x = context.step(
                &x,
                &middle.first,
                middle.attending.as_ref().map(|(transformer, _)| transformer),
            );
            if let Some((_, last)) = &middle.attending {
                x = context.step(&x, last, None);
            }
        }
        Encoded { bottleneck: x, skips }
    }

    fn decode(&self, encoded: Encoded, context: &Context) -> Tensor {
        let Encoded { bottleneck: mut x, mut skips } = encoded;
        for block in &self.up {
            for (index, resnet) in block.resnets.iter().enumerate() {
                let skip = skips.pop();
                let merged = Tensor::cat(&[Some(x), skip].into_iter().flatten().collect::<Vec<_>>(), 1);
                x = context.step(&merged, resnet, block.transformers.get(index));
            }
            if let Some(conv) = &block.upsampler {
                // To the size of the next skip connection: halving odd sizes rounds up.
                let size = skips.last().map_or_else(|| x.size(), Tensor::size);
                x = conv.forward(&enlarge(&x, [size[2], size[3]]));
            }
        }
        self.conv_out.forward(&self.norm_out.forward(&x).silu())
    }
}

impl Context<'_> {
    fn step(
        &self,
        x: &Tensor,
        resnet: &Recomputed<Resnet>,
        transformer: Option<&Recomputed<Transformer>>,
    ) -> Tensor {
        let x = resnet.forward(&[x, &self.embedding], self.recompute);
        match transformer {
            Some(transformer) => transformer.forward(&[&x, self.states], self.recompute),
            None => x,
        }
    }
}

impl Downsampler {
    fn forward(&self, x: &Tensor) -> Tensor {
        match self.padding {
            // Zeros on the right and at the bottom only.
            0 => self.conv.forward(&x.constant_pad_nd([0, 1, 0, 1])),
            _ => self.conv.forward(x),
        }
    }
}

/// Adds the blocks of one level: each residual block is followed by its transformer, if there is one.
fn in_turn<'a>(
    blocks: &mut Vec<&'a dyn AnyBlock>,
    resnets: &'a [Recomputed<Resnet>],
    transformers: &'a [Recomputed<Transformer>],
) {
    for (index, resnet) in resnets.iter().enumerate() {
        blocks.push(resnet);
        blocks.extend(transformers.get(index).map(|transformer| transformer as &dyn AnyBlock));
    }
}

fn residual(scope: Scope, shape: ResnetShape) -> Recomputed<Resnet> {
    Recomputed::new(scope, |scope| Resnet::new(scope, shape))
}

fn attending(scope: Scope, shape: TransformerShape) -> Recomputed<Transformer> {
    Recomputed::new(scope, |scope| Transformer::new(scope, shape))
}
