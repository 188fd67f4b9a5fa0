//! The residual block of all three architectures.

use tch::Tensor;

use super::layers::{Conv2d, Direction, GroupNorm, InitLaw, Linear, Resample};
use crate::{builder::Scope, denoiser::Mode};

/// How a block uses the embedding.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Injection {
    /// Added before the second normalization: DDPM++ and NCSN++.
    Shift,
    /// Scales and shifts the output of the second normalization: ADM.
    ScaleShift,
}

/// Number of attention heads.
#[derive(Clone, Copy)]
pub(crate) enum Heads {
    /// One: DDPM++ and NCSN++.
    One,
    /// The largest number with at least this many channels for each head: ADM. A narrower block has no head, and no
    /// attention.
    OfChannels(i64),
}

/// Properties that the blocks of one network share.
pub(crate) struct BlockStyle<'a> {
    pub embedding_channels: i64,
    pub dropout: f64,
    pub injection: Injection,
    pub heads: Heads,
    /// Factor on the sum of a residual branch and its skip.
    pub skip_scale: f64,
    pub eps: f64,
    pub resample_filter: &'a [f64],
    /// Whether the skip of a resampling block has a 1×1 convolution even when the number of channels does not change.
    pub resample_projection: bool,
    pub init: InitLaw,
    pub init_zero: InitLaw,
    pub init_attention: InitLaw,
}

/// Properties of one block.
#[derive(Clone, Copy)]
pub(crate) struct BlockShape {
    pub inputs: i64,
    pub outputs: i64,
    pub resample: Option<Direction>,
    pub attention: bool,
}

/// Twice normalization, activation, convolution; the embedding in between, a skip around, and self-attention after.
pub(crate) struct UNetBlock {
    norm0: GroupNorm,
    resample0: Option<Resample>,
    conv0: Conv2d,
    affine: Linear,
    injection: Injection,
    norm1: GroupNorm,
    dropout: f64,
    conv1: Conv2d,
    skip: Skip,
    skip_scale: f64,
    attention: Option<Attention>,
}

struct Skip {
    projection: Option<Conv2d>,
    resample: Option<Resample>,
}

struct Attention {
    norm: GroupNorm,
    qkv: Conv2d,
    projection: Conv2d,
    heads: i64,
}

impl UNetBlock {
    pub fn new(mut scope: Scope, style: &BlockStyle, shape: BlockShape) -> Self {
        let BlockShape { inputs, outputs, resample, attention } = shape;
        let resampler = |scope: &mut Scope, channels| {
            resample.map(|direction| Resample::new(scope, channels, style.resample_filter, direction))
        };
        let norm0 = GroupNorm::new(scope.child("norm0"), inputs, style.eps);
        let mut conv0_scope = scope.child("conv0");
        let conv0 = Conv2d::new(&mut conv0_scope, inputs, outputs, 3, style.init);
        let resample0 = resampler(&mut conv0_scope, inputs);
        let modulation = if style.injection == Injection::ScaleShift { outputs * 2 } else { outputs };
        let affine =
            Linear::new(scope.child("affine"), style.embedding_channels, modulation, true, style.init);
        let norm1 = GroupNorm::new(scope.child("norm1"), outputs, style.eps);
        let conv1 = Conv2d::new(&mut scope.child("conv1"), outputs, outputs, 3, style.init_zero);

        let mut skip_scope = scope.child("skip");
        let projected = inputs != outputs || (resample.is_some() && style.resample_projection);
        let skip = Skip {
            projection: projected.then(|| Conv2d::new(&mut skip_scope, inputs, outputs, 1, style.init)),
            // Upsampling comes after the projection.
            resample: resampler(
                &mut skip_scope,
                if resample == Some(Direction::Up) { outputs } else { inputs },
            ),
        };

        let heads = match style.heads {
            Heads::One => 1,
            Heads::OfChannels(channels) => outputs / channels,
        };
        let attention = (attention && heads > 0).then(|| {
            if outputs % heads != 0 {
                scope.problem(format!("{outputs} channels do not split into {heads} attention heads"));
            }
            Attention {
                norm: GroupNorm::new(scope.child("norm2"), outputs, style.eps),
                qkv: Conv2d::new(&mut scope.child("qkv"), outputs, outputs * 3, 1, style.init_attention),
                projection: Conv2d::new(&mut scope.child("proj"), outputs, outputs, 1, style.init_zero),
                heads,
            }
        });
        Self {
            norm0,
            resample0,
            conv0,
            affine,
            injection: style.injection,
            norm1,
            dropout: style.dropout,
            conv1,
            skip,
            skip_scale: style.skip_scale,
            attention,
        }
    }

    /// `x` [N, C, H, W] and the embedding [N or 1, E].
    pub fn forward(&self, x: &Tensor, embedding: &Tensor, mode: Mode) -> Tensor {
        let mut h = self.norm0.forward(x).silu();
        if let Some(resample) = &self.resample0 {
            h = resample.forward(&h);
        }
        let modulate = |modulation: Tensor| modulation.unsqueeze(2).unsqueeze(3);
        h = match self.injection {
            Injection::Shift => {
                // The convolution's bias is added with the shift, which is cheaper to add and to sum gradients for.
                let shift = modulate(self.affine.forward_plus(embedding, self.conv0.bias()));
                self.norm1.forward(&self.conv0.with_bias(&h, None).g_add_(&shift))
            }
            Injection::ScaleShift => {
                let [scale, shift] = halves(&modulate(self.affine.forward(embedding)));
                shift.addcmul(&self.norm1.forward(&self.conv0.forward(&h)), &(scale + 1.0))
            }
        }
        .silu();
        if mode == Mode::Train && self.dropout > 0.0 {
            h = h.dropout(self.dropout, true);
        }
        h = match self.skip.bias() {
            // Both biases are added to the same sum, so their gradients are equal.
            Some(bias) => self.conv1.with_bias(&h, Some(&(self.conv1.bias() + bias))),
            None => self.conv1.forward(&h),
        };
        h = self.scaled(h.g_add_(&self.skip.forward_without_bias(x)));
        match &self.attention {
            Some(attention) => self.scaled(attention.forward(&h).g_add_(&h)),
            None => h,
        }
    }

    fn scaled(&self, mut x: Tensor) -> Tensor {
        if self.skip_scale == 1.0 { x } else { x.g_mul_scalar_(self.skip_scale) }
    }
}

fn halves(x: &Tensor) -> [Tensor; 2] {
    let half = x.size()[1] / 2;
    [x.narrow(1, 0, half), x.narrow(1, half, half)]
}

impl Skip {
    fn bias(&self) -> Option<&Tensor> {
        self.projection.as_ref().map(Conv2d::bias)
    }

    fn forward_without_bias(&self, x: &Tensor) -> Tensor {
        let project = |x: &Tensor| match &self.projection {
            Some(projection) => projection.with_bias(x, None),
            None => x.shallow_clone(),
        };
        match &self.resample {
            None => project(x),
            // Both are linear and operate on different dimensions, so they commute: the smaller image is projected.
            Some(resample) if resample.direction() == Direction::Up => resample.forward(&project(x)),
            Some(resample) => project(&resample.forward(x)),
        }
    }
}

impl Attention {
    fn forward(&self, x: &Tensor) -> Tensor {
        let size = x.size();
        let (samples, channels) = (size[0] * self.heads, size[1] / self.heads);
        // Queries, keys and values alternate along the channels of a head.
        // A bias of the keys shifts all scores of a query equally, which softmax ignores: its gradient is 0 but for
        // rounding, and Adam without a first moment would make full steps of that. So no gradient flows to it.
        let bias = self.qkv.bias().view([-1, 3]);
        let bias = Tensor::stack(&[bias.select(1, 0), bias.select(1, 1).detach(), bias.select(1, 2)], 1);
        let qkv = self.qkv.with_bias(&self.norm.forward(x), Some(&bias.view([-1])));
        let qkv = qkv.view([samples, channels, 3, -1]);
        let [q, k, v] = [qkv.select(2, 0), qkv.select(2, 1), qkv.select(2, 2)];
        let scores = q.transpose(1, 2).bmm(&k) * (channels as f64).sqrt().recip();
        let attended = v.bmm(&scores.softmax(-1, None).transpose(1, 2));
        self.projection.forward(&attended.view(size.as_slice()))
    }
}
