//! Low-rank adapters (LoRA, 2106.09685): a frozen network whose chosen layers compute `W·x + (α/r)·B·(A·x)`, and train A
//! and B alone.
//!
//! For a convolution A has the layer's kernel and stride, and B is 1×1, as in the public PEFT library. The adapters of a
//! network are its [`Parameters`](crate::Parameters), so that optimizer, average, checkpoints and transfers treat them like
//! any weights.

pub mod file;
pub(crate) mod weights;

pub use crate::weight::{DOWN, UP};

/// Which layers get adapters, and of which size.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    /// r.
    pub rank: i64,
    /// α.
    pub alpha: f64,
    /// Names of modules, or their ends at a dot: `to_q` means every module `….to_q`. `None`: the usual
    /// ones of the network's family.
    pub targets: Option<Vec<String>>,
    /// The share of an adapter's input that is 0 in training mode, drawn anew for each layer and pass; the rest is divided by what
    /// is left of 1. As in the public PEFT library.
    pub dropout: f64,
}

impl Lora {
    /// The names of the layers that get adapters in a network whose usual ones these are.
    pub(crate) fn targets_of(&self, usual: &[&str]) -> Vec<String> {
        let usual = || usual.iter().map(|name| (*name).to_owned()).collect();
        self.targets.clone().unwrap_or_else(usual)
    }

    /// α/r.
    #[must_use]
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }
}

/// Why a network cannot have these adapters.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum LoraError {
    /// Names that no layer has.
    #[error("no layer has the name or the ending {}", .targets.join(", or "))]
    UnknownTargets {
        /// Each with the nearest names that there are.
        targets: Vec<String>,
    },
    /// A layer has fewer inputs or outputs than the rank.
    #[error(
        "rank {rank} is above what {module} has: its weight is of rank {most} at most; lower lora.rank or leave it out of lora.targets"
    )]
    Rank {
        /// The layer.
        module: String,
        /// The wanted rank.
        rank: i64,
        /// The rank of its weight.
        most: i64,
    },
    /// The network has no layers that adapters are built for.
    #[error("this network has no layers that can be adapted")]
    Unsupported,
}
