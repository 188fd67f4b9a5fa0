//! ADM (2105.05233) with EDM's parameter names.

use tch::Tensor;

use super::{
    block::{BlockShape, BlockStyle, Heads, Injection, UNetBlock},
    config::EdmConfig,
    inputs::Inputs,
    layers::{Conv2d, Direction, GroupNorm, InitLaw, Linear, Sinusoids, drop_labels},
};
use crate::builder::Scope;

pub(crate) struct DhariwalUNet {
    mapping: Mapping,
    first: Conv2d,
    encoder: Vec<UNetBlock>,
    decoder: Vec<DecoderStep>,
    out_norm: GroupNorm,
    out_conv: Conv2d,
}

/// Noise level, class and augmentation label → embedding.
struct Mapping {
    noise: Sinusoids,
    augment: Option<Linear>,
    layer0: Linear,
    layer1: Linear,
    label: Option<Linear>,
    label_dropout: f64,
}

enum DecoderStep {
    /// A block with the previous step's output as its input.
    Block(UNetBlock),
    /// A block that also takes the last unused output of the encoder.
    Merge(UNetBlock),
}

impl DhariwalUNet {
    pub fn new(scope: &mut Scope, config: &EdmConfig) -> Self {
        let third = (1.0f64 / 3.0).sqrt();
        let init = InitLaw::kaiming_uniform(third, third);
        let init_zero = InitLaw::kaiming_uniform(0.0, 0.0);
        let eps = 1e-5;
        let embedding_channels = config.model_channels * config.channel_mult_emb;
        let style = BlockStyle {
            embedding_channels,
            dropout: config.dropout,
            injection: Injection::ScaleShift,
            heads: Heads::OfChannels(64),
            skip_scale: 1.0,
            eps,
            resample_filter: &[1.0, 1.0],
            resample_projection: false,
            init,
            init_zero,
            init_attention: init,
        };
        let plain = |inputs, outputs| BlockShape { inputs, outputs, resample: None, attention: false };
        let mapping = Mapping::new(scope, config, embedding_channels, init, init_zero);

        let mut enc = scope.child("enc");
        let mut channels = config.model_channels * config.channel_mult[0];
        let name = format!("{0}x{0}_conv", config.img_resolution);
        let first = Conv2d::new(&mut enc.child(name), config.img_channels, channels, 3, init);
        let mut encoder = Vec::new();
        let mut skips = vec![channels];
        for (level, (resolution, multiplier)) in config.resolutions().zip(&config.channel_mult).enumerate() {
            let name = |part: &str| format!("{resolution}x{resolution}_{part}");
            if level > 0 {
                let shape = BlockShape { resample: Some(Direction::Down), ..plain(channels, channels) };
                encoder.push(UNetBlock::new(enc.child(name("down")), &style, shape));
                skips.push(channels);
            }
            for index in 0..config.num_blocks {
                let outputs = config.model_channels * multiplier;
                let attention = config.attn_resolutions.contains(&resolution);
                let shape = BlockShape { attention, ..plain(channels, outputs) };
                encoder.push(UNetBlock::new(enc.child(name(&format!("block{index}"))), &style, shape));
                skips.push(outputs);
                channels = outputs;
            }
        }

        let mut dec = scope.child("dec");
        let mut decoder = Vec::new();
        let lowest = config.channel_mult.len() - 1;
        for (level, (resolution, multiplier)) in
            config.resolutions().zip(&config.channel_mult).enumerate().rev()
        {
            let name = |part: &str| format!("{resolution}x{resolution}_{part}");
            if level == lowest {
                let shape = BlockShape { attention: true, ..plain(channels, channels) };
                decoder.push(DecoderStep::Block(UNetBlock::new(dec.child(name("in0")), &style, shape)));
                let shape = plain(channels, channels);
                decoder.push(DecoderStep::Block(UNetBlock::new(dec.child(name("in1")), &style, shape)));
            } else {
                let shape = BlockShape { resample: Some(Direction::Up), ..plain(channels, channels) };
                decoder.push(DecoderStep::Block(UNetBlock::new(dec.child(name("up")), &style, shape)));
            }
            for index in 0..=config.num_blocks {
                let outputs = config.model_channels * multiplier;
                let attention = config.attn_resolutions.contains(&resolution);
                let shape = BlockShape { attention, ..plain(channels + skips.pop().unwrap_or(0), outputs) };
                let block = UNetBlock::new(dec.child(name(&format!("block{index}"))), &style, shape);
                decoder.push(DecoderStep::Merge(block));
                channels = outputs;
            }
        }
        let out_norm = GroupNorm::new(scope.child("out_norm"), channels, eps);
        let out_conv = Conv2d::new(&mut scope.child("out_conv"), channels, config.img_channels, 3, init_zero);
        Self { mapping, first, encoder, decoder, out_norm, out_conv }
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
        let mut features = Vec::with_capacity(self.encoder.len() + 1);
        features.push(self.first.forward(x));
        for block in &self.encoder {
            let next = block.forward(&features[features.len() - 1], embedding, inputs.mode);
            features.push(next);
        }
        features
    }

    fn decode(&self, mut features: Vec<Tensor>, embedding: &Tensor, inputs: &Inputs) -> Tensor {
        let mut x = features[features.len() - 1].shallow_clone();
        for step in &self.decoder {
            x = match step {
                DecoderStep::Block(block) => block.forward(&x, embedding, inputs.mode),
                DecoderStep::Merge(block) => {
                    let skip = features.pop();
                    let merged = Tensor::cat(&[Some(x), skip].into_iter().flatten().collect::<Vec<_>>(), 1);
                    block.forward(&merged, embedding, inputs.mode)
                }
            };
        }
        self.out_conv.forward(&self.out_norm.forward(&x).silu())
    }
}

impl Mapping {
    fn new(
        scope: &mut Scope,
        config: &EdmConfig,
        embedding_channels: i64,
        init: InitLaw,
        init_zero: InitLaw,
    ) -> Self {
        let channels = config.model_channels;
        let classes = config.label_dim;
        Self {
            noise: Sinusoids::positional(scope, channels, false),
            augment: (config.augment_dim > 0).then(|| {
                Linear::new(scope.child("map_augment"), config.augment_dim, channels, false, init_zero)
            }),
            layer0: Linear::new(scope.child("map_layer0"), channels, embedding_channels, true, init),
            layer1: Linear::new(
                scope.child("map_layer1"),
                embedding_channels,
                embedding_channels,
                true,
                init,
            ),
            label: (classes > 0).then(|| {
                // The distribution's variance 1/classes times the square of the weight: unit variance.
                let law = InitLaw::kaiming_normal((classes as f64).sqrt());
                Linear::new(scope.child("map_label"), classes, embedding_channels, false, law)
            }),
            label_dropout: config.label_dropout,
        }
    }

    fn forward(&self, samples: i64, inputs: &Inputs) -> Tensor {
        let (cosines, sines) = self.noise.forward(inputs.noise);
        // Not added in place: one noise level may be broadcast to many labels.
        let mut embedding = Tensor::cat(&[cosines, sines], 1);
        if let (Some(map), Some(augment)) = (&self.augment, &inputs.augment) {
            embedding = map.forward(augment) + embedding;
        }
        embedding = self.layer1.forward(&self.layer0.forward(&embedding).silu());
        if let (Some(map), Some(labels)) = (&self.label, &inputs.labels) {
            let labels = drop_labels(labels.shallow_clone(), samples, self.label_dropout, inputs.mode);
            embedding = map.forward(&labels) + embedding;
        }
        embedding.silu()
    }
}
