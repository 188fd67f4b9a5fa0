//! The CLIP score: how well images match their prompts, by a CLIP model (2103.00020).

use std::path::Path;

use anyhow::{Context, anyhow, ensure};
use potstill_distill::metrics;
use potstill_spec::Protocol;
use tch::{CModule, Device, IValue, Kind, Tensor, no_grad};

use super::torch_script::{at_a_time, digest_of, message, on_any_batch, torch_script, trial_images};
use crate::{data::protocol, model::Space, process::work};

/// A TorchScript CLIP: images fp32 [N, C, H, W] in [−1, 1] and tokens int64 [N, tokens] → (image embeddings [N, D],
/// text embeddings [N, D]). The tokens are those of the model's first tokenizer: for SD 1.x, 2.x and SDXL OpenAI's
/// vocabulary, padded after the end token.
pub struct Clip {
    module: CModule,
    device: Device,
    space: Space,
    protocol: Protocol,
    /// SHA-256 of its file.
    digest: String,
}

impl Clip {
    /// Loads it, and tries it on images and prompts of `space`; `protocol` is the treatment of images before it gets
    /// them.
    ///
    /// # Errors
    /// Not TorchScript; another signature; the evaluated model takes no prompts.
    pub fn load(path: &Path, space: &Space, protocol: Protocol, device: Device) -> anyhow::Result<Self> {
        let context = || format!("CLIP {}", path.display());
        ensure!(space.prompts().is_some(), "{}: a CLIP score is for text-to-image models", context());
        let bytes = std::fs::read(path).with_context(context)?;
        let module = torch_script(&bytes, device).with_context(context)?;
        let clip = Self { module, device, space: space.clone(), protocol, digest: digest_of(&bytes) };
        let [channels, height, width] = space.image_shape();
        let trial = on_any_batch(|batch| {
            let images = trial_images([batch, channels, height, width], device);
            let images = protocol::apply(clip.protocol, &images)?;
            clip.forward(&images, &clip.tokens(&Tensor::zeros([batch], (Kind::Int64, Device::Cpu)))?)
        })
        .with_context(context)?;
        let finite = bool::try_from(trial.isfinite().all())?;
        ensure!(finite, "{}: its embeddings of a trial image are not finite", context());
        Ok(clip)
    }

    /// SHA-256 of its file.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The CLIP score of each image, as made, with the prompt of its number, fp64 `[N]`; numbers are int64 `[N]` on the
    /// host.
    ///
    /// # Errors
    /// The module fails, or does not return two embeddings for each pair.
    pub fn scores(&self, images: &Tensor, prompts: &Tensor) -> anyhow::Result<Tensor> {
        let tokens = self.tokens(prompts)?;
        let images = protocol::apply(self.protocol, images)?;
        let few = at_a_time(self.device);
        let mut scores = Vec::new();
        for (images, tokens) in images.split(few, 0).iter().zip(tokens.split(few, 0)) {
            scores.push(self.forward(images, &tokens)?);
            work::complete();
        }
        Ok(Tensor::cat(&scores, 0))
    }

    fn tokens(&self, prompts: &Tensor) -> anyhow::Result<Tensor> {
        let known = self.space.evaluation_prompts().context("there are no prompts")?;
        known.tokens(&Vec::try_from(prompts)?)
    }

    /// The score of each image with its tokens.
    fn forward(&self, images: &Tensor, tokens: &Tensor) -> anyhow::Result<Tensor> {
        let inputs = [images, tokens].map(|input| IValue::Tensor(input.to_device(self.device)));
        let output = no_grad(|| self.module.forward_is(&inputs)).map_err(|e| {
            let (images, tokens) = (images.size(), tokens.size());
            anyhow!("fails on images of shape {images:?} and tokens of shape {tokens:?}: {}", message(&e))
        })?;
        let IValue::Tuple(parts) = output else {
            return Err(anyhow!("does not return (image embeddings, text embeddings)"));
        };
        let Ok([IValue::Tensor(images), IValue::Tensor(texts)]) = <[IValue; 2]>::try_from(parts) else {
            return Err(anyhow!("returns a tuple that is not (image embeddings, text embeddings)"));
        };
        let (of_images, of_texts, count) = (images.size(), texts.size(), tokens.size()[0]);
        ensure!(
            of_images == of_texts && matches!(of_images[..], [n, _] if n == count),
            "turns {count} images and prompts into embeddings {of_images:?} and {of_texts:?}; expected [{count}, D] twice"
        );
        Ok(metrics::clip(&images, &texts))
    }
}
