//! A U-Net's inputs besides the noisy sample.

use tch::Tensor;

use crate::denoiser::Mode;

/// A U-Net's inputs besides the noisy sample.
pub(crate) struct Inputs<'a> {
    /// c_noise, `[N]` or `[1]`.
    pub noise: &'a Tensor,
    /// [N or 1, classes]; present exactly when the network has classes.
    pub labels: Option<Tensor>,
    /// [N or 1, augment_dim]; present exactly when the network takes augmentation labels.
    pub augment: Option<Tensor>,
    pub mode: Mode,
}
