//! `[memory]`: options that save memory on the devices.

use std::num::NonZeroU32;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{distillation::Precision, problems::Problems};

/// What each rank holds a slice of. It holds a copy of one other rank's slice too, so that a rank that dies costs no step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Shard {
    /// Nothing: every rank holds everything.
    #[default]
    None,
    /// Master weights, Adam's moments and G_ema (ZeRO stage 1, 1910.02054).
    Optimizer,
    /// These, and the gradients: each block's are reduced to the slices as soon as they are computed (ZeRO stage 2).
    Gradients,
    /// These, and the weights of teacher, generator and fake score: a block's are gathered before it computes, and let go of
    /// afterwards (ZeRO stage 3). For text-to-image models, with `memory.recompute`.
    Parameters,
}

/// Options that save memory on the devices; `potstill plan` prints how much.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MemorySpec {
    /// The networks' weights are bf16; the optimizer holds fp32 master copies. For `distillation.precision = "bf16"`
    /// and text-to-image models.
    pub bf16_weights: bool,
    /// Blocks of a text-to-image model's networks are computed again in the backward pass instead of keeping their
    /// activations (activation checkpointing, 1604.06174).
    pub recompute: bool,
    /// What the ranks divide among themselves instead of holding it whole.
    pub shard: Shard,
    /// Ranks that hold all slices together, at least: as many as a machine has. Where the ranks can form several groups of
    /// equal size, slices are exchanged within each, only sums of gradients between them, and each group is another's copy
    /// (hybrid sharding, 2304.11277). Without it, all ranks are one group.
    pub shard_group: Option<NonZeroU32>,
    /// G_ema is kept in the host's memory.
    pub offload_ema: bool,
    /// Master weights, Adam's moments and G_ema are kept in the host's memory, and stepped there: the gradient is sent to it and the
    /// weights back in each step (2101.06840). For `bf16_weights`, whose master weights are separate.
    pub offload_optimizer: bool,
}

impl MemorySpec {
    /// Whether each rank holds slices of the state.
    #[must_use]
    pub fn is_sharded(&self) -> bool {
        self.shard != Shard::None
    }

    /// `reads`: whether the teacher is a text-to-image model.
    pub(crate) fn validate(&self, reads: bool, precision: Precision, problems: &mut Problems) {
        problems.require(!self.bf16_weights || (precision == Precision::Bf16 && reads), || {
            "memory.bf16_weights is for text-to-image models with distillation.precision = \"bf16\"".into()
        });
        problems.require(self.shard != Shard::Parameters || self.recompute, || {
            "memory.shard = \"parameters\" gathers the weights of the blocks that are computed again: set memory.recompute = true \
             (text-to-image models), or memory.shard = \"gradients\""
                .into()
        });
        problems.require(!self.offload_optimizer || self.bf16_weights, || {
            "memory.offload_optimizer keeps master weights on the host, which are the weights themselves without \
             memory.bf16_weights = true"
                .into()
        });
        problems.require(self.shard_group.is_none() || self.is_sharded(), || {
            "memory.shard_group divides the ranks that memory.shard divides the state among: set memory.shard too".into()
        });
        problems.require(self.shard_group.is_none_or(|ranks| ranks.get() > 1), || {
            "memory.shard_group = 1 divides nothing: set memory.shard = \"none\"".into()
        });
        problems.require(!self.recompute || reads, || "memory.recompute is for text-to-image models".into());
    }
}
