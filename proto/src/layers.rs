//! Layered configuration: defaults → file → `POTSTILL__…` environment → `--set key=value`.
//!
//! A key that the configuration does not have is refused by name, with the nearest one it has.

use std::path::{Path, PathBuf};

use config::{Config, Environment, File, FileFormat};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

/// Why a configuration could not be read.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The file is not there or cannot be read.
    #[error("cannot read {path}: {source}")]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// Bad TOML, or a value of the wrong type.
    #[error("{origin}: {problem}")]
    Invalid {
        /// The file, or the other layer, at fault.
        origin: String,
        /// What is wrong, with the key.
        problem: String,
    },
    /// A key that an earlier version had.
    #[error("the key `{key}` is of an earlier version: {now}")]
    FormerKey {
        /// The key, dotted.
        key: String,
        /// What became of it.
        now: &'static str,
    },
    /// A key that means nothing.
    #[error("unknown key `{key}`{}", nearest.as_ref().map(|n| format!("; the nearest valid key is `{n}`")).unwrap_or_default())]
    UnknownKey {
        /// The key, dotted.
        key: String,
        /// The most similar valid key, if one is similar at all.
        nearest: Option<String>,
    },
    /// `--set` without `=`.
    #[error("--set {0}: expected key=value, as in --set distillation.iterations=200")]
    NotKeyValue(String),
    /// Values that are each well-formed but not acceptable.
    #[error("the configuration is not valid:{}", problems.iter().map(|p| format!("\n  - {p}")).collect::<String>())]
    OutOfRange {
        /// One line for each problem, naming the key.
        problems: Vec<String>,
    },
}

/// Keys that earlier versions had, dotted, each with a sentence that says what became of it.
pub type FormerKeys = [(&'static str, &'static str)];

/// Reads a `T` from its layers. `sets` are the `key=value` strings of `--set`, applied in order; a value is read as TOML
/// where it parses as such and as a string otherwise. `former` keys are refused with what became of them.
///
/// # Errors
/// See [`LayerError`]. Ranges are not checked here: that is the business of `T`'s own `validate`.
pub fn load<T>(file: &Path, sets: &[String], former: &FormerKeys) -> Result<T, LayerError>
where
    T: Default + Serialize + DeserializeOwned,
{
    let text = std::fs::read_to_string(file)
        .map_err(|source| LayerError::Unreadable { path: file.to_owned(), source })?;
    let environment = Environment::with_prefix("POTSTILL")
        .prefix_separator("__")
        .separator("__")
        .try_parsing(true)
        .ignore_empty(true);
    parse(&text, &file.display().to_string(), sets, environment, former)
}

/// [`load`] for a text that is already in memory, without environment.
///
/// # Errors
/// As [`load`].
pub fn from_str<T>(text: &str, origin: &str, former: &FormerKeys) -> Result<T, LayerError>
where
    T: Default + Serialize + DeserializeOwned,
{
    let none = Environment::default().source(Some(Default::default()));
    parse(text, origin, &[], none, former)
}

fn parse<T>(
    text: &str,
    origin: &str,
    sets: &[String],
    environment: Environment,
    former: &FormerKeys,
) -> Result<T, LayerError>
where
    T: Default + Serialize + DeserializeOwned,
{
    let invalid = |origin: &str| {
        let origin = origin.to_owned();
        move |e: config::ConfigError| LayerError::Invalid { origin, problem: e.to_string() }
    };
    let mut builder =
        Config::builder().add_source(File::from_str(text, FileFormat::Toml)).add_source(environment);
    for set in sets {
        let (key, value) = set.split_once('=').ok_or_else(|| LayerError::NotKeyValue(set.clone()))?;
        builder = builder
            .set_override(key.trim(), toml_value(value.trim()))
            .map_err(invalid(&format!("--set {set}")))?;
    }
    let merged = builder.build().map_err(invalid(origin))?;

    // Optional values serialise as null, so the defaults list every key there is.
    let template = serde_json::to_value(T::default()).unwrap_or_default();
    let given: Value = merged.try_deserialize().map_err(invalid(origin))?;
    refuse_unknown_keys(&given, &template, former)?;

    // Not the configuration library's own conversion: it would round 1.5 to 2 where a count is wanted.
    serde_path_to_error::deserialize(given).map_err(|e| LayerError::Invalid {
        origin: origin.to_owned(),
        problem: format!("`{}`: {}", e.path(), e.inner()),
    })
}

/// A `--set` value as the configuration library's value, by way of TOML's grammar.
fn toml_value(text: &str) -> config::Value {
    fn convert(value: toml::Value) -> config::Value {
        use toml::Value as T;
        match value {
            T::String(s) => s.into(),
            T::Integer(i) => i.into(),
            T::Float(f) => f.into(),
            T::Boolean(b) => b.into(),
            T::Datetime(d) => d.to_string().into(),
            T::Array(a) => a.into_iter().map(convert).collect::<Vec<_>>().into(),
            T::Table(t) => config::Map::from_iter(t.into_iter().map(|(k, v)| (k, convert(v)))).into(),
        }
    }
    let parsed: Option<toml::Table> = toml::from_str(&format!("value = {text}")).ok();
    match parsed.and_then(|mut t| t.remove("value")) {
        Some(value) => convert(value),
        None => text.into(),
    }
}

fn refuse_unknown_keys(given: &Value, template: &Value, former: &FormerKeys) -> Result<(), LayerError> {
    let mut valid = Vec::new();
    leaves(template, "", &mut valid);
    let mut present = Vec::new();
    leaves(given, "", &mut present);
    for key in present {
        // First: inside an optional section every key counts as known here.
        if let Some((_, now)) = former.iter().find(|(former, _)| *former == key) {
            return Err(LayerError::FormerKey { key, now });
        }
        // A key is known when it is a leaf of the template, or when it lies inside one (a table given for an option).
        let known = valid
            .iter()
            .any(|v| key == *v || key.strip_prefix(v.as_str()).is_some_and(|r| r.starts_with('.')));
        let section = valid.iter().any(|v| v.starts_with(&format!("{key}.")));
        if !known && !section {
            return Err(LayerError::UnknownKey { nearest: nearest(&key, &valid), key });
        }
    }
    Ok(())
}

/// The dotted paths of everything that is not a non-empty table.
fn leaves(value: &Value, path: &str, into: &mut Vec<String>) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (key, value) in map {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                leaves(value, &path, into);
            }
        }
        _ if path.is_empty() => {}
        _ => into.push(path.to_owned()),
    }
}

fn nearest(key: &str, valid: &[String]) -> Option<String> {
    let last = |k: &str| k.rsplit('.').next().unwrap_or(k).to_owned();
    valid
        .iter()
        // A key in the wrong section is as likely a slip as a misspelt one.
        .map(|v| (strsim::jaro_winkler(key, v).max(strsim::jaro_winkler(&last(key), &last(v))), v))
        .filter(|(similarity, _)| *similarity > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, v)| v.clone())
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Outer {
        name: String,
        inner: Inner,
    }

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Inner {
        learning_rate: f64,
        steps: u32,
        clip: Option<f64>,
        betas: [f64; 2],
    }

    fn with(text: &str, sets: &[&str], env: &[(&str, &str)]) -> Result<Outer, LayerError> {
        let vars = env.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let environment = Environment::with_prefix("POTSTILL")
            .prefix_separator("__")
            .separator("__")
            .try_parsing(true)
            .source(Some(vars));
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        parse(text, "run.toml", &sets, environment, &[("inner.rate", "it is `inner.learning_rate` now")])
    }

    #[test]
    fn later_layers_win() {
        let text = "name = 'file'\n[inner]\nlearning_rate = 1e-3\nsteps = 2";
        let read =
            with(text, &["inner.steps=4", "inner.betas=[0.0, 0.9]"], &[("POTSTILL__INNER__STEPS", "3")])
                .unwrap();
        assert_eq!(read.inner, Inner { learning_rate: 1e-3, steps: 4, clip: None, betas: [0.0, 0.9] });
        let read = with(text, &["name=set"], &[("POTSTILL__INNER__CLIP", "2.5")]).unwrap();
        assert_eq!((read.name.as_str(), read.inner.clip, read.inner.steps), ("set", Some(2.5), 2));
    }

    #[test]
    fn an_unknown_key_is_named_with_the_nearest_valid_one() {
        let error = with("[inner]\nlerning_rate = 1", &[], &[]).unwrap_err().to_string();
        assert_eq!(error, "unknown key `inner.lerning_rate`; the nearest valid key is `inner.learning_rate`");
        let error = with("", &["steps=3"], &[]).unwrap_err().to_string();
        assert_eq!(error, "unknown key `steps`; the nearest valid key is `inner.steps`");
        let error = with("", &[], &[("POTSTILL__INNER__STEP", "3")]).unwrap_err().to_string();
        assert!(error.contains("`inner.steps`"), "{error}");
        let error = with("[zzqx]\nq = 1", &[], &[]).unwrap_err().to_string();
        assert_eq!(error, "unknown key `zzqx.q`");
    }

    #[test]
    fn a_key_of_an_earlier_version_is_refused_with_what_became_of_it() {
        let error = with("[inner]\nrate = 1", &[], &[]).unwrap_err().to_string();
        assert_eq!(error, "the key `inner.rate` is of an earlier version: it is `inner.learning_rate` now");
        assert!(matches!(with("", &["inner.rate=1"], &[]), Err(LayerError::FormerKey { .. })));
    }

    #[test]
    fn mistyped_values_and_bad_grammar_name_their_place() {
        let error = with("[inner]\nsteps = 'many'", &[], &[]).unwrap_err().to_string();
        assert!(error.contains("steps") && error.contains("run.toml"), "{error}");
        let error = with("[inner]\nsteps = 1.5", &[], &[]).unwrap_err().to_string();
        assert!(error.contains("steps"), "{error}");
        assert!(with("[inner", &[], &[]).is_err());
        assert!(matches!(with("", &["novalue"], &[]), Err(LayerError::NotKeyValue(_))));
        let missing = load::<Outer>(Path::new("/nonexistent/run.toml"), &[], &[]).unwrap_err().to_string();
        assert!(missing.contains("/nonexistent/run.toml"), "{missing}");
    }
}
