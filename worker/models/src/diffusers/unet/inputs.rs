//! A U-Net's inputs besides the noisy latents.

use tch::Tensor;

/// A U-Net's inputs besides the noisy latents.
pub struct UNetInputs<'a> {
    /// Timesteps, `[N]` or `[1]`.
    pub time: &'a Tensor,
    /// The text embeddings, [N, tokens, width].
    pub states: &'a Tensor,
    /// SDXL's pooled text [N, width] and micro-conditioning [N, 6].
    pub text_time: Option<(&'a Tensor, &'a Tensor)>,
    /// Classes, where the network has some: indices `[N]`, numbers `[N]`, or vectors [N, width].
    pub class_labels: Option<&'a Tensor>,
    /// Whether activations are computed again in the backward pass instead of being kept.
    pub recompute: bool,
}
