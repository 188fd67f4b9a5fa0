//! Errors of a configuration.

/// A configuration is not that of a valid network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the network's configuration is not valid:{}", problems.iter().map(|p| format!("\n  - {p}")).collect::<String>())]
pub struct ConfigError {
    /// One line for each problem, naming the field or the layer.
    pub problems: Vec<String>,
}
