//! Writing safetensors. Equal tensors and metadata give equal bytes.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
};

use safetensors::tensor::{Dtype, SafeTensorError, View};
use tch::{Device, Kind, Tensor};

use super::{
    error::{CONFIG_KEY, SaveError},
    stored::{Named, Stored, dtype},
};
use crate::parameters::Parameters;

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
    fn kind(self) -> Kind {
        match self {
            Self::Fp32 => Kind::Float,
            Self::Bf16 => Kind::BFloat16,
            Self::Fp16 => Kind::Half,
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
    let stored: Vec<(&str, Stored)> = tensors
        .iter()
        .map(|(name, tensor)| (*name, Stored::Memory(tensor.detach().to_device(Device::Cpu))))
        .collect();
    let views = views(stored.iter().map(|(name, stored)| (*name, stored)), Some(precision))?;
    let header = Header::new(metadata)?;
    let mut bytes = safetensors::serialize(views, Some(header.given()))?;
    header.sort(&mut bytes);
    Ok(bytes)
}

/// Writes tensors and metadata to a file, one tensor after the other, so that there is never a second copy of all; in their own
/// data types, or all in another. Equal input gives equal bytes.
///
/// # Errors
/// As [`archive_in`], before anything is written; the file cannot be written.
pub fn write(
    path: &Path,
    tensors: &Named,
    precision: Option<Precision>,
    metadata: &BTreeMap<String, String>,
) -> Result<(), SaveError> {
    let views = views(tensors.iter().map(|(name, stored)| (name.as_str(), stored)), precision)?;
    let header = Header::new(metadata)?;
    let unwritable = |source| SaveError::Unwritable { path: path.to_owned(), source };
    safetensors::serialize_to_file(views, Some(header.given()), path).map_err(|error| match error {
        SafeTensorError::IoError(source) => unwritable(source),
        other => other.into(),
    })?;
    let patched = || {
        let mut file = File::options().read(true).write(true).open(path)?;
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let mut json = vec![0; u64::from_le_bytes(length) as usize];
        file.read_exact(&mut json)?;
        header.sort(&mut json);
        file.seek(SeekFrom::Start(8))?;
        file.write_all(&json)?;
        file.sync_all()
    };
    patched().map_err(unwritable)
}

/// Metadata of a file. The library takes it in a hash map and writes it in the map's order, which varies. The length does not,
/// so the sorted metadata fits in its place.
struct Header {
    given: HashMap<String, String>,
    found: String,
    sorted: String,
}

impl Header {
    fn new(metadata: &BTreeMap<String, String>) -> Result<Self, SafeTensorError> {
        let given: HashMap<String, String> = metadata.clone().into_iter().collect();
        Ok(Self { found: serde_json::to_string(&given)?, sorted: serde_json::to_string(metadata)?, given })
    }

    /// For the library. A clone of a hash map has its order.
    fn given(&self) -> HashMap<String, String> {
        self.given.clone()
    }

    fn sort(&self, bytes: &mut [u8]) {
        let found = self.found.as_bytes();
        if let Some(start) = bytes.windows(found.len()).position(|window| window == found) {
            bytes[start..start + found.len()].copy_from_slice(self.sorted.as_bytes());
        }
    }
}

/// A tensor as the library takes it; it is converted when it is written.
struct Converted<'a> {
    stored: &'a Stored,
    kind: Kind,
    dtype: Dtype,
    shape: Vec<usize>,
}

/// Views of tensors.
///
/// # Errors
/// [`SaveError::Overflow`]; [`SaveError::Kind`].
fn views<'a>(
    tensors: impl Iterator<Item = (&'a str, &'a Stored)>,
    precision: Option<Precision>,
) -> Result<Vec<(&'a str, Converted<'a>)>, SaveError> {
    let (mut overflowed, mut first) = (0, None);
    let mut views = Vec::new();
    for (name, stored) in tensors {
        let kind = precision.map_or(stored.kind(), Precision::kind);
        if stored.kind() != kind && kind != Kind::Float {
            let tensor = stored.tensor();
            let finite = |x: &Tensor| x.isfinite().sum(Kind::Int64).int64_value(&[]);
            let lost = finite(&tensor) - finite(&tensor.to_kind(kind));
            if lost > 0 {
                overflowed += lost;
                first.get_or_insert_with(|| (name.to_owned(), kind));
            }
        }
        let dtype = dtype(kind).ok_or_else(|| SaveError::Kind { name: name.to_owned(), kind })?;
        let shape = stored.shape().iter().map(|side| *side as usize).collect();
        views.push((name, Converted { stored, kind, dtype, shape }));
    }
    match first {
        Some((name, kind)) => Err(SaveError::Overflow { count: overflowed, name, kind }),
        None => Ok(views),
    }
}

impl View for Converted<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        if let Some(bytes) = self.stored.bytes().filter(|_| self.stored.kind() == self.kind) {
            return Cow::Borrowed(bytes);
        }
        let host = self.stored.tensor().to_kind(self.kind).contiguous();
        let mut bytes = vec![0; self.data_len()];
        host.copy_data_u8(&mut bytes, host.numel());
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}
