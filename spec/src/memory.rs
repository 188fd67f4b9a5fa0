//! `[memory]`: what saves memory on the devices.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{distillation::Precision, problems::Problems};

/// What saves memory on the devices; `potstill plan` says how much.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MemorySpec {
    /// The networks' weights are bf16; fp32 master copies lie with the optimizer. For `distillation.precision = "bf16"` and
    /// text-to-image models.
    pub bf16_weights: bool,
    /// Blocks of a text-to-image model's networks are computed again in the backward pass instead of keeping what they computed
    /// (activation checkpointing, 1604.06174).
    pub recompute: bool,
    /// Each rank holds and steps one part of master weights, Adam's moments and G_ema (ZeRO stage 1, 1910.02054). What a rank
    /// that dies held is then in the newest checkpoint only.
    pub shard_optimizer: bool,
    /// G_ema lies in the host's memory.
    pub offload_ema: bool,
}

impl MemorySpec {
    /// `reads` says whether the teacher is a text-to-image model.
    pub(crate) fn validate(&self, reads: bool, precision: Precision, problems: &mut Problems) {
        problems.require(!self.bf16_weights || (precision == Precision::Bf16 && reads), || {
            "memory.bf16_weights is for text-to-image models with distillation.precision = \"bf16\"".into()
        });
        problems.require(!self.recompute || reads, || "memory.recompute is for text-to-image models".into());
    }
}
