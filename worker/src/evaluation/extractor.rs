//! The feature extractor for FID, precision, recall and agreement.

use std::path::Path;

use anyhow::{Context, anyhow, ensure};
use tch::{CModule, Device, IValue, Kind, Tensor, no_grad};

use super::torch_script::{digest_of, first_line, torch_script};
use crate::data::Shape;

/// A TorchScript extractor: images fp32 [N, C, H, W] in [−1, 1] → features [N, D], or (features, logits [N, classes]).
pub struct Extractor {
    module: CModule,
    pub device: Device,
    /// SHA-256 of its file, by which statistics name the extractor that made them.
    digest: String,
    /// D, the number of features.
    width: i64,
}

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
        let bytes = std::fs::read(path).with_context(context)?;
        let digest = digest_of(&bytes);
        let module = torch_script(&bytes, device).with_context(context)?;
        let mut extractor = Self { module, device, digest, width: 0 };
        let [channels, height, width] = shape.sample;
        let trial = Tensor::zeros([2, channels, height, width], (Kind::Float, device));
        let Extracted { features, logits } = extractor.run(&trial).with_context(context)?;
        ensure!(
            features.size().len() == 2 && features.size()[0] == 2,
            "{}: turns 2 images into features {:?}; expected [2, D]",
            context(),
            features.size()
        );
        extractor.width = features.size()[1];
        if let Some(logits) = logits {
            let size = logits.size();
            ensure!(
                size.len() == 2 && size[0] == 2 && (shape.classes == 0 || size[1] == shape.classes),
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

    /// Features of images [N, C, H, W] in [−1, 1], on its device.
    ///
    /// # Errors
    /// The module fails, or returns another kind of value.
    pub fn run(&self, images: &Tensor) -> anyhow::Result<Extracted> {
        let input = IValue::Tensor(images.to_device(self.device));
        let output = no_grad(|| self.module.forward_is(&[input]))
            .map_err(|e| anyhow!("fails on images of shape {:?}: {}", images.size(), first_line(&e)))?;
        match output {
            IValue::Tensor(features) => Ok(Extracted { features, logits: None }),
            IValue::Tuple(parts) => match <[IValue; 2]>::try_from(parts) {
                Ok([IValue::Tensor(features), IValue::Tensor(logits)]) => {
                    Ok(Extracted { features, logits: Some(logits) })
                }
                _ => Err(anyhow!("returns a tuple that is not (features, logits)")),
            },
            _ => Err(anyhow!("returns neither features nor (features, logits)")),
        }
    }
}
