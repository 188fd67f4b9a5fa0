//! The configuration of a network, with the names and defaults of the public EDM checkpoints.

use serde::{Deserialize, Serialize};

/// The U-Net inside the preconditioning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ModelType {
    /// DDPM++ and NCSN++ of Score SDE (2011.13456, appendix H), as EDM restates them.
    SongUNet,
    /// ADM (2105.05233).
    DhariwalUNet,
}

/// How a noise level is embedded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EmbeddingType {
    /// Sines and cosines at fixed frequencies: DDPM++.
    Positional,
    /// Sines and cosines at random frequencies: NCSN++.
    Fourier,
}

/// How the encoder gets the input at lower resolutions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EncoderType {
    /// Only through the blocks: DDPM++.
    Standard,
    /// The downsampled input is added at each resolution.
    Skip,
    /// A strided path beside the blocks is added at each resolution: NCSN++.
    Residual,
}

/// How the output is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DecoderType {
    /// From the full resolution alone.
    Standard,
    /// The sum of upsampled outputs of all resolutions.
    Skip,
}

/// An EDM network (2206.00364), with the field names of the public checkpoints.
///
/// A field that is absent when read has the official default, which for some depends on `model_type`; `img_resolution`,
/// `img_channels` and `model_type` have none. Unknown fields are rejected.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Fields", into = "Fields")]
pub struct EdmConfig {
    /// Height and width of a sample.
    pub img_resolution: i64,
    /// Channels of a sample.
    pub img_channels: i64,
    /// Number of classes; 0 for an unconditional network.
    pub label_dim: i64,
    /// Whether the official code runs the U-Net in fp16 on a GPU. Kept so that files are written unchanged; not used
    /// here.
    pub use_fp16: bool,
    /// Least σ that the network supports.
    pub sigma_min: f64,
    /// Greatest σ that the network supports; in JSON, ∞ is null.
    pub sigma_max: f64,
    /// Standard deviation of the data that the preconditioning assumes.
    pub sigma_data: f64,
    /// The U-Net inside the preconditioning.
    pub model_type: ModelType,
    /// Length of the augmentation label; 0 for none.
    pub augment_dim: i64,
    /// Channels at a multiplier of 1.
    pub model_channels: i64,
    /// Multiplier of the channels at each resolution, from the full one down; each halves the one before.
    pub channel_mult: Vec<i64>,
    /// Multiplier for the length of the embedding.
    pub channel_mult_emb: i64,
    /// Residual blocks per resolution.
    pub num_blocks: i64,
    /// Resolutions with self-attention. The bottleneck always has it.
    pub attn_resolutions: Vec<i64>,
    /// Dropout probability inside the blocks.
    pub dropout: f64,
    /// Probability that a sample's class is dropped in training mode.
    pub label_dropout: f64,
    /// SongUNet only.
    pub embedding_type: EmbeddingType,
    /// SongUNet only: multiplier for the length of the noise level's embedding.
    pub channel_mult_noise: i64,
    /// SongUNet only.
    pub encoder_type: EncoderType,
    /// SongUNet only.
    pub decoder_type: DecoderType,
    /// SongUNet only: 1-D taps for down- and upsampling.
    pub resample_filter: Vec<f64>,
}

impl Default for EdmConfig {
    /// The official defaults of a SongUNet. Resolution and channels are 0, which [`validate`](Self::validate) rejects.
    fn default() -> Self {
        Self {
            img_resolution: 0,
            img_channels: 0,
            label_dim: 0,
            use_fp16: false,
            sigma_min: 0.0,
            sigma_max: f64::INFINITY,
            sigma_data: 0.5,
            model_type: ModelType::SongUNet,
            augment_dim: 0,
            model_channels: 128,
            channel_mult: vec![1, 2, 2, 2],
            channel_mult_emb: 4,
            num_blocks: 4,
            attn_resolutions: vec![16],
            dropout: 0.1,
            label_dropout: 0.0,
            embedding_type: EmbeddingType::Positional,
            channel_mult_noise: 1,
            encoder_type: EncoderType::Standard,
            decoder_type: DecoderType::Standard,
            resample_filter: vec![1.0, 1.0],
        }
    }
}

impl EdmConfig {
    /// Resolution of each level, from the full one down.
    pub(crate) fn resolutions(&self) -> impl DoubleEndedIterator<Item = i64> + ExactSizeIterator {
        (0..self.channel_mult.len()).map(|level| self.img_resolution >> level)
    }

    /// Problems of the fields themselves; problems of layers are found when they are declared.
    pub(crate) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut require = |holds: bool, problem: String| {
            if !holds {
                problems.push(problem);
            }
        };
        let positive = [
            ("img_resolution", self.img_resolution),
            ("img_channels", self.img_channels),
            ("model_channels", self.model_channels),
            ("channel_mult_emb", self.channel_mult_emb),
            ("channel_mult_noise", self.channel_mult_noise),
            ("num_blocks", self.num_blocks),
        ];
        for (field, value) in positive {
            require(
                (1..=MAX_SIZE).contains(&value),
                format!("{field} is {value}; it must lie in 1..={MAX_SIZE}"),
            );
        }
        for (field, value) in [("label_dim", self.label_dim), ("augment_dim", self.augment_dim)] {
            require(
                (0..=MAX_SIZE).contains(&value),
                format!("{field} is {value}; it must lie in 0..={MAX_SIZE}"),
            );
        }
        let levels = self.channel_mult.len();
        require(
            (1..=16).contains(&levels) && self.channel_mult.iter().all(|m| (1..=1024).contains(m)),
            format!(
                "channel_mult is {:?}; it needs 1 to 16 multipliers, each in 1..=1024",
                self.channel_mult
            ),
        );
        let halvings = levels.clamp(1, 16) - 1;
        require(
            self.img_resolution % (1 << halvings) == 0,
            format!("img_resolution is {}; it must be divisible by 2^{halvings}", self.img_resolution),
        );
        for (field, value) in [("dropout", self.dropout), ("label_dropout", self.label_dropout)] {
            require((0.0..1.0).contains(&value), format!("{field} is {value}; it must lie in [0, 1)"));
        }
        require(
            self.sigma_data.is_finite() && self.sigma_data > 0.0,
            format!("sigma_data is {}; it must be > 0", self.sigma_data),
        );
        require(
            self.sigma_min >= 0.0 && self.sigma_min < self.sigma_max,
            format!(
                "sigma_min is {} and sigma_max {}; it must be 0 ≤ sigma_min < sigma_max",
                self.sigma_min, self.sigma_max
            ),
        );
        // Half of the noise embedding are sines, half cosines, and the frequencies' exponents go from 0 to 1.
        let embedding = match self.model_type {
            ModelType::SongUNet => self.model_channels.saturating_mul(self.channel_mult_noise),
            ModelType::DhariwalUNet => self.model_channels,
        };
        require(
            embedding >= 4 && embedding % 2 == 0,
            format!("the noise embedding has {embedding} channels; it must be an even number ≥ 4"),
        );
        let taps = &self.resample_filter;
        let sum: f64 = taps.iter().sum();
        require(
            (2..=64).contains(&taps.len()) && taps.len().is_multiple_of(2) && sum.is_finite() && sum != 0.0,
            format!(
                "resample_filter is {taps:?}; it needs an even number of finite taps with a sum other than 0"
            ),
        );
        problems
    }
}

/// Keeps products of sizes within i64 for any configuration.
const MAX_SIZE: i64 = 1 << 20;

/// [`EdmConfig`] as it is in JSON.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    img_resolution: i64,
    img_channels: i64,
    label_dim: Option<i64>,
    use_fp16: Option<bool>,
    sigma_min: Option<f64>,
    sigma_max: Option<f64>,
    sigma_data: Option<f64>,
    model_type: ModelType,
    augment_dim: Option<i64>,
    model_channels: Option<i64>,
    channel_mult: Option<Vec<i64>>,
    channel_mult_emb: Option<i64>,
    num_blocks: Option<i64>,
    attn_resolutions: Option<Vec<i64>>,
    dropout: Option<f64>,
    label_dropout: Option<f64>,
    embedding_type: Option<EmbeddingType>,
    channel_mult_noise: Option<i64>,
    encoder_type: Option<EncoderType>,
    decoder_type: Option<DecoderType>,
    resample_filter: Option<Vec<f64>>,
}

impl TryFrom<Fields> for EdmConfig {
    type Error = String;

    fn try_from(fields: Fields) -> Result<Self, String> {
        let mut default = Self { model_type: fields.model_type, ..Self::default() };
        if fields.model_type == ModelType::DhariwalUNet {
            let given = [
                ("embedding_type", fields.embedding_type.is_some()),
                ("channel_mult_noise", fields.channel_mult_noise.is_some()),
                ("encoder_type", fields.encoder_type.is_some()),
                ("decoder_type", fields.decoder_type.is_some()),
                ("resample_filter", fields.resample_filter.is_some()),
            ];
            if let Some((field, _)) = given.iter().find(|(_, given)| *given) {
                return Err(format!("{field} is a field of SongUNet; a DhariwalUNet has none"));
            }
            default = Self {
                model_channels: 192,
                channel_mult: vec![1, 2, 3, 4],
                num_blocks: 3,
                attn_resolutions: vec![32, 16, 8],
                ..default
            };
        }
        Ok(Self {
            img_resolution: fields.img_resolution,
            img_channels: fields.img_channels,
            label_dim: fields.label_dim.unwrap_or(default.label_dim),
            use_fp16: fields.use_fp16.unwrap_or(default.use_fp16),
            sigma_min: fields.sigma_min.unwrap_or(default.sigma_min),
            sigma_max: fields.sigma_max.unwrap_or(default.sigma_max),
            sigma_data: fields.sigma_data.unwrap_or(default.sigma_data),
            model_type: fields.model_type,
            augment_dim: fields.augment_dim.unwrap_or(default.augment_dim),
            model_channels: fields.model_channels.unwrap_or(default.model_channels),
            channel_mult: fields.channel_mult.unwrap_or(default.channel_mult),
            channel_mult_emb: fields.channel_mult_emb.unwrap_or(default.channel_mult_emb),
            num_blocks: fields.num_blocks.unwrap_or(default.num_blocks),
            attn_resolutions: fields.attn_resolutions.unwrap_or(default.attn_resolutions),
            dropout: fields.dropout.unwrap_or(default.dropout),
            label_dropout: fields.label_dropout.unwrap_or(default.label_dropout),
            embedding_type: fields.embedding_type.unwrap_or(default.embedding_type),
            channel_mult_noise: fields.channel_mult_noise.unwrap_or(default.channel_mult_noise),
            encoder_type: fields.encoder_type.unwrap_or(default.encoder_type),
            decoder_type: fields.decoder_type.unwrap_or(default.decoder_type),
            resample_filter: fields.resample_filter.unwrap_or(default.resample_filter),
        })
    }
}

impl From<EdmConfig> for Fields {
    fn from(config: EdmConfig) -> Self {
        let song = config.model_type == ModelType::SongUNet;
        Self {
            img_resolution: config.img_resolution,
            img_channels: config.img_channels,
            label_dim: Some(config.label_dim),
            use_fp16: Some(config.use_fp16),
            sigma_min: Some(config.sigma_min),
            sigma_max: config.sigma_max.is_finite().then_some(config.sigma_max),
            sigma_data: Some(config.sigma_data),
            model_type: config.model_type,
            augment_dim: Some(config.augment_dim),
            model_channels: Some(config.model_channels),
            channel_mult: Some(config.channel_mult),
            channel_mult_emb: Some(config.channel_mult_emb),
            num_blocks: Some(config.num_blocks),
            attn_resolutions: Some(config.attn_resolutions),
            dropout: Some(config.dropout),
            label_dropout: Some(config.label_dropout),
            embedding_type: song.then_some(config.embedding_type),
            channel_mult_noise: song.then_some(config.channel_mult_noise),
            encoder_type: song.then_some(config.encoder_type),
            decoder_type: song.then_some(config.decoder_type),
            resample_filter: song.then_some(config.resample_filter),
        }
    }
}
