//! Generations and cursors: which membership computes, and how far its state is.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A numbered membership of a run. The number grows by one with every change of members and is never used twice within
/// a run, so that messages of former members can be told from those of present ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl Generation {
    /// The generation that follows.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// The key prefix that this generation's process group uses in the shared store.
    #[must_use]
    pub fn store_prefix(self) -> String {
        format!("g{}", self.0)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "generation {}", self.0)
    }
}

/// The two halves of an iteration, in the order in which they run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The fake score network learns the score of the generator's samples.
    #[default]
    FakeScore,
    /// The generator takes a step along the difference of the two scores.
    Generator,
}

/// How far a state is: the phase that it computes next, with everything before applied to it. Ordered by age.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Cursor {
    /// Completed iterations.
    pub iteration: u64,
    /// The phase of this iteration that comes next.
    pub phase: Phase,
}

impl Cursor {
    /// The boundary after `iteration` completed iterations.
    #[must_use]
    pub fn boundary(iteration: u64) -> Self {
        Self { iteration, phase: Phase::FakeScore }
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.phase {
            Phase::FakeScore => write!(f, "iteration {}", self.iteration),
            Phase::Generator => write!(f, "iteration {} (generator phase)", self.iteration),
        }
    }
}
