//! Networks in safetensors files: named tensors, and the configuration as JSON under the metadata key `config`.

mod error;
mod foreign;
mod mapped;
mod stored;
mod written;

use std::{collections::BTreeMap, fs::File, io::Read, path::Path};

use safetensors::SafeTensors;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

pub use self::foreign::failed_download;
use self::stored::{kind, unknown_kind};
pub(crate) use self::written::to_safetensors;
pub use self::{
    error::{CONFIG_KEY, LoadError, SaveError},
    mapped::Mapped,
    stored::{Named, Stored, copied, map, metadata},
    written::{Precision, archive, archive_in, write},
};
use crate::{
    builder::{BufferSource, Declaration},
    parameters::Parameters,
};

/// The content of a safetensors file.
pub struct Archive {
    /// Free-form metadata.
    pub metadata: BTreeMap<String, String>,
    /// Tensors by name, in their stored data types, on the host.
    pub tensors: BTreeMap<String, Tensor>,
}

impl Archive {
    /// Parses a file's bytes.
    ///
    /// # Errors
    /// [`LoadError::Malformed`]; [`LoadError::Foreign`] with tensors of data types that libtorch does not have.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, LoadError> {
        let (_, header) = SafeTensors::read_metadata(bytes)?;
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        let mut tensors = BTreeMap::new();
        let parsed = SafeTensors::deserialize(bytes)?;
        for (name, view) in parsed.iter() {
            let kind = kind(view.dtype()).ok_or_else(|| unknown_kind(&parsed))?;
            let shape: Vec<i64> = view.shape().iter().map(|d| *d as i64).collect();
            tensors.insert(name.to_owned(), Tensor::from_data_size(view.data(), &shape, kind));
        }
        Ok(Self { metadata, tensors })
    }

    /// Reads and parses a file.
    ///
    /// # Errors
    /// Those of [`from_bytes`](Self::from_bytes) with the path, and [`LoadError::Unreadable`].
    pub fn read(path: &Path) -> Result<Self, LoadError> {
        let bytes = read(path)?;
        Self::from_bytes(&bytes).map_err(|e| e.of_file(path))
    }

    /// The tensors whose names begin with `prefix`, under the rest of their names.
    #[must_use]
    pub fn with_prefix(&self, prefix: &str) -> BTreeMap<String, Tensor> {
        self.tensors
            .iter()
            .filter_map(|(name, tensor)| {
                Some((name.strip_prefix(prefix)?.to_owned(), tensor.shallow_clone()))
            })
            .collect()
    }
}

/// A text from a file, such as a configuration.
pub(crate) fn text(path: &Path) -> Result<String, LoadError> {
    let bytes = read(path)?;
    let problem = match failed_download(&bytes) {
        Some(problem) => problem.to_owned(),
        None => match String::from_utf8(bytes) {
            Ok(text) => return Ok(text),
            Err(error) => format!("is not UTF-8: {error}"),
        },
    };
    Err(LoadError::Foreign(problem).in_file(path))
}

/// A value from a file of JSON.
pub(crate) fn json(path: &Path) -> Result<Value, LoadError> {
    serde_json::from_str(&text(path)?)
        .map_err(|error| LoadError::Foreign(format!("is not JSON: {error}")).in_file(path))
}

/// A file's content; each piece counts as [`copied`].
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, LoadError> {
    const PIECE: u64 = 8 << 20;
    let pieces = || {
        let mut file = File::open(path)?;
        let mut bytes = Vec::with_capacity(usize::try_from(file.metadata()?.len()).unwrap_or_default());
        while (&mut file).take(PIECE).read_to_end(&mut bytes)? > 0 {
            stored::count();
        }
        Ok(bytes)
    };
    pieces().map_err(|source| LoadError::Unreadable { path: path.to_owned(), source })
}

/// What becomes of tensors that are not part of a network.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Surplus {
    /// The file is refused.
    Refused,
    /// They are passed over with a warning, as the public libraries do.
    PassedOver,
}

/// Checks all `tensors` against a declared network.
pub(crate) fn check(declaration: &Declaration, tensors: &Named, surplus: Surplus) -> Result<(), LoadError> {
    let mut problems = Vec::new();
    let mut expected = BTreeMap::new();
    expected.extend(declaration.entries().iter().map(|e| (e.name.as_str(), e.shape.as_slice())));
    expected.extend(declaration.buffers().iter().map(|b| (b.name.as_str(), b.shape.as_slice())));
    if let Some(prefix) = wrapped(&expected, tensors) {
        return Err(LoadError::Foreign(format!(
            "all names begin with {prefix:?}: the network was saved wrapped, by torch.compile or for training on several devices; save \
             the network inside"
        )));
    }
    let mut strange: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for (name, shape) in &expected {
        match tensors.get(*name) {
            None => problems.push(format!("{name} {shape:?} is missing")),
            Some(tensor) if tensor.shape() != *shape => {
                problems.push(format!("{name} has shape {:?}, expected {shape:?}", tensor.shape()));
            }
            // Data types that fp32 can represent exactly.
            Some(tensor) if !matches!(tensor.kind(), Kind::Float | Kind::Half | Kind::BFloat16) => {
                strange.entry(format!("{:?}", tensor.kind())).or_default().push(name);
            }
            Some(_) => {}
        }
    }
    problems.extend(strange.into_iter().map(|(kind, names)| {
        let which = match &names[..] {
            [one] => format!("{one} is"),
            [first, others @ ..] => format!("{first} and {} others are", others.len()),
            [] => String::new(),
        };
        format!("{which} of kind {kind}, expected Float, Half or BFloat16")
    }));
    let others: Vec<String> = tensors
        .iter()
        .filter(|(name, _)| !expected.contains_key(name.as_str()))
        .map(|(name, tensor)| format!("{name} {:?} is not part of the network", tensor.shape()))
        .collect();
    // Where others are missing, they may have these names.
    if surplus == Surplus::Refused || !problems.is_empty() {
        problems.extend(others);
    } else if let Some(first) = others.first() {
        tracing::warn!("{} tensors are passed over: {first}", others.len());
    }
    if problems.is_empty() {
        for buffer in declaration.buffers() {
            let BufferSource::Fixed(values) = &buffer.source else { continue };
            let stored = tensors[&buffer.name].tensor();
            let wanted = Tensor::from_slice(values).view(buffer.shape.as_slice()).to_device(stored.device());
            if !stored.to_kind(Kind::Float).allclose(&wanted, 1e-5, 1e-6, false) {
                problems.push(format!("{} differs from its value by the configuration", buffer.name));
            }
        }
    }
    match problems.is_empty() {
        true => Ok(()),
        false => Err(LoadError::Tensors { problems }),
    }
}

/// Checks all `tensors` against a declared network, and makes its parameters, of this data type on this device. Buffers are fp32.
pub(crate) fn assemble(
    declaration: Declaration,
    tensors: &Named,
    surplus: Surplus,
    options: (Kind, Device),
) -> Result<Parameters, LoadError> {
    check(&declaration, tensors, surplus)?;
    let (kind, device) = options;
    let moved = |name: &str| tensors[name].tensor().detach().to_device(device);
    let fp32 = |name: &str| moved(name).to_kind(Kind::Float);
    // One tensor after the other, so that there is never a second copy of all.
    let flat = Tensor::empty([declaration.numel()], (kind, device));
    for entry in declaration.entries() {
        flat.narrow(0, entry.offset, entry.numel()).copy_(&moved(&entry.name).reshape([-1]));
    }
    // Buffers are copied, so that the network does not share memory with the mapped file.
    let buffers = declaration.buffers().iter().map(|b| (b.name.clone(), fp32(&b.name).copy())).collect();
    Ok(declaration.parameters(flat, buffers))
}

/// What stands before the name of each tensor, where that is all that is wrong.
fn wrapped(expected: &BTreeMap<&str, &[i64]>, tensors: &Named) -> Option<String> {
    let first = *expected.keys().next()?;
    let prefix =
        tensors.keys().find_map(|name| name.strip_suffix(first).filter(|prefix| prefix.ends_with('.')))?;
    expected.keys().all(|name| tensors.contains_key(&format!("{prefix}{name}"))).then(|| prefix.to_owned())
}
