//! Tensors that stay in a mapped file until they are needed.

use std::{
    collections::BTreeMap,
    ops::Range,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use potstill_torch_ext::MappedFile;
use safetensors::{SafeTensors, tensor::Dtype};
use tch::{Kind, Tensor};

use super::error::LoadError;

static COPIED: AtomicU64 = AtomicU64::new(0);

/// The number of tensors, and of pieces of files, that this process has read so far: a process that loads for long can show by it
/// that it does not stand still.
#[must_use]
pub fn copied() -> u64 {
    COPIED.load(Ordering::Relaxed)
}

/// Counts one.
pub(super) fn count() {
    COPIED.fetch_add(1, Ordering::Relaxed);
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

    /// Its bytes, if it is in a file.
    pub(super) fn bytes(&self) -> Option<&[u8]> {
        count();
        match self {
            Self::Memory(_) => None,
            Self::Mapped { file, bytes, .. } => Some(&file[bytes.clone()]),
        }
    }

    /// The same values in another shape.
    ///
    /// # Panics
    /// When the number of elements differs.
    #[must_use]
    pub fn reshaped(&self, shape: &[i64]) -> Self {
        assert_eq!(self.shape().iter().product::<i64>(), shape.iter().product::<i64>(), "as many elements");
        match self {
            Self::Memory(tensor) => Self::Memory(tensor.reshape(shape)),
            Self::Mapped { file, bytes, kind, .. } => {
                let (file, bytes, shape) = (Arc::clone(file), bytes.clone(), shape.to_vec());
                Self::Mapped { file, bytes, kind: *kind, shape }
            }
        }
    }

    /// Some rows along the first dimension.
    ///
    /// # Panics
    /// When there are no such rows.
    #[must_use]
    pub fn rows(&self, rows: Range<usize>) -> Self {
        match self {
            Self::Memory(tensor) => {
                Self::Memory(tensor.narrow(0, rows.start as i64, rows.len() as i64).contiguous())
            }
            Self::Mapped { file, bytes, kind, shape } => {
                assert!(rows.end <= shape[0] as usize, "rows {rows:?} of {shape:?}");
                let length = bytes.len() / shape[0] as usize;
                let bytes = bytes.start + rows.start * length..bytes.start + rows.end * length;
                let mut shape = shape.clone();
                shape[0] = rows.len() as i64;
                Self::Mapped { file: Arc::clone(file), bytes, kind: *kind, shape }
            }
        }
    }

    /// One row along the first dimension, copied to the host.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn row(&self, index: usize) -> Tensor {
        count();
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
        count();
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
        let mut tensors = Named::new();
        let parsed = SafeTensors::deserialize(&file)?;
        for (name, view) in parsed.iter() {
            let kind = kind(view.dtype()).ok_or_else(|| unknown_kind(&parsed))?;
            let start = view.data().as_ptr() as usize - whole;
            let bytes = start..start + view.data().len();
            let shape = view.shape().iter().map(|d| *d as i64).collect();
            tensors.insert(name.to_owned(), Stored::Mapped { file: Arc::clone(&file), bytes, kind, shape });
        }
        Ok(tensors)
    };
    parse().map_err(|e: LoadError| e.of_file(path))
}

/// The metadata of a safetensors file.
///
/// # Errors
/// [`LoadError`], with the path.
pub fn metadata(path: &Path) -> Result<BTreeMap<String, String>, LoadError> {
    let file =
        MappedFile::open(path).map_err(|source| LoadError::Unreadable { path: path.to_owned(), source })?;
    let (_, header) = SafeTensors::read_metadata(&file).map_err(|e| LoadError::from(e).in_file(path))?;
    Ok(header.metadata().clone().unwrap_or_default().into_iter().collect())
}

/// That some tensors are of kinds that libtorch does not have.
pub(super) fn unknown_kind(parsed: &SafeTensors<'_>) -> LoadError {
    let strange: Vec<String> = parsed
        .iter()
        .filter(|(_, view)| kind(view.dtype()).is_none())
        .map(|(name, view)| format!("{name} ({:?})", view.dtype()))
        .collect();
    LoadError::Foreign(format!(
        "{} of {} tensors are of a kind that is not read, such as {}: take the weights in fp32, bf16 or fp16",
        strange.len(),
        parsed.len(),
        strange.first().map_or("", String::as_str)
    ))
}

/// libtorch's data types and the format's.
const KINDS: [(Dtype, Kind); 10] = [
    (Dtype::F64, Kind::Double),
    (Dtype::F32, Kind::Float),
    (Dtype::F16, Kind::Half),
    (Dtype::BF16, Kind::BFloat16),
    (Dtype::I64, Kind::Int64),
    (Dtype::I32, Kind::Int),
    (Dtype::I16, Kind::Int16),
    (Dtype::I8, Kind::Int8),
    (Dtype::U8, Kind::Uint8),
    (Dtype::BOOL, Kind::Bool),
];

pub(super) fn kind(dtype: Dtype) -> Option<Kind> {
    KINDS.iter().find(|(known, _)| *known == dtype).map(|(_, kind)| *kind)
}

pub(super) fn dtype(kind: Kind) -> Option<Dtype> {
    KINDS.iter().find(|(_, known)| *known == kind).map(|(dtype, _)| *dtype)
}
