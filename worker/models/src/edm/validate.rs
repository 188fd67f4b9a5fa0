//! Checks configurations.

use super::{config::EdmConfig, error::ConfigError, unet::UNet};
use crate::builder::{Declaration, Scope};

impl EdmConfig {
    /// Checks that the configuration is that of a valid network, and that all `attn_resolutions` are resolutions of the
    /// network. (The official code ignores others, so weights with them can be loaded.)
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

    /// The parameters and buffers of the network, if it is valid.
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
