//! Embeds a U-Net's inputs besides the latents as one vector: time, class, and SDXL's pooled text and
//! micro-conditioning.

use tch::{Kind, Tensor};

use super::{
    config::{ClassEmbedding, UNetConfig},
    inputs::UNetInputs,
};
use crate::{
    builder::Scope,
    diffusers::layers::{Embedding, linear},
    layers::Linear,
};

pub(super) struct Embeddings {
    sinusoids: Sinusoids,
    time: TwoLayers,
    class: Option<Class>,
    concatenated: bool,
    text_time: Option<TextTime>,
}

/// Sines and cosines of numbers (1706.03762).
struct Sinusoids {
    width: i64,
    cosines_first: bool,
    frequency_shift: i64,
}

struct TwoLayers {
    first: Linear,
    second: Linear,
}

enum Class {
    Table(Embedding),
    Timestep(TwoLayers),
    Identity,
    Projection(TwoLayers),
    SimpleProjection(Linear),
}

/// SDXL's (2307.01952, section 2.2).
struct TextTime {
    sinusoids: Sinusoids,
    layers: TwoLayers,
}

impl Embeddings {
    pub fn new(scope: &mut Scope, config: &UNetConfig) -> Self {
        let width = config.time_embedding_width();
        let sinusoids = |width| Sinusoids {
            width,
            cosines_first: config.flip_sin_to_cos,
            frequency_shift: config.freq_shift,
        };
        let inputs = config.block_out_channels[0];
        let time = TwoLayers::new(&mut scope.child("time_embedding"), inputs, width);
        let class = config.class_embedding().map(|class| {
            let mut scope = scope.child("class_embedding");
            match class {
                ClassEmbedding::Table(rows) => Class::Table(Embedding::new(scope, rows, width)),
                ClassEmbedding::Timestep => Class::Timestep(TwoLayers::new(&mut scope, inputs, width)),
                ClassEmbedding::Identity => Class::Identity,
                ClassEmbedding::Projection(from) => {
                    Class::Projection(TwoLayers::new(&mut scope, from, width))
                }
                ClassEmbedding::SimpleProjection(from) => {
                    Class::SimpleProjection(linear(scope, from, width, true))
                }
            }
        });
        let text_time = config.takes_text_time().then(|| TextTime {
            sinusoids: sinusoids(config.addition_time_embed_dim.unwrap_or(0)),
            layers: TwoLayers::new(
                &mut scope.child("add_embedding"),
                config.projection_class_embeddings_input_dim.unwrap_or(0),
                width,
            ),
        });
        let concatenated = config.class_embeddings_concat;
        Self { sinusoids: sinusoids(inputs), time, class, concatenated, text_time }
    }

    /// [N, width], twice as wide where the class embedding is concatenated to the time embedding.
    pub fn forward(&self, samples: i64, inputs: &UNetInputs) -> Tensor {
        let time = number(inputs.time, inputs.states).view([-1]).expand([samples], false);
        let mut embedding = self.time.forward(&self.sinusoids.forward(&time));
        if let Some(class) = &self.class {
            let labels = inputs.class_labels.expect("a class-conditional network needs class labels");
            let class = match class {
                Class::Table(table) => table.forward(&labels.to_kind(Kind::Int64)),
                Class::Timestep(layers) => {
                    layers.forward(&self.sinusoids.forward(&number(labels, inputs.states)))
                }
                Class::Identity => labels.shallow_clone(),
                Class::Projection(layers) => layers.forward(labels),
                Class::SimpleProjection(layer) => layer.forward(labels),
            };
            embedding = match self.concatenated {
                true => Tensor::cat(&[embedding, class], -1),
                false => embedding + class,
            };
        }
        if let Some(text_time) = &self.text_time {
            let (pooled, numbers) = inputs.text_time.expect("SDXL's network needs pooled text and sizes");
            let numbers = text_time.sinusoids.forward(&number(numbers, pooled).flatten(0, -1));
            let numbers = numbers.view([samples, -1]);
            let both = Tensor::cat(&[pooled.to_kind(Kind::Float), numbers], -1);
            embedding += text_time.layers.forward(&both);
        }
        embedding
    }
}

impl Sinusoids {
    /// `x` fp32 `[N]` → [N, width].
    fn forward(&self, x: &Tensor) -> Tensor {
        let half = self.width / 2;
        let exponents = Tensor::arange(half, (Kind::Float, x.device()))
            * (-(10_000f64.ln()) / (half - self.frequency_shift) as f64);
        let angles = x.unsqueeze(1) * exponents.exp().unsqueeze(0);
        let (sines, cosines) = (angles.sin(), angles.cos());
        let both = if self.cosines_first { [cosines, sines] } else { [sines, cosines] };
        let embedded = Tensor::cat(&both, 1);
        if self.width % 2 == 1 { embedded.constant_pad_nd([0, 1]) } else { embedded }
    }
}

impl TwoLayers {
    fn new(scope: &mut Scope, inputs: i64, width: i64) -> Self {
        Self {
            first: linear(scope.child("linear_1"), inputs, width, true),
            second: linear(scope.child("linear_2"), width, width, true),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        self.second.forward(&self.first.forward(&x.to_kind(self.first.kind())).silu())
    }
}

/// A tensor in fp32 on the device of `like`.
fn number(x: &Tensor, like: &Tensor) -> Tensor {
    x.to_device(like.device()).to_kind(Kind::Float)
}
