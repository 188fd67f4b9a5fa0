//! The U-Net of a latent diffusion model as a denoiser.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::{
    config::ConfigError,
    original::names,
    schedule::ScheduleConfig,
    unet::{UNet, UNetConfig, UNetInputs},
};
use crate::{
    builder::{Declaration, Scope},
    denoiser::{Condition, Denoiser, Mode},
    gate::{Gate, absent},
    lora::{
        Lora, LoraError,
        file::Layers,
        weights::{AdapterDeclaration, Weights},
    },
    masks,
    parameters::{Entry, Parameters},
    process::ForwardProcess,
    weights::{self, LoadError, Mapped, Named, Surplus},
};

/// A text-conditional U-Net over latents, on the DDPM process of its schedule. Time is the timestep.
pub struct LatentDenoiser {
    config: UNetConfig,
    schedule: ScheduleConfig,
    process: ForwardProcess,
    sides: [i64; 2],
    recompute: bool,
    weights: Weights,
    unet: UNet,
}

/// The layers that DMD2 (2405.14867) adapts in SDXL's U-Net, by its public training code.
const LORA_TARGETS: &[&str] = &[
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
];

/// Default sides of a latent: those of SD's first models.
const DEFAULT_SIDES: [i64; 2] = [64, 64];

impl LatentDenoiser {
    /// A new network with PyTorch's distributions of initial weights, drawn from `seed`.
    ///
    /// # Errors
    /// The configuration is not that of a valid network.
    pub fn initialise(
        config: UNetConfig,
        schedule: ScheduleConfig,
        seed: u64,
        device: Device,
    ) -> Result<Self, ConfigError> {
        let parameters = declare(&config)?.draw(seed, device);
        Ok(Self::bind(config, schedule, Weights::own(parameters)))
    }

    /// A network from named tensors, which must be exactly those of the configuration, with weights of this data type.
    ///
    /// # Errors
    /// [`LoadError`], with one line for each tensor that does not fit.
    pub fn from_tensors(
        config: UNetConfig,
        schedule: ScheduleConfig,
        tensors: &Named,
        options: (Kind, Device),
    ) -> Result<Self, LoadError> {
        let parameters = weights::assemble(declare(&config)?, tensors, Surplus::Refused, options)?;
        Ok(Self::bind(config, schedule, Weights::own(parameters)))
    }

    /// A network without weights in memory, whose leaves are to be [redirected](crate::gate::redirect), and its weights.
    ///
    /// # Errors
    /// As [`from_tensors`](Self::from_tensors).
    pub fn mapped(
        config: UNetConfig,
        schedule: ScheduleConfig,
        tensors: Named,
        device: Device,
    ) -> Result<(Self, Mapped), LoadError> {
        let declaration = declare(&config)?;
        weights::check(&declaration, &tensors, Surplus::Refused)?;
        let mapped = Mapped::new(declaration.entries(), tensors);
        let flat = absent(declaration.numel(), (Kind::Float, device));
        // The network has no buffers.
        let parameters = declaration.parameters(flat, BTreeMap::new());
        Ok((Self::bind(config, schedule, Weights::own(parameters)), mapped))
    }

    fn bind(config: UNetConfig, schedule: ScheduleConfig, weights: Weights) -> Self {
        let unet = UNet::new(&mut Scope::root(&mut weights.binding()), &config);
        let sides = config.sides();
        // Not in the middle of a pass, whose memory may be overwritten when it is repeated.
        let process = schedule.process().prepared(weights.base().flat().device());
        Self { config, schedule, process, sides, recompute: false, weights, unet }
    }

    /// The same network with other weights.
    fn rebind(&self, weights: Weights) -> Box<dyn Denoiser> {
        let made = Self::bind(self.config.clone(), self.schedule.clone(), weights);
        Box::new(made.with_sides(self.sides).with_recomputation(self.recompute))
    }

    /// The same network for latents of another height and width than the configuration's.
    #[must_use]
    pub fn with_sides(mut self, sides: [i64; 2]) -> Self {
        self.sides = sides;
        self
    }

    /// Sets whether activations are computed again in the backward pass instead of being kept; also for all later
    /// copies.
    #[must_use]
    pub fn with_recomputation(mut self, recompute: bool) -> Self {
        self.recompute = recompute;
        self
    }

    /// The architecture.
    #[must_use]
    pub fn config(&self) -> &UNetConfig {
        &self.config
    }

    /// The native prediction [N, C, H, W] and the bottleneck under any condition.
    pub fn predict(&self, x_t: &Tensor, inputs: &UNetInputs) -> (Tensor, Tensor) {
        self.unet.forward(&x_t.to_kind(self.kind()), inputs)
    }

    /// The data type of the weights, in which the network computes.
    fn kind(&self) -> Kind {
        self.weights.base().flat().kind()
    }

    /// Runs a pass, with the dropout of adapters in training mode.
    fn masked<T>(&self, mode: Mode, pass: impl FnOnce() -> T) -> T {
        masks::pass(mode != Mode::Eval && self.weights.has_dropout(), pass)
    }

    /// Calls `forward` with the inputs of the condition.
    fn conditioned<T>(
        &self,
        time: &Tensor,
        condition: &Condition,
        forward: impl FnOnce(&UNetInputs) -> T,
    ) -> T {
        let text = match condition {
            Condition::Text(text) => text,
            Condition::Augmented { .. } => panic!("augmentation labels given to a network that takes none"),
            Condition::None | Condition::Class(_) => panic!("a text-to-image network needs text embeddings"),
        };
        let embedded = text.embedded();
        let text_time = match (&embedded.pooled, text.sizes()) {
            (Some(pooled), Some(sizes)) if self.config.takes_text_time() => Some((pooled, sizes)),
            _ => None,
        };
        let indices = time.to_kind(Kind::Float).round();
        let states = embedded.states.to_kind(self.kind());
        forward(&UNetInputs {
            time: &indices,
            states: &states,
            text_time,
            class_labels: None,
            recompute: self.recompute,
        })
    }
}

impl UNetConfig {
    /// Number of parameters of such a network.
    ///
    /// # Errors
    /// The configuration is not that of a valid network.
    pub fn size(&self) -> Result<i64, ConfigError> {
        Ok(declare(self)?.numel())
    }

    /// Number of parameters of each of the [blocks](Denoiser::blocks) of such a network.
    ///
    /// # Errors
    /// The configuration is not that of a valid network.
    pub fn block_sizes(&self) -> Result<Vec<i64>, ConfigError> {
        let (declaration, unet) = declared(self)?;
        let size = |leaves: Range<usize>| declaration.entries()[leaves].iter().map(Entry::numel).sum();
        Ok(unet.blocks().iter().map(|block| size(block.leaves(declaration.entries()))).collect())
    }

    /// Names and shapes of the tensors of such a network.
    ///
    /// # Errors
    /// The configuration is not that of a valid network.
    pub(crate) fn tensors(&self) -> Result<Vec<(String, Vec<i64>)>, ConfigError> {
        Ok(declare(self)?.named_shapes())
    }

    /// The layers of such a network for files of adapters, which call them by their names here or in the original layout.
    pub(crate) fn layers_of<'a>(&self, tensors: impl Iterator<Item = (&'a str, &'a [i64])>) -> Layers {
        let layers = Layers::new("unet", tensors);
        let modules: Vec<String> = layers.modules().map(str::to_owned).collect();
        layers.also(names::modules(self, modules.iter().map(String::as_str)))
    }

    /// Number of parameters of the adapters of such a network.
    ///
    /// # Errors
    /// As [`Denoiser::adapted`].
    pub fn lora_size(&self, lora: &Lora) -> Result<i64, LoraError> {
        Ok(declare_adapters(self, lora)?.numel())
    }

    /// Height and width of the latents that it was trained on.
    #[must_use]
    pub fn sides(&self) -> [i64; 2] {
        self.sample_size.map_or(DEFAULT_SIDES, |size| size.sides())
    }
}

fn declare_adapters(config: &UNetConfig, lora: &Lora) -> Result<Declaration, LoraError> {
    let targets = lora.targets_of(LORA_TARGETS);
    let mut declaration = AdapterDeclaration::new(lora, &targets);
    UNet::new(&mut Scope::root(&mut declaration), config);
    declaration.finish()
}

fn declare(config: &UNetConfig) -> Result<Declaration, ConfigError> {
    Ok(declared(config)?.0)
}

/// A declaration, and a network of placeholders.
fn declared(config: &UNetConfig) -> Result<(Declaration, UNet), ConfigError> {
    let mut declaration = Declaration::default();
    let unet = UNet::new(&mut Scope::root(&mut declaration), config);
    match declaration.problems() {
        [] => Ok((declaration, unet)),
        problems => Err(ConfigError::Problems { problems: problems.to_vec() }),
    }
}

impl Denoiser for LatentDenoiser {
    fn denoise_and_encode(
        &self,
        x_t: &Tensor,
        time: &Tensor,
        condition: &Condition,
        mode: Mode,
    ) -> (Tensor, Tensor) {
        let predict = |inputs: &UNetInputs| self.masked(mode, || self.predict(x_t, inputs));
        let (native, bottleneck) = self.conditioned(time, condition, predict);
        // Under mixed precision the U-Net's outputs are of lower precision; computations with them are in fp32.
        let x0 = self.process.to_x0(&native.to_kind(Kind::Float), &x_t.to_kind(Kind::Float), time);
        (x0, bottleneck.to_kind(Kind::Float))
    }

    fn encode(&self, x_t: &Tensor, time: &Tensor, condition: &Condition, mode: Mode) -> Tensor {
        let x = x_t.to_kind(self.kind());
        let encode = |inputs: &UNetInputs| self.masked(mode, || self.unet.bottleneck(&x, inputs));
        let bottleneck = self.conditioned(time, condition, encode);
        bottleneck.to_kind(Kind::Float)
    }

    fn process(&self) -> &ForwardProcess {
        &self.process
    }

    fn parameters(&self) -> &Parameters {
        self.weights.trained()
    }

    fn base(&self) -> &Parameters {
        self.weights.base()
    }

    fn blocks(&self) -> Vec<Range<usize>> {
        let entries = self.weights.base().entries();
        self.unet.blocks().iter().map(|block| block.leaves(entries)).collect()
    }

    fn set_gate(&self, gate: &Arc<dyn Gate>) {
        assert!(self.recompute, "only blocks that are computed again can be left between their passes");
        for (number, block) in self.unet.blocks().into_iter().enumerate() {
            block.set_place((Arc::clone(gate), number));
        }
    }

    fn rebased(&self, flat: Tensor) -> Box<dyn Denoiser> {
        self.rebind(self.weights.rebased(flat))
    }

    fn adapted(
        &self,
        lora: &Lora,
        draw: &mut dyn FnMut(&[i64]) -> Tensor,
    ) -> Result<Box<dyn Denoiser>, LoraError> {
        let declared = declare_adapters(&self.config, lora)?;
        Ok(self.rebind(self.weights.adapted(lora, declared, draw)))
    }

    fn layers(&self) -> Layers {
        self.config
            .layers_of(self.weights.base().entries().iter().map(|e| (e.name.as_str(), e.shape.as_slice())))
    }

    fn merged(&self) -> Box<dyn Denoiser> {
        self.rebind(Weights::own(self.weights.merged()))
    }

    fn sample_shape(&self) -> [i64; 3] {
        [self.config.in_channels, self.sides[0], self.sides[1]]
    }

    fn classes(&self) -> i64 {
        0
    }

    fn time_range(&self) -> [f64; 2] {
        match &self.process {
            ForwardProcess::Ddpm { alphas_cumprod, .. } => [0.0, (alphas_cumprod.len() - 1) as f64],
            _ => [0.0, f64::INFINITY],
        }
    }

    fn over(&self, flat: Tensor, trainable: bool) -> Box<dyn Denoiser> {
        self.rebind(self.weights.over(flat, trainable))
    }

    fn config_json(&self) -> String {
        json!({ "unet": self.config, "scheduler": self.schedule }).to_string()
    }
}
