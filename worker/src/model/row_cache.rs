//! Rows of tensors on disk: computed once by one process of a machine, then memory-mapped by all.

use std::{
    collections::BTreeMap,
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context;
use potstill_models::weights::{self, Named};
use potstill_storage::digest::hexadecimal;
use sha2::{Digest, Sha256};
use tch::Tensor;

use super::lock;

/// Rows in one file, which are computed at a time.
const ROWS: usize = 64;

/// How often it says how far it is.
const SAY: Duration = Duration::from_secs(10);

/// See the module's documentation.
pub struct RowCache {
    files: Vec<Named>,
}

/// Tensors of some rows, by name, [rows, …] each.
pub type Rows = Vec<(&'static str, Tensor)>;

impl RowCache {
    /// Opens the `count` rows that `identity` names below `folder`, and computes the missing ones. Other processes wait
    /// meanwhile.
    ///
    /// # Errors
    /// The folder cannot be written, or a file has other content than its name says; the errors of `compute`.
    pub fn open<'a>(
        folder: &Path,
        identity: impl Iterator<Item = &'a [u8]>,
        count: usize,
        compute: impl Fn(Range<usize>) -> anyhow::Result<Rows>,
    ) -> anyhow::Result<Self> {
        let folder = folder.join(name(identity));
        std::fs::create_dir_all(&folder)?;
        let lock = File::create(folder.join("lock"))?;
        let _held = lock::exclusive(lock, &folder)?;
        let (mut files, mut said) = (Vec::new(), Instant::now());
        for first in (0..count).step_by(ROWS) {
            let path = folder.join(format!("{:06}.safetensors", first / ROWS));
            if !path.is_file() {
                write(&path, &compute(first..(first + ROWS).min(count))?)?;
                if said.elapsed() >= SAY {
                    said = Instant::now();
                    tracing::info!(folder = %folder.display(), rows = first, of = count, "filling a cache");
                }
            }
            files.push(weights::map(&path)?);
        }
        Ok(Self { files })
    }

    /// Some rows of a tensor, [indices, …], if there is one of this name.
    ///
    /// # Panics
    /// When an index is out of range.
    pub fn rows(&self, name: &str, indices: &[i64]) -> Option<Tensor> {
        let row = |index: &i64| {
            let (file, row) = (*index as usize / ROWS, *index as usize % ROWS);
            self.files[file].get(name).map(|stored| stored.row(row))
        };
        let rows: Vec<Tensor> = indices.iter().map_while(row).collect();
        (rows.len() == indices.len() && !rows.is_empty()).then(|| Tensor::stack(&rows, 0))
    }
}

fn name<'a>(identity: impl Iterator<Item = &'a [u8]>) -> String {
    let mut hasher = Sha256::new();
    for part in identity {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hexadecimal(&hasher.finalize()[..16])
}

/// Written under another name first, so that a file that exists is complete.
fn write(path: &PathBuf, rows: &Rows) -> anyhow::Result<()> {
    let tensors: Vec<(&str, &Tensor)> = rows.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let partial = path.with_extension("partial");
    std::fs::write(&partial, weights::archive(&tensors, &BTreeMap::new())?)
        .and_then(|()| std::fs::rename(&partial, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn rows_are_computed_once() {
        let folder = tempfile::tempdir().unwrap();
        let computed = Cell::new(0);
        let open = |identity: &'static [u8]| {
            RowCache::open(folder.path(), [identity].into_iter(), 100, |rows| {
                computed.set(computed.get() + rows.len());
                let (first, end) = (rows.start as i64, rows.end as i64);
                let values = Tensor::arange_start(first, end, (Kind::Float, Device::Cpu));
                Ok(vec![("x", values.unsqueeze(1).expand([end - first, 3], false).contiguous())])
            })
            .unwrap()
        };
        for _ in 0..2 {
            let rows = open(b"a").rows("x", &[99, 0, 64]).unwrap();
            assert_eq!(rows.size(), [3, 3]);
            assert_eq!(Vec::<f32>::try_from(rows.select(1, 2)).unwrap(), [99.0, 0.0, 64.0]);
        }
        assert_eq!(computed.get(), 100);
        assert!(open(b"a").rows("y", &[0]).is_none());
        open(b"b");
        assert_eq!(computed.get(), 200, "another identity has other rows");
    }
}
