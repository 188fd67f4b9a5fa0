//! `[adversarial]`: the adversarial loss with real samples.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problems::Problems;

/// The adversarial loss: a Diffusion GAN on the fake score's encoder (SiDA, 2410.14919; docs/algorithm.md §5).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AdversarialSpec {
    /// Real samples: an image file in this project's format (safetensors), a folder with one sub-folder of images per
    /// class, a tar in the WebDataset layout or a folder of such; a path relative to the file that names it, or a URL.
    /// For a text-to-image model tars of images with captions, or a folder of images with captions beside them
    /// (docs/FORMATS.md).
    pub data: String,
    /// Folder on this machine that keeps the latents of images with captions: each is computed once. Without it they
    /// are computed when they are needed.
    pub cache: Option<PathBuf>,
    /// Use only this many of them, spread evenly over all.
    pub limit: Option<u64>,
    /// How the cross entropies become losses.
    pub scaling: Scaling,
    /// λ_adv of the generator. SiDA: 0.01; SiD-DiT: 1.
    pub generator_weight: f64,
    /// λ_D of the discriminator, which learns from the first image. SiDA and SiD-DiT: 1.
    pub discriminator_weight: f64,
    /// The generator's adversarial term joins when more images than this have been seen; without it, it is present from
    /// the first image. SiDA: 200,000; SiD-DiT: 40,000.
    pub join_images: Option<u64>,
    /// Weight of the approximate R1 penalty on real samples (2501.08316); 0: none.
    pub approximate_r1: f64,
    /// Standard deviation of the perturbation of that penalty.
    pub approximate_r1_sigma: f64,
}

/// The two published ways to scale the discriminator's and the generator's cross entropies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Scaling {
    /// SiDA's (2410.14919): means over a micro-batch; the discriminator's with the denoising loss's weight, the generator's with ω
    /// and the number of a sample's elements.
    #[default]
    Sida,
    /// SiD-DiT's (2509.25127): means over a sample, times the number of its elements; the generator's with ω.
    SidDit,
}

impl Default for AdversarialSpec {
    fn default() -> Self {
        Self {
            data: String::new(),
            cache: None,
            limit: None,
            scaling: Scaling::Sida,
            generator_weight: 0.01,
            discriminator_weight: 1.0,
            join_images: None,
            approximate_r1: 0.0,
            approximate_r1_sigma: 0.1,
        }
    }
}

impl AdversarialSpec {
    pub(crate) fn validate(&self, problems: &mut Problems) {
        problems.require(!self.data.is_empty(), || {
            "adversarial.data is missing: name the real samples, or remove the section".into()
        });
        problems.require(self.limit != Some(0), || "adversarial.limit is 0; it must be at least 1".into());
        for (name, weight) in [
            ("generator_weight", self.generator_weight),
            ("discriminator_weight", self.discriminator_weight),
            ("approximate_r1", self.approximate_r1),
            ("approximate_r1_sigma", self.approximate_r1_sigma),
        ] {
            problems.require(weight.is_finite() && weight >= 0.0, || {
                format!("adversarial.{name} is {weight}; it must be at least 0")
            });
        }
    }
}
