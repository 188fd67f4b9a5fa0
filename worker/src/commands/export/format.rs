//! What is written.

use clap::ValueEnum;

/// The form of an export.
#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// The whole student: a folder for diffusers' pipelines, or an EDM network's file; adapters are added to the weights
    #[default]
    Diffusers,
    /// The whole student as one file in the original layout of Stable Diffusion, for ComfyUI and for from_single_file
    SingleFile,
    /// The adapters alone, under PEFT's names, for load_lora_weights
    LoraDiffusers,
    /// The adapters alone, under the names of kohya's scripts
    LoraKohya,
}
