//! Why weights could not be read or written.

use std::path::{Path, PathBuf};

use safetensors::tensor::SafeTensorError;
use tch::Kind;

use super::foreign;
use crate::{diffusers, edm::ConfigError, lora::file::LoraFileError};

/// Metadata key of the architecture's configuration.
pub const CONFIG_KEY: &str = "config";

/// Why weights could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file is missing or cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// One of the other errors, with its file.
    #[error("{}: {source}", path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// The error.
        source: Box<LoadError>,
    },
    /// Something else than what is read: another kind of file, other names, other data types.
    #[error("{0}")]
    Foreign(String),
    /// Not safetensors, truncated, or damaged.
    #[error("not a safetensors file, or truncated or damaged: {0}")]
    Malformed(#[from] SafeTensorError),
    /// The metadata has no configuration.
    #[error("the metadata has no `{CONFIG_KEY}`, the architecture as JSON")]
    NoConfig,
    /// The configuration is not JSON of the expected form.
    #[error("the `{CONFIG_KEY}` in the metadata: {0}")]
    ConfigSyntax(#[source] serde_json::Error),
    /// The configuration has the right form but is not that of a valid network.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A part of a model folder has a configuration that is not supported.
    #[error(transparent)]
    Diffusers(#[from] diffusers::ConfigError),
    /// A model folder lacks a file, or has one in another format.
    #[error("{0}")]
    Folder(String),
    /// A part that was read could not be written in another form.
    #[error(transparent)]
    Written(#[from] SaveError),
    /// Adapters of a file do not fit the model.
    #[error(transparent)]
    Adapters(#[from] LoraFileError),
    /// The tensors are not those of the configured network.
    #[error("the tensors do not fit the configuration:{}", shown(problems))]
    Tensors {
        /// One line for each tensor that is missing, surplus, or of another shape, kind or value.
        problems: Vec<String>,
    },
}

/// The first problems, and how many more there are.
fn shown(problems: &[String]) -> String {
    const SHOWN: usize = 10;
    let mut text: String = problems.iter().take(SHOWN).map(|problem| format!("\n  - {problem}")).collect();
    if problems.len() > SHOWN {
        text += &format!("\n  and {} more", problems.len() - SHOWN);
    }
    text
}

impl LoadError {
    /// The same error of a file, or that it is another kind of file.
    pub(super) fn of_file(self, path: &Path) -> Self {
        match (&self, foreign::what_it_is(path)) {
            (Self::Malformed(_), Some(what)) => Self::Foreign(what.to_owned()).in_file(path),
            _ => self.in_file(path),
        }
    }

    /// The same error of the file from which one below `copy` was made: the one with the same name below `original`, or `original`
    /// itself where that is a file.
    #[must_use]
    pub fn of_original(self, copy: &Path, original: &Path) -> Self {
        let moved = |path: PathBuf| match path.strip_prefix(copy) {
            Ok(_) if original.is_file() => original.to_owned(),
            Ok(rest) if rest.as_os_str().is_empty() => original.to_owned(),
            Ok(rest) => {
                let path = original.join(rest);
                // Weights that were in another form have another name.
                let weights = path.extension().is_some_and(|end| end == "safetensors");
                path.parent().filter(|_| weights && !path.exists()).map_or(path.clone(), Path::to_owned)
            }
            Err(_) => path,
        };
        match self {
            Self::Unreadable { path, source } => Self::Unreadable { path: moved(path), source },
            Self::InFile { path, source } => {
                Self::InFile { path: moved(path), source: Box::new(source.of_original(copy, original)) }
            }
            other => other,
        }
    }

    /// The same error, with its file.
    #[must_use]
    pub fn in_file(self, path: &Path) -> Self {
        Self::InFile { path: path.to_owned(), source: Box::new(self) }
    }
}

/// Why a network could not be written.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The caller's metadata has the key of the configuration.
    #[error("the metadata key `{CONFIG_KEY}` is taken by the architecture")]
    ReservedKey,
    /// Numbers beyond the range of the file's data type.
    #[error("{count} numbers are beyond the range of {kind:?}, the first in {name}: write bf16 or fp32")]
    Overflow {
        /// How many.
        count: i64,
        /// The first tensor that has some.
        name: String,
        /// The data type.
        kind: Kind,
    },
    /// A tensor of a data type that the format does not have.
    #[error("{name} is of kind {kind:?}, which safetensors does not have")]
    Kind {
        /// The tensor.
        name: String,
        /// Its data type.
        kind: Kind,
    },
    /// The file cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The format does not support the network's tensors or metadata.
    #[error("cannot write safetensors: {0}")]
    Format(#[from] SafeTensorError),
}
