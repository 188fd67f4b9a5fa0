//! The networks of EDM (2206.00364): preconditioning around a DDPM++, NCSN++ or ADM U-Net.
//!
//! Parameters and buffers have the names and the order of the public checkpoints.

mod block;
pub mod config;
mod dhariwal_unet;
mod error;
mod inputs;
mod layers;
mod preconditioning;
mod song_unet;
mod unet;
mod validate;

use std::{collections::BTreeMap, path::Path};

use tch::{Device, Kind, Tensor};

pub use self::error::ConfigError;
use self::{config::EdmConfig, inputs::Inputs, preconditioning::Coefficients, unet::UNet};
use crate::{
    builder::Scope,
    denoiser::{Condition, Denoiser, Mode},
    lora::{
        Lora, LoraError,
        weights::{AdapterDeclaration, Weights},
    },
    masks,
    parameters::Parameters,
    process::ForwardProcess,
    weights::{self, Archive, LoadError, Stored},
};

/// All products inside the blocks, and those of the embedding of noise levels.
const LORA_TARGETS: &[&str] =
    &["conv0", "conv1", "skip", "affine", "qkv", "proj", "map_layer0", "map_layer1"];

/// An EDM network: `D(x, σ) = c_skip·x + c_out·F(c_in·x, ln(σ)/4)` with a U-Net `F` (2206.00364, eq. 7). Time is σ.
pub struct EdmNetwork {
    config: EdmConfig,
    process: ForwardProcess,
    weights: Weights,
    unet: UNet,
}

impl EdmNetwork {
    /// A new network with the official distributions of initial weights, drawn from `seed`. The same seed gives the
    /// same weights on every platform; the official code draws other numbers from the same distributions.
    ///
    /// # Errors
    /// The configuration is not that of a valid network.
    pub fn initialise(config: EdmConfig, seed: u64, device: Device) -> Result<Self, ConfigError> {
        config.validate()?;
        let parameters = config.declare()?.draw(seed, device);
        Ok(Self::bind(config, Weights::own(parameters)))
    }

    /// Reads a file that [`to_safetensors`](Denoiser::to_safetensors) made.
    ///
    /// # Errors
    /// [`LoadError`], with the path.
    pub fn load(path: &Path, device: Device) -> Result<Self, LoadError> {
        let bytes = weights::read(path)?;
        Self::from_bytes(&bytes, device).map_err(|e| e.in_file(path))
    }

    /// [`load`](Self::load) from a file's bytes.
    ///
    /// # Errors
    /// [`LoadError`]: the file is damaged, has no configuration, or tensors that do not fit it, each of them named.
    pub fn from_bytes(bytes: &[u8], device: Device) -> Result<Self, LoadError> {
        let archive = Archive::from_bytes(bytes)?;
        let config = archive.metadata.get(weights::CONFIG_KEY).ok_or(LoadError::NoConfig)?;
        let config = serde_json::from_str(config).map_err(LoadError::ConfigSyntax)?;
        Self::from_tensors(config, &archive.tensors, device)
    }

    /// A network with given parameters and buffers, which are copied. They must be exactly those of the configuration,
    /// in fp32 or a type that fp32 can represent.
    ///
    /// # Errors
    /// [`LoadError::Config`] and [`LoadError::Tensors`].
    pub fn from_tensors(
        config: EdmConfig,
        tensors: &BTreeMap<String, Tensor>,
        device: Device,
    ) -> Result<Self, LoadError> {
        let stored = tensors.iter().map(|(name, t)| (name.clone(), Stored::Memory(t.shallow_clone())));
        let parameters = weights::assemble(
            config.declare()?,
            &stored.collect(),
            weights::Surplus::Refused,
            (Kind::Float, device),
        )?;
        Ok(Self::bind(config, Weights::own(parameters)))
    }

    /// The network with parameters that were declared by this configuration.
    fn bind(config: EdmConfig, weights: Weights) -> Self {
        let mut binding = weights.binding();
        let unet = UNet::new(&mut Scope::root(&mut binding).child("model"), &config);
        let process = ForwardProcess::Edm { sigma_data: config.sigma_data };
        Self { config, process, weights, unet }
    }

    fn rebind(&self, flat: Tensor, trainable: bool) -> Self {
        Self::bind(self.config.clone(), self.weights.over(flat, trainable))
    }

    /// The architecture.
    #[must_use]
    pub fn config(&self) -> &EdmConfig {
        &self.config
    }

    /// Runs a pass, with the dropout of adapters in training mode.
    fn masked<T>(&self, mode: Mode, pass: impl FnOnce() -> T) -> T {
        masks::pass(mode != Mode::Eval && self.weights.has_dropout(), pass)
    }

    fn coefficients(&self, time: &Tensor) -> Coefficients {
        Coefficients::new(&time.to_kind(Kind::Float).reshape([-1]), self.config.sigma_data)
    }

    fn inputs<'a>(&self, coefficients: &'a Coefficients, condition: &Condition, mode: Mode) -> Inputs<'a> {
        let (condition, augment_labels) = condition.split_augmentation();
        let labels = match condition {
            Condition::None => None,
            Condition::Class(labels) => Some(labels),
            Condition::Text(_) => panic!("an EDM network takes classes, not text embeddings"),
            Condition::Augmented { .. } => panic!("a sample has augmentation labels once"),
        };
        Inputs {
            noise: &coefficients.noise,
            labels: self.side_input("class", labels, self.config.label_dim),
            augment: self.side_input("augmentation", augment_labels, self.config.augment_dim),
            mode,
        }
    }

    /// Given or all-zero labels of a network that takes them. Zeros, so that the layer for labels is used and gets a
    /// gradient.
    fn side_input(&self, what: &str, given: Option<&Tensor>, width: i64) -> Option<Tensor> {
        match given {
            Some(labels) if width > 0 => {
                let given = labels.size().last().copied();
                assert_eq!(given, Some(width), "{what} labels of another width than the network's");
                Some(labels.to_kind(Kind::Float))
            }
            Some(_) => panic!("{what} labels given to a network that takes none"),
            None => {
                let device = self.weights.base().flat().device();
                (width > 0).then(|| Tensor::zeros([1, width], (Kind::Float, device)))
            }
        }
    }
}

impl Denoiser for EdmNetwork {
    fn denoise_and_encode(
        &self,
        x_t: &Tensor,
        time: &Tensor,
        condition: &Condition,
        mode: Mode,
    ) -> (Tensor, Tensor) {
        let x = x_t.to_kind(Kind::Float);
        let coefficients = self.coefficients(time);
        let inputs = self.inputs(&coefficients, condition, mode);
        let (output, bottleneck) =
            self.masked(mode, || self.unet.forward(&coefficients.network_input(&x), &inputs));
        // Under mixed precision the U-Net's outputs are of lower precision; computations with them are in fp32.
        (coefficients.denoised(&x, &output.to_kind(Kind::Float)), bottleneck.to_kind(Kind::Float))
    }

    fn encode(&self, x_t: &Tensor, time: &Tensor, condition: &Condition, mode: Mode) -> Tensor {
        let coefficients = self.coefficients(time);
        let inputs = self.inputs(&coefficients, condition, mode);
        let input = coefficients.network_input(&x_t.to_kind(Kind::Float));
        self.masked(mode, || self.unet.bottleneck(&input, &inputs)).to_kind(Kind::Float)
    }

    fn process(&self) -> &ForwardProcess {
        &self.process
    }

    fn parameters(&self) -> &Parameters {
        self.weights.trained()
    }

    fn adapted(
        &self,
        lora: &Lora,
        draw: &mut dyn FnMut(&[i64]) -> Tensor,
    ) -> Result<Box<dyn Denoiser>, LoraError> {
        let targets = lora.targets_of(LORA_TARGETS);
        let mut declaration = AdapterDeclaration::new(lora, &targets);
        UNet::new(&mut Scope::root(&mut declaration).child("model"), &self.config);
        let weights = self.weights.adapted(lora, declaration.finish()?, draw);
        Ok(Box::new(Self::bind(self.config.clone(), weights)))
    }

    fn merged(&self) -> Box<dyn Denoiser> {
        Box::new(Self::bind(self.config.clone(), Weights::own(self.weights.merged())))
    }

    fn sample_shape(&self) -> [i64; 3] {
        [self.config.img_channels, self.config.img_resolution, self.config.img_resolution]
    }

    fn classes(&self) -> i64 {
        self.config.label_dim
    }

    fn augment_dim(&self) -> i64 {
        self.config.augment_dim
    }

    fn time_range(&self) -> [f64; 2] {
        [self.config.sigma_min, self.config.sigma_max]
    }

    fn over(&self, flat: Tensor, trainable: bool) -> Box<dyn Denoiser> {
        Box::new(self.rebind(flat, trainable))
    }

    fn config_json(&self) -> String {
        serde_json::to_string(&self.config).unwrap_or_else(|e| unreachable!("plain numbers and names: {e}"))
    }
}
