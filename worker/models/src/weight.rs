//! The weight of a layer, which may have a low-rank adapter beside it (2106.09685).

use tch::Tensor;

use crate::masks;

/// Ending of the name of A, [r, inputs(, k, k)], after that of its module.
pub const DOWN: &str = "lora_A.weight";
/// Ending of the name of B, [outputs, r(, 1, 1)].
pub const UP: &str = "lora_B.weight";

/// A layer's weight, by itself or with a low-rank adapter beside it.
pub(crate) struct Weight {
    own: Tensor,
    adapter: Option<Adapter>,
}

struct Adapter {
    down: Tensor,
    up: Tensor,
    scale: f64,
    dropout: f64,
}

impl Weight {
    pub fn own(own: Tensor) -> Self {
        Self { own, adapter: None }
    }

    /// `down` and `up` are A and B of [`lora`](mod@crate::lora), `scale` is α/r, and `dropout` the share of A's input that is 0
    /// while the adapter trains.
    pub fn adapted(own: Tensor, down: Tensor, up: Tensor, scale: f64, dropout: f64) -> Self {
        Self { own, adapter: Some(Adapter { down, up, scale, dropout }) }
    }

    /// W itself.
    pub fn own_values(&self) -> &Tensor {
        &self.own
    }

    /// The tensors that take gradients.
    pub fn trained(&self) -> Vec<Tensor> {
        match &self.adapter {
            None => vec![self.own.shallow_clone()],
            Some(adapter) => vec![adapter.down.shallow_clone(), adapter.up.shallow_clone()],
        }
    }

    /// The layer's output: `product` of `x` with W, and with A; `up` multiplies the latter with B. The adapter computes in
    /// the data type of `x`, of which it sees a part where it has dropout and [trains](masks::pass).
    pub fn apply(
        &self,
        x: &Tensor,
        product: impl Fn(&Tensor, &Tensor, Role) -> Tensor,
        up: impl FnOnce(&Tensor, &Tensor) -> Tensor,
    ) -> Tensor {
        let mut output = product(x, &self.own, Role::Own);
        let Some(adapter) = &self.adapter else { return output };
        let seen = match adapter.dropout > 0.0 {
            true => masks::next().map(|seed| masks::dropped(x, adapter.dropout, seed)),
            false => None,
        };
        let down = &adapter.down.to_kind(x.kind());
        let down = product(seen.as_ref().unwrap_or(x), down, Role::Down) * adapter.scale;
        output.g_add_(&up(&down, &adapter.up.to_kind(down.kind())))
    }
}

/// Which of a layer's products is computed: only the first has the bias.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Own,
    Down,
}

impl Role {
    /// The bias of this product.
    pub fn bias(self, bias: Option<&Tensor>) -> Option<&Tensor> {
        bias.filter(|_| self == Self::Own)
    }
}
