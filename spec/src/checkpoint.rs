//! `[checkpoint]`: when checkpoints are saved, and how many are kept.

use std::num::{NonZeroU32, NonZeroU64};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problems::Problems;

/// Checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointSpec {
    /// Iterations between two checkpoints; the last iteration is always saved.
    pub every: u64,
    /// Number of the newest checkpoints to keep, or "all".
    pub keep_last: Keep,
    /// Besides these, every checkpoint whose iteration is a multiple of this is kept.
    pub keep_every: Option<NonZeroU64>,
    /// Stop the run after this number of failed checkpoints in a row; without it the run continues however many fail.
    pub stop_after_failures: Option<NonZeroU32>,
}

/// How many of the newest checkpoints are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a number of at least 1, or \"all\"")]
pub enum Keep {
    /// This number.
    Newest(NonZeroU64),
    /// All of them.
    All(All),
}

/// The word "all".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum All {
    /// All checkpoints.
    All,
}

impl Keep {
    /// All checkpoints.
    pub const ALL: Self = Self::All(All::All);

    /// The number, if it is limited.
    #[must_use]
    pub fn bound(self) -> Option<u64> {
        match self {
            Self::Newest(count) => Some(count.get()),
            Self::All(_) => None,
        }
    }
}

impl Default for CheckpointSpec {
    fn default() -> Self {
        const NEWEST: NonZeroU64 = NonZeroU64::new(5).expect("5 is not 0");
        Self { every: 500, keep_last: Keep::Newest(NEWEST), keep_every: None, stop_after_failures: None }
    }
}

impl CheckpointSpec {
    pub(crate) fn validate(&self, problems: &mut Problems) {
        problems.require(self.every > 0, || "checkpoint.every is 0; it must be at least 1".into());
    }
}
