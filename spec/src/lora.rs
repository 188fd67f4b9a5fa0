//! `[lora]`: low-rank adapters instead of whole networks.

use std::num::NonZeroU32;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problems::{Problems, positive};

/// Low-rank adapters (LoRA, 2106.09685): teacher, fake score and generator share one frozen network, and the latter two
/// train an adapter each. Master copies and moments exist for the adapters alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoraSpec {
    /// r, the rank of an adapter. DMD2's (2405.14867): 64.
    pub rank: NonZeroU32,
    /// α: an adapter's product is multiplied by α/r. DMD2's: 8.
    pub alpha: f64,
    /// The layers that get adapters: names of modules, or their ends at a dot, as in `to_q` or `ff.net.2`. By default those of
    /// DMD2 in a U-Net of diffusers, and all convolutions, attention and embedding layers inside the blocks of an EDM
    /// network.
    pub targets: Option<Vec<String>>,
    /// Share of each adapter's input that is dropped while its network trains, as in the public PEFT library; whether or not the
    /// networks' own dropout is active.
    pub dropout: f64,
}

impl Default for LoraSpec {
    fn default() -> Self {
        Self { rank: NonZeroU32::MIN.saturating_add(63), alpha: 8.0, targets: None, dropout: 0.0 }
    }
}

impl LoraSpec {
    pub(crate) fn validate(&self, problems: &mut Problems) {
        let Self { alpha, dropout, .. } = *self;
        problems.require((0.0..1.0).contains(&dropout), || {
            format!("lora.dropout is {dropout}; it must lie in [0, 1)")
        });
        problems.require(positive(alpha), || format!("lora.alpha is {alpha}; it must be > 0"));
        problems.require(self.targets.as_ref().is_none_or(|targets| !targets.is_empty()), || {
            "lora.targets is empty: name layers, or remove the key for the usual ones".into()
        });
    }
}
