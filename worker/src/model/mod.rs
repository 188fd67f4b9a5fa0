//! Models as this process sees them: an EDM network, or a text-to-image model with its text encoders and autoencoder.

mod location;
mod prompts;
mod real_pairs;
mod row_cache;
mod steps;
pub mod student;

use std::{path::Path, rc::Rc};

use anyhow::{Context, ensure};
use potstill_distill::condition::{Classes, Conditions};
use potstill_models::{
    Denoiser, EdmNetwork, Parameters,
    diffusers::{Autoencoder, LatentDenoiser, ModelFolder, TextConditioner},
};
use potstill_spec::{PromptsSpec, RunSpec};
use potstill_storage::digest::sha256_of;
use potstill_torch_ext::Autocast;
use tch::{Device, Tensor, no_grad};

use self::real_pairs::RealPairs;
pub use self::{
    location::fetch_model,
    prompts::Prompts,
    steps::{initial_timestep, times},
};
use crate::data::pairs::Pair;

/// A network, and what turns texts into its conditions and its samples into images, where it needs that.
pub struct Model {
    /// The network; its weights are this value's own.
    pub network: Box<dyn Denoiser>,
    /// Only of a text-to-image model.
    pub latent: Option<Latent>,
}

/// What surrounds the U-Net of a text-to-image model.
pub struct Latent {
    /// Where it came from.
    pub folder: ModelFolder,
    /// Images ↔ latents.
    pub autoencoder: Autoencoder,
    /// Texts → conditions.
    pub conditioner: TextConditioner,
    /// SHA-256 of the folder, where somebody asked for it.
    digest: Option<String>,
}

impl Model {
    /// Loads the teacher that a run names, and checks that it is the one it was started with.
    ///
    /// # Errors
    /// It is missing, damaged, another one, or of a kind that is not supported.
    pub fn load(spec: &RunSpec, device: Device) -> anyhow::Result<Self> {
        let teacher = &spec.teacher;
        let Some(location) = &teacher.model else {
            let network = load_network(
                teacher.weights.as_deref().context("the run names no teacher")?,
                teacher.sha256.as_deref(),
                device,
            )?;
            return Ok(Self { network: Box::new(network), latent: None });
        };
        let path = fetch_model(location).with_context(|| format!("teacher.model {location}"))?;
        let keeps = spec.prompts.as_ref().is_some_and(|prompts| prompts.cache.is_some())
            || spec.adversarial.as_ref().is_some_and(|adversarial| adversarial.cache.is_some());
        let digest = match teacher.sha256.is_some() || keeps {
            true => Some(sha256_of(&path).with_context(|| format!("cannot read {}", path.display()))?),
            false => None,
        };
        if let (Some(expected), Some(found)) = (&teacher.sha256, &digest) {
            ensure!(
                found == expected,
                "the teacher's folder {} has SHA-256 {found} on this machine, but the run was started with {expected}",
                path.display()
            );
        }
        let recompute = spec.memory.recompute;
        let mut model = Self::from_folder(&path, teacher.image_size, recompute, device)?;
        if let Some(latent) = &mut model.latent {
            latent.digest = digest;
        }
        Ok(model)
    }

    /// A text-to-image model from a folder on this machine; `image_size` is height and width of its images where they are not what
    /// it was trained on. With `recompute` the network and its copies keep no activations of their blocks.
    ///
    /// # Errors
    /// As [`load`](Self::load); sides that the autoencoder and the U-Net cannot halve as often as they do.
    pub fn from_folder(
        path: &Path,
        image_size: Option<[u32; 2]>,
        recompute: bool,
        device: Device,
    ) -> anyhow::Result<Self> {
        let folder = ModelFolder::open(path)?;
        let conditioner = folder.text(device)?;
        folder.check(&conditioner)?;
        let autoencoder = folder.autoencoder(device)?;
        let mut network = folder.denoiser(device)?.with_recomputation(recompute);
        if let Some(sides) = image_size {
            let cell = autoencoder.config().downscale();
            ensure!(
                sides.iter().all(|side| i64::from(*side) % cell == 0),
                "teacher.image_size {sides:?}: the autoencoder of {} needs multiples of {cell}",
                path.display()
            );
            network = network.with_sides(sides.map(|side| i64::from(side) / cell));
        }
        let latent = Latent { folder, autoencoder, conditioner, digest: None };
        Ok(Self { network: Box::new(network), latent: Some(latent) })
    }

    /// A network that needs nothing around it.
    pub fn plain(network: impl Denoiser + 'static) -> Self {
        Self { network: Box::new(network), latent: None }
    }

    /// The weights.
    pub fn parameters(&self) -> &Parameters {
        self.network.parameters()
    }

    /// The network alone, and the space of its samples. `prompts` are what a text-to-image model is shown, `captions` what real
    /// images say beside them, `evaluation` what it is scored on where that is something else.
    ///
    /// # Errors
    /// The prompts cannot be read; a text-to-image model without any.
    pub fn into_space(
        self,
        prompts: Option<Wanted>,
        captions: Vec<String>,
        evaluation: Option<Wanted>,
    ) -> anyhow::Result<(Box<dyn Denoiser>, Space)> {
        let (sample, classes) = (self.network.sample_shape(), self.network.classes());
        let Some(latent) = self.latent else {
            return Ok((self.network, Space { sample, classes, texts: None }));
        };
        let prompts = prompts.context("a text-to-image model needs prompts")?;
        let [_, height, width] = latent.autoencoder.config().image_shape([sample[1], sample[2]]);
        let digest = latent.digest.as_deref();
        let (prompts, evaluation) =
            Prompts::new(prompts, captions, evaluation, latent.conditioner, [height, width], digest)?;
        let texts = Texts { autoencoder: latent.autoencoder, prompts, evaluation, digest: latent.digest };
        Ok((self.network, Space { sample, classes, texts: Some(Rc::new(texts)) }))
    }
}

/// Which prompts a text-to-image model is shown.
pub enum Wanted<'a> {
    /// Those of a file.
    File(&'a PromptsSpec),
    /// Those of another file for its evaluation: `data` and `column`, the rest as for the file that training draws
    /// from.
    Evaluation {
        /// The training's.
        like: &'a PromptsSpec,
        /// As [`PromptsSpec::data`].
        data: &'a str,
        /// As [`PromptsSpec::column`].
        column: &'a str,
    },
    /// These.
    These(Vec<String>),
}

impl<'a> Wanted<'a> {
    /// What a run is scored on where it says so.
    pub fn evaluation(spec: &'a RunSpec) -> Option<Self> {
        let (like, e) = (spec.prompts.as_ref()?, &spec.evaluation);
        let column = e.prompts_column.as_ref().unwrap_or(&like.column);
        Some(Self::Evaluation { like, data: e.prompts.as_deref()?, column })
    }
}

/// What a network's samples are, and what they are made for.
#[derive(Clone)]
pub struct Space {
    /// Channels, height, width of a sample.
    pub sample: [i64; 3],
    /// Classes of a class-conditional network, else 0.
    pub classes: i64,
    texts: Option<Rc<Texts>>,
}

struct Texts {
    autoencoder: Autoencoder,
    prompts: Prompts,
    /// What it is scored on, where that is something else.
    evaluation: Option<Prompts>,
    /// SHA-256 of the model, where somebody asked for it.
    digest: Option<String>,
}

impl Space {
    /// Of a network that makes images from classes, or from nothing.
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

    /// Whether a sample can be made for something, so that guidance means something.
    pub fn is_conditional(&self) -> bool {
        self.classes > 0 || self.texts.is_some()
    }

    /// The prompts of a text-to-image model.
    pub fn prompts(&self) -> Option<&Prompts> {
        self.texts.as_ref().map(|texts| &texts.prompts)
    }

    /// The prompts that a text-to-image model is scored on.
    pub fn evaluation_prompts(&self) -> Option<&Prompts> {
        let texts = self.texts.as_ref()?;
        Some(texts.evaluation.as_ref().unwrap_or(&texts.prompts))
    }

    /// Samples [N, C, H, W] as images fp32 in [−1, 1]: of latents one image at a time, in tiles where they are large.
    pub fn images(&self, samples: &Tensor) -> Tensor {
        let Some(texts) = &self.texts else { return samples.shallow_clone() };
        let images: Vec<Tensor> = no_grad(|| {
            samples
                .split(1, 0)
                .iter()
                .map(|one| texts.autoencoder.decode_tiled(one).clamp(-1.0, 1.0))
                .collect()
        });
        Tensor::cat(&images, 0)
    }

    /// Real images whose captions are those that this space was made with, as the adversarial loss of a text-to-image model sees
    /// them; with a folder their latents are kept there.
    ///
    /// # Errors
    /// The model is none; the folder cannot be written.
    pub fn real_pairs(&self, pairs: Vec<Pair>, cache: Option<&Path>) -> anyhow::Result<RealPairs> {
        let texts = self.texts.as_ref().context("image-text pairs are for text-to-image models")?;
        let [_, height, width] = self.image_shape();
        let cache = match cache {
            Some(folder) => Some((
                folder,
                texts
                    .digest
                    .as_deref()
                    .context("the model's folder was not hashed, which names what is kept")?,
            )),
            None => None,
        };
        RealPairs::new(Rc::clone(texts), pairs, [height, width], cache)
    }

    /// What training draws its conditions from.
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

/// Reads an EDM network and checks that it is the one the run was started with.
///
/// # Errors
/// The file is missing, damaged, or another one.
pub fn load_network(path: &Path, sha256: Option<&str>, device: Device) -> anyhow::Result<EdmNetwork> {
    if let Some(expected) = sha256 {
        let found = sha256_of(path)
            .with_context(|| format!("cannot read the teacher's weights {}", path.display()))?;
        ensure!(
            found == expected,
            "the teacher's weights {} have SHA-256 {found} on this machine, but the run was started with {expected}",
            path.display()
        );
    }
    EdmNetwork::load(path, device).context("teacher's weights")
}

/// The U-Net of a text-to-image model in a folder.
///
/// # Errors
/// The folder's.
pub fn load_unet(path: &Path, device: Device) -> anyhow::Result<LatentDenoiser> {
    Ok(ModelFolder::open(path)?.denoiser(device)?)
}
