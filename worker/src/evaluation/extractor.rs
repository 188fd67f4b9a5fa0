//! The feature extractor for FID, precision, recall and agreement.

use std::path::Path;

use anyhow::{Context, anyhow, ensure};
use tch::{CModule, Device, IValue, Kind, Tensor, no_grad};

use super::torch_script::{
    at_a_time, digest_of, message, on_any_batch, parameters, torch_script, trial_images,
};
use crate::{data::Shape, process::work};

/// A TorchScript extractor: images fp32 [N, C, H, W] in [−1, 1] → features [N, D], or (features, logits [N, classes]).
pub struct Extractor {
    /// For messages.
    name: String,
    module: CModule,
    pub device: Device,
    /// SHA-256 of its file, by which statistics name the extractor that made them.
    digest: String,
    /// D, the number of features.
    width: i64,
    signature: Signature,
}

/// How a module is called.
enum Signature {
    /// With images fp32 in [−1, 1].
    Images,
    /// As NVIDIA's `inception-2015-12-05.pt` of the StyleGAN repositories: RGB images u8, and switches, of which
    /// `return_features` is needed, or else it returns the scores of 1,008 classes.
    Nvidia {
        /// For each argument behind the images, whether it is that switch.
        switches: Vec<bool>,
    },
}

const FEATURES_SWITCH: &str = "return_features";

impl Signature {
    fn of(module: &CModule) -> Self {
        let parameters = parameters(module);
        let rest = parameters.get(1..).unwrap_or_default();
        let is_nvidia = rest.iter().any(|(_, name)| name == FEATURES_SWITCH)
            && rest.iter().all(|(kind, _)| kind == "bool");
        match is_nvidia {
            true => Self::Nvidia { switches: rest.iter().map(|(_, name)| name == FEATURES_SWITCH).collect() },
            false => Self::Images,
        }
    }

    fn arguments(&self, images: &Tensor) -> Vec<IValue> {
        match self {
            Self::Images => vec![IValue::Tensor(images.shallow_clone())],
            Self::Nvidia { switches } => {
                let [n, _, height, width] = images.size()[..] else { return vec![] };
                let bytes = (images * 127.5 + 128.0).clamp(0.0, 255.0).to_kind(Kind::Uint8);
                let bytes = bytes.expand([n, 3, height, width], false).contiguous();
                let switches = switches.iter().map(|is_wanted| IValue::Bool(*is_wanted));
                std::iter::once(IValue::Tensor(bytes)).chain(switches).collect()
            }
        }
    }
}

/// Most features of an image: a covariance of more does not fit a machine's memory.
const MOST_FEATURES: i64 = 32_768;

/// The output of an extractor.
pub struct Extracted {
    /// [N, D].
    pub features: Tensor,
    /// [N, classes].
    pub logits: Option<Tensor>,
}

impl Extractor {
    /// Loads it, and tries it on images of `shape`.
    ///
    /// # Errors
    /// Not TorchScript; another signature; logits for another number of classes.
    pub fn load(path: &Path, shape: Shape, device: Device) -> anyhow::Result<Self> {
        let context = || format!("feature extractor {}", path.display());
        ensure!(
            !path.to_string_lossy().contains("://"),
            "{}: an extractor is a file of this machine, no URL: copy it here",
            context()
        );
        let bytes = std::fs::read(path).with_context(context)?;
        let digest = digest_of(&bytes);
        let module = torch_script(&bytes, device).with_context(context)?;
        let signature = Signature::of(&module);
        let mut extractor = Self { name: context(), module, device, digest, width: 0, signature };
        let [channels, height, width] = shape.sample;
        let Extracted { features, logits } =
            on_any_batch(|batch| extractor.batch(&trial_images([batch, channels, height, width], device)))
                .with_context(context)?;
        let finite = bool::try_from(features.isfinite().all())?;
        ensure!(finite, "{}: its features of a trial image are not finite", context());
        let differ = !bool::try_from(features.get(0).eq_tensor(&features.get(1)).all())?;
        ensure!(differ, "{}: has the same features for different images, so it can score nothing", context());
        extractor.width = features.size()[1];
        if let Some(logits) = logits {
            let finite = bool::try_from(logits.isfinite().all())?;
            ensure!(finite, "{}: its logits of a trial image are not finite", context());
            let size = logits.size();
            ensure!(
                shape.classes == 0 || size[1] == shape.classes,
                "{}: turns 2 images into logits {size:?}; expected [2, {}], one for each of the teacher's classes",
                context(),
                shape.classes
            );
        }
        Ok(extractor)
    }

    /// SHA-256 of its file.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Number of features.
    pub fn width(&self) -> i64 {
        self.width
    }

    /// Features of images [N, C, H, W] in [−1, 1], on its device; a few images at a time.
    ///
    /// # Errors
    /// The module fails, or returns another kind of value.
    pub fn run(&self, images: &Tensor) -> anyhow::Result<Extracted> {
        let (mut features, mut logits) = (Vec::new(), Vec::new());
        for images in images.split(at_a_time(self.device), 0) {
            let extracted = self.batch(&images).with_context(|| self.name.clone())?;
            features.push(extracted.features);
            logits.extend(extracted.logits);
            work::complete();
        }
        let logits = (!logits.is_empty()).then(|| Tensor::cat(&logits, 0));
        Ok(Extracted { features: Tensor::cat(&features, 0), logits })
    }

    /// Features of all images at once.
    fn batch(&self, images: &Tensor) -> anyhow::Result<Extracted> {
        let extracted = self.forward(images)?;
        let (size, count) = (extracted.features.size(), images.size()[0]);
        ensure!(
            matches!(size[..], [n, d] if n == count && d > 0 && d <= MOST_FEATURES),
            "turns {count} images into features {size:?}; expected [{count}, D], D at most {MOST_FEATURES}"
        );
        if let Some(logits) = &extracted.logits {
            let size = logits.size();
            ensure!(
                matches!(size[..], [n, _] if n == count),
                "turns {count} images into logits {size:?}; expected [{count}, classes]"
            );
        }
        Ok(extracted)
    }

    fn forward(&self, images: &Tensor) -> anyhow::Result<Extracted> {
        let arguments = self.signature.arguments(&images.to_device(self.device));
        let output = no_grad(|| self.module.forward_is(&arguments))
            .map_err(|e| anyhow!("fails on images of shape {:?}: {}", images.size(), message(&e)))?;
        let fp32 = |x: Tensor| x.to_kind(Kind::Float);
        match output {
            IValue::Tensor(features) => Ok(Extracted { features: fp32(features), logits: None }),
            IValue::Tuple(parts) => match <[IValue; 2]>::try_from(parts) {
                Ok([IValue::Tensor(features), IValue::Tensor(logits)]) => {
                    Ok(Extracted { features: fp32(features), logits: Some(fp32(logits)) })
                }
                _ => Err(anyhow!("returns a tuple that is not (features, logits)")),
            },
            _ => Err(anyhow!("returns neither features nor (features, logits)")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn extractors_are_called_as_they_are_meant_and_useless_ones_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let made = Command::new(root.join(".venv/bin/python"))
            .arg(root.join("scripts/fixtures/extractors.py"))
            .arg(folder.path())
            .status();
        assert!(made.unwrap().success());
        for (name, content) in [
            ("pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
            ("page", "<!DOCTYPE html>"),
            ("empty", ""),
        ] {
            std::fs::write(folder.path().join(format!("{name}.pt")), content).unwrap();
        }
        let shape = |channels| Shape { sample: [channels, 8, 8], classes: 0 };
        let load =
            |name: &str| Extractor::load(&folder.path().join(format!("{name}.pt")), shape(3), Device::Cpu);
        let images = trial_images([3, 3, 8, 8], Device::Cpu);
        let features = |extractor: &Extractor, images: &Tensor| extractor.run(images).unwrap().features;
        let expected = features(&load("plain").unwrap(), &images);
        for (name, tolerance) in [("nvidia", 0.02), ("other", 0.02), ("double", 1e-6), ("dropping", 1e-6)] {
            let extractor = load(name).unwrap();
            assert_eq!(extractor.width(), 8, "{name}: features, not classes");
            let found = features(&extractor, &images);
            assert_eq!(found.kind(), Kind::Float);
            let off = (&found - &expected).abs().max().double_value(&[]);
            assert!(off <= tolerance, "{name}: {off}");
            assert!(found.equal(&features(&extractor, &images)), "{name}: nothing is dropped");
        }
        // Grey images become RGB.
        Extractor::load(&folder.path().join("nvidia.pt"), shape(1), Device::Cpu).unwrap();
        for (name, said) in [
            ("bytes", "expecting bytes"),
            ("constant", "the same features for different images"),
            ("notanumber", "not finite"),
            ("weights", "torch.jit.script(module).save"),
            ("fixed1", "takes a batch of 1, but not one of 2: it was traced with a fixed batch size"),
            ("fixed2", "takes a batch of 2, but not one of 3: it was traced with a fixed batch size"),
            ("fixed8", "takes a batch of 8, but not one of 2: it was traced with a fixed batch size"),
            ("pointer", "git lfs pull"),
            ("page", "is an HTML page"),
            ("empty", "is empty"),
        ] {
            let error = format!("{:#}", load(name).err().unwrap());
            assert!(error.contains(said), "{name}: {error}");
        }
    }
}
