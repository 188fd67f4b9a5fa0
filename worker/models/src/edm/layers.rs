//! The layers that SongUNet and DhariwalUNet share.

use tch::{Device, Kind, Tensor};

pub(crate) use crate::layers::{InitLaw, Linear};
use crate::weight::{Role, Weight};
use crate::{
    builder::{BufferSource, Init, Scope},
    denoiser::Mode,
};

/// A 1×1 or 3×3 convolution that keeps height and width.
pub(crate) struct Conv2d {
    weight: Weight,
    bias: Tensor,
}

impl Conv2d {
    pub fn new(scope: &mut Scope, inputs: i64, outputs: i64, kernel: i64, law: InitLaw) -> Self {
        let (fan_in, fan_out) = (inputs * kernel * kernel, outputs * kernel * kernel);
        let shape = [outputs, inputs, kernel, kernel];
        Self {
            weight: scope.weight(&shape, law.init(law.weight, fan_in, fan_out)),
            bias: scope.parameter("bias", &[outputs], law.init(law.bias, fan_in, fan_out)),
        }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.convolve(x, Some(&self.bias), 0)
    }

    /// With `extra` zeros on each side beyond those that keep the size.
    pub fn padded(&self, x: &Tensor, extra: i64) -> Tensor {
        self.convolve(x, Some(&self.bias), extra)
    }

    /// With another bias, or without one, for a caller that adds this layer's bias elsewhere.
    pub fn with_bias(&self, x: &Tensor, bias: Option<&Tensor>) -> Tensor {
        self.convolve(x, bias, 0)
    }

    pub fn bias(&self) -> &Tensor {
        &self.bias
    }

    fn convolve(&self, x: &Tensor, bias: Option<&Tensor>, extra_padding: i64) -> Tensor {
        let product =
            |x: &Tensor, weight: &Tensor, role: Role| convolve(weight, x, role.bias(bias), extra_padding);
        self.weight.apply(x, product, |down, up| convolve(up, down, None, 0))
    }
}

fn convolve(weight: &Tensor, x: &Tensor, bias: Option<&Tensor>, extra_padding: i64) -> Tensor {
    let kernel = weight.size()[3];
    let size = x.size();
    if kernel == 1 && extra_padding == 0 && x.device() == Device::Cpu && size[2] * size[3] >= 64 {
        return pointwise(weight, x, bias, &size);
    }
    x.conv2d(weight, bias, 1, kernel / 2 + extra_padding, 1, 1)
}

/// A 1×1 convolution as a matrix product for each sample: on CPU up to twice as fast, except for tiny images.
fn pointwise(weight: &Tensor, x: &Tensor, bias: Option<&Tensor>, size: &[i64]) -> Tensor {
    let (samples, inputs) = (size[0], size[1]);
    let outputs = weight.size()[0];
    let weight = weight.view([1, outputs, inputs]).expand([samples, outputs, inputs], false);
    let x = x.reshape([samples, inputs, -1]);
    let y = match bias {
        Some(bias) => bias.view([1, -1, 1]).baddbmm(&weight, &x, 1, 1),
        None => weight.bmm(&x),
    };
    y.view([samples, outputs, size[2], size[3]])
}

/// Group normalization with EDM's number of groups: at most 32, of at least 4 channels each.
pub(crate) struct GroupNorm {
    groups: i64,
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl GroupNorm {
    pub fn new(mut scope: Scope, channels: i64, eps: f64) -> Self {
        let groups = (channels / 4).min(32);
        if groups == 0 || channels % groups != 0 {
            let groups = groups.max(1);
            scope.problem(format!("{channels} channels do not split into {groups} groups of at least 4"));
        }
        Self {
            groups,
            weight: scope.parameter("weight", &[channels], Init::Constant(1.0)),
            bias: scope.parameter("bias", &[channels], Init::Constant(0.0)),
            eps,
        }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.group_norm(self.groups, Some(&self.weight), Some(&self.bias), self.eps, true)
    }
}

/// Direction of a change of resolution by 2.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Down,
    Up,
}

/// Halves or doubles height and width with a separable filter, each channel by itself.
pub(crate) struct Resample {
    direction: Direction,
    /// [C, 1, k, k]; none for the box filter, which has a faster equivalent.
    taps: Option<Tensor>,
    padding: i64,
}

impl Resample {
    /// `filter` are the 1-D taps; they are normalized to a sum of 1.
    pub fn new(scope: &mut Scope, channels: i64, filter: &[f64], direction: Direction) -> Self {
        let sum: f64 = filter.iter().sum();
        let outer = filter.iter().flat_map(|a| filter.iter().map(move |b| (a * b / (sum * sum)) as f32));
        let k = filter.len() as i64;
        let taps = scope.buffer("resample_filter", &[1, 1, k, k], BufferSource::Fixed(outer.collect()));
        let is_box = k == 2 && filter[0] == filter[1];
        // Doubling distributes each sample over four.
        let gain = if direction == Direction::Up { 4.0 } else { 1.0 };
        let taps = (!is_box).then(|| (taps * gain).repeat([channels, 1, 1, 1]));
        Self { direction, taps, padding: (k - 1) / 2 }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.padded(x, self.padding)
    }

    /// Downsampling without padding, for a caller that has padded the input.
    pub fn unpadded(&self, x: &Tensor) -> Tensor {
        self.padded(x, 0)
    }

    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// The zeros that [`forward`](Self::forward) adds on each side.
    pub fn padding(&self) -> i64 {
        self.padding
    }

    fn padded(&self, x: &Tensor, padding: i64) -> Tensor {
        let bias: Option<Tensor> = None;
        match (&self.taps, self.direction) {
            (None, Direction::Down) => x.avg_pool2d([2, 2], [2, 2], [0, 0], false, true, None),
            (None, Direction::Up) => {
                let size = x.size();
                x.upsample_nearest2d([size[2] * 2, size[3] * 2], None, None)
            }
            (Some(taps), Direction::Down) => x.conv2d(taps, bias, 2, padding, 1, x.size()[1]),
            (Some(taps), Direction::Up) => x.conv_transpose2d(taps, bias, 2, padding, 0, x.size()[1], 1),
        }
    }
}

/// Sines and cosines of a number at several frequencies.
pub(crate) struct Sinusoids {
    frequencies: Tensor,
}

impl Sinusoids {
    /// Frequencies 10000^(−i/d), i = 0, 1, …; d is half the number of `channels`, or one less with `endpoint`.
    pub fn positional(scope: &Scope, channels: i64, endpoint: bool) -> Self {
        let half = channels / 2;
        let divisor = (half - i64::from(endpoint)) as f64;
        let exponents = Tensor::arange(half, (Kind::Float, scope.device())) / divisor;
        Self { frequencies: (exponents * -(10_000f64.ln())).exp() }
    }

    /// Frequencies 2π·f with f drawn once from N(0, 16²).
    pub fn fourier(mut scope: Scope, channels: i64) -> Self {
        let drawn = BufferSource::Drawn(Init::Normal { std: 16.0 });
        Self { frequencies: scope.buffer("freqs", &[channels / 2], drawn) * std::f64::consts::TAU }
    }

    /// Cosines and sines of `x` `[N]`, each [N, channels/2].
    pub fn forward(&self, x: &Tensor) -> (Tensor, Tensor) {
        let angles = x.unsqueeze(1) * &self.frequencies;
        (angles.cos(), angles.sin())
    }
}

/// Drops a sample's class with probability `p` in training mode. A dropped class is a row of zeros.
pub(crate) fn drop_labels(labels: Tensor, samples: i64, p: f64, mode: Mode) -> Tensor {
    if mode != Mode::Train || p == 0.0 {
        return labels;
    }
    let kept = Tensor::rand([samples, 1], (Kind::Float, labels.device())).ge(p).to_kind(Kind::Float);
    labels * kept
}
