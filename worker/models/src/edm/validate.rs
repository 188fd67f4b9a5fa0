//! Whether a configuration describes a network.

use super::{config::EdmConfig, error::ConfigError, unet::UNet};
use crate::builder::{Declaration, Scope};

impl EdmConfig {
    /// Checks that there is such a network, and that every resolution in `attn_resolutions` is one of its own. (The official
    /// code ignores the others, so weights load with them.)
    ///
    /// # Errors
    /// [`ConfigError`] with every problem found.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.declare()?;
        let known: Vec<i64> = self.resolutions().collect();
        let problems: Vec<String> = (self.attn_resolutions.iter())
            .filter(|resolution| !known.contains(resolution))
            .map(|r| format!("attn_resolutions has {r}, but the network's resolutions are {known:?}"))
            .collect();
        if problems.is_empty() { Ok(()) } else { Err(ConfigError { problems }) }
    }

    /// The parameters and buffers of the network, if there is such a network.
    pub(crate) fn declare(&self) -> Result<Declaration, ConfigError> {
        let problems = self.problems();
        if !problems.is_empty() {
            return Err(ConfigError { problems });
        }
        let mut declaration = Declaration::default();
        UNet::new(&mut Scope::root(&mut declaration).child("model"), self);
        match declaration.problems() {
            [] => Ok(declaration),
            problems => Err(ConfigError { problems: problems.to_vec() }),
        }
    }
}
