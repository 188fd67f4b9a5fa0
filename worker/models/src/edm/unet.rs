//! The U-Net inside the preconditioning, whichever it is.

use tch::Tensor;

use super::{
    config::{EdmConfig, ModelType},
    dhariwal_unet::DhariwalUNet,
    song_unet::SongUNet,
};
use crate::{builder::Scope, denoiser::Mode};

/// What a U-Net is given beside the noisy sample.
pub(crate) struct Inputs<'a> {
    /// c_noise, `[N]` or `[1]`.
    pub noise: &'a Tensor,
    /// [N or 1, classes]; there is one exactly when the network has classes.
    pub labels: Option<Tensor>,
    /// [N or 1, augment_dim]; there is one exactly when the network takes augmentation labels.
    pub augment: Option<Tensor>,
    pub mode: Mode,
}

pub(crate) enum UNet {
    Song(SongUNet),
    Dhariwal(DhariwalUNet),
}

impl UNet {
    pub fn new(scope: &mut Scope, config: &EdmConfig) -> Self {
        match config.model_type {
            ModelType::SongUNet => Self::Song(SongUNet::new(scope, config)),
            ModelType::DhariwalUNet => Self::Dhariwal(DhariwalUNet::new(scope, config)),
        }
    }

    /// The output and the bottleneck.
    pub fn forward(&self, x: &Tensor, inputs: &Inputs) -> (Tensor, Tensor) {
        match self {
            Self::Song(unet) => unet.forward(x, inputs),
            Self::Dhariwal(unet) => unet.forward(x, inputs),
        }
    }

    /// The bottleneck alone.
    pub fn bottleneck(&self, x: &Tensor, inputs: &Inputs) -> Tensor {
        match self {
            Self::Song(unet) => unet.bottleneck(x, inputs),
            Self::Dhariwal(unet) => unet.bottleneck(x, inputs),
        }
    }
}
