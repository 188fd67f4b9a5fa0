//! Layered configuration: defaults → the files that a file extends → the file → `POTSTILL__…` environment → `--set key=value`.
//!
//! - A file extends another by `extends = "base.toml"` at its top; relative paths in it are relative to the file that has them.
//! - An unknown key is rejected by name, with the nearest valid one.
//! - The value `none` unsets an optional key that an earlier layer has set.

use std::path::{Path, PathBuf};

use config::{Config, Environment, File, FileFormat};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::former;

/// Why a configuration could not be read.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The file is missing or cannot be read.
    #[error("cannot read {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// Invalid TOML, or a value of the wrong type.
    #[error("{origin}: {problem}")]
    Invalid {
        /// The file, or the other layer, in which it was found.
        origin: String,
        /// The error, with the key.
        problem: String,
    },
    /// A key that an earlier version had.
    #[error("the key `{key}` is of an earlier version: {now}")]
    FormerKey {
        /// The key, dotted.
        key: String,
        /// A sentence about its replacement.
        now: &'static str,
    },
    /// An unknown key.
    #[error("unknown key `{key}`{}", nearest.as_ref().map(|n| format!("; the nearest valid key is `{n}`")).unwrap_or_default())]
    UnknownKey {
        /// The key, dotted.
        key: String,
        /// The most similar valid key, if there is a similar one.
        nearest: Option<String>,
    },
    /// `--set` without `=`.
    #[error("--set {0}: expected key=value, as in --set distillation.iterations=200")]
    NotKeyValue(String),
    /// Values of the right type that are out of range or contradict each other.
    #[error("the configuration is not valid:{}", problems.iter().map(|p| format!("\n  - {p}")).collect::<String>())]
    OutOfRange {
        /// One line for each problem, naming the key.
        problems: Vec<String>,
    },
}

/// The kind of reference that a key holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Names {
    /// A path on this machine.
    Path,
    /// A path, or a URL.
    Location,
    /// A folder or file, or the name of a remote repository: a path only where there is one.
    PathIfThere,
}

/// A configuration that is read from layers.
pub trait Layered: Default + Serialize + DeserializeOwned {
    /// Keys that name files, dotted. Relative paths in them are relative to the file that has them.
    const PATHS: &'static [(&'static str, Names)];
}

/// The largest number of files in a chain of `extends`.
const MOST_BASES: usize = 8;

/// Reads a `T` from its layers. `sets` are the `key=value` strings of `--set`, applied in order; a value is read as
/// TOML if it is valid TOML and as a string otherwise. Relative paths in them and in the environment are relative to
/// `file`.
///
/// # Errors
/// See [`LayerError`]. Ranges are not checked here: `T`'s own `validate` does that.
pub fn load<T: Layered>(file: &Path, sets: &[String]) -> Result<T, LayerError> {
    let environment = Environment::with_prefix("POTSTILL")
        .prefix_separator("__")
        .separator("__")
        .try_parsing(true)
        .ignore_empty(true);
    let mut layers = Vec::new();
    let mut next = Some(file.to_owned());
    while let Some(path) = next.take() {
        let origin = path.display().to_string();
        let text = std::fs::read_to_string(&path)
            .map_err(|source| LayerError::Unreadable { path: path.clone(), source })?;
        let invalid = |problem: String| LayerError::Invalid { origin: origin.clone(), problem };
        let mut table: toml::Table = text.parse().map_err(|e: toml::de::Error| invalid(e.to_string()))?;
        let folder = folder_of(&path)?;
        next = match table.remove("extends") {
            Some(toml::Value::String(base)) => Some(folder.join(base)),
            Some(_) => return Err(invalid("`extends`: expected the path of a file".to_owned())),
            None => None,
        };
        resolve::<T>(&mut table, &folder);
        layers.push((origin.clone(), table));
        if layers.len() > MOST_BASES {
            return Err(invalid(format!(
                "more than {MOST_BASES} files extend each other: does one of them extend itself?"
            )));
        }
    }
    layers.reverse();
    merge(&layers, &folder_of(file)?, sets, environment)
}

/// [`load`] for a text that is already in memory, without environment. It extends no file, and its paths stay
/// unchanged.
///
/// # Errors
/// As [`load`].
pub fn from_str<T: Layered>(text: &str, origin: &str) -> Result<T, LayerError> {
    let invalid = |problem: String| LayerError::Invalid { origin: origin.to_owned(), problem };
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| invalid(e.to_string()))?;
    let none = Environment::default().source(Some(Default::default()));
    merge(&[(origin.to_owned(), table)], Path::new(""), &[], none)
}

/// The absolute folder of a file.
fn folder_of(file: &Path) -> Result<PathBuf, LayerError> {
    let absolute = std::path::absolute(file)
        .map_err(|source| LayerError::Unreadable { path: file.to_owned(), source })?;
    Ok(absolute.parent().unwrap_or(Path::new("/")).to_owned())
}

/// `layers` from the first to the last, each with its origin; relative paths of the environment and of `sets` are relative to
/// `folder`.
fn merge<T: Layered>(
    layers: &[(String, toml::Table)],
    folder: &Path,
    sets: &[String],
    environment: Environment,
) -> Result<T, LayerError> {
    let invalid = |origin: &str| {
        let origin = origin.to_owned();
        move |e: config::ConfigError| LayerError::Invalid { origin, problem: e.to_string() }
    };
    let origin = layers.last().map_or("", |(origin, _)| origin);
    // Optional values serialize as null, so the defaults list every key there is.
    let template = serde_json::to_value(T::default()).unwrap_or_default();
    let mut valid = Vec::new();
    leaves(&template, "", &mut valid);

    let mut builder = Config::builder();
    for (_, table) in layers {
        builder = builder.add_source(File::from_str(&table.to_string(), FileFormat::Toml));
    }
    builder = builder.add_source(environment);
    for set in sets {
        let (key, value) = set.split_once('=').ok_or_else(|| LayerError::NotKeyValue(set.clone()))?;
        builder = builder
            .set_override(key.trim(), toml_value(value.trim()))
            .map_err(invalid(&format!("--set {set}")))?;
    }
    let merged = builder.build().map_err(invalid(origin))?;
    let mut given: toml::Table = merged.try_deserialize().map_err(invalid(origin))?;
    refuse_unknown_keys(&serde_json::to_value(&given).unwrap_or_default(), &valid)?;
    unset(&mut given, &template);
    resolve::<T>(&mut given, folder);

    // The configuration library's own conversion would round 1.5 to 2 where an integer is wanted.
    let given = serde_json::to_value(given).unwrap_or_default();
    serde_path_to_error::deserialize(given).map_err(|e| {
        let advice = if e.inner().to_string().contains("nonzero") { "; remove the key for none" } else { "" };
        LayerError::Invalid {
            origin: origin.to_owned(),
            problem: format!("`{}`: {}{advice}", e.path(), e.inner()),
        }
    })
}

/// Makes relative paths absolute.
fn resolve<T: Layered>(table: &mut toml::Table, folder: &Path) {
    if folder.as_os_str().is_empty() {
        return;
    }
    for (key, names) in T::PATHS {
        resolve_key(table, key, *names, folder);
    }
}

/// Resolves one key; of a list of tables, that key of each.
fn resolve_key(table: &mut toml::Table, key: &str, names: Names, folder: &Path) {
    let (first, rest) = key.split_once('.').map_or((key, None), |(first, rest)| (first, Some(rest)));
    match (table.get_mut(first), rest) {
        (Some(toml::Value::Table(inner)), Some(rest)) => resolve_key(inner, rest, names, folder),
        (Some(toml::Value::Array(items)), Some(rest)) => {
            for inner in items.iter_mut().filter_map(toml::Value::as_table_mut) {
                resolve_key(inner, rest, names, folder);
            }
        }
        (Some(toml::Value::String(text)), None) if !text.is_empty() => {
            let joined = folder.join(&*text);
            let is_path = match names {
                Names::Path => true,
                Names::Location => !text.contains("://"),
                Names::PathIfThere => !text.contains("://") && joined.exists(),
            };
            // "none" is not a path.
            if is_path && text != NONE {
                *text = joined.display().to_string();
            }
        }
        _ => {}
    }
}

/// The value that unsets an optional key.
const NONE: &str = "none";

/// Removes keys that a layer has set to `none` and that are absent by default. A section that is absent by default
/// (`template` is null) says nothing of its keys: each of them is removed, and what it must have is then missing.
fn unset(given: &mut toml::Table, template: &Value) {
    given.retain(|key, value| {
        let template = if template.is_null() { Some(&Value::Null) } else { template.get(key) };
        match (value, template) {
            (toml::Value::String(text), Some(Value::Null)) => text != NONE,
            (toml::Value::Table(inner), Some(template)) => {
                unset(inner, template);
                true
            }
            _ => true,
        }
    });
}

/// A `--set` value as the configuration library's value, parsed by TOML's grammar.
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

fn refuse_unknown_keys(given: &Value, valid: &[String]) -> Result<(), LayerError> {
    let mut present = Vec::new();
    leaves(given, "", &mut present);
    for key in present {
        // Checked first: inside an optional section every key counts as known here.
        if let Some(former) = former::find(&key) {
            return Err(LayerError::FormerKey { key, now: former.now });
        }
        // A key is known when it is a leaf of the template, or when it lies inside one (a table given for an option).
        let known = valid
            .iter()
            .any(|v| key == *v || key.strip_prefix(v.as_str()).is_some_and(|r| r.starts_with('.')));
        let section = valid.iter().any(|v| v.starts_with(&format!("{key}.")));
        if !known && !section {
            return Err(LayerError::UnknownKey { nearest: nearest(&key, valid), key });
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
        // A valid key in the wrong section is as likely a mistake as a misspelled one.
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
        section: Option<Inner>,
    }

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Inner {
        learning_rate: f64,
        steps: u32,
        clip: Option<f64>,
        betas: [f64; 2],
        file: Option<PathBuf>,
        data: Option<String>,
        model: Option<String>,
    }

    impl Layered for Outer {
        const PATHS: &'static [(&'static str, Names)] = &[
            ("inner.file", Names::Path),
            ("inner.data", Names::Location),
            ("inner.model", Names::PathIfThere),
        ];
    }

    fn with(text: &str, sets: &[&str], env: &[(&str, &str)]) -> Result<Outer, LayerError> {
        let vars = env.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let environment = Environment::with_prefix("POTSTILL")
            .prefix_separator("__")
            .separator("__")
            .try_parsing(true)
            .source(Some(vars));
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        let table = text.parse().map_err(|e: toml::de::Error| LayerError::Invalid {
            origin: String::new(),
            problem: e.to_string(),
        })?;
        merge(&[("run.toml".to_owned(), table)], Path::new("/run"), &sets, environment)
    }

    #[test]
    fn later_layers_win() {
        let text = "name = 'file'\n[inner]\nlearning_rate = 1e-3\nsteps = 2";
        let read =
            with(text, &["inner.steps=4", "inner.betas=[0.0, 0.9]"], &[("POTSTILL__INNER__STEPS", "3")])
                .unwrap();
        let expected = Inner { learning_rate: 1e-3, steps: 4, betas: [0.0, 0.9], ..Inner::default() };
        assert_eq!(read.inner, expected);
        let read = with(text, &["name=set"], &[("POTSTILL__INNER__CLIP", "2.5")]).unwrap();
        assert_eq!((read.name.as_str(), read.inner.clip, read.inner.steps), ("set", Some(2.5), 2));
    }

    #[test]
    fn an_optional_key_can_be_unset() {
        let text = "name = 'none'\n[inner]\nclip = 1.0\nfile = 'f'";
        let read = with(text, &["inner.clip=none", "inner.file=none"], &[]).unwrap();
        assert_eq!((read.inner.clip, read.inner.file, read.name.as_str()), (None, None, "none"));
        assert!(with("", &["inner.steps=none"], &[]).is_err(), "what has a default has no absence");
        let text = "[section]\nclip = 1.0\nfile = 'f'\nsteps = 3";
        let section = with(text, &["section.clip=none", "section.file=none"], &[]).unwrap().section.unwrap();
        assert_eq!((section.clip, section.file, section.steps), (None, None, 3));
        assert_eq!(with(text, &["section=none"], &[]).unwrap().section, None);
    }

    #[test]
    fn a_file_extends_others_and_paths_are_relative_to_where_they_stand() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
            path
        };
        write("base/base.toml", "name = 'base'\n[inner]\nsteps = 1\nfile = 'f.bin'\ndata = 's3://b/d'");
        write("middle.toml", "extends = 'base/base.toml'\nname = 'middle'\n[inner]\nlearning_rate = 0.5");
        let top = write("top.toml", "extends = 'middle.toml'\n[inner]\nsteps = 2\nmodel = 'hub/name'");
        let read: Outer = load(&top, &["inner.model=base".into()]).unwrap();
        assert_eq!((read.name.as_str(), read.inner.steps, read.inner.learning_rate), ("middle", 2, 0.5));
        assert_eq!(read.inner.file, Some(folder.path().join("base/f.bin")));
        assert_eq!(read.inner.data.as_deref(), Some("s3://b/d"));
        assert_eq!(read.inner.model, Some(folder.path().join("base").display().to_string()));
        assert_eq!(load::<Outer>(&top, &[]).unwrap().inner.model.as_deref(), Some("hub/name"));

        let circle = write("circle.toml", "extends = 'circle.toml'");
        let error = load::<Outer>(&circle, &[]).unwrap_err().to_string();
        assert!(error.contains("circle.toml") && error.contains("extend"), "{error}");
        let lost = write("lost.toml", "extends = 'nowhere.toml'");
        let error = load::<Outer>(&lost, &[]).unwrap_err().to_string();
        assert!(error.contains("nowhere.toml"), "{error}");
        let wrong = write("wrong.toml", "extends = 3");
        assert!(load::<Outer>(&wrong, &[]).unwrap_err().to_string().contains("wrong.toml"));
        assert!(with("extends = 'x.toml'", &[], &[]).unwrap_err().to_string().contains("`extends`"));
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
        let error = with("[optimiser]\nbetas = [0.0, 0.9]", &[], &[]).unwrap_err().to_string();
        let expected = "the key `optimiser.betas` is of an earlier version: the section is `[optimizer]` now, with the same keys";
        assert_eq!(error, expected);
        let set = with("", &["cluster.wait_timeout_seconds=1"], &[]);
        assert!(matches!(set, Err(LayerError::FormerKey { .. })));
    }

    #[test]
    fn mistyped_values_and_bad_grammar_name_their_place() {
        let error = with("[inner]\nsteps = 'many'", &[], &[]).unwrap_err().to_string();
        assert!(error.contains("steps") && error.contains("run.toml"), "{error}");
        let error = with("[inner]\nsteps = 1.5", &[], &[]).unwrap_err().to_string();
        assert!(error.contains("steps"), "{error}");
        assert!(with("[inner", &[], &[]).is_err());
        assert!(matches!(with("", &["novalue"], &[]), Err(LayerError::NotKeyValue(_))));
        let missing = load::<Outer>(Path::new("/nonexistent/run.toml"), &[]).unwrap_err().to_string();
        assert!(missing.contains("/nonexistent/run.toml"), "{missing}");
    }
}
