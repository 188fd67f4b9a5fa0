//! `[checkpoint]`: when to save, and how much to keep.

use std::num::{NonZeroU32, NonZeroU64};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problems::Problems;

/// Checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointSpec {
    /// Save after every so many iterations; the last iteration always saves.
    pub every: u64,
    /// Keep so many of the newest, or "all".
    pub keep_last: Keep,
    /// Besides these, keep every checkpoint whose iteration is a multiple of this.
    pub keep_every: Option<NonZeroU64>,
    /// Stop the run after so many failed saves in a row; without it the run goes on whatever fails.
    pub stop_after_failures: Option<NonZeroU32>,
}

/// How many of the newest checkpoints are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a number of at least 1, or \"all\"")]
pub enum Keep {
    /// So many.
    Newest(NonZeroU64),
    /// Every one.
    All(All),
}

/// The word "all".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum All {
    /// Every one.
    All,
}

impl Keep {
    /// Every checkpoint.
    pub const ALL: Self = Self::All(All::All);

    /// How many, where there is a bound.
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
