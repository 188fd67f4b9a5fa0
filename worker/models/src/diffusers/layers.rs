//! Layers of latent diffusion models, with PyTorch's distributions of initial weights.

use tch::Tensor;

use crate::{
    builder::{Init, Scope},
    layers::InitLaw,
    weight::{Role, Weight},
};

/// PyTorch's default for linear and convolutional layers: U(±1/√fan_in) for weights and biases.
pub(crate) fn default_init() -> InitLaw {
    let third = (1.0f64 / 3.0).sqrt();
    InitLaw::kaiming_uniform(third, third)
}

/// A linear layer with the default distribution.
pub(crate) fn linear(scope: Scope, inputs: i64, outputs: i64, bias: bool) -> crate::layers::Linear {
    let law = default_init();
    // Biases are drawn with the weights' fan.
    crate::layers::Linear::new(scope, inputs, outputs, bias, law)
}

/// A convolution with a square kernel.
pub(crate) struct Conv2d {
    weight: Weight,
    bias: Tensor,
    stride: i64,
    padding: i64,
}

impl Conv2d {
    /// Keeps height and width; `kernel` is odd.
    pub fn same(scope: Scope, inputs: i64, outputs: i64, kernel: i64) -> Self {
        Self::new(scope, inputs, outputs, kernel, 1, kernel / 2)
    }

    pub fn new(mut scope: Scope, inputs: i64, outputs: i64, kernel: i64, stride: i64, padding: i64) -> Self {
        let law = default_init();
        let (fan_in, fan_out) = (inputs * kernel * kernel, outputs * kernel * kernel);
        Self {
            weight: scope.weight(&[outputs, inputs, kernel, kernel], law.init(law.weight, fan_in, fan_out)),
            bias: scope.parameter("bias", &[outputs], law.init(law.bias, fan_in, fan_out)),
            stride,
            padding,
        }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        let product = |x: &Tensor, weight: &Tensor, role: Role| {
            x.conv2d(weight, role.bias(Some(&self.bias)), self.stride, self.padding, 1, 1)
        };
        self.weight.apply(x, product, |down, up| down.conv2d::<&Tensor>(up, None, 1, 0, 1, 1))
    }
}

/// Group normalization.
pub(crate) struct GroupNorm {
    groups: i64,
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl GroupNorm {
    pub fn new(mut scope: Scope, groups: i64, channels: i64, eps: f64) -> Self {
        if groups < 1 || channels % groups != 0 {
            scope.problem(format!("{channels} channels do not split into {groups} groups"));
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

/// Normalization over the last dimension.
pub(crate) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    pub fn new(mut scope: Scope, width: i64, eps: f64) -> Self {
        Self {
            weight: scope.parameter("weight", &[width], Init::Constant(1.0)),
            bias: scope.parameter("bias", &[width], Init::Constant(0.0)),
            eps,
        }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm(self.weight.size(), Some(&self.weight), Some(&self.bias), self.eps, true)
    }
}

/// A table with a row for each index.
pub(crate) struct Embedding {
    weight: Tensor,
}

impl Embedding {
    pub fn new(mut scope: Scope, rows: i64, width: i64) -> Self {
        Self { weight: scope.parameter("weight", &[rows, width], Init::Normal { std: 1.0 }) }
    }

    /// `indices` int64 [N, …] → [N, …, width].
    pub fn forward(&self, indices: &Tensor) -> Tensor {
        Tensor::embedding(&self.weight, indices, -1, false, false)
    }
}

/// Multi-head attention of `query` [N, L, C] to `key` and `value` [N, S, C] through libtorch's fused kernels.
pub(crate) fn attention(query: &Tensor, key: &Tensor, value: &Tensor, heads: i64, causal: bool) -> Tensor {
    let split = |x: &Tensor| {
        let size = x.size();
        x.view([size[0], size[1], heads, size[2] / heads]).transpose(1, 2)
    };
    let attended = Tensor::scaled_dot_product_attention::<Tensor>(
        &split(query),
        &split(key),
        &split(value),
        None,
        0.0,
        causal,
        None,
        false,
    );
    attended.transpose(1, 2).reshape_as(query)
}

/// Doubles height and width, or enlarges them to `size`, by repeating pixels.
pub(crate) fn enlarge(x: &Tensor, size: [i64; 2]) -> Tensor {
    x.upsample_nearest2d(size, None, None)
}
