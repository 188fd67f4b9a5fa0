//! Denoisers: one interface for all networks, the networks of EDM and of Stable Diffusion, samplers, and weights in
//! safetensors.
//!
//! - [`Denoiser`]: the interface of a network for distillation, sampling and evaluation.
//! - [`Parameters`]: a network's weights, views into one flat fp32 vector.
//! - [`EdmNetwork`]: EDM preconditioning around a DDPM++, NCSN++ or ADM U-Net, compatible with the public checkpoints.
//! - [`diffusers`]: text-to-image models: U-Net, autoencoder, text encoders, and the folders that they come in.
//! - [`ForwardProcess`]: how data become noise, one interface over EDM, DDPM and flow matching.
//! - [`sampler`]: EDM's deterministic Heun sampler, and DDIM.
//! - [`lora`]: low-rank adapters on a frozen network.
//! - [`gate`]: weights that are in memory only while they are needed.
//! - [`weights`]: reading and writing safetensors.
//!
//! Like tch itself, functions of tensors panic on mismatched shapes or devices: those are errors in a program, not in
//! its input. Input from outside (configurations, files) is checked and gives errors as values.

mod builder;
mod denoiser;
pub mod diffusers;
pub mod edm;
pub mod gate;
mod layers;
pub mod lora;
mod masks;
mod parameters;
pub mod process;
mod recomputed;
pub mod sampler;
mod weight;
pub mod weights;

pub use denoiser::{Condition, Denoiser, Embedded, Mode, TextCondition};
pub use edm::{ConfigError, EdmNetwork, config::EdmConfig};
pub use lora::{Lora, LoraError};
pub use parameters::{Entry, Parameters};
pub use process::{Alphas, ForwardProcess};
pub use weights::{LoadError, SaveError};
