//! Evaluation of teacher and student, spread over the ranks.
//!
//! Each rank makes every world-th chunk of the samples and writes features, logits and CLIP scores into its rows of
//! zero matrices; a sum over ranks completes them, and every rank can compute the same metrics. Chunks that an earlier
//! process has [kept](Kept) are read instead.

mod clip;
mod extractor;
pub mod kept;
pub mod pictures;
mod reference;
pub mod samples;
mod torch_script;

use std::time::Instant;

use anyhow::{Context, ensure};
use potstill_c10d::{Error, ProcessGroup, ReduceOp};
use potstill_distill::metrics::{self, Moments};
use potstill_proto::scores::{Scores, measured};
use potstill_spec::{EvaluationSpec, Protocol};
use tch::{Device, Kind, Tensor};

use self::{
    clip::Clip,
    extractor::{Extracted, Extractor},
    kept::{Finished, Kept},
    reference::Reference,
    samples::{CHUNK, SampleSet, Sampler},
};
use crate::{
    data::{Shape, protocol},
    model::Space,
    process::work,
};

/// Evaluates samples.
pub struct Evaluator {
    spec: EvaluationSpec,
    protocol: Protocol,
    extractor: Extractor,
    clip: Option<Clip>,
    reference: Reference,
    samples: SampleSet,
    kept: Option<Kept>,
}

/// Progress of an evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// This many samples are made by all ranks together, assuming that the others are as fast as this one.
    Sampled(u64),
    /// It is about to wait for the other ranks' features.
    Gather,
    /// It is about to compare them with the reference.
    Compare,
}

/// Features of all samples, and other measurements of them.
pub struct Gathered {
    /// [N, D] on the host.
    features: Tensor,
    /// [N, classes] on the host.
    logits: Option<Tensor>,
    /// `[N]`.
    clip_scores: Option<Tensor>,
    evaluations_per_image: f64,
    /// Images per second; NaN where no sample was made.
    images_per_second: f64,
}

impl Evaluator {
    /// Loads extractor and reference, and CLIP, if the specification has them.
    ///
    /// # Errors
    /// One of them is missing or does not fit the model.
    pub fn load(spec: &EvaluationSpec, space: &Space, device: Device) -> anyhow::Result<Option<Self>> {
        let (Some(features), Some(reference)) = (&spec.features, &spec.reference) else { return Ok(None) };
        let protocol = spec.protocol().map_err(anyhow::Error::msg)?;
        ensure!(
            spec.prompts.is_none() || space.prompts().is_some(),
            "evaluation.prompts is for text-to-image models, and this model takes no prompts"
        );
        let shape = protocol::shape_after(protocol, space.image_shape())?;
        let shape = Shape { sample: shape, classes: space.classes };
        let extractor = Extractor::load(features, shape, device)?;
        let clip = match &spec.clip {
            Some(path) => Some(Clip::load(path, space, seen_by_clip(protocol), device)?),
            None => None,
        };
        let reference = Reference::load(reference, &extractor, shape, protocol)?;
        if let Some(features) = &reference.features {
            ensure!(
                features.size()[0] > i64::from(spec.neighbours),
                "the reference has {} images; evaluation.neighbours = {} needs more",
                features.size()[0],
                spec.neighbours
            );
        }
        let samples = SampleSet::new(spec, space.clone(), device);
        let spec = spec.clone();
        Ok(Some(Self { spec, protocol, extractor, clip, reference, samples, kept: None }))
    }

    /// The reference.
    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// SHA-256 of the extractor's file, and of CLIP's where there is one.
    pub fn digests(&self) -> (&str, Option<&str>) {
        (self.extractor.digest(), self.clip.as_ref().map(Clip::digest))
    }

    /// Keeps finished chunks there, and reads those that an earlier process has finished. They must be those of the
    /// sampler that is evaluated.
    pub fn keep(&mut self, kept: Kept) {
        self.kept = Some(kept);
    }

    /// Evaluates a sampler; every rank of the group must call it and gets the same metrics. With `in_step` all of them evaluate
    /// the network equally often. `tell` receives its progress.
    ///
    /// # Errors
    /// A collective failed, or the extractor did.
    pub fn score(
        &self,
        sampler: Sampler<'_>,
        group: &ProcessGroup,
        in_step: bool,
        mut tell: impl FnMut(Scoring),
    ) -> anyhow::Result<Result<Scores, Error>> {
        Ok(match self.gather(sampler, group, in_step, &mut tell)? {
            Ok(gathered) => Ok(self.compare(&gathered, tell)?),
            Err(error) => Err(error),
        })
    }

    /// The first half of [`score`](Self::score): makes the samples and gathers their features on every rank.
    ///
    /// # Errors
    /// As `score`; kept chunks that cannot be read or written.
    pub fn gather(
        &self,
        sampler: Sampler<'_>,
        group: &ProcessGroup,
        in_step: bool,
        mut tell: impl FnMut(Scoring),
    ) -> anyhow::Result<Result<Gathered, Error>> {
        let member = group.member();
        let (rank, world) = (member.rank, member.world);
        let samples = i64::from(self.spec.samples);
        let count = |index: i64| CHUNK.min(samples - index * CHUNK);
        let kept = match self.kept(group)? {
            Ok(kept) => kept,
            Err(error) => return Ok(Err(error)),
        };
        let (ready, missing): (Vec<i64>, Vec<i64>) =
            (0..chunks(samples)).partition(|index| kept[*index as usize]);
        let share =
            |indices: &[i64]| -> Vec<i64> { indices.iter().copied().skip(rank).step_by(world).collect() };
        let mut rows = Rows::new(samples);

        for index in share(&ready) {
            let kept = self.kept.as_ref().context("there is no folder for kept chunks")?;
            rows.put(index, &kept.read(index, count(index))?.on(self.extractor.device))?;
        }
        let mut sampling = 0.0;
        for indices in missing.chunks(world) {
            // The other ranks make the same number at the same time.
            let done = indices.iter().map(|index| count(*index)).sum::<i64>();
            let passes = |index: i64| self.samples.passes(count(index));
            let most = indices.iter().map(|index| passes(*index)).max().unwrap_or(0);
            let Some(&index) = indices.get(rank) else {
                self.samples.accompany(sampler, if in_step { most } else { 0 });
                continue;
            };
            let chunk = self.samples.chunk(index, count(index));
            let started = Instant::now();
            let made = self.samples.sample(sampler, &chunk);
            self.samples.accompany(sampler, if in_step { most - passes(index) } else { 0 });
            sampling += started.elapsed().as_secs_f64();
            let images = protocol::apply(self.protocol, &made)?;
            let Extracted { features, logits } = self.extractor.run(&images)?;
            let clip_scores = match &self.clip {
                Some(clip) => Some(clip.scores(&made, &chunk.numbers)?.to_kind(Kind::Float)),
                None => None,
            };
            let finished = Finished { features, logits, clip_scores };
            if let Some(kept) = &self.kept {
                kept.write(index, &finished)?;
            }
            rows.put(index, &finished)?;
            tell(Scoring::Sampled(done as u64));
        }
        if rows.is_empty() {
            // More ranks than chunks: this rank has none, but takes part in the sums.
            let shape =
                [&[1][..], &protocol::shape_after(self.protocol, self.samples.image_shape())?].concat();
            let trial = Tensor::zeros(shape, (Kind::Float, self.extractor.device));
            let Extracted { features, logits } = self.extractor.run(&trial)?;
            let clip_scores =
                self.clip.as_ref().map(|_| Tensor::zeros([1], (Kind::Float, features.device())));
            rows.shape(&Finished { features, logits, clip_scores });
        }
        // All ranks sample at the same time; the slowest one's time counts.
        let seconds = Tensor::from_slice(&[sampling]).to_kind(Kind::Float).to_device(group.device());
        tell(Scoring::Gather);
        let sums = rows.parts.iter().flatten().map(|tensor| (tensor, ReduceOp::Sum));
        for (tensor, op) in sums.chain([(&seconds, ReduceOp::Max)]) {
            if let Err(error) = group.all_reduce(tensor, op).and_then(|work| work.wait(None)) {
                return Ok(Err(error));
            }
        }
        let made: i64 = missing.iter().map(|index| count(*index)).sum();
        let [features, logits, clip_scores] = rows.parts.map(|part| part.map(|x| x.to_device(Device::Cpu)));
        Ok(Ok(Gathered {
            features: features.context("there are no features")?,
            logits,
            clip_scores,
            evaluations_per_image: self.samples.evaluations(sampler) as f64,
            images_per_second: match made {
                0 => f64::NAN,
                made => made as f64 / seconds.double_value(&[0]).max(1e-9),
            },
        }))
    }

    /// The second half of [`score`](Self::score), which needs no other rank. A metric that cannot be measured is NaN.
    ///
    /// # Errors
    /// The features are not finite.
    pub fn compare(&self, gathered: &Gathered, mut tell: impl FnMut(Scoring)) -> anyhow::Result<Scores> {
        tell(Scoring::Compare);
        let Gathered { features, logits, clip_scores, .. } = gathered;
        ensure!(
            bool::try_from(features.isfinite().all())?,
            "the extractor's features are not finite: the samples are broken"
        );
        let clip_score = clip_scores.as_ref().map(|all| all.mean(Kind::Double).double_value(&[]));
        ensure!(
            clip_score.is_none_or(f64::is_finite),
            "evaluation.clip: the embeddings are not finite, though the features are"
        );
        let manifolds = match &self.reference.features {
            Some(real) => {
                // The distances between tens of thousands of rows are computed on a GPU if there is one.
                let [real, features] = [real, features].map(|x| x.to_device(self.extractor.device));
                let neighbours = self.spec.neighbours.into();
                Some(metrics::precision_recall(&real, &features, neighbours, &mut work::complete))
            }
            None => None,
        };
        tell(Scoring::Compare);
        let agreement = match (logits, self.samples.labels()) {
            (Some(logits), Some(labels)) => measured(metrics::agreement(logits, &labels)),
            _ => None,
        };
        let diversity = self.samples.has_pairs().then(|| metrics::diversity(features, self.samples.groups()));
        Ok(Scores {
            fid: measured(self.reference.moments.frechet_distance(&Moments::of(features))),
            agreement,
            precision: manifolds.and_then(|(precision, _)| measured(precision)),
            recall: manifolds.and_then(|(_, recall)| measured(recall)),
            diversity: diversity.and_then(measured),
            clip_score,
            evaluations_per_image: measured(gathered.evaluations_per_image),
            images_per_second: measured(gathered.images_per_second),
            samples: self.spec.samples.into(),
        })
    }

    /// The chunks that need not be made. All ranks agree on them before any of them makes one.
    fn kept(&self, group: &ProcessGroup) -> anyhow::Result<Result<Vec<bool>, Error>> {
        let chunks = chunks(self.spec.samples.into());
        let Some(kept) = &self.kept else { return Ok(Ok(vec![false; chunks as usize])) };
        let missing: Vec<f32> = (0..chunks).map(|index| f32::from(!kept.has(index))).collect();
        let missing = Tensor::from_slice(&missing).to_device(group.device());
        if let Err(error) = group.all_reduce(&missing, ReduceOp::Max).and_then(|work| work.wait(None)) {
            return Ok(Err(error));
        }
        Ok(Ok(Vec::<f32>::try_from(missing.to_device(Device::Cpu))?.into_iter().map(|x| x == 0.0).collect()))
    }

    /// Samples that are kept already.
    pub fn kept_samples(&self) -> u64 {
        let samples = i64::from(self.spec.samples);
        let Some(kept) = &self.kept else { return 0 };
        let there = (0..chunks(samples)).filter(|index| kept.has(*index));
        there.map(|index| CHUNK.min(samples - index * CHUNK) as u64).sum()
    }
}

/// CLIP gets whole images: from a patch it cannot be seen whether the image matches its prompt.
fn seen_by_clip(protocol: Protocol) -> Protocol {
    match protocol {
        Protocol::Patch(_) => Protocol::AsMade,
        other => other,
    }
}

/// The number of chunks for this many samples.
fn chunks(samples: i64) -> i64 {
    (samples + CHUNK - 1) / CHUNK
}

/// Features, logits and CLIP scores of all samples; this rank fills its own rows, the others are 0.
struct Rows {
    samples: i64,
    parts: [Option<Tensor>; 3],
}

impl Rows {
    fn new(samples: i64) -> Self {
        Self { samples, parts: [None, None, None] }
    }

    fn is_empty(&self) -> bool {
        self.parts[0].is_none()
    }

    /// Takes the widths from the first chunk.
    fn shape(&mut self, like: &Finished) {
        self.parts = like.parts().map(|part| {
            part.map(|x| {
                let size = [&[self.samples], &x.size()[1..]].concat();
                Tensor::zeros(size, (Kind::Float, x.device()))
            })
        });
    }

    /// Writes the rows of one chunk.
    ///
    /// # Errors
    /// It has other parts, or parts of other widths, than the chunks before it.
    fn put(&mut self, index: i64, finished: &Finished) -> anyhow::Result<()> {
        if self.is_empty() {
            self.shape(finished);
        }
        for (all, part) in self.parts.iter().zip(finished.parts()) {
            match (all, part) {
                (Some(all), Some(part)) if all.size()[1..] == part.size()[1..] => {
                    all.narrow(0, index * CHUNK, part.size()[0]).copy_(part);
                }
                (None, None) => {}
                _ => anyhow::bail!("chunk {index} of the samples has other features than those before it"),
            }
        }
        Ok(())
    }
}
