//! The space of a network's samples, and their conditions.

use std::rc::Rc;

use potstill_distill::condition::{Classes, Conditions};
use potstill_models::{Denoiser, diffusers::Autoencoder};
use potstill_torch_ext::Autocast;
use tch::{Device, Tensor, no_grad};

use super::prompts::Prompts;
use crate::process::work;

/// The space of a network's samples, and their conditions.
#[derive(Clone)]
pub struct Space {
    /// Channels, height, width of a sample.
    pub sample: [i64; 3],
    /// Classes of a class-conditional network, else 0.
    pub classes: i64,
    pub(super) texts: Option<Rc<Texts>>,
}

/// The parts of a text-to-image model beside its network.
pub(super) struct Texts {
    pub(super) autoencoder: Autoencoder,
    pub(super) prompts: Prompts,
    /// The prompts of the evaluation, if they differ.
    pub(super) evaluation: Option<Prompts>,
    /// SHA-256 of the model, where it was computed.
    pub(super) digest: Option<String>,
}

impl Space {
    /// The space of a class-conditional or unconditional network.
    pub fn of(network: &dyn Denoiser) -> Self {
        Self { sample: network.sample_shape(), classes: network.classes(), texts: None }
    }

    /// Channels, height, width of an image.
    pub fn image_shape(&self) -> [i64; 3] {
        match &self.texts {
            Some(texts) => texts.autoencoder.config().image_shape([self.sample[1], self.sample[2]]),
            None => self.sample,
        }
    }

    /// Whether samples have conditions, which guidance needs.
    pub fn is_conditional(&self) -> bool {
        self.classes > 0 || self.texts.is_some()
    }

    /// The prompts of a text-to-image model's training.
    pub fn prompts(&self) -> Option<&Prompts> {
        self.texts.as_ref().map(|texts| &texts.prompts)
    }

    /// The prompts of a text-to-image model's evaluation.
    pub fn evaluation_prompts(&self) -> Option<&Prompts> {
        let texts = self.texts.as_ref()?;
        Some(texts.evaluation.as_ref().unwrap_or(&texts.prompts))
    }

    /// Converts samples [N, C, H, W] to images, fp32 in [−1, 1]: latents one image at a time, in tiles if they are
    /// large.
    pub fn images(&self, samples: &Tensor) -> Tensor {
        let Some(texts) = &self.texts else { return samples.shallow_clone() };
        let images: Vec<Tensor> = no_grad(|| {
            samples
                .split(1, 0)
                .iter()
                .map(|one| {
                    let image = texts.autoencoder.decode_tiled(one).clamp(-1.0, 1.0);
                    work::complete();
                    image
                })
                .collect()
        });
        Tensor::cat(&images, 0)
    }

    /// The conditions from which training draws.
    pub fn conditions(&self) -> Box<dyn Conditions> {
        match &self.texts {
            Some(texts) => Box::new(OfPrompts(Rc::clone(texts))),
            None => Box::new(Classes(self.classes)),
        }
    }
}

struct OfPrompts(Rc<Texts>);

impl Conditions for OfPrompts {
    fn draw(
        &self,
        stream: &mut potstill_distill::random::Stream,
        n: i64,
        device: Device,
    ) -> potstill_models::Condition {
        let prompts = &self.0.prompts;
        // Embeddings are the same with and without a cache.
        let _fp32 = Autocast::pause();
        prompts.condition(&stream.integers(n, prompts.len()), device)
    }
}
