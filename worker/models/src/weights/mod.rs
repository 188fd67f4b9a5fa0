//! Networks in safetensors files: named tensors, and the configuration as JSON under the metadata key `config`.

mod error;
mod stored;
mod written;

use std::{collections::BTreeMap, path::Path};

use safetensors::SafeTensors;
use tch::{Device, Kind, Tensor};

use self::stored::{kind, unknown_kind};
pub(crate) use self::written::to_safetensors;
pub use self::{
    error::{CONFIG_KEY, LoadError, SaveError},
    stored::{Named, Stored, map, metadata},
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
    /// [`LoadError::Malformed`]; [`LoadError::Tensors`] with tensors of data types that libtorch does not have.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, LoadError> {
        let (_, header) = SafeTensors::read_metadata(bytes)?;
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        let (mut tensors, mut problems) = (BTreeMap::new(), Vec::new());
        for (name, view) in SafeTensors::deserialize(bytes)?.iter() {
            match kind(view.dtype()) {
                Some(kind) => {
                    let shape: Vec<i64> = view.shape().iter().map(|d| *d as i64).collect();
                    tensors.insert(name.to_owned(), Tensor::from_data_size(view.data(), &shape, kind));
                }
                None => problems.push(unknown_kind(name, view.dtype())),
            }
        }
        if problems.is_empty() {
            Ok(Self { metadata, tensors })
        } else {
            Err(LoadError::Tensors { problems })
        }
    }

    /// Reads and parses a file.
    ///
    /// # Errors
    /// Those of [`from_bytes`](Self::from_bytes) with the path, and [`LoadError::Unreadable`].
    pub fn read(path: &Path) -> Result<Self, LoadError> {
        let bytes = read(path)?;
        Self::from_bytes(&bytes).map_err(|e| e.in_file(path))
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

pub(crate) fn read(path: &Path) -> Result<Vec<u8>, LoadError> {
    std::fs::read(path).map_err(|source| LoadError::Unreadable { path: path.to_owned(), source })
}

/// Checks all `tensors` against a declared network, and makes its parameters.
pub(crate) fn assemble(
    declaration: Declaration,
    tensors: &Named,
    device: Device,
) -> Result<Parameters, LoadError> {
    let mut problems = Vec::new();
    let mut expected = BTreeMap::new();
    expected.extend(declaration.entries().iter().map(|e| (e.name.as_str(), e.shape.as_slice())));
    expected.extend(declaration.buffers().iter().map(|b| (b.name.as_str(), b.shape.as_slice())));
    for (name, shape) in &expected {
        match tensors.get(*name) {
            None => problems.push(format!("{name} {shape:?} is missing")),
            Some(tensor) if tensor.shape() != *shape => {
                problems.push(format!("{name} has shape {:?}, expected {shape:?}", tensor.shape()));
            }
            // Data types that fp32 can represent exactly.
            Some(tensor) if !matches!(tensor.kind(), Kind::Float | Kind::Half | Kind::BFloat16) => {
                problems
                    .push(format!("{name} is of kind {:?}, expected Float, Half or BFloat16", tensor.kind()));
            }
            Some(_) => {}
        }
    }
    let surplus = tensors.iter().filter(|(name, _)| !expected.contains_key(name.as_str()));
    problems.extend(
        surplus.map(|(name, tensor)| format!("{name} {:?} is not part of the network", tensor.shape())),
    );
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
    if !problems.is_empty() {
        return Err(LoadError::Tensors { problems });
    }
    let fp32 = |name: &str| tensors[name].tensor().detach().to_device(device).to_kind(Kind::Float);
    // One tensor after the other, so that there is never a second copy of all.
    let flat = Tensor::empty([declaration.numel()], (Kind::Float, device));
    for entry in declaration.entries() {
        flat.narrow(0, entry.offset, entry.numel()).copy_(&fp32(&entry.name).reshape([-1]));
    }
    // Buffers are copied, so that the network does not share memory with the mapped file.
    let buffers = declaration.buffers().iter().map(|b| (b.name.clone(), fp32(&b.name).copy())).collect();
    Ok(declaration.parameters(flat, buffers))
}
