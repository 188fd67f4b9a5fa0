//! `unet/config.json`.

use serde::{Deserialize, Serialize};

use crate::diffusers::config::{self, ConfigError, PerBlock, Rest};

/// Height and width, as one number or two.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum SampleSize {
    /// Both sides.
    Square(i64),
    /// Height, width.
    Sides([i64; 2]),
}

impl SampleSize {
    /// Height and width.
    #[must_use]
    pub fn sides(self) -> [i64; 2] {
        match self {
            Self::Square(side) => [side, side],
            Self::Sides(sides) => sides,
        }
    }
}

/// A U-Net's architecture, under the keys of diffusers' `UNet2DConditionModel` and with its defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct UNetConfig {
    /// Height and width of a latent that it was trained on.
    pub sample_size: Option<SampleSize>,
    /// Channels of a latent.
    pub in_channels: i64,
    /// Channels of the prediction.
    pub out_channels: i64,
    /// Whether the input is rescaled from [0, 1] to [−1, 1].
    pub center_input_sample: bool,
    /// Order of sines and cosines in the time embedding.
    pub flip_sin_to_cos: bool,
    /// Shift of that embedding's frequencies.
    pub freq_shift: i64,
    /// `DownBlock2D` or `CrossAttnDownBlock2D`, from the highest resolution to the lowest.
    pub down_block_types: Vec<String>,
    /// `UNetMidBlock2DCrossAttn`; `UNetMidBlock2D`, which is one residual block; or none.
    pub mid_block_type: Option<String>,
    /// `UpBlock2D` or `CrossAttnUpBlock2D`, from the lowest resolution to the highest.
    pub up_block_types: Vec<String>,
    /// Whether the first attention of a block also attends to the text.
    pub only_cross_attention: PerBlock<bool>,
    /// Channels, from the highest resolution to the lowest.
    pub block_out_channels: Vec<i64>,
    /// Residual blocks in each down block; up blocks have one more.
    pub layers_per_block: PerBlock<i64>,
    /// 1, or 0 for one pixel on the right and below.
    pub downsample_padding: i64,
    /// The divisor of the middle block's residual sums.
    pub mid_block_scale_factor: f64,
    /// Share of elements dropped in training.
    pub dropout: f64,
    /// `silu`.
    pub act_fn: String,
    /// Groups of each normalization.
    pub norm_num_groups: Option<i64>,
    /// Added to the variances in normalizations.
    pub norm_eps: f64,
    /// Width of the text embeddings.
    pub cross_attention_dim: PerBlock<i64>,
    /// Transformer blocks in each attention.
    pub transformer_layers_per_block: TransformerLayers,
    /// Those of the up blocks, from the lowest resolution to the highest, where they differ from the down blocks'.
    pub reverse_transformer_layers_per_block: Option<Vec<PerBlock<i64>>>,
    /// Numbers of **heads**; the name is diffusers' mistake, kept for compatibility.
    pub attention_head_dim: PerBlock<i64>,
    /// Whether attention's projections are linear layers instead of 1×1 convolutions.
    pub use_linear_projection: bool,
    /// `timestep`, `identity`, `projection` or `simple_projection`.
    pub class_embed_type: Option<String>,
    /// Rows of the table of class embeddings.
    pub num_class_embeds: Option<i64>,
    /// `text_time`: SDXL's pooled text and micro-conditioning.
    pub addition_embed_type: Option<String>,
    /// Width of the embedding of each number of the micro-conditioning.
    pub addition_time_embed_dim: Option<i64>,
    /// Width of the input of the projection for `text_time`, or of the class labels of `projection`.
    pub projection_class_embeddings_input_dim: Option<i64>,
    /// Whether the class embedding is concatenated to the time embedding instead of being added.
    pub class_embeddings_concat: bool,
    /// `default` or `scale_shift`: how a residual block uses the embedding.
    pub resnet_time_scale_shift: String,
    /// Only `positional`.
    pub time_embedding_type: String,
    /// Width of the time embedding; by default four times the first block's channels.
    pub time_embedding_dim: Option<i64>,
    /// Only 3.
    pub conv_in_kernel: i64,
    /// Only 3.
    pub conv_out_kernel: i64,
    /// Only `default`.
    pub attention_type: String,
    #[serde(flatten)]
    rest: Rest,
}

impl Default for UNetConfig {
    fn default() -> Self {
        let strings = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Self {
            sample_size: None,
            in_channels: 4,
            out_channels: 4,
            center_input_sample: false,
            flip_sin_to_cos: true,
            freq_shift: 0,
            down_block_types: strings(&[
                "CrossAttnDownBlock2D",
                "CrossAttnDownBlock2D",
                "CrossAttnDownBlock2D",
                "DownBlock2D",
            ]),
            mid_block_type: Some(MID_BLOCK.to_owned()),
            up_block_types: strings(&[
                "UpBlock2D",
                "CrossAttnUpBlock2D",
                "CrossAttnUpBlock2D",
                "CrossAttnUpBlock2D",
            ]),
            only_cross_attention: PerBlock::One(false),
            block_out_channels: vec![320, 640, 1280, 1280],
            layers_per_block: PerBlock::One(2),
            downsample_padding: 1,
            mid_block_scale_factor: 1.0,
            dropout: 0.0,
            act_fn: "silu".to_owned(),
            norm_num_groups: Some(32),
            norm_eps: 1e-5,
            cross_attention_dim: PerBlock::One(1280),
            transformer_layers_per_block: TransformerLayers::Same(1),
            reverse_transformer_layers_per_block: None,
            attention_head_dim: PerBlock::One(8),
            use_linear_projection: false,
            class_embed_type: None,
            num_class_embeds: None,
            addition_embed_type: None,
            addition_time_embed_dim: None,
            projection_class_embeddings_input_dim: None,
            class_embeddings_concat: false,
            resnet_time_scale_shift: "default".to_owned(),
            time_embedding_type: "positional".to_owned(),
            time_embedding_dim: None,
            conv_in_kernel: 3,
            conv_out_kernel: 3,
            attention_type: "default".to_owned(),
            rest: Rest::new(),
        }
    }
}

/// The class in diffusers.
pub(crate) const CLASS: &str = "UNet2DConditionModel";
const MID_BLOCK: &str = "UNetMidBlock2DCrossAttn";
const MID_RESIDUAL: &str = "UNetMidBlock2D";

/// Numbers of transformer blocks: the same for all attentions, or for each block of the U-Net the same for its attentions or one for
/// each of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TransformerLayers {
    /// The same for all.
    Same(i64),
    /// For each block.
    PerBlock(Vec<PerBlock<i64>>),
}

impl TransformerLayers {
    fn at(&self, block: usize, attention: usize) -> i64 {
        match self {
            Self::Same(layers) => *layers,
            Self::PerBlock(blocks) => blocks[block].at(attention),
        }
    }
}

/// How a sample's class is embedded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClassEmbedding {
    /// An index into a table with this many rows.
    Table(i64),
    /// A number, embedded like a time.
    Timestep,
    /// The embedding itself.
    Identity,
    /// A vector of this width through a network of two layers.
    Projection(i64),
    /// A vector of this width through one linear layer.
    SimpleProjection(i64),
}

impl UNetConfig {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// [`ConfigError`]: names the keys that are not supported.
    pub fn parse(json: &str) -> Result<Self, ConfigError> {
        // Upcasting attention changes nothing with fused kernels, which accumulate in fp32; the scale factor of
        // residual blocks and the heads of an embedding belong to kinds of blocks that are rejected.
        let neutral = ["upcast_attention", "resnet_out_scale_factor", "addition_embed_type_num_heads"];
        let config: Self = config::parse(json, CLASS, |config: &Self| &config.rest, &neutral)?;
        config.validate()?;
        Ok(config)
    }

    /// Width of the time embedding.
    #[must_use]
    pub fn time_embedding_width(&self) -> i64 {
        self.time_embedding_dim.unwrap_or(self.block_out_channels[0] * 4)
    }

    /// Groups of each normalization.
    pub(crate) fn groups(&self) -> i64 {
        self.norm_num_groups.unwrap_or(0)
    }

    /// Whether a down block attends to the text; counted from the highest resolution.
    pub(crate) fn attends_down(&self, block: usize) -> bool {
        self.down_block_types[block] == "CrossAttnDownBlock2D"
    }

    /// Whether an up block attends to the text; counted from the lowest resolution.
    pub(crate) fn attends_up(&self, block: usize) -> bool {
        self.up_block_types[block] == "CrossAttnUpBlock2D"
    }

    /// Transformer blocks of an attention of a down block, counted from the highest resolution.
    pub(crate) fn layers_down(&self, block: usize, attention: usize) -> i64 {
        self.transformer_layers_per_block.at(block, attention)
    }

    /// Those of the middle block's attention, if it has one.
    pub(crate) fn layers_middle(&self) -> Option<i64> {
        let last = self.block_out_channels.len() - 1;
        let attends = self.mid_block_type.as_deref() == Some(MID_BLOCK);
        attends.then(|| self.transformer_layers_per_block.at(last, 0))
    }

    /// Those of an attention of an up block, counted from the lowest resolution.
    pub(crate) fn layers_up(&self, block: usize, attention: usize) -> i64 {
        match &self.reverse_transformer_layers_per_block {
            Some(blocks) => blocks[block].at(attention),
            None => {
                let last = self.block_out_channels.len() - 1;
                self.transformer_layers_per_block.at(last - block, attention)
            }
        }
    }

    /// All numbers of transformer blocks.
    fn transformer_layers(&self) -> impl Iterator<Item = i64> {
        let down = match &self.transformer_layers_per_block {
            TransformerLayers::Same(layers) => vec![*layers],
            TransformerLayers::PerBlock(blocks) => blocks.iter().flat_map(PerBlock::all).collect(),
        };
        let up = self.reverse_transformer_layers_per_block.iter().flatten().flat_map(PerBlock::all);
        down.into_iter().chain(up.collect::<Vec<_>>())
    }

    /// The numbers of transformer blocks that are missing, one line for each.
    fn missing_layers(&self) -> Vec<String> {
        let blocks = self.block_out_channels.len();
        let key = "transformer_layers_per_block";
        let levels = self.layers_per_block.fits(blocks);
        let down = |block: usize| if levels { self.layers_per_block.at(block) } else { 0 };
        let up = |block: usize| down(blocks - 1 - block) + 1;
        let missing = |key: &str, given: &[PerBlock<i64>], attentions: &dyn Fn(usize) -> i64| {
            if given.len() != blocks {
                return vec![format!("`{key}` must be one value or one for each of the {blocks} blocks")];
            }
            let short = |(block, layers): (usize, &PerBlock<i64>)| match layers {
                PerBlock::Each(layers) if (layers.len() as i64) < attentions(block) => Some(format!(
                    "`{key}` has {} numbers for block {block}; it needs {}",
                    layers.len(),
                    attentions(block)
                )),
                _ => None,
            };
            given.iter().enumerate().filter_map(short).collect()
        };
        let mut problems = Vec::new();
        if let TransformerLayers::PerBlock(given) = &self.transformer_layers_per_block {
            problems.extend(missing(key, given, &down));
            let nested = given.iter().any(|layers| matches!(layers, PerBlock::Each(_)));
            if nested && self.reverse_transformer_layers_per_block.is_none() {
                problems.push(format!("`reverse_{key}` is missing, which lists in `{key}` need"));
            }
        }
        if let Some(given) = &self.reverse_transformer_layers_per_block {
            problems.extend(missing(&format!("reverse_{key}"), given, &up));
        }
        problems
    }

    /// How classes are embedded, if there are some.
    pub(crate) fn class_embedding(&self) -> Option<ClassEmbedding> {
        let width = self.projection_class_embeddings_input_dim.unwrap_or(0);
        match (self.class_embed_type.as_deref(), self.num_class_embeds) {
            (None, None) => None,
            (None, Some(rows)) => Some(ClassEmbedding::Table(rows)),
            (Some("timestep"), _) => Some(ClassEmbedding::Timestep),
            (Some("identity"), _) => Some(ClassEmbedding::Identity),
            (Some("projection"), _) => Some(ClassEmbedding::Projection(width)),
            (Some(_), _) => Some(ClassEmbedding::SimpleProjection(width)),
        }
    }

    /// Whether it takes SDXL's pooled text and micro-conditioning.
    #[must_use]
    pub fn takes_text_time(&self) -> bool {
        self.addition_embed_type.is_some()
    }

    /// Width of SDXL's pooled text.
    #[must_use]
    pub fn pooled_width(&self) -> i64 {
        self.projection_class_embeddings_input_dim.unwrap_or(0)
            - 6 * self.addition_time_embed_dim.unwrap_or(0)
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let mut problems = Vec::new();
        let mut require = |holds: bool, problem: String| {
            if !holds {
                problems.push(problem);
            }
        };
        let blocks = self.block_out_channels.len();
        require(blocks > 0, "`block_out_channels` is empty".into());
        let sides = self.sample_size.map(SampleSize::sides);
        for (key, most, numbers) in [
            ("block_out_channels", 1 << 16, self.block_out_channels.clone()),
            ("in_channels", 1 << 12, vec![self.in_channels]),
            ("out_channels", 1 << 12, vec![self.out_channels]),
            ("sample_size", 1 << 13, sides.map_or_else(Vec::new, Vec::from)),
            ("layers_per_block", 100, self.layers_per_block.all()),
            ("attention_head_dim", 1 << 12, self.attention_head_dim.all()),
            ("cross_attention_dim", 1 << 16, self.cross_attention_dim.all()),
        ] {
            for number in numbers.iter().filter(|number| !(1..=most).contains(*number)) {
                require(false, format!("`{key}` has {number}; it must be between 1 and {most}"));
            }
        }
        for number in self.transformer_layers().filter(|layers| !(0..=1000).contains(layers)) {
            require(
                false,
                format!("`transformer_layers_per_block` has {number}; it must be between 0 and 1000"),
            );
        }
        require(
            self.norm_eps > 0.0 && self.norm_eps.is_finite(),
            format!("`norm_eps` is {}; it must be above 0", self.norm_eps),
        );
        require(
            (0.0..1.0).contains(&self.dropout),
            format!("`dropout` is {}; it must be a share below 1", self.dropout),
        );
        for (key, types, known) in [
            ("down_block_types", &self.down_block_types, ["DownBlock2D", "CrossAttnDownBlock2D"]),
            ("up_block_types", &self.up_block_types, ["UpBlock2D", "CrossAttnUpBlock2D"]),
        ] {
            require(
                types.len() == blocks,
                format!("`{key}` has {} entries, `block_out_channels` {blocks}", types.len()),
            );
            for unknown in types.iter().filter(|name| !known.contains(&name.as_str())) {
                require(false, format!("`{key}` asks for {unknown}; supported are {known:?}"));
            }
        }
        for (key, fits) in [
            ("layers_per_block", self.layers_per_block.fits(blocks)),
            ("attention_head_dim", self.attention_head_dim.fits(blocks)),
            ("cross_attention_dim", self.cross_attention_dim.fits(blocks)),
            ("only_cross_attention", self.only_cross_attention.fits(blocks)),
        ] {
            require(fits, format!("`{key}` must be one value or one for each of the {blocks} blocks"));
        }
        for problem in self.missing_layers() {
            require(false, problem);
        }
        let only = [
            (
                "mid_block_type",
                self.mid_block_type.as_deref().is_none_or(|name| [MID_BLOCK, MID_RESIDUAL].contains(&name)),
                "UNetMidBlock2DCrossAttn and UNetMidBlock2D",
            ),
            ("act_fn", ["silu", "swish"].contains(&self.act_fn.as_str()), "silu"),
            ("time_embedding_type", self.time_embedding_type == "positional", "positional"),
            ("attention_type", self.attention_type == "default", "default"),
            ("conv_in_kernel", self.conv_in_kernel == 3, "3"),
            ("conv_out_kernel", self.conv_out_kernel == 3, "3"),
            (
                "resnet_time_scale_shift",
                ["default", "scale_shift"].contains(&self.resnet_time_scale_shift.as_str()),
                "default and scale_shift",
            ),
            ("downsample_padding", (0..=1).contains(&self.downsample_padding), "0 and 1"),
            (
                "class_embed_type",
                self.class_embed_type.as_deref().is_none_or(|name| {
                    ["timestep", "identity", "projection", "simple_projection"].contains(&name)
                }),
                "timestep, identity, projection and simple_projection",
            ),
            (
                "addition_embed_type",
                self.addition_embed_type.as_deref().is_none_or(|name| name == "text_time"),
                "text_time",
            ),
            ("norm_num_groups", self.norm_num_groups.is_some_and(|groups| groups > 0), "numbers > 0"),
        ];
        for (key, holds, supported) in only {
            require(holds, format!("`{key}`: supported: {supported}"));
        }
        let projects = matches!(self.class_embed_type.as_deref(), Some("projection" | "simple_projection"));
        require(
            !projects || self.projection_class_embeddings_input_dim.is_some_and(|width| width > 0),
            "`projection_class_embeddings_input_dim` is missing".into(),
        );
        require(
            !self.takes_text_time()
                || (self.addition_time_embed_dim.is_some_and(|width| width > 0) && self.pooled_width() > 0),
            "`text_time` needs `addition_time_embed_dim` and a `projection_class_embeddings_input_dim` of more than six times \
             that"
                .into(),
        );
        if problems.is_empty() { Ok(()) } else { Err(ConfigError::Problems { problems }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_supported_is_named() {
        for (json, named) in [
            (
                r#"{"up_block_types": ["UpBlock2D", "SkipUpBlock2D", "UpBlock2D", "UpBlock2D"]}"#,
                "SkipUpBlock2D",
            ),
            (r#"{"encoder_hid_dim_type": "ip_image_proj"}"#, "encoder_hid_dim_type"),
            (r#"{"time_cond_proj_dim": 256}"#, "time_cond_proj_dim"),
            (
                r#"{"transformer_layers_per_block": [1, [1, 1], 1, 1]}"#,
                "reverse_transformer_layers_per_block",
            ),
            (r#"{"transformer_layers_per_block": [1, 1]}"#, "transformer_layers_per_block"),
            (
                r#"{"reverse_transformer_layers_per_block": [[4, 4], 1, 1, 1]}"#,
                "`reverse_transformer_layers_per_block` has 2 numbers for block 0; it needs 3",
            ),
            (r#"{"layers_per_block": -1}"#, "`layers_per_block` has -1"),
            (r#"{"layers_per_block": 100000000000}"#, "layers_per_block"),
            (r#"{"transformer_layers_per_block": 1000000000}"#, "transformer_layers_per_block"),
            (r#"{"block_out_channels": [-24, 32, 32, 32]}"#, "block_out_channels"),
            (r#"{"sample_size": 0}"#, "sample_size"),
            (r#"{"norm_eps": -1.0}"#, "norm_eps"),
            (r#"{"in_channels": 4, "in_channels": 8}"#, "in_channels"),
            (r#"{"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}"#, "mid_block_type"),
            (r#"{"block_out_channels": [320, 640]}"#, "down_block_types"),
            (r#"{"addition_embed_type": "text_time"}"#, "addition_time_embed_dim"),
            (r#"{"attention_head_dim": [5, 10]}"#, "attention_head_dim"),
            (r#"{"norm_num_groups": null}"#, "norm_num_groups"),
        ] {
            let error = UNetConfig::parse(json).unwrap_err().to_string();
            assert!(error.contains(named), "{json}: {error}");
        }
        assert_eq!(UNetConfig::parse("{}").unwrap(), UNetConfig::default());
    }
}
