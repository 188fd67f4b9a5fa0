//! Scoring teacher and student, spread over the ranks.
//!
//! Each rank makes every world-th chunk of the samples and puts features, logits and CLIP scores into its rows of zero matrices; a sum over ranks puts them
//! together, and every rank computes the same scores.

use std::{collections::BTreeMap, path::Path, time::Instant};

use anyhow::{Context, anyhow, ensure};
use potstill_c10d::{Error, ProcessGroup, ReduceOp};
use potstill_distill::score::{self, Moments};
use potstill_models::weights::{self, Archive};
use potstill_proto::{spec::EvaluationSpec, wire::Scores};
use sha2::{Digest, Sha256};
use tch::{CModule, Device, IValue, Kind, Tensor, no_grad};

use crate::{
    clip::Clip,
    dataset::{Dataset, Shape},
    model::Space,
    samples::{CHUNK, SampleSet, Sampler},
};

/// A TorchScript extractor: images fp32 [N, C, H, W] in [−1, 1] → features [N, D], or (features, logits [N, classes]).
pub struct Extractor {
    module: CModule,
    device: Device,
    /// SHA-256 of its file: what statistics were computed with.
    digest: String,
}

/// What an extractor makes of images.
struct Extracted {
    features: Tensor,
    logits: Option<Tensor>,
}

impl Extractor {
    /// Loads it, and tries it on images of `shape`.
    ///
    /// # Errors
    /// Not TorchScript; another signature; logits for another number of classes.
    pub fn load(path: &Path, shape: Shape, device: Device) -> anyhow::Result<Self> {
        let context = || format!("feature extractor {}", path.display());
        let bytes = std::fs::read(path).with_context(context)?;
        let digest = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let module = torch_script(&bytes, device).with_context(context)?;
        let extractor = Self { module, device, digest };
        let [channels, height, width] = shape.sample;
        let trial = Tensor::zeros([2, channels, height, width], (Kind::Float, device));
        let Extracted { features, logits } = extractor.run(&trial).with_context(context)?;
        ensure!(
            features.size().len() == 2 && features.size()[0] == 2,
            "{}: turns 2 images into features {:?}; expected [2, D]",
            context(),
            features.size()
        );
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

    fn run(&self, images: &Tensor) -> anyhow::Result<Extracted> {
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

/// A TorchScript module from the bytes of its file.
///
/// # Errors
/// It is none.
pub fn torch_script(bytes: &[u8], device: Device) -> anyhow::Result<CModule> {
    CModule::load_data_on_device(&mut &bytes[..], device)
        .map_err(|e| anyhow!("is not a TorchScript module: {}", first_line(&e)))
}

/// What libtorch says, without where in its source.
pub fn first_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// What samples are compared with.
pub struct Evaluator {
    spec: EvaluationSpec,
    extractor: Extractor,
    clip: Option<Clip>,
    reference: Reference,
    samples: SampleSet,
    image_shape: [i64; 3],
}

/// What a scoring is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// The next chunk of samples: the one before is done.
    Sample,
    /// To wait for the other ranks' features.
    Gather,
    /// To compare with the reference.
    Compare,
}

impl Evaluator {
    /// Loads extractor and reference, and CLIP, if the specification has them.
    ///
    /// # Errors
    /// One of them is missing or does not fit the model.
    pub fn load(spec: &EvaluationSpec, space: &Space, device: Device) -> anyhow::Result<Option<Self>> {
        let (Some(features), Some(reference)) = (&spec.features, &spec.reference) else { return Ok(None) };
        let shape = Shape { sample: space.image_shape(), classes: space.classes };
        let extractor = Extractor::load(features, shape, device)?;
        let clip = spec.clip.as_ref().map(|path| Clip::load(path, space, device)).transpose()?;
        let reference = Reference::load(reference, &extractor, shape)?;
        ensure!(
            reference.features.size()[0] > i64::from(spec.neighbours),
            "the reference has {} images; evaluation.neighbours = {} needs more",
            reference.features.size()[0],
            spec.neighbours
        );
        let samples = SampleSet::new(spec, space.clone(), device);
        let (spec, image_shape) = (spec.clone(), shape.sample);
        Ok(Some(Self { spec, extractor, clip, reference, samples, image_shape }))
    }

    /// What it compares with.
    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// Scores a sampler; every rank of the group takes part and gets the same scores. `tell` hears what it is about to do.
    ///
    /// # Errors
    /// A collective failed, or the extractor did.
    pub fn score(
        &self,
        sampler: Sampler<'_>,
        group: &ProcessGroup,
        mut tell: impl FnMut(Scoring),
    ) -> anyhow::Result<Result<Scores, Error>> {
        let member = group.member();
        let samples = i64::from(self.spec.samples);
        let mut rows: Option<(Tensor, Option<Tensor>)> = None;
        let matrix = |x: &Tensor| Tensor::zeros([samples, x.size()[1]], (Kind::Float, x.device()));
        let clip_scores = self.clip.as_ref().map(|clip| (clip, clip.zeros(samples)));
        let mut sampling = 0.0;
        let mut labels = Vec::new();
        for index in 0..(samples + CHUNK - 1) / CHUNK {
            let first = index * CHUNK;
            let count = CHUNK.min(samples - first);
            let chunk = self.samples.chunk(index, count);
            labels.extend(chunk.labels.as_ref().map(Tensor::shallow_clone));
            if index % member.world as i64 != member.rank as i64 {
                continue;
            }
            let started = Instant::now();
            let images = self.samples.sample(sampler, &chunk);
            sampling += started.elapsed().as_secs_f64();
            let Extracted { features, logits } = self.extractor.run(&images)?;
            let (all_features, all_logits) =
                rows.get_or_insert_with(|| (matrix(&features), logits.as_ref().map(matrix)));
            all_features.narrow(0, first, count).copy_(&features);
            if let (Some(all), Some(logits)) = (all_logits, logits) {
                all.narrow(0, first, count).copy_(&logits);
            }
            if let Some((clip, all)) = &clip_scores {
                all.narrow(0, first, count).copy_(&clip.scores(&images, &chunk.groups)?);
            }
            tell(Scoring::Sample);
        }
        let (features, logits) = match rows {
            Some(rows) => rows,
            // More ranks than chunks: this one has none, but takes part in the sums.
            None => {
                let [channels, height, width] = self.image_shape;
                let trial = Tensor::zeros([1, channels, height, width], (Kind::Float, self.extractor.device));
                let Extracted { features, logits } = self.extractor.run(&trial)?;
                (matrix(&features), logits.as_ref().map(matrix))
            }
        };
        // All ranks sample side by side; the slowest one's time is the sampling's.
        let seconds = Tensor::from_slice(&[sampling]).to_kind(Kind::Float).to_device(group.device());
        tell(Scoring::Gather);
        let clip_scores = clip_scores.map(|(_, all)| all);
        let sums = [Some(&features), logits.as_ref(), clip_scores.as_ref()];
        if let Err(error) = gather(group, sums.into_iter().flatten(), &seconds) {
            return Ok(Err(error));
        }
        tell(Scoring::Compare);
        let features = features.to_device(Device::Cpu);
        ensure!(
            bool::try_from(features.isfinite().all())?,
            "the extractor's features are not finite: the samples are broken"
        );
        let clip_score = clip_scores.map(|all| all.mean(Kind::Double).double_value(&[]));
        ensure!(
            clip_score.is_none_or(f64::is_finite),
            "evaluation.clip: the embeddings are not finite, though the features are"
        );
        let (precision, recall) =
            score::precision_recall(&self.reference.features, &features, self.spec.neighbours.into());
        tell(Scoring::Compare);
        let agreement = match logits {
            Some(logits) if !labels.is_empty() => {
                score::agreement(&logits.to_device(Device::Cpu), &Tensor::cat(&labels, 0))
            }
            _ => f64::NAN,
        };
        Ok(Ok(Scores {
            fid: self.reference.moments.frechet_distance(&Moments::of(&features)),
            agreement,
            precision,
            recall,
            diversity: score::diversity(&features, self.samples.groups()),
            clip_score,
            evaluations_per_image: self.samples.evaluations(sampler) as f64,
            images_per_second: samples as f64 / seconds.double_value(&[0]).max(1e-9),
            samples: samples as u64,
        }))
    }
}

fn gather<'a>(
    group: &ProcessGroup,
    sums: impl Iterator<Item = &'a Tensor>,
    seconds: &'a Tensor,
) -> Result<(), Error> {
    let sums = sums.map(|tensor| (tensor, ReduceOp::Sum));
    for (tensor, op) in sums.chain([(seconds, ReduceOp::Max)]) {
        group.all_reduce(tensor, op)?.wait(None)?;
    }
    Ok(())
}

/// The features of real images, with their moments: computed from the images, or read from a file that holds them
/// already.
pub struct Reference {
    features: Tensor,
    moments: Moments,
    extractor: String,
}

/// Header key of a file of features: SHA-256 of the extractor that made them.
const EXTRACTOR_KEY: &str = "extractor_sha256";

impl Reference {
    /// Loads images and extracts their features, or loads features that [`to_safetensors`](Self::to_safetensors) wrote.
    ///
    /// # Errors
    /// There are none, they do not fit the model, or the features are another extractor's.
    fn load(path: &Path, extractor: &Extractor, shape: Shape) -> anyhow::Result<Self> {
        let location = path.to_string_lossy();
        if path.extension().is_some_and(|e| e == "safetensors") && path.is_file() {
            let archive = Archive::read(path)?;
            if let Some(features) = archive.tensors.get("features") {
                let made_by = archive.metadata.get(EXTRACTOR_KEY).map_or("", String::as_str);
                ensure!(
                    made_by == extractor.digest,
                    "{location}: these features were made by the extractor with SHA-256 {made_by}, but this one has {}; \
                     compute them anew with `potstill evaluate --save-statistics`",
                    extractor.digest
                );
                ensure!(features.size().len() == 2, "{location}: `features` must be [N, D]");
                return Ok(Self::new(features.shallow_clone(), made_by.to_owned()));
            }
        }
        let images = Dataset::load(&location, shape)?.images();
        let features = images
            .split(CHUNK, 0)
            .iter()
            .map(|batch| Ok(extractor.run(batch)?.features.to_device(Device::Cpu)))
            .collect::<anyhow::Result<Vec<_>>>()?;
        Ok(Self::new(Tensor::cat(&features, 0), extractor.digest.clone()))
    }

    fn new(features: Tensor, extractor: String) -> Self {
        Self { moments: Moments::of(&features), features, extractor }
    }

    /// The features as a file that takes the images' place next time.
    ///
    /// # Errors
    /// The serialiser's.
    pub fn to_safetensors(&self) -> anyhow::Result<Vec<u8>> {
        let metadata = BTreeMap::from([(EXTRACTOR_KEY.to_owned(), self.extractor.clone())]);
        Ok(weights::archive(&[("features", &self.features)], &metadata)?)
    }
}
