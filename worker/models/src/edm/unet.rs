//! The U-Net inside the preconditioning: SongUNet or DhariwalUNet.

use tch::Tensor;

use super::{
    config::{EdmConfig, ModelType},
    dhariwal_unet::DhariwalUNet,
    inputs::Inputs,
    song_unet::SongUNet,
};
use crate::builder::Scope;

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
