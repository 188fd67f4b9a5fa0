//! transformers' `CLIPTextModel` and `CLIPTextModelWithProjection` (2103.00020).

use potstill_torch_ext::upload;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Device, Kind, Tensor, no_grad};

use super::{
    config::ConfigError,
    layers::{Embedding, LayerNorm, attention, linear},
};
use crate::{
    builder::{Binding, Declaration, Scope},
    layers::Linear,
    parameters::Parameters,
    weights::{self, LoadError, Named, Surplus},
};

/// Architecture, under the keys of `text_encoder/config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TextEncoderConfig {
    /// Width of the states.
    pub hidden_size: i64,
    /// Width inside the feed-forward layers.
    pub intermediate_size: i64,
    /// Width of the projected pooled output.
    pub projection_dim: i64,
    /// Layers.
    pub num_hidden_layers: i64,
    /// Heads of each attention.
    pub num_attention_heads: i64,
    /// Greatest number of tokens.
    pub max_position_embeddings: i64,
    /// `quick_gelu` or `gelu`.
    pub hidden_act: String,
    /// Added to the variances in normalizations.
    pub layer_norm_eps: f64,
    /// The token whose state is the pooled output. Old files have 2, which stands for the greatest token.
    pub eos_token_id: i64,
    /// Number of tokens.
    pub vocab_size: i64,
}

impl Default for TextEncoderConfig {
    fn default() -> Self {
        Self {
            hidden_size: 512,
            intermediate_size: 2048,
            projection_dim: 512,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: "quick_gelu".to_owned(),
            layer_norm_eps: 1e-5,
            eos_token_id: 49407,
            vocab_size: 49408,
        }
    }
}

/// The classes in transformers, without and with the projection of the pooled output.
pub(crate) const CLASSES: [&str; 2] = ["CLIPTextModel", "CLIPTextModelWithProjection"];
const KIND: &str = "clip_text_model";
const WHOLE: &str = "is the configuration of a whole CLIP model, of images and texts (`CLIPModel`), and not of its text encoder alone: \
     save that with transformers' CLIPTextModel.from_pretrained(…).save_pretrained(…)";

/// The end token in old files, by which they mean the greatest token.
const LEGACY_EOS: i64 = 2;

impl TextEncoderConfig {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// [`ConfigError`]: names the keys that are not supported.
    pub fn parse(json: &str) -> Result<Self, ConfigError> {
        let named: Value = serde_json::from_str(json)?;
        let kind = named["model_type"].as_str();
        let problem = match kind {
            Some("clip") => Some(WHOLE.to_owned()),
            _ if named["text_config"].is_object() => Some(WHOLE.to_owned()),
            Some(other) if other != KIND => Some(format!("`model_type` is {other:?}; supported: {KIND}")),
            _ => None,
        };
        if let Some(problem) = problem {
            return Err(ConfigError::Problems { problems: vec![problem] });
        }
        let config: Self = serde_json::from_str(json)?;
        let mut problems = Vec::new();
        for (holds, problem) in [
            (
                ["quick_gelu", "gelu"].contains(&config.hidden_act.as_str()),
                format!("`hidden_act` is {:?}; supported: quick_gelu, gelu", config.hidden_act),
            ),
            (
                config.num_attention_heads > 0 && config.hidden_size % config.num_attention_heads == 0,
                "`hidden_size` must be a multiple of `num_attention_heads`".to_owned(),
            ),
            (
                (2..=1 << 13).contains(&config.max_position_embeddings),
                format!(
                    "`max_position_embeddings` is {}; it must be between 2 and {}",
                    config.max_position_embeddings,
                    1 << 13
                ),
            ),
            (config.num_hidden_layers >= 2, "`num_hidden_layers` must be at least 2".to_owned()),
        ] {
            if !holds {
                problems.push(problem);
            }
        }
        if problems.is_empty() { Ok(config) } else { Err(ConfigError::Problems { problems }) }
    }

    /// Number of parameters of such an encoder, with or without the projection of its pooled output.
    #[must_use]
    pub fn size(&self, projects: bool) -> i64 {
        self.declare(projects).numel()
    }

    /// Names and shapes of the tensors of such an encoder.
    pub(crate) fn tensors(&self, projects: bool) -> Vec<(String, Vec<i64>)> {
        self.declare(projects).named_shapes()
    }

    fn declare(&self, projects: bool) -> Declaration {
        let mut declaration = Declaration::default();
        Network::new(&mut Scope::root(&mut declaration), self, projects);
        declaration
    }
}

/// Tensors of a file under the names of the network: without the prefix `text_model.`.
pub(crate) fn present(tensors: Named) -> Named {
    let present = tensors.into_iter().map(|(name, tensor)| match name.strip_prefix("text_model.") {
        Some(rest) => (rest.to_owned(), tensor),
        None => (name, tensor),
    });
    // Old files hold a table of the numbers 0 to 76.
    present.filter(|(name, _)| !name.ends_with("embeddings.position_ids")).collect()
}

/// The name in files of a tensor of the network.
pub(crate) fn in_files(name: String) -> String {
    if name.starts_with("text_projection") { name } else { format!("text_model.{name}") }
}

/// Tokens → states and a pooled vector; its weights take no gradient.
pub struct TextEncoder {
    config: TextEncoderConfig,
    /// Owns the memory of which the network's tensors are views.
    parameters: Parameters,
    network: Network,
}

/// The output for a text.
pub struct TextStates {
    /// States after the last layer and its normalization, [N, tokens, width].
    pub last: Tensor,
    /// States after the layer before the last, not normalized: SDXL uses these.
    pub penultimate: Tensor,
    /// The state of the text's end token, [N, width]; projected if the network has the projection.
    pub pooled: Tensor,
}

struct Network {
    tokens: Embedding,
    positions: Embedding,
    layers: Vec<Layer>,
    norm: LayerNorm,
    projection: Option<Linear>,
}

struct Layer {
    norm1: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    norm2: LayerNorm,
    widen: Linear,
    narrow: Linear,
    heads: i64,
    quick: bool,
}

impl TextEncoder {
    /// An encoder from named tensors, which must be exactly those of the configuration, with or without the prefix
    /// `text_model.`; with `projects` the pooled output is projected (`CLIPTextModelWithProjection`).
    ///
    /// # Errors
    /// [`LoadError`], with one line for each tensor that does not fit.
    pub fn from_tensors(
        config: TextEncoderConfig,
        projects: bool,
        tensors: Named,
        device: Device,
    ) -> Result<Self, LoadError> {
        let parameters = weights::assemble(
            config.declare(projects),
            &present(tensors),
            Surplus::PassedOver,
            (Kind::Float, device),
        )?;
        let parameters = parameters.over(parameters.flat().shallow_clone(), false);
        let network = Network::new(&mut Scope::root(&mut Binding::new(&parameters)), &config, projects);
        Ok(Self { config, parameters, network })
    }

    /// The architecture.
    #[must_use]
    pub fn config(&self) -> &TextEncoderConfig {
        &self.config
    }

    /// Number of parameters.
    #[must_use]
    pub fn size(&self) -> i64 {
        self.parameters.flat().numel() as i64
    }

    /// States of `ids`, int64 [N, tokens]. No gradients are recorded.
    ///
    /// # Panics
    /// When a token is not in the vocabulary, or there are more than `max_position_embeddings`.
    pub fn encode(&self, ids: &Tensor) -> TextStates {
        no_grad(|| {
            let ids = upload(ids, self.parameters.flat().device());
            let network = &self.network;
            let positions = Tensor::arange(ids.size()[1], (Kind::Int64, ids.device()));
            let mut x = network.tokens.forward(&ids) + network.positions.forward(&positions);
            let mut penultimate = x.shallow_clone();
            for layer in &network.layers {
                penultimate = std::mem::replace(&mut x, Tensor::new());
                x = layer.forward(&penultimate);
            }
            let last = network.norm.forward(&x);
            let end = match self.config.eos_token_id {
                LEGACY_EOS => ids.argmax(-1, false),
                eos => ids.eq(eos).to_kind(Kind::Int64).argmax(-1, false),
            };
            let rows = Tensor::arange(ids.size()[0], (Kind::Int64, ids.device()));
            let pooled = last.index(&[Some(&rows), Some(&end)]);
            let pooled = match &network.projection {
                Some(projection) => projection.forward(&pooled),
                None => pooled,
            };
            TextStates { last, penultimate, pooled }
        })
    }
}

impl Network {
    fn new(scope: &mut Scope, config: &TextEncoderConfig, projects: bool) -> Self {
        let width = config.hidden_size;
        let mut embeddings = scope.child("embeddings");
        let tokens = Embedding::new(embeddings.child("token_embedding"), config.vocab_size, width);
        let positions =
            Embedding::new(embeddings.child("position_embedding"), config.max_position_embeddings, width);
        let layers = (0..config.num_hidden_layers)
            .map(|index| Layer::new(&mut scope.child(format!("encoder.layers.{index}")), config))
            .collect();
        let norm = LayerNorm::new(scope.child("final_layer_norm"), width, config.layer_norm_eps);
        let projection =
            projects.then(|| linear(scope.child("text_projection"), width, config.projection_dim, false));
        Self { tokens, positions, layers, norm, projection }
    }
}

impl Layer {
    fn new(scope: &mut Scope, config: &TextEncoderConfig) -> Self {
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let norm = |scope: Scope| LayerNorm::new(scope, width, config.layer_norm_eps);
        let project = |scope: &mut Scope, name: &str| {
            linear(scope.child(format!("self_attn.{name}_proj")), width, width, true)
        };
        Self {
            query: project(scope, "q"),
            key: project(scope, "k"),
            value: project(scope, "v"),
            out: project(scope, "out"),
            norm1: norm(scope.child("layer_norm1")),
            widen: linear(scope.child("mlp.fc1"), width, inner, true),
            narrow: linear(scope.child("mlp.fc2"), inner, width, true),
            norm2: norm(scope.child("layer_norm2")),
            heads: config.num_attention_heads,
            quick: config.hidden_act == "quick_gelu",
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let normed = self.norm1.forward(x);
        let [query, key, value] = [&self.query, &self.key, &self.value].map(|layer| layer.forward(&normed));
        // A token attends to those before it, padding included: CLIP has no other mask.
        let x = self.out.forward(&attention(&query, &key, &value, self.heads, true)) + x;
        let h = self.widen.forward(&self.norm2.forward(&x));
        let h = if self.quick { (&h * 1.702).sigmoid() * h } else { h.gelu("none") };
        self.narrow.forward(&h) + x
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_of_another_model_is_called_what_it_is() {
        assert!(TextEncoderConfig::parse(r#"{"model_type": "clip_text_model"}"#).is_ok());
        assert!(TextEncoderConfig::parse("{}").is_ok());
        for (json, said) in [
            (r#"{"model_type": "clip", "text_config": {"hidden_size": 8}}"#, "a whole CLIP model"),
            (r#"{"architectures": ["CLIPModel"], "text_config": {}}"#, "CLIPTextModel.from_pretrained"),
            (
                r#"{"model_type": "t5", "hidden_size": "none"}"#,
                "`model_type` is \"t5\"; supported: clip_text_model",
            ),
        ] {
            let error = TextEncoderConfig::parse(json).unwrap_err().to_string();
            assert!(error.contains(said), "{json}: {error}");
        }
    }
}
