//! Text-to-image models in the layout of diffusers: the networks of Stable Diffusion 1.x, 2.x and SDXL, and their
//! folders.
//!
//! - [`UNetConfig`] and [`LatentDenoiser`]: the U-Net, as the denoiser of a DDPM process over latents.
//! - [`Autoencoder`]: images ↔ latents.
//! - [`TextEncoder`], [`Tokenizer`]: prompts → the conditions of the U-Net.
//! - [`ScheduleConfig`]: the forward process that a model was trained on.
//! - [`ModelFolder`]: all of them from a folder as downloaded from a hub.
//! - [`original`]: all of them as one file in the layout of the first public code.

mod autoencoder;
mod config;
mod denoiser;
mod folder;
pub mod guided;
mod layers;
mod merge;
pub mod original;
mod resnet;
mod schedule;
mod text;
mod text_encoder;
mod tokenizer;
mod unet;

pub use self::{
    autoencoder::{Autoencoder, AutoencoderConfig},
    config::{ConfigError, PerBlock},
    denoiser::LatentDenoiser,
    folder::ModelFolder,
    merge::merge,
    schedule::ScheduleConfig,
    text::{TextConditioner, Tokens},
    text_encoder::{TextEncoder, TextEncoderConfig, TextStates},
    tokenizer::Tokenizer,
    unet::{Kept, Pass, SampleSize, TransformerLayers, UNetConfig, UNetInputs},
};
