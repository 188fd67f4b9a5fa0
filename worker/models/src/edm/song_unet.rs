//! DDPM++ and NCSN++ (Score SDE, 2011.13456), as one architecture with EDM's parameter names.

use std::f64::consts::{FRAC_1_SQRT_2, SQRT_2};

use tch::Tensor;

use super::{
    block::{BlockShape, BlockStyle, Heads, Injection, UNetBlock},
    config::{DecoderType, EdmConfig, EmbeddingType, EncoderType},
    inputs::Inputs,
    layers::{Conv2d, Direction, GroupNorm, InitLaw, Linear, Resample, Sinusoids, drop_labels},
};
use crate::builder::Scope;

pub(crate) struct SongUNet {
    mapping: Mapping,
    encoder: Vec<EncoderStep>,
    decoder: Vec<DecoderStep>,
}

/// Noise level, class and augmentation label → embedding.
struct Mapping {
    noise: Sinusoids,
    label: Option<Linear>,
    /// Labels are scaled by this, so that a one-hot vector has a mean square of 1.
    label_scale: f64,
    label_dropout: f64,
    augment: Option<Linear>,
    layer0: Linear,
    layer1: Linear,
}

enum EncoderStep {
    Conv(Conv2d),
    Block(Box<UNetBlock>),
    /// Downsamples the auxiliary input and adds its projection.
    AuxSkip {
        down: Resample,
        projection: Conv2d,
    },
    /// Downsamples the auxiliary path and merges it.
    AuxResidual {
        conv: Conv2d,
        down: Resample,
    },
}

enum DecoderStep {
    /// A block with the previous step's output as its input.
    Block(Box<UNetBlock>),
    /// A block that also takes the last unused output of the encoder.
    Merge(Box<UNetBlock>),
    /// Upsamples the sum of the outputs so far.
    AuxUp(Resample),
    /// Adds to the output.
    Output { norm: GroupNorm, conv: Conv2d },
}

impl SongUNet {
    pub fn new(scope: &mut Scope, config: &EdmConfig) -> Self {
        let init = InitLaw::xavier_uniform(1.0);
        let init_zero = InitLaw::xavier_uniform(1e-5);
        let eps = 1e-6;
        let embedding_channels = config.model_channels * config.channel_mult_emb;
        let style = BlockStyle {
            embedding_channels,
            dropout: config.dropout,
            injection: Injection::Shift,
            heads: Heads::One,
            skip_scale: FRAC_1_SQRT_2,
            eps,
            resample_filter: &config.resample_filter,
            resample_projection: true,
            init,
            init_zero,
            init_attention: InitLaw::xavier_uniform(0.2f64.sqrt()),
        };
        let plain = |inputs, outputs| BlockShape { inputs, outputs, resample: None, attention: false };
        let mapping = Mapping::new(scope, config, embedding_channels, init);

        let mut encoder = Vec::new();
        let mut skips = Vec::new();
        let mut enc = scope.child("enc");
        let mut channels = config.model_channels;
        let mut aux_channels = config.img_channels;
        for (level, (resolution, multiplier)) in config.resolutions().zip(&config.channel_mult).enumerate() {
            let name = |part: &str| format!("{resolution}x{resolution}_{part}");
            if level == 0 {
                let conv = Conv2d::new(&mut enc.child(name("conv")), config.img_channels, channels, 3, init);
                encoder.push(EncoderStep::Conv(conv));
                skips.push(channels);
            } else {
                let shape = BlockShape { resample: Some(Direction::Down), ..plain(channels, channels) };
                encoder.push(EncoderStep::Block(boxed(enc.child(name("down")), &style, shape)));
                skips.push(channels);
                let filter = &config.resample_filter;
                match config.encoder_type {
                    EncoderType::Standard => {}
                    EncoderType::Skip => {
                        let mut at = enc.child(name("aux_down"));
                        let down = Resample::new(&mut at, aux_channels, filter, Direction::Down);
                        let mut at = enc.child(name("aux_skip"));
                        let projection = Conv2d::new(&mut at, aux_channels, channels, 1, init);
                        encoder.push(EncoderStep::AuxSkip { down, projection });
                    }
                    EncoderType::Residual => {
                        let mut at = enc.child(name("aux_residual"));
                        let conv = Conv2d::new(&mut at, aux_channels, channels, 3, init);
                        let down = Resample::new(&mut at, channels, filter, Direction::Down);
                        encoder.push(EncoderStep::AuxResidual { conv, down });
                        aux_channels = channels;
                    }
                }
            }
            for index in 0..config.num_blocks {
                let outputs = config.model_channels * multiplier;
                let attention = config.attn_resolutions.contains(&resolution);
                let shape = BlockShape { attention, ..plain(channels, outputs) };
                let block = boxed(enc.child(name(&format!("block{index}"))), &style, shape);
                encoder.push(EncoderStep::Block(block));
                skips.push(outputs);
                channels = outputs;
            }
        }

        let mut decoder = Vec::new();
        let mut dec = scope.child("dec");
        let lowest = config.channel_mult.len() - 1;
        for (level, (resolution, multiplier)) in
            config.resolutions().zip(&config.channel_mult).enumerate().rev()
        {
            let name = |part: &str| format!("{resolution}x{resolution}_{part}");
            if level == lowest {
                let shape = BlockShape { attention: true, ..plain(channels, channels) };
                decoder.push(DecoderStep::Block(boxed(dec.child(name("in0")), &style, shape)));
                let shape = plain(channels, channels);
                decoder.push(DecoderStep::Block(boxed(dec.child(name("in1")), &style, shape)));
            } else {
                let shape = BlockShape { resample: Some(Direction::Up), ..plain(channels, channels) };
                decoder.push(DecoderStep::Block(boxed(dec.child(name("up")), &style, shape)));
            }
            for index in 0..=config.num_blocks {
                let outputs = config.model_channels * multiplier;
                let attention = index == config.num_blocks && config.attn_resolutions.contains(&resolution);
                let shape = BlockShape { attention, ..plain(channels + skips.pop().unwrap_or(0), outputs) };
                let block = boxed(dec.child(name(&format!("block{index}"))), &style, shape);
                decoder.push(DecoderStep::Merge(block));
                channels = outputs;
            }
            let skip_decoder = config.decoder_type == DecoderType::Skip;
            if skip_decoder && level < lowest {
                let mut at = dec.child(name("aux_up"));
                let up = Resample::new(&mut at, config.img_channels, &config.resample_filter, Direction::Up);
                decoder.push(DecoderStep::AuxUp(up));
            }
            if skip_decoder || level == 0 {
                let norm = GroupNorm::new(dec.child(name("aux_norm")), channels, eps);
                let mut at = dec.child(name("aux_conv"));
                let conv = Conv2d::new(&mut at, channels, config.img_channels, 3, init_zero);
                decoder.push(DecoderStep::Output { norm, conv });
            }
        }
        Self { mapping, encoder, decoder }
    }

    /// The output and the bottleneck.
    pub fn forward(&self, x: &Tensor, inputs: &Inputs) -> (Tensor, Tensor) {
        let embedding = self.mapping.forward(x.size()[0], inputs);
        let features = self.encode(x, &embedding, inputs);
        let bottleneck = features[features.len() - 1].shallow_clone();
        (self.decode(features, &embedding, inputs), bottleneck)
    }

    /// The bottleneck alone.
    pub fn bottleneck(&self, x: &Tensor, inputs: &Inputs) -> Tensor {
        let embedding = self.mapping.forward(x.size()[0], inputs);
        let mut features = self.encode(x, &embedding, inputs);
        features.swap_remove(features.len() - 1)
    }

    /// The outputs of the encoder's steps; the last one is the bottleneck.
    fn encode(&self, x: &Tensor, embedding: &Tensor, inputs: &Inputs) -> Vec<Tensor> {
        let mut features: Vec<Tensor> = Vec::with_capacity(self.encoder.len());
        let mut aux = x.shallow_clone();
        for step in &self.encoder {
            let last = features.last();
            match step {
                EncoderStep::Conv(conv) => features.push(conv.forward(last.unwrap_or(x))),
                EncoderStep::Block(block) => {
                    features.push(block.forward(last.unwrap_or(x), embedding, inputs.mode));
                }
                EncoderStep::AuxSkip { down, projection } => {
                    aux = down.forward(&aux);
                    let merged = projection.forward(&aux).g_add_(last.unwrap_or(x));
                    features.pop();
                    features.push(merged);
                }
                EncoderStep::AuxResidual { conv, down } => {
                    // The filter follows the convolution, whose padding serves both.
                    let path = down.unpadded(&conv.padded(&aux, down.padding()));
                    aux = (path + last.unwrap_or(x)) / SQRT_2;
                    features.pop();
                    features.push(aux.shallow_clone());
                }
            }
        }
        features
    }

    fn decode(&self, mut features: Vec<Tensor>, embedding: &Tensor, inputs: &Inputs) -> Tensor {
        let mut x = features[features.len() - 1].shallow_clone();
        let mut output: Option<Tensor> = None;
        for step in &self.decoder {
            match step {
                DecoderStep::Block(block) => x = block.forward(&x, embedding, inputs.mode),
                DecoderStep::Merge(block) => {
                    let skip = features.pop();
                    let merged = Tensor::cat(&[Some(x), skip].into_iter().flatten().collect::<Vec<_>>(), 1);
                    x = block.forward(&merged, embedding, inputs.mode);
                }
                DecoderStep::AuxUp(up) => output = output.map(|sum| up.forward(&sum)),
                DecoderStep::Output { norm, conv } => {
                    let mut term = conv.forward(&norm.forward(&x).silu());
                    output = Some(match output {
                        Some(sum) => term.g_add_(&sum),
                        None => term,
                    });
                }
            }
        }
        output.unwrap_or(x)
    }
}

/// Blocks are many times larger than the other steps.
fn boxed(scope: Scope, style: &BlockStyle, shape: BlockShape) -> Box<UNetBlock> {
    Box::new(UNetBlock::new(scope, style, shape))
}

impl Mapping {
    fn new(scope: &mut Scope, config: &EdmConfig, embedding_channels: i64, init: InitLaw) -> Self {
        let channels = config.model_channels * config.channel_mult_noise;
        let linear = |scope: Scope, inputs, outputs, bias| Linear::new(scope, inputs, outputs, bias, init);
        Self {
            noise: match config.embedding_type {
                EmbeddingType::Positional => Sinusoids::positional(scope, channels, true),
                EmbeddingType::Fourier => Sinusoids::fourier(scope.child("map_noise"), channels),
            },
            label: (config.label_dim > 0)
                .then(|| linear(scope.child("map_label"), config.label_dim, channels, true)),
            label_scale: (config.label_dim as f64).sqrt(),
            label_dropout: config.label_dropout,
            augment: (config.augment_dim > 0)
                .then(|| linear(scope.child("map_augment"), config.augment_dim, channels, false)),
            layer0: linear(scope.child("map_layer0"), channels, embedding_channels, true),
            layer1: linear(scope.child("map_layer1"), embedding_channels, embedding_channels, true),
        }
    }

    fn forward(&self, samples: i64, inputs: &Inputs) -> Tensor {
        let (cosines, sines) = self.noise.forward(inputs.noise);
        // Not added in place: one noise level may be broadcast to many labels.
        let mut embedding = Tensor::cat(&[sines, cosines], 1);
        if let (Some(map), Some(labels)) = (&self.label, &inputs.labels) {
            let labels = labels * self.label_scale;
            let labels = drop_labels(labels, samples, self.label_dropout, inputs.mode);
            embedding = map.forward(&labels) + embedding;
        }
        if let (Some(map), Some(augment)) = (&self.augment, &inputs.augment) {
            embedding = map.forward(augment) + embedding;
        }
        self.layer1.forward(&self.layer0.forward(&embedding).silu()).silu()
    }
}
