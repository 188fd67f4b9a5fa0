//! The contract between networks and everything that uses them.

use std::collections::BTreeMap;

use tch::Tensor;

use crate::{
    parameters::Parameters,
    process::ForwardProcess,
    weights::{self, SaveError},
};

/// What a sample is conditioned on.
pub enum Condition {
    /// Nothing: the unconditional prediction, also of a network that knows classes.
    None,
    /// One-hot class labels, fp32, [N, classes]. An all-zero row is unconditional.
    Class(Tensor),
}

/// Whether dropout is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Dropout draws from libtorch's global generator.
    Train,
    /// No dropout; the same input gives the same output.
    Eval,
}

/// A network that predicts the clean sample from a noisy one, whatever it natively predicts.
pub trait Denoiser: Send {
    /// Predicts x0, fp32 [N, C, H, W].
    ///
    /// `x_t` [N, C, H, W] is the noisy sample, `time` `[N]` or `[1]` the time of the network's [process](Self::process)
    /// (σ for EDM); both may be of any floating kind. Gradients flow to `x_t`, and to the parameters unless the network is [frozen](Self::frozen).
    /// Every parameter takes part in every call, so that none is ever left without a gradient.
    ///
    /// # Panics
    /// When shapes or devices do not fit, or when a network without classes gets some.
    fn denoise(&self, x_t: &Tensor, time: &Tensor, condition: &Condition, mode: Mode) -> Tensor {
        self.denoise_and_encode(x_t, time, condition, mode).0
    }

    /// [`denoise`](Self::denoise), and the encoder's output at the bottleneck, [N, channels, height, width], of the same
    /// pass.
    ///
    /// # Panics
    /// As `denoise`.
    fn denoise_and_encode(
        &self,
        x_t: &Tensor,
        time: &Tensor,
        condition: &Condition,
        mode: Mode,
    ) -> (Tensor, Tensor);

    /// The bottleneck alone: what [`denoise_and_encode`](Self::denoise_and_encode) gives beside x0, without the decoder.
    ///
    /// # Panics
    /// As `denoise`.
    fn encode(&self, x_t: &Tensor, time: &Tensor, condition: &Condition, mode: Mode) -> Tensor;

    /// The forward process that the network was trained on.
    fn process(&self) -> &ForwardProcess;

    /// The weights.
    fn parameters(&self) -> &Parameters;

    /// Channels, height, width of a sample.
    fn sample_shape(&self) -> [i64; 3];

    /// Number of classes; 0 for an unconditional network.
    fn classes(&self) -> i64;

    /// The least and the greatest time that the network supports. A sampler stays within.
    fn time_range(&self) -> [f64; 2] {
        [0.0, f64::INFINITY]
    }

    /// A trainable deep copy: equal values in its own storage.
    fn duplicate(&self) -> Box<dyn Denoiser>;

    /// The same network with weights that take no gradient; gradients still flow through its inputs.
    ///
    /// It **shares the storage**: in-place updates of [`Parameters::flat`] on either side are seen by both.
    fn frozen(&self) -> Box<dyn Denoiser>;

    /// The architecture as JSON, as [`to_safetensors`](Self::to_safetensors) puts it into the metadata.
    fn config_json(&self) -> String;

    /// Weights, buffers and configuration as one safetensors file. Equal networks and metadata give equal bytes.
    ///
    /// # Errors
    /// [`SaveError`] when `metadata` uses the key of the configuration, or when the format cannot hold the network.
    fn to_safetensors(&self, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>, SaveError> {
        weights::to_safetensors(self.parameters(), &self.config_json(), metadata)
    }
}
