//! Residual blocks, with the time embedding in U-Nets, without it in autoencoders.

use potstill_torch_ext::Block;
use tch::Tensor;

use super::layers::{Conv2d, GroupNorm, linear};
use crate::{builder::Scope, layers::Linear};

/// The hyperparameters of a [`Resnet`].
#[derive(Clone, Copy)]
pub(crate) struct ResnetShape {
    pub inputs: i64,
    pub outputs: i64,
    /// Width of the time embedding; 0: none.
    pub embedding: i64,
    pub groups: i64,
    pub eps: f64,
    /// The embedding scales and shifts the second normalization's output instead of being added before it.
    pub scale_shift: bool,
    /// The divisor of the sum.
    pub scale_factor: f64,
}

/// diffusers' `ResnetBlock2D`.
pub(crate) struct Resnet {
    norm1: GroupNorm,
    conv1: Conv2d,
    embedding: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    shortcut: Option<Conv2d>,
    scale_shift: bool,
    scale_factor: f64,
}

impl Resnet {
    pub fn new(scope: &mut Scope, shape: ResnetShape) -> Self {
        let ResnetShape { inputs, outputs, embedding, groups, eps, scale_shift, scale_factor } = shape;
        let projected = if scale_shift { 2 * outputs } else { outputs };
        Self {
            norm1: GroupNorm::new(scope.child("norm1"), groups, inputs, eps),
            conv1: Conv2d::same(scope.child("conv1"), inputs, outputs, 3),
            embedding: (embedding > 0)
                .then(|| linear(scope.child("time_emb_proj"), embedding, projected, true)),
            norm2: GroupNorm::new(scope.child("norm2"), groups, outputs, eps),
            conv2: Conv2d::same(scope.child("conv2"), outputs, outputs, 3),
            shortcut: (inputs != outputs)
                .then(|| Conv2d::same(scope.child("conv_shortcut"), inputs, outputs, 1)),
            scale_shift,
            scale_factor,
        }
    }
}

impl Block for Resnet {
    /// `[x [N, C, H, W]]`, and the time embedding [N, D] after its activation, where there is one.
    fn forward(&self, inputs: &[Tensor]) -> Tensor {
        let x = &inputs[0];
        let mut h = self.conv1.forward(&self.norm1.forward(x).silu());
        match (&self.embedding, inputs.get(1)) {
            (Some(layer), Some(embedding)) => {
                let embedded = layer.forward(embedding).unsqueeze(-1).unsqueeze(-1);
                if self.scale_shift {
                    let halves = embedded.chunk(2, 1);
                    h = self.norm2.forward(&h) * (1.0 + &halves[0]) + &halves[1];
                } else {
                    h = self.norm2.forward(&(h + embedded));
                }
            }
            _ => h = self.norm2.forward(&h),
        }
        h = self.conv2.forward(&h.silu());
        let x = match &self.shortcut {
            Some(shortcut) => shortcut.forward(x),
            None => x.shallow_clone(),
        };
        let sum = x + h;
        if self.scale_factor == 1.0 { sum } else { sum / self.scale_factor }
    }
}
