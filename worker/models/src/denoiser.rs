//! The interface between networks and the code that uses them.

use std::{collections::BTreeMap, ops::Range, rc::Rc, sync::Arc};

use tch::{Kind, Tensor};

use crate::{
    gate::Gate,
    lora::{Lora, LoraError, file::Layers},
    parameters::Parameters,
    process::ForwardProcess,
    weights::{self, SaveError},
};

/// The condition of a sample.
pub enum Condition {
    /// No condition: the unconditional prediction, also of a class-conditional network.
    None,
    /// One-hot class labels, fp32, [N, classes]. An all-zero row is unconditional.
    Class(Tensor),
    /// Text embeddings.
    Text(TextCondition),
    /// Augmented samples (2206.00364, appendix F.2); [`augmented`](Self::augmented) makes it.
    Augmented {
        /// The transforms of each sample, fp32 [N, `augment_dim`]. An all-zero row means none, like absent labels.
        labels: Tensor,
        /// The condition of the samples besides.
        of: Box<Condition>,
    },
}

/// Text embeddings in the form that a network takes.
#[derive(Debug)]
pub struct Embedded {
    /// [N, tokens, width].
    pub states: Tensor,
    /// SDXL's pooled output, [N, width].
    pub pooled: Option<Tensor>,
}

impl Embedded {
    /// Another handle to the same tensors.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        self.map(Tensor::shallow_clone)
    }

    /// Applies a function to each tensor.
    #[must_use]
    pub fn map(&self, mut f: impl FnMut(&Tensor) -> Tensor) -> Self {
        Self { states: f(&self.states), pooled: self.pooled.as_ref().map(f) }
    }

    /// Applies a function to each tensor and its counterpart.
    fn zip(&self, other: &Self, f: impl Fn(&Tensor, &Tensor) -> Tensor) -> Self {
        let pooled = self.pooled.as_ref().zip(other.pooled.as_ref()).map(|(a, b)| f(a, b));
        Self { states: f(&self.states, &other.states), pooled }
    }
}

/// Text embeddings, those of the empty text, and SDXL's micro-conditioning.
pub struct TextCondition {
    texts: Embedded,
    null: Rc<Embedded>,
    sizes: Option<Tensor>,
}

impl TextCondition {
    /// `texts` of N samples; `null` replaces the text of a sample whose condition is dropped and has one row; `sizes`,
    /// [N, 6], are SDXL's micro-conditioning (2307.01952, section 2.2): original height and width, top and left of the
    /// crop, target height and width.
    #[must_use]
    pub fn new(texts: Embedded, null: Rc<Embedded>, sizes: Option<Tensor>) -> Self {
        Self { texts, null, sizes }
    }

    /// The texts.
    #[must_use]
    pub fn embedded(&self) -> &Embedded {
        &self.texts
    }

    /// SDXL's micro-conditioning.
    #[must_use]
    pub fn sizes(&self) -> Option<&Tensor> {
        self.sizes.as_ref()
    }

    fn with_texts(&self, texts: Embedded) -> Self {
        let sizes = self.sizes.as_ref().map(Tensor::shallow_clone);
        Self { texts, null: Rc::clone(&self.null), sizes }
    }
}

impl Condition {
    /// The same condition for samples with the augmentation labels `labels`, fp32 [N, `augment_dim`]. They replace
    /// labels that it already has.
    #[must_use]
    pub fn augmented(self, labels: Tensor) -> Self {
        match self {
            Self::Augmented { of, .. } => Self::Augmented { labels, of },
            other => Self::Augmented { labels, of: Box::new(other) },
        }
    }

    /// The condition without augmentation labels, and the labels.
    #[must_use]
    pub fn split_augmentation(&self) -> (&Self, Option<&Tensor>) {
        match self {
            Self::Augmented { labels, of } => (of, Some(labels)),
            other => (other, None),
        }
    }

    /// Another handle to the same condition.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        match self {
            Self::Augmented { labels, of } => of.shallow_clone().augmented(labels.shallow_clone()),
            Self::None => Self::None,
            Self::Class(labels) => Self::Class(labels.shallow_clone()),
            Self::Text(text) => Self::Text(text.with_texts(text.texts.shallow_clone())),
        }
    }

    /// Applies a function to each tensor that differs from micro-batch to micro-batch, in one order.
    #[must_use]
    pub fn map(&self, f: &mut dyn FnMut(&Tensor) -> Tensor) -> Self {
        match self {
            Self::Augmented { labels, of } => {
                let labels = f(labels);
                of.map(f).augmented(labels)
            }
            Self::None => Self::None,
            Self::Class(labels) => Self::Class(f(labels)),
            Self::Text(text) => {
                let texts = text.texts.map(&mut *f);
                let sizes = text.sizes.as_ref().map(f);
                Self::Text(TextCondition { texts, null: Rc::clone(&text.null), sizes })
            }
        }
    }

    /// All samples without condition. SDXL's micro-conditioning and augmentation labels are kept: they describe the
    /// format of the sample, not its content.
    #[must_use]
    pub fn dropped(&self) -> Self {
        match self {
            Self::Augmented { labels, of } => of.dropped().augmented(labels.shallow_clone()),
            Self::None => Self::None,
            Self::Class(labels) => Self::Class(labels.zeros_like()),
            Self::Text(text) => {
                let texts = text.null.zip(&text.texts, |null, text| null.expand_as(text));
                Self::Text(text.with_texts(texts))
            }
        }
    }

    /// The samples for which `kept`, fp32 [N, 1] of 0 and 1, is 1 keep their condition. All keep their augmentation
    /// labels.
    #[must_use]
    pub fn kept(&self, kept: &Tensor) -> Self {
        match self {
            Self::Augmented { labels, of } => of.kept(kept).augmented(labels.shallow_clone()),
            Self::None => Self::None,
            Self::Class(labels) => Self::Class(labels * kept),
            Self::Text(text) => {
                let texts = text.texts.zip(&text.null, |text, null| {
                    let mut shape = vec![1; text.dim()];
                    shape[0] = -1;
                    text.where_self(&kept.view(shape.as_slice()).gt(0.5), null)
                });
                Self::Text(text.with_texts(texts))
            }
        }
    }

    /// Both halves of a guided prediction as one batch: [`dropped`](Self::dropped) first; both have the augmentation
    /// labels. `None` where there is no condition to drop.
    #[must_use]
    pub fn doubled(&self) -> Option<Self> {
        match self {
            Self::Augmented { labels, of } => {
                of.doubled().map(|both| both.augmented(Tensor::cat(&[labels, labels], 0)))
            }
            Self::None => None,
            Self::Class(labels) => Some(Self::Class(Tensor::cat(&[&labels.zeros_like(), labels], 0))),
            Self::Text(text) => {
                let texts =
                    text.null.zip(&text.texts, |null, text| Tensor::cat(&[&null.expand_as(text), text], 0));
                let sizes = text.sizes.as_ref().map(|sizes| Tensor::cat(&[sizes, sizes], 0));
                Some(Self::Text(TextCondition { texts, null: Rc::clone(&text.null), sizes }))
            }
        }
    }
}

/// Whether dropout is active.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Dropout draws from libtorch's global generator.
    Train,
    /// That of adapters alone, as far as they have [some](crate::Lora::dropout).
    TrainAdapters,
    /// No dropout; the same input gives the same output.
    Eval,
}

/// A network that predicts the clean sample from a noisy one; its native prediction may be another.
pub trait Denoiser {
    /// Predicts x0, fp32 [N, C, H, W].
    ///
    /// `x_t` [N, C, H, W] is the noisy sample, `time` `[N]` or `[1]` the time of the network's [process](Self::process)
    /// (σ for EDM); both may be of any floating kind. Gradients flow to `x_t`, and to the parameters unless the network
    /// is [frozen](Self::frozen). Every call uses every parameter, so that each one gets a gradient.
    ///
    /// # Panics
    /// When shapes or devices do not fit, or when a network without classes or augmentation labels gets some.
    fn denoise(&self, x_t: &Tensor, time: &Tensor, condition: &Condition, mode: Mode) -> Tensor {
        self.denoise_and_encode(x_t, time, condition, mode).0
    }

    /// [`denoise`](Self::denoise), and the encoder's output at the bottleneck, [N, channels, height, width], of the same
    /// pass.
    ///
    /// # Panics
    /// As `denoise`.
    fn denoise_and_encode(
        &self,
        x_t: &Tensor,
        time: &Tensor,
        condition: &Condition,
        mode: Mode,
    ) -> (Tensor, Tensor);

    /// The bottleneck alone: the same as from [`denoise_and_encode`](Self::denoise_and_encode), without the decoder.
    ///
    /// # Panics
    /// As `denoise`.
    fn encode(&self, x_t: &Tensor, time: &Tensor, condition: &Condition, mode: Mode) -> Tensor;

    /// The forward process that the network was trained on.
    fn process(&self) -> &ForwardProcess;

    /// The weights; those of the adapters, if the network [has some](Self::adapted).
    fn parameters(&self) -> &Parameters;

    /// The weights with which the layers compute, without adapters.
    fn base(&self) -> &Parameters {
        self.parameters()
    }

    /// The blocks of the network in the order of the forward pass, each as a range of the [base](Self::base)'s leaves; other
    /// leaves belong to no block.
    fn blocks(&self) -> Vec<Range<usize>> {
        vec![]
    }

    /// Sets the gate through which the weights of the [blocks](Self::blocks) come. It must be set once, before the network
    /// computes, and the network must recompute.
    fn set_gate(&self, _gate: &Arc<dyn Gate>) {}

    /// Channels, height, width of a sample.
    fn sample_shape(&self) -> [i64; 3];

    /// Number of classes; 0 for an unconditional network.
    fn classes(&self) -> i64;

    /// The number of augmentation labels of a sample; 0 for a network that takes none.
    fn augment_dim(&self) -> i64 {
        0
    }

    /// The least and the greatest time that the network supports, to which a sampler must keep.
    fn time_range(&self) -> [f64; 2] {
        [0.0, f64::INFINITY]
    }

    /// The same network with other weights: views into `flat`, laid out like [`Parameters::flat`], which take gradients
    /// or not. A [`LatentDenoiser`](crate::diffusers::LatentDenoiser) computes in the data type of its weights.
    fn over(&self, flat: Tensor, trainable: bool) -> Box<dyn Denoiser>;

    /// The same network, frozen, with other weights of its [base](Self::base), and with its adapters, if it has some.
    fn rebased(&self, flat: Tensor) -> Box<dyn Denoiser> {
        self.over(flat, false)
    }

    /// A trainable deep copy: equal values in its own storage.
    fn duplicate(&self) -> Box<dyn Denoiser> {
        self.over(self.parameters().flat().copy(), true)
    }

    /// The same network with weights that take no gradient; gradients still flow through its inputs.
    ///
    /// It **shares the storage**: both see in-place updates of [`Parameters::flat`] on either side.
    fn frozen(&self) -> Box<dyn Denoiser> {
        self.over(self.parameters().flat().shallow_clone(), false)
    }

    /// This network, frozen, with new adapters, which are the [`parameters`](Self::parameters) of what is returned. It
    /// shares this one's weights. `draw` returns independent N(0, 1) numbers of a shape: A is such numbers divided by
    /// the rank, and B is 0, so that the network computes what it computed without them.
    ///
    /// # Errors
    /// [`LoraError`].
    fn adapted(
        &self,
        _lora: &Lora,
        _draw: &mut dyn FnMut(&[i64]) -> Tensor,
    ) -> Result<Box<dyn Denoiser>, LoraError> {
        Err(LoraError::Unsupported)
    }

    /// The layers whose adapters a file may hold; of a network without adapters.
    fn layers(&self) -> Layers {
        let entries = self.parameters().entries().iter();
        Layers::new("unet", entries.map(|entry| (entry.name.as_str(), entry.shape.as_slice())))
    }

    /// A frozen copy, fp32, in its own storage, in which the adapters are added to the weights.
    fn merged(&self) -> Box<dyn Denoiser> {
        self.over(self.parameters().flat().to_kind(Kind::Float).copy(), false)
    }

    /// The architecture as JSON, as [`to_safetensors`](Self::to_safetensors) puts it into the metadata.
    fn config_json(&self) -> String;

    /// Weights, buffers and configuration as one safetensors file. Equal networks and metadata give equal bytes.
    ///
    /// # Errors
    /// [`SaveError`] when `metadata` uses the key of the configuration, or when the format cannot hold the network.
    fn to_safetensors(&self, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>, SaveError> {
        weights::to_safetensors(self.parameters(), &self.config_json(), metadata)
    }
}
