//! Loading models: an EDM network, or a text-to-image model with its text encoders and autoencoder.

pub mod adapters;
mod cache;
mod composed;
mod location;
mod lock;
mod prompts;
mod real_pairs;
mod row_cache;
mod space;
mod steps;
pub mod student;
mod watched;

use std::{path::Path, rc::Rc};

use anyhow::{Context, bail, ensure};
use potstill_models::{
    Denoiser, EdmNetwork, Parameters,
    diffusers::{Autoencoder, LatentDenoiser, ModelFolder, TextConditioner},
    weights::Mapped,
};
use potstill_spec::RunSpec;
use potstill_storage::digest::sha256_of;
use tch::{Device, Kind};

use self::space::Texts;
pub use self::{
    composed::teacher_folder,
    prompts::{Prompts, Wanted},
    space::Space,
    steps::{initial_timestep, is_stock, times},
    watched::Watched,
};
use crate::process::work;

/// A network, and for a text-to-image model its text encoders and autoencoder.
pub struct Model {
    /// The network, with weights of its own.
    pub network: Box<dyn Denoiser>,
    /// Only for a text-to-image model.
    pub latent: Option<Latent>,
    /// The network's weights, where it has none in memory.
    pub files: Option<Mapped>,
}

/// The parts of a text-to-image model beside its U-Net.
pub struct Latent {
    /// The folder from which it was loaded.
    pub folder: ModelFolder,
    /// Images ↔ latents.
    pub autoencoder: Autoencoder,
    /// Texts → conditions.
    pub conditioner: TextConditioner,
    /// SHA-256 of the folder, where it was computed.
    digest: Option<String>,
}

impl Model {
    /// Loads the teacher that a run names, a text-to-image model's with weights of this data type, and checks that it is the one
    /// with which the run was started.
    ///
    /// # Errors
    /// It is missing, damaged, another one, or of a kind that is not supported.
    pub fn load(spec: &RunSpec, kind: Kind, device: Device) -> anyhow::Result<Self> {
        Self::of_run(spec, false, (kind, device))
    }

    /// The same without the network's weights, which stay in their [files](Self::files): where each rank needs a part of
    /// them.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_divided(spec: &RunSpec, device: Device) -> anyhow::Result<Self> {
        Self::of_run(spec, true, (Kind::Float, device))
    }

    fn of_run(spec: &RunSpec, divided: bool, weights: (Kind, Device)) -> anyhow::Result<Self> {
        let (_, device) = weights;
        let teacher = &spec.teacher;
        if teacher.model.is_none() {
            let network = load_network(
                teacher.weights.as_deref().context("the run names no teacher")?,
                teacher.sha256.as_deref(),
                device,
            )?;
            finite(&network)?;
            return Ok(Self::plain(network));
        }
        let keeps = spec.prompts.as_ref().is_some_and(|prompts| prompts.cache.is_some())
            || spec.adversarial.as_ref().is_some_and(|adversarial| adversarial.cache.is_some());
        let found = teacher_folder(teacher, keeps)?;
        let recompute = spec.memory.recompute;
        let mut model = Self::of_folder(&found.path, teacher.image_size, recompute, divided, weights)
            .map_err(|error| found.named(error))?;
        match &model.files {
            None => finite(model.network.as_ref())?,
            Some(files) => {
                let found = files.first_not_finite(model.parameters().entries());
                found.map_or(Ok(()), not_finite)?;
            }
        }
        if let Some(latent) = &mut model.latent {
            latent.digest = found.digest;
        }
        Ok(model)
    }

    /// Loads a text-to-image model from a folder on this machine; `image_size` is height and width of its images, if
    /// they differ from those it was trained on. With `recompute` the network and its copies keep no activations of
    /// their blocks.
    ///
    /// # Errors
    /// As [`load`](Self::load); sides that are not a multiple of the autoencoder's and the U-Net's downsampling.
    pub fn from_folder(
        path: &Path,
        image_size: Option<[u32; 2]>,
        recompute: bool,
        device: Device,
    ) -> anyhow::Result<Self> {
        Self::of_folder(path, image_size, recompute, false, (Kind::Float, device))
    }

    fn of_folder(
        path: &Path,
        image_size: Option<[u32; 2]>,
        recompute: bool,
        divided: bool,
        weights: (Kind, Device),
    ) -> anyhow::Result<Self> {
        let (kind, device) = weights;
        let folder = ModelFolder::open(path)?;
        let conditioner = folder.text(device)?;
        folder.check(&conditioner)?;
        work::complete();
        let autoencoder = folder.autoencoder(device)?;
        work::complete();
        let (network, files) = match divided {
            true => folder.mapped_denoiser(device).map(|(network, files)| (network, Some(files)))?,
            false => (folder.denoiser_of(kind, device)?, None),
        };
        let mut network = network.with_recomputation(recompute);
        work::complete();
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
        Ok(Self { network: Box::new(network), latent: Some(latent), files })
    }

    /// An EDM network, which needs no other parts.
    pub fn plain(network: impl Denoiser + 'static) -> Self {
        Self { network: Box::new(network), latent: None, files: None }
    }

    /// The weights.
    pub fn parameters(&self) -> &Parameters {
        self.network.parameters()
    }

    /// The network, and the space of its samples. `prompts` are the prompts of training, `captions` those of real
    /// images, `evaluation` the prompts of the evaluation if they differ.
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

/// Checks that all weights of a teacher are numbers.
fn finite(network: &dyn Denoiser) -> anyhow::Result<()> {
    let parameters = network.parameters();
    for (entry, leaf) in parameters.entries().iter().zip(parameters.leaves()) {
        let all = bool::try_from(leaf.isfinite().all())?;
        if !all {
            return not_finite(&entry.name);
        }
    }
    Ok(())
}

fn not_finite(name: &str) -> anyhow::Result<()> {
    bail!("the teacher's weights are not finite, such as {name}: the file is damaged, or it diverged")
}

/// Loads an EDM network and checks that it is the one with which the run was started.
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

/// The data type of the weights of a run's networks.
pub fn weights_kind(spec: &RunSpec) -> Kind {
    if spec.memory.bf16_weights { Kind::BFloat16 } else { Kind::Float }
}

/// Loads the U-Net of a text-to-image model's folder, with weights of this data type.
///
/// # Errors
/// The folder's error.
pub fn load_unet(path: &Path, kind: Kind, device: Device) -> anyhow::Result<LatentDenoiser> {
    Ok(ModelFolder::open(path)?.denoiser_of(kind, device)?)
}
