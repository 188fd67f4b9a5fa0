//! The reference of metrics: features of real images with their moments, or moments alone.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, anyhow, bail, ensure};
use npyz::npz::NpzArchive;
use potstill_distill::metrics::Moments;
use potstill_models::weights::{self, Archive};
use potstill_spec::Protocol;
use tch::{Device, Kind, Tensor};

use super::{extractor::Extractor, samples::CHUNK};
use crate::data::{Dataset, Shape};

/// See the module's documentation.
pub struct Reference {
    /// Features of each real image, [N, D] on the host; `None` where only the moments are known.
    pub features: Option<Tensor>,
    /// Their mean and covariance.
    pub moments: Moments,
    /// SHA-256 of the extractor that made the features.
    extractor: String,
    /// The treatment of the images before.
    protocol: Protocol,
}

/// Header key of a file of features: SHA-256 of the extractor that made them.
const EXTRACTOR_KEY: &str = "extractor_sha256";
/// Header key of a file of features: the treatment of the images before; files without it hold features of images as
/// made.
const PROTOCOL_KEY: &str = "images";
/// Elements of a covariance and of its transpose may differ by this fraction of its largest element: they are summed in
/// different orders.
const ASYMMETRY: f64 = 1e-5;

impl Reference {
    /// Loads real images, brings them to `shape` with `protocol` and extracts their features; or loads features that
    /// [`to_safetensors`](Self::to_safetensors) wrote, or an `.npz` file of moments.
    ///
    /// # Errors
    /// There are no images or they do not fit the model; the features are of another extractor or another treatment;
    /// the moments are invalid.
    pub fn load(
        path: &Path,
        extractor: &Extractor,
        shape: Shape,
        protocol: Protocol,
    ) -> anyhow::Result<Self> {
        let location = path.to_string_lossy();
        let is = |extension: &str| path.extension().is_some_and(|e| e == extension) && path.is_file();
        if is("npz") {
            let moments = moments(path, extractor.width()).with_context(|| format!("moments {location}"))?;
            return Ok(Self { features: None, moments, extractor: extractor.digest().to_owned(), protocol });
        }
        if is("safetensors") {
            let archive = Archive::read(path)?;
            if let Some(features) = archive.tensors.get("features") {
                let header = |key: &str| archive.metadata.get(key).map(String::as_str);
                let made_by = header(EXTRACTOR_KEY).unwrap_or_default();
                ensure!(
                    made_by == extractor.digest(),
                    "{location}: these features were made by the extractor with SHA-256 {made_by}, but this one has {}; \
                     compute them anew with `potstill evaluate --save-statistics`",
                    extractor.digest()
                );
                let images = header(PROTOCOL_KEY).map_or_else(|| Protocol::AsMade.to_string(), str::to_owned);
                ensure!(
                    images == protocol.to_string(),
                    "{location}: these are the features of images {images}, but here images are {protocol}; compute them \
                     anew with `potstill evaluate --save-statistics`"
                );
                ensure!(
                    matches!(features.size()[..], [_, width] if width == extractor.width()),
                    "{location}: `features` has shape {:?}; expected [N, {}]",
                    features.size(),
                    extractor.width()
                );
                return Ok(Self::new(features.shallow_clone(), made_by.to_owned(), protocol));
            }
        }
        let images = Dataset::load_reference(&location, shape, protocol)?;
        let features = images
            .batches(CHUNK)
            .map(|batch| Ok(extractor.run(&batch)?.features.to_device(Device::Cpu)))
            .collect::<anyhow::Result<Vec<_>>>()?;
        Ok(Self::new(Tensor::cat(&features, 0), extractor.digest().to_owned(), protocol))
    }

    fn new(features: Tensor, extractor: String, protocol: Protocol) -> Self {
        Self { moments: Moments::of(&features), features: Some(features), extractor, protocol }
    }

    /// The features as a file that can be loaded instead of the images.
    ///
    /// # Errors
    /// There are only moments; the serializer's error.
    pub fn to_safetensors(&self) -> anyhow::Result<Vec<u8>> {
        let features =
            self.features.as_ref().context("the reference holds moments only, no features to save")?;
        let metadata = BTreeMap::from([
            (EXTRACTOR_KEY.to_owned(), self.extractor.clone()),
            (PROTOCOL_KEY.to_owned(), self.protocol.to_string()),
        ]);
        Ok(weights::archive(&[("features", features)], &metadata)?)
    }
}

/// Mean and covariance from an `.npz` file with `mu` `[D]` and `sigma` [D, D], fp32 or fp64, the format of EDM
/// (`fid-refs/*.npz`), pytorch-fid (`--save-stats`) and clean-fid.
///
/// # Errors
/// The file is damaged or lacks an array; a shape does not match `width`; values are not finite or not a covariance.
fn moments(path: &Path, width: i64) -> anyhow::Result<Moments> {
    let mut archive = NpzArchive::open(path).context("is not an .npz file, or it is damaged")?;
    let mean = array(&mut archive, "mu", &[width])?;
    let covariance = array(&mut archive, "sigma", &[width, width])?;
    let largest = covariance.abs().max().double_value(&[]);
    let apart = (&covariance - covariance.transpose(0, 1)).abs().max().double_value(&[]);
    ensure!(
        apart <= ASYMMETRY * largest,
        "`sigma` is not symmetric: elements differ from their mirror images by up to {apart:e}"
    );
    ensure!(
        covariance.diag(0).min().double_value(&[]) >= 0.0,
        "`sigma` has negative variances on its diagonal: it is not a covariance"
    );
    let symmetric = (&covariance + covariance.transpose(0, 1)) / 2.0;
    Ok(Moments::given(mean, symmetric))
}

/// One finite array of an archive, fp64.
fn array<R: std::io::Read + std::io::Seek>(
    archive: &mut NpzArchive<R>,
    name: &str,
    shape: &[i64],
) -> anyhow::Result<Tensor> {
    let names: Vec<String> = archive.array_names().map(str::to_owned).collect();
    let damaged = || format!("`{name}` is damaged");
    let Some(file) = archive.by_name(name).with_context(damaged)? else {
        bail!(
            "has no array `{name}`; expected `mu` [D] and `sigma` [D, D], as in EDM's and pytorch-fid's files, but it holds {names:?}"
        );
    };
    let found: Vec<i64> = file.shape().iter().map(|side| *side as i64).collect();
    ensure!(
        found == shape,
        "`{name}` has shape {found:?}, but the extractor's {} features need {shape:?}",
        shape[0]
    );
    // A symmetric matrix is the same in either memory order; an asymmetric one is rejected.
    let numbers: Vec<f64> = match file.try_data::<f64>() {
        Ok(numbers) => numbers.collect::<Result<_, _>>().with_context(damaged)?,
        Err(file) => {
            let kind = file.dtype().descr();
            let numbers = file
                .try_data::<f32>()
                .map_err(|_| anyhow!("`{name}` holds numbers of kind {kind}; expected fp64 or fp32"))?;
            numbers.map(|x| x.map(f64::from)).collect::<Result<_, _>>().with_context(damaged)?
        }
    };
    let tensor = Tensor::from_slice(&numbers).reshape(shape).to_kind(Kind::Double);
    ensure!(bool::try_from(tensor.isfinite().all())?, "`{name}` holds numbers that are not finite");
    Ok(tensor)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use npyz::{WriterBuilder, npz::NpzWriter};
    use zip::{CompressionMethod, write::FileOptions};

    use super::*;

    fn write(path: &Path, arrays: &[(&str, &[u64], &[f64])], method: CompressionMethod) {
        let mut writer = NpzWriter::create(path).unwrap();
        let options = FileOptions::default().compression_method(method);
        for (name, shape, values) in arrays {
            let mut array =
                writer.array(name, options).unwrap().default_dtype().shape(shape).begin_nd().unwrap();
            array.extend(values.iter()).unwrap();
            array.finish().unwrap();
        }
    }

    const MU: (&str, &[u64], &[f64]) = ("mu", &[2], &[1.0, -2.0]);
    const SIGMA: (&str, &[u64], &[f64]) = ("sigma", &[2, 2], &[4.0, 1.0, 1.0, 9.0]);

    fn file(arrays: &[(&str, &[u64], &[f64])]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.npz");
        write(&path, arrays, CompressionMethod::Deflated);
        (folder, path)
    }

    #[test]
    fn moments_come_from_npz_files_compressed_or_not() {
        let here = Moments::given(
            Tensor::from_slice(&[1.0, -2.0]),
            Tensor::from_slice(&[4.0, 1.0, 1.0, 9.0]).reshape([2, 2]),
        );
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.npz");
        for method in [CompressionMethod::Stored, CompressionMethod::Deflated] {
            write(&path, &[MU, SIGMA, ("other", &[1], &[0.0])], method);
            assert!(moments(&path, 2).unwrap().frechet_distance(&here) < 1e-12);
        }
        let mut writer = NpzWriter::create(&path).unwrap();
        for (name, shape, values) in [MU, SIGMA] {
            let array = writer.array(name, FileOptions::default()).unwrap().default_dtype();
            let mut array = array.shape(shape).begin_nd().unwrap();
            array.extend(values.iter().map(|x| *x as f32)).unwrap();
            array.finish().unwrap();
        }
        drop(writer);
        assert!(moments(&path, 2).unwrap().frechet_distance(&here) < 1e-6, "fp32 does as well");
    }

    #[test]
    fn what_are_no_moments_is_refused() {
        let refused = |arrays: &[(&str, &[u64], &[f64])], width: i64, says: &str| {
            let (_folder, path) = file(arrays);
            let error = format!("{:#}", moments(&path, width).err().unwrap());
            assert!(error.contains(says), "{says}: {error}");
        };
        refused(&[("mean", &[2], &[1.0, 2.0]), SIGMA], 2, "has no array `mu`");
        refused(&[("mean", &[2], &[1.0, 2.0]), SIGMA], 2, "\"mean\"");
        refused(&[MU, SIGMA], 3, "`mu` has shape [2], but the extractor's 3 features need [3]");
        refused(&[MU, ("sigma", &[2, 1], &[1.0, 1.0])], 2, "`sigma` has shape [2, 1]");
        refused(&[MU, ("sigma", &[2, 2], &[4.0, 1.0, 1.1, 9.0])], 2, "not symmetric");
        refused(&[MU, ("sigma", &[2, 2], &[4.0, f64::NAN, f64::NAN, 9.0])], 2, "not finite");
        refused(&[MU, ("sigma", &[2, 2], &[-4.0, 1.0, 1.0, 9.0])], 2, "negative variances");
        let (_folder, path) = file(&[MU, SIGMA]);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        assert!(format!("{:#}", moments(&path, 2).err().unwrap()).contains("damaged"));
    }
}
