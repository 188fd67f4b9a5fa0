//! Real images with captions for the adversarial loss of a text-to-image model: latents, each conditioned on its own
//! caption.
//!
//! SDXL's micro-conditioning (2307.01952, section 2.2) is that of the generated samples, regardless of an image's
//! original size and crop: with other numbers beside real images than beside generated ones, a discriminator could tell
//! them apart by these alone. DMD2 (2405.14867) does the same.

use std::{path::Path, rc::Rc};

use anyhow::Context;
use potstill_distill::{adversarial::RealData, random::Stream};
use potstill_models::Condition;
use potstill_torch_ext::{Autocast, upload};
use tch::{Device, Tensor, no_grad};

use super::{
    prompts::distinct,
    row_cache::RowCache,
    space::{Space, Texts},
};
use crate::{data::pairs::Pair, process::work};

/// See the module's documentation.
pub struct RealPairs {
    texts: Rc<Texts>,
    pairs: Vec<Pair>,
    /// Height and width of the images.
    sides: [i64; 2],
    /// Mean and log variance of each image's latent, where they are cached.
    moments: Option<RowCache>,
}

impl Space {
    /// Real images with the captions of this space, for the adversarial loss of a text-to-image model; with a folder
    /// their latents are cached there.
    ///
    /// # Errors
    /// The model is not a text-to-image model; the folder cannot be written.
    pub fn real_pairs(&self, pairs: Vec<Pair>, cache: Option<&Path>) -> anyhow::Result<RealPairs> {
        let texts = self.texts.as_ref().context("image-text pairs are for text-to-image models")?;
        let [_, height, width] = self.image_shape();
        let cache = match cache {
            Some(folder) => Some((
                folder,
                texts
                    .digest
                    .as_deref()
                    .context("the model's folder was not hashed, so the cache cannot name it")?,
            )),
            None => None,
        };
        RealPairs::new(Rc::clone(texts), pairs, [height, width], cache)
    }
}

impl RealPairs {
    /// Images whose captions are those of `texts`, in the same order. With a folder, and a digest that names the model,
    /// their latents are computed once and cached there.
    ///
    /// # Errors
    /// The cache cannot be written.
    pub(super) fn new(
        texts: Rc<Texts>,
        pairs: Vec<Pair>,
        sides: [i64; 2],
        cache: Option<(&Path, &str)>,
    ) -> anyhow::Result<Self> {
        let mut made = Self { texts, pairs, sides, moments: None };
        if let Some((folder, digest)) = cache {
            let size = format!("{sides:?}");
            let identity =
                [digest.as_bytes(), size.as_bytes()].into_iter().chain(made.pairs.iter().map(Pair::encoded));
            let computed = RowCache::open(folder, identity, made.pairs.len(), |rows| {
                let indices: Vec<i64> = rows.map(|row| row as i64).collect();
                let (means, log_variances) = made.encode(&indices)?;
                Ok(vec![("mean", means), ("log_variance", log_variances)])
            });
            made.moments = Some(computed.with_context(|| format!("adversarial.cache {}", folder.display()))?);
        }
        Ok(made)
    }

    /// Moments of the latents of some images, one image at a time: an autoencoder's activations are large.
    fn encode(&self, indices: &[i64]) -> anyhow::Result<(Tensor, Tensor)> {
        let autoencoder = &self.texts.autoencoder;
        let (mut means, mut log_variances) = (Vec::new(), Vec::new());
        for index in indices {
            let image = self.pairs[*index as usize].image(self.sides)?.unsqueeze(0);
            let (mean, log_variance) =
                no_grad(|| autoencoder.moments(&image.to_device(autoencoder.device())));
            means.push(mean.to_device(Device::Cpu));
            log_variances.push(log_variance.to_device(Device::Cpu));
            work::complete();
        }
        Ok((Tensor::cat(&means, 0), Tensor::cat(&log_variances, 0)))
    }

    /// Moments of the latents of some images; one that occurs several times is encoded once.
    fn moments(&self, indices: &[i64]) -> (Tensor, Tensor) {
        if let Some(cache) = &self.moments {
            let rows = |name| cache.rows(name, indices).expect("every row was written with both");
            return (rows("mean"), rows("log_variance"));
        }
        let (numbers, order) = distinct(indices);
        let (means, log_variances) = self.encode(&numbers).expect("each image was decoded when it was read");
        (means.index_select(0, &order), log_variances.index_select(0, &order))
    }
}

impl RealData for RealPairs {
    fn draw(&self, stream: &mut Stream, count: i64, device: Device) -> (Tensor, Condition) {
        // Cached and newly computed latents are the same.
        let _fp32 = Autocast::pause();
        let indices = stream.integers(count, self.pairs.len() as i64);
        let (means, log_variances) = self.moments(&indices);
        let noise = stream.normal(&means.size());
        let latents = self.texts.autoencoder.draw(
            &upload(&means, device),
            &upload(&log_variances, device),
            &upload(&noise, device),
        );
        (latents, self.texts.prompts.condition_of(&indices, device))
    }

    fn conditions(&self, stream: &mut Stream, count: i64, device: Device) -> Condition {
        let _fp32 = Autocast::pause();
        let indices = stream.integers(count, self.pairs.len() as i64);
        self.texts.prompts.condition_of(&indices, device)
    }
}
