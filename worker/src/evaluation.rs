//! Scoring teacher and student, spread over the ranks.
//!
//! Each rank makes every world-th chunk of the samples and puts features and logits into its rows of a zero matrix; a sum over ranks puts them together, and
//! every rank computes the same scores.

use std::{path::Path, time::Instant};

use anyhow::{Context, anyhow, ensure};
use potstill_c10d::{Error, ProcessGroup, ReduceOp};
use potstill_distill::score::{self, Moments};
use potstill_models::Denoiser;
use potstill_proto::{spec::EvaluationSpec, wire::Scores};
use tch::{CModule, Device, IValue, Kind, Tensor, no_grad};

use crate::{
    dataset::Dataset,
    samples::{CHUNK, SampleSet, Sampler},
};

/// A TorchScript extractor: images fp32 [N, C, H, W] in [−1, 1] → (features [N, D], logits [N, classes]).
pub struct Extractor {
    module: CModule,
    device: Device,
}

impl Extractor {
    /// Loads it, and tries it on images of `sample_shape`.
    ///
    /// # Errors
    /// Not TorchScript; another signature; logits for another number of classes.
    pub fn load(path: &Path, sample_shape: [i64; 3], classes: i64, device: Device) -> anyhow::Result<Self> {
        let context = || format!("feature extractor {}", path.display());
        ensure!(path.is_file(), "{}: no such file", context());
        let module = CModule::load_on_device(path, device)
            .map_err(|e| anyhow!("is not a TorchScript module: {}", first_line(&e)))
            .with_context(context)?;
        let extractor = Self { module, device };
        let [channels, height, width] = sample_shape;
        let trial = Tensor::zeros([2, channels, height, width], (Kind::Float, device));
        let (features, logits) = extractor.run(&trial).with_context(context)?;
        ensure!(
            features.size().len() == 2 && features.size()[0] == 2 && logits.size().first() == Some(&2),
            "{}: turns 2 images into features {:?} and logits {:?}; expected [2, D] and [2, classes]",
            context(),
            features.size(),
            logits.size()
        );
        ensure!(
            classes == 0 || logits.size()[1..] == [classes],
            "{}: has logits {:?}, but the teacher has {classes} classes",
            context(),
            logits.size()
        );
        Ok(extractor)
    }

    fn run(&self, images: &Tensor) -> anyhow::Result<(Tensor, Tensor)> {
        let input = IValue::Tensor(images.to_device(self.device));
        let output = no_grad(|| self.module.forward_is(&[input]))
            .map_err(|e| anyhow!("fails on images of shape {:?}: {}", images.size(), first_line(&e)))?;
        match output {
            IValue::Tuple(parts) => match <[IValue; 2]>::try_from(parts) {
                Ok([IValue::Tensor(features), IValue::Tensor(logits)]) => Ok((features, logits)),
                _ => Err(anyhow!("does not return (features, logits)")),
            },
            _ => Err(anyhow!("does not return a pair (features, logits)")),
        }
    }
}

fn first_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// What samples are compared with.
pub struct Evaluator {
    spec: EvaluationSpec,
    extractor: Extractor,
    real_features: Tensor,
    real_moments: Moments,
    samples: SampleSet,
    device: Device,
}

impl Evaluator {
    /// Loads extractor and reference images, if the run has them.
    ///
    /// # Errors
    /// Either file is missing or does not fit the model.
    pub fn load(spec: &EvaluationSpec, model: &dyn Denoiser, device: Device) -> anyhow::Result<Option<Self>> {
        let (Some(features), Some(reference)) = (&spec.features, &spec.reference) else { return Ok(None) };
        let extractor = Extractor::load(features, model.sample_shape(), model.classes(), device)?;
        let data = Dataset::load(reference, model.sample_shape(), model.classes())?;
        ensure!(
            data.len() > i64::from(spec.neighbours),
            "{}: has {} images; evaluation.neighbours = {} needs more",
            reference.display(),
            data.len(),
            spec.neighbours
        );
        let batches = data.images.split(CHUNK, 0);
        let features = batches.iter().map(|b| Ok(extractor.run(b)?.0)).collect::<anyhow::Result<Vec<_>>>()?;
        let real_features = Tensor::cat(&features, 0).to_device(Device::Cpu);
        let real_moments = Moments::of(&real_features);
        let samples = SampleSet::new(spec, device);
        Ok(Some(Self { spec: spec.clone(), extractor, real_features, real_moments, samples, device }))
    }

    /// Scores a sampler; every rank of the group takes part and gets the same scores. `tick` is called after each chunk.
    ///
    /// # Errors
    /// A collective failed, or the extractor did.
    pub fn score(
        &self,
        sampler: Sampler<'_>,
        group: &ProcessGroup,
        mut tick: impl FnMut(),
    ) -> anyhow::Result<Result<Scores, Error>> {
        let model = sampler.network();
        let member = group.member();
        let samples = i64::from(self.spec.samples);
        let mut rows: Option<(Tensor, Tensor)> = None;
        let mut sampling = 0.0;
        let mut labels = Vec::new();
        for index in 0..(samples + CHUNK - 1) / CHUNK {
            let first = index * CHUNK;
            let count = CHUNK.min(samples - first);
            let chunk = self.samples.chunk(model, index, count);
            labels.push(chunk.labels.shallow_clone());
            if index % member.world as i64 != member.rank as i64 {
                continue;
            }
            let started = Instant::now();
            let images = self.samples.sample(sampler, &chunk);
            sampling += started.elapsed().as_secs_f64();
            let (features, logits) = self.extractor.run(&images)?;
            let matrix = |x: &Tensor| Tensor::zeros([samples, x.size()[1]], (Kind::Float, x.device()));
            let (all_features, all_logits) = rows.get_or_insert_with(|| (matrix(&features), matrix(&logits)));
            all_features.narrow(0, first, count).copy_(&features);
            all_logits.narrow(0, first, count).copy_(&logits);
            tick();
        }
        let (features, logits) = match rows {
            Some(rows) => rows,
            // More ranks than chunks: this one has none, but takes part in the sums.
            None => {
                let [channels, height, width] = model.sample_shape();
                let trial = Tensor::zeros([1, channels, height, width], (Kind::Float, self.device));
                let (f, l) = self.extractor.run(&trial)?;
                let matrix = |x: &Tensor| Tensor::zeros([samples, x.size()[1]], (Kind::Float, x.device()));
                (matrix(&f), matrix(&l))
            }
        };
        // All ranks sample side by side; the slowest one's time is the sampling's.
        let seconds = Tensor::from_slice(&[sampling]).to_kind(Kind::Float).to_device(group.device());
        if let Err(error) = gather(group, &features, &logits, &seconds) {
            return Ok(Err(error));
        }
        let (features, logits) = (features.to_device(Device::Cpu), logits.to_device(Device::Cpu));
        ensure!(
            bool::try_from(features.isfinite().all())?,
            "the extractor's features are not finite: the samples are broken"
        );
        let (precision, recall) =
            score::precision_recall(&self.real_features, &features, self.spec.neighbours.into());
        tick();
        let agreement = match model.classes() {
            0 => f64::NAN,
            _ => score::agreement(&logits, &Tensor::cat(&labels, 0)),
        };
        Ok(Ok(Scores {
            fid: self.real_moments.frechet_distance(&Moments::of(&features)),
            agreement,
            precision,
            recall,
            diversity: score::diversity(&features, model.classes()),
            evaluations_per_image: self.samples.evaluations(sampler) as f64,
            images_per_second: samples as f64 / seconds.double_value(&[0]).max(1e-9),
            samples: samples as u64,
        }))
    }
}

fn gather(group: &ProcessGroup, features: &Tensor, logits: &Tensor, seconds: &Tensor) -> Result<(), Error> {
    for (tensor, op) in [(features, ReduceOp::Sum), (logits, ReduceOp::Sum), (seconds, ReduceOp::Max)] {
        group.all_reduce(tensor, op)?.wait(None)?;
    }
    Ok(())
}
