//! Layers of all families of networks.

use tch::{Kind, Tensor};

use crate::{
    builder::{Init, Scope},
    weight::{Role, Weight},
};

/// Distribution of a layer's initial weights and biases. Bounds scale with the layer's fans.
#[derive(Clone, Copy)]
pub(crate) struct InitLaw {
    variance: Variance,
    pub weight: f64,
    pub bias: f64,
}

#[derive(Clone, Copy)]
enum Variance {
    /// Uniform with variance 2/(fan_in + fan_out).
    XavierUniform,
    /// Uniform with variance 1/fan_in.
    KaimingUniform,
    /// Normal with variance 1/fan_in.
    KaimingNormal,
}

impl InitLaw {
    pub const fn xavier_uniform(weight: f64) -> Self {
        Self { variance: Variance::XavierUniform, weight, bias: 0.0 }
    }

    pub const fn kaiming_uniform(weight: f64, bias: f64) -> Self {
        Self { variance: Variance::KaimingUniform, weight, bias }
    }

    pub const fn kaiming_normal(weight: f64) -> Self {
        Self { variance: Variance::KaimingNormal, weight, bias: 0.0 }
    }

    pub fn init(self, scale: f64, fan_in: i64, fan_out: i64) -> Init {
        let (fan_in, fan_out) = (fan_in as f64, fan_out as f64);
        if scale == 0.0 {
            return Init::Constant(0.0);
        }
        match self.variance {
            Variance::XavierUniform => Init::Uniform { bound: scale * (6.0 / (fan_in + fan_out)).sqrt() },
            Variance::KaimingUniform => Init::Uniform { bound: scale * (3.0 / fan_in).sqrt() },
            Variance::KaimingNormal => Init::Normal { std: scale * (1.0 / fan_in).sqrt() },
        }
    }
}

/// y = W·x + b.
pub(crate) struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

impl Linear {
    pub fn new(mut scope: Scope, inputs: i64, outputs: i64, bias: bool, law: InitLaw) -> Self {
        let weight = scope.weight(&[outputs, inputs], law.init(law.weight, inputs, outputs));
        let bias = bias.then(|| scope.parameter("bias", &[outputs], law.init(law.bias, inputs, outputs)));
        Self { weight, bias }
    }

    /// Data type of its weights.
    pub fn kind(&self) -> Kind {
        self.weight.own_values().kind()
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.with_bias(x, self.bias.as_ref())
    }

    /// The output with one more bias.
    pub fn forward_plus(&self, x: &Tensor, more: &Tensor) -> Tensor {
        match &self.bias {
            Some(bias) => self.with_bias(x, Some(&(bias + more))),
            None => self.with_bias(x, Some(more)),
        }
    }

    fn with_bias(&self, x: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let product = |x: &Tensor, weight: &Tensor, role: Role| x.linear(weight, role.bias(bias));
        self.weight.apply(x, product, |down, up| down.linear::<&Tensor>(up, None))
    }
}
