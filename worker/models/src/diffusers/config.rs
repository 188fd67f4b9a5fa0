//! Types that the configurations of a model folder share.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

/// Why a configuration is not that of a supported network.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It is not JSON of the expected form.
    #[error("{0}")]
    Syntax(#[from] serde_json::Error),
    /// It asks for a feature that is not implemented, or contradicts itself; one line for each problem.
    #[error("{}", problems.join("; "))]
    Problems {
        /// One line for each problem, with its key.
        problems: Vec<String>,
    },
}

/// One value for all blocks, or one for each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PerBlock<T> {
    /// The same for all.
    One(T),
    /// One for each.
    Each(Vec<T>),
}

impl<T: Copy> PerBlock<T> {
    /// The value for one block.
    ///
    /// # Panics
    /// When there is none, which [`PerBlock::fits`] tells.
    #[must_use]
    pub fn at(&self, block: usize) -> T {
        match self {
            Self::One(value) => *value,
            Self::Each(values) => values[block],
        }
    }

    /// The values.
    #[must_use]
    pub fn all(&self) -> Vec<T> {
        match self {
            Self::One(value) => vec![*value],
            Self::Each(values) => values.clone(),
        }
    }

    /// Whether there is a value for each of `blocks`.
    #[must_use]
    pub fn fits(&self, blocks: usize) -> bool {
        match self {
            Self::One(_) => true,
            Self::Each(values) => values.len() == blocks,
        }
    }
}

/// The key under which diffusers writes the class of what it saves.
pub(crate) const CLASS: &str = "_class_name";

/// Keys of a configuration beside those that its reader supports.
pub(crate) type Rest = BTreeMap<String, Value>;

/// Reads a configuration and rejects keys that would change the network in a way that its reader does not support:
/// those that are neither null, false, nor empty. Keys that begin with `_` are notes of the library that wrote them, of
/// which the name of the network's class must be `class`.
pub(crate) fn parse<T: DeserializeOwned>(
    json: &str,
    class: &str,
    rest: impl Fn(&T) -> &Rest,
    neutral: &[&str],
) -> Result<T, ConfigError> {
    let named = serde_json::from_str::<Value>(json)?;
    if let Some(other) = named[CLASS].as_str().filter(|name| *name != class) {
        let problem = format!("`{CLASS}` is {other:?}; supported: {class}");
        return Err(ConfigError::Problems { problems: vec![problem] });
    }
    let config: T = serde_json::from_str(json).map_err(|error| match error.to_string() {
        // Only of a value that has several forms the message does not say which one it is.
        said if said.contains("untagged enum") => culprit::<T>(json).unwrap_or(error.into()),
        said if said.starts_with("invalid type") => culprit::<T>(json).unwrap_or(error.into()),
        _ => error.into(),
    })?;
    let says_something = |value: &Value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(values) => !values.is_empty(),
        _ => true,
    };
    let problems: Vec<String> = rest(&config)
        .iter()
        .filter(|(key, value)| {
            !key.starts_with('_') && !neutral.contains(&key.as_str()) && says_something(value)
        })
        .map(|(key, value)| format!("`{key}` is {value}, which is not supported"))
        .collect();
    if problems.is_empty() { Ok(config) } else { Err(ConfigError::Problems { problems }) }
}

/// The key without which a configuration can be read: the library's message of a value that has several forms names none.
fn culprit<T: DeserializeOwned>(json: &str) -> Option<ConfigError> {
    let Ok(Value::Object(object)) = serde_json::from_str::<Value>(json) else { return None };
    let without = |key: &str| {
        let mut rest = object.clone();
        rest.remove(key);
        serde_json::from_value::<T>(Value::Object(rest)).is_ok()
    };
    let (key, value) = object.iter().find(|(key, _)| without(key))?;
    Some(ConfigError::Problems { problems: vec![format!("`{key}` is {value}, which is not supported")] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct Known {
        size: i64,
        #[serde(flatten)]
        rest: Rest,
    }

    fn read(json: &str) -> Result<Known, ConfigError> {
        parse(json, "X", |known: &Known| &known.rest, &["harmless"])
    }

    #[test]
    fn what_would_change_the_network_unknown_is_refused_by_name() {
        let known =
            read(r#"{"size": 3, "_class_name": "X", "off": false, "none": null, "harmless": 7}"#).unwrap();
        assert_eq!(known.size, 3);
        let error = read(r#"{"size": 3, "gated": true, "extra_layers": 2}"#).unwrap_err().to_string();
        assert!(error.contains("`gated` is true") && error.contains("`extra_layers` is 2"), "{error}");
        assert!(read(r#"{"size": "three"}"#).is_err());
        // Of another class the other keys say nothing.
        let error = read(r#"{"size": "three", "_class_name": "Y"}"#).unwrap_err().to_string();
        assert_eq!(error, r#"`_class_name` is "Y"; supported: X"#);
    }
}
