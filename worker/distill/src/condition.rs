//! Conditions of generated samples.

use potstill_models::Condition;
use potstill_torch_ext::upload;
use tch::{Device, Kind, Tensor};

use crate::random::Stream;

/// A source of conditions.
pub trait Conditions {
    /// The conditions of `n` samples, which depend on the stream alone.
    fn draw(&self, stream: &mut Stream, n: i64, device: Device) -> Condition;
}

/// Uniform classes.
#[derive(Clone, Copy, Debug)]
pub struct Classes(
    /// The number of classes; 0 for an unconditional network.
    pub i64,
);

impl Conditions for Classes {
    fn draw(&self, stream: &mut Stream, n: i64, device: Device) -> Condition {
        match self.0 {
            0 => Condition::None,
            classes => {
                let labels = Tensor::from_slice(&stream.integers(n, classes));
                Condition::Class(upload(&labels.one_hot(classes).to_kind(Kind::Float), device))
            }
        }
    }
}
