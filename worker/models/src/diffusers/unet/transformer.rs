//! Attention over an image's positions and to the text.

use potstill_torch_ext::Block;
use tch::Tensor;

use crate::{
    builder::Scope,
    diffusers::layers::{Conv2d, GroupNorm, LayerNorm, attention, linear},
    layers::Linear,
};

/// The hyperparameters of a [`Transformer`].
#[derive(Clone, Copy)]
pub(super) struct TransformerShape {
    pub channels: i64,
    pub heads: i64,
    pub layers: i64,
    pub text_width: i64,
    pub groups: i64,
    /// Linear layers around the blocks instead of 1×1 convolutions.
    pub linear: bool,
    /// The first attention of each block also attends to the text.
    pub only_cross: bool,
}

/// diffusers' `Transformer2DModel`: positions become a sequence, which goes through transformer blocks; the input is
/// added to the result.
pub(super) struct Transformer {
    norm: GroupNorm,
    project_in: Projection,
    layers: Vec<Layer>,
    project_out: Projection,
}

enum Projection {
    Linear(Linear),
    Convolution(Conv2d),
}

struct Layer {
    norm1: LayerNorm,
    attention1: Attention,
    norm2: LayerNorm,
    attention2: Attention,
    norm3: LayerNorm,
    gate: Linear,
    out: Linear,
    only_cross: bool,
}

struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    heads: i64,
}

impl Transformer {
    pub fn new(scope: &mut Scope, shape: TransformerShape) -> Self {
        let channels = shape.channels;
        if shape.heads < 1 || channels % shape.heads != 0 {
            scope.problem(format!("{channels} channels do not split into {} heads", shape.heads));
        }
        let projection = |scope: Scope| match shape.linear {
            true => Projection::Linear(linear(scope, channels, channels, true)),
            false => Projection::Convolution(Conv2d::same(scope, channels, channels, 1)),
        };
        Self {
            norm: GroupNorm::new(scope.child("norm"), shape.groups, channels, 1e-6),
            project_in: projection(scope.child("proj_in")),
            layers: (0..shape.layers)
                .map(|index| Layer::new(&mut scope.child(format!("transformer_blocks.{index}")), shape))
                .collect(),
            project_out: projection(scope.child("proj_out")),
        }
    }
}

impl Block for Transformer {
    /// `[x [N, C, H, W], states [N, T, D]]`.
    fn forward(&self, inputs: &[Tensor]) -> Tensor {
        let [x, states] = inputs else { unreachable!("called with an image and a text") };
        let [samples, channels, height, width] = x.size()[..] else { unreachable!("an image") };
        let sequence = |x: &Tensor| x.flatten(2, 3).transpose(1, 2);
        let image = |x: &Tensor| x.transpose(1, 2).reshape([samples, channels, height, width]);
        let normed = self.norm.forward(x);
        let mut h = match &self.project_in {
            Projection::Linear(layer) => layer.forward(&sequence(&normed)),
            Projection::Convolution(layer) => sequence(&layer.forward(&normed)),
        };
        for layer in &self.layers {
            h = layer.forward(&h, states);
        }
        let out = match &self.project_out {
            Projection::Linear(layer) => image(&layer.forward(&h)),
            Projection::Convolution(layer) => layer.forward(&image(&h)),
        };
        out + x
    }
}

impl Layer {
    fn new(scope: &mut Scope, shape: TransformerShape) -> Self {
        let channels = shape.channels;
        let norm = |scope: Scope| LayerNorm::new(scope, channels, 1e-5);
        let first = if shape.only_cross { shape.text_width } else { channels };
        Self {
            norm1: norm(scope.child("norm1")),
            attention1: Attention::new(&mut scope.child("attn1"), shape, first),
            norm2: norm(scope.child("norm2")),
            attention2: Attention::new(&mut scope.child("attn2"), shape, shape.text_width),
            norm3: norm(scope.child("norm3")),
            gate: linear(scope.child("ff.net.0.proj"), channels, 8 * channels, true),
            out: linear(scope.child("ff.net.2"), 4 * channels, channels, true),
            only_cross: shape.only_cross,
        }
    }

    fn forward(&self, x: &Tensor, states: &Tensor) -> Tensor {
        let normed = self.norm1.forward(x);
        let context = if self.only_cross { states } else { &normed };
        let x = self.attention1.forward(&normed, context) + x;
        let x = self.attention2.forward(&self.norm2.forward(&x), states) + x;
        // GEGLU (2002.05202).
        let halves = self.gate.forward(&self.norm3.forward(&x)).chunk(2, -1);
        self.out.forward(&(&halves[0] * halves[1].gelu("none"))) + x
    }
}

impl Attention {
    fn new(scope: &mut Scope, shape: TransformerShape, context: i64) -> Self {
        let channels = shape.channels;
        Self {
            query: linear(scope.child("to_q"), channels, channels, false),
            key: linear(scope.child("to_k"), context, channels, false),
            value: linear(scope.child("to_v"), context, channels, false),
            out: linear(scope.child("to_out.0"), channels, channels, true),
            heads: shape.heads,
        }
    }

    fn forward(&self, x: &Tensor, context: &Tensor) -> Tensor {
        let (query, key, value) =
            (self.query.forward(x), self.key.forward(context), self.value.forward(context));
        self.out.forward(&attention(&query, &key, &value, self.heads, false))
    }
}
