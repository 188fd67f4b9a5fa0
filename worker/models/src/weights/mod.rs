//! Networks in safetensors files: named tensors, and the configuration as JSON under the metadata key `config`.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use potstill_torch_ext::MappedFile;

use safetensors::{
    SafeTensors,
    tensor::{Dtype, SafeTensorError, TensorView},
};
use tch::{Device, Kind, Tensor};

use crate::{
    builder::{BufferSource, Declaration},
    diffusers,
    edm::ConfigError,
    parameters::Parameters,
};

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
    /// The tensors are not those of the configured network.
    #[error("the tensors do not fit the configuration:{}", problems.iter().map(|p| format!("\n  - {p}")).collect::<String>())]
    Tensors {
        /// One line for each tensor that is missing, surplus, or of another shape, kind or value.
        problems: Vec<String>,
    },
}

impl LoadError {
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
    /// The format does not support the network's tensors or metadata.
    #[error("cannot write safetensors: {0}")]
    Format(#[from] SafeTensorError),
}

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

fn kind(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::I16 => Kind::Int16,
        Dtype::I8 => Kind::Int8,
        Dtype::U8 => Kind::Uint8,
        Dtype::BOOL => Kind::Bool,
        _ => return None,
    })
}

/// A tensor in memory, or in a mapped file until it is needed.
#[derive(Debug)]
pub enum Stored {
    /// In memory.
    Memory(Tensor),
    /// In a file.
    Mapped {
        /// The file.
        file: Arc<MappedFile>,
        /// Its range of bytes there.
        bytes: Range<usize>,
        /// Data type of its elements.
        kind: Kind,
        /// Shape.
        shape: Vec<i64>,
    },
}

/// Tensors by name.
pub type Named = BTreeMap<String, Stored>;

impl Stored {
    /// Its shape.
    #[must_use]
    pub fn shape(&self) -> Vec<i64> {
        match self {
            Self::Memory(tensor) => tensor.size(),
            Self::Mapped { shape, .. } => shape.clone(),
        }
    }

    /// Data type of its elements.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Memory(tensor) => tensor.kind(),
            Self::Mapped { kind, .. } => *kind,
        }
    }

    /// One row along the first dimension, copied to the host.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn row(&self, index: usize) -> Tensor {
        match self {
            Self::Memory(tensor) => tensor.get(index as i64).copy(),
            Self::Mapped { file, bytes, kind, shape } => {
                let length = bytes.len() / shape[0] as usize;
                let start = bytes.start + index * length;
                assert!(start + length <= bytes.end, "row {index} of {shape:?}");
                Tensor::from_data_size(&file[start..start + length], &shape[1..], *kind)
            }
        }
    }

    /// The tensor; if it is in a file, a copy on the host.
    pub fn tensor(&self) -> Tensor {
        match self {
            Self::Memory(tensor) => tensor.shallow_clone(),
            Self::Mapped { file, bytes, kind, shape } => {
                Tensor::from_data_size(&file[bytes.clone()], shape, *kind)
            }
        }
    }
}

/// The tensors of a safetensors file, which is mapped and not read: several processes share its pages, and only one tensor at
/// a time is copied.
///
/// # Errors
/// [`LoadError`], with the path.
pub fn map(path: &Path) -> Result<Named, LoadError> {
    let file =
        MappedFile::open(path).map_err(|source| LoadError::Unreadable { path: path.to_owned(), source })?;
    let file = Arc::new(file);
    let parse = || {
        let whole = file.as_ptr() as usize;
        let (mut tensors, mut problems) = (Named::new(), Vec::new());
        for (name, view) in SafeTensors::deserialize(&file)?.iter() {
            let Some(kind) = kind(view.dtype()) else {
                problems.push(unknown_kind(name, view.dtype()));
                continue;
            };
            let start = view.data().as_ptr() as usize - whole;
            let bytes = start..start + view.data().len();
            let shape = view.shape().iter().map(|d| *d as i64).collect();
            tensors.insert(name.to_owned(), Stored::Mapped { file: Arc::clone(&file), bytes, kind, shape });
        }
        if problems.is_empty() { Ok(tensors) } else { Err(LoadError::Tensors { problems }) }
    };
    parse().map_err(|e: LoadError| e.in_file(path))
}

fn unknown_kind(name: &str, dtype: Dtype) -> String {
    format!("{name} is of kind {dtype:?}, which libtorch does not have")
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

/// Parameters and buffers, with `config` and `metadata` in the header.
pub(crate) fn to_safetensors(
    parameters: &Parameters,
    config: &str,
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>, SaveError> {
    if metadata.contains_key(CONFIG_KEY) {
        return Err(SaveError::ReservedKey);
    }
    let names = parameters.entries().iter().map(|entry| entry.name.as_str());
    let buffers = parameters.buffers().iter().map(|(name, tensor)| (name.as_str(), tensor));
    let tensors: Vec<(&str, &Tensor)> = names.zip(parameters.leaves()).chain(buffers).collect();
    let mut header = metadata.clone();
    header.insert(CONFIG_KEY.to_owned(), config.to_owned());
    archive(&tensors, &header)
}

/// The data type of a file's tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// fp32.
    #[default]
    Fp32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    Fp16,
}

impl Precision {
    fn kinds(self) -> (Kind, Dtype, usize) {
        match self {
            Self::Fp32 => (Kind::Float, Dtype::F32, 4),
            Self::Bf16 => (Kind::BFloat16, Dtype::BF16, 2),
            Self::Fp16 => (Kind::Half, Dtype::F16, 2),
        }
    }
}

/// Named fp32 tensors and metadata as one safetensors file. Equal input gives equal bytes.
///
/// # Errors
/// [`SaveError::Format`] when the format does not support them.
pub fn archive(
    tensors: &[(&str, &Tensor)],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>, SaveError> {
    archive_in(Precision::Fp32, tensors, metadata)
}

/// [`archive`] with tensors of another data type.
///
/// # Errors
/// As `archive`; [`SaveError::Overflow`] when finite numbers are beyond the data type's range.
pub fn archive_in(
    precision: Precision,
    tensors: &[(&str, &Tensor)],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>, SaveError> {
    let (kind, dtype, width) = precision.kinds();
    let (mut overflowed, mut first) = (0, None);
    let tensors: Vec<(&str, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, tensor)| {
            let shape = tensor.size().iter().map(|d| *d as usize).collect();
            let tensor = tensor.detach().to_device(Device::Cpu);
            let host = tensor.to_kind(kind).contiguous();
            if kind != Kind::Float {
                let finite = |x: &Tensor| x.isfinite().sum(Kind::Int64).int64_value(&[]);
                let lost = finite(&tensor) - finite(&host);
                if lost > 0 {
                    overflowed += lost;
                    first.get_or_insert_with(|| (*name).to_owned());
                }
            }
            let mut bytes = vec![0; host.numel() * width];
            host.copy_data_u8(&mut bytes, host.numel());
            (*name, shape, bytes)
        })
        .collect();
    if let Some(name) = first {
        return Err(SaveError::Overflow { count: overflowed, name, kind });
    }
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((*name, TensorView::new(dtype, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, SafeTensorError>>()?;
    let unordered: HashMap<String, String> = metadata.clone().into_iter().collect();
    // The writer takes metadata in a hash map and writes it in the map's order, which varies. The length does not, so
    // the sorted metadata fits in its place.
    let found = serde_json::to_string(&unordered).map_err(SafeTensorError::from)?;
    let sorted = serde_json::to_string(metadata).map_err(SafeTensorError::from)?;
    let mut bytes = safetensors::serialize(views, Some(unordered))?;
    let start = bytes.windows(found.len()).position(|window| window == found.as_bytes());
    if let Some(start) = start {
        bytes[start..start + sorted.len()].copy_from_slice(sorted.as_bytes());
    }
    Ok(bytes)
}
