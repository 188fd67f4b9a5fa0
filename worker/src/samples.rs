//! The samples that are scored and looked at: the same whoever makes them.
//!
//! They come in chunks, each with its own stream of noise, and classes go round, so that teacher and student, today's run
//! and tomorrow's, are compared on the same noise and the same classes.

use potstill_distill::{
    generator,
    random::{Purpose, Stream},
};
use potstill_models::{Condition, Denoiser, Mode, sampler};
use potstill_proto::spec::EvaluationSpec;
use tch::{Device, Kind, Tensor, no_grad};

/// Samples made at a time.
pub const CHUNK: i64 = 100;

/// Who makes the samples.
#[derive(Clone, Copy)]
pub enum Sampler<'a> {
    /// EDM's Heun sampler over many noise levels.
    Teacher(&'a dyn Denoiser),
    /// The K-step generator.
    Student {
        /// G_ema.
        generator: &'a dyn Denoiser,
        /// Time of each step.
        times: &'a [f64],
    },
}

impl<'a> Sampler<'a> {
    /// The network that is asked.
    pub fn network(self) -> &'a dyn Denoiser {
        match self {
            Sampler::Teacher(network) | Sampler::Student { generator: network, .. } => network,
        }
    }
}

/// What decides a run's samples.
pub struct SampleSet {
    seed: u64,
    teacher_steps: u64,
    device: Device,
}

/// Noise, condition, and class labels (int64, on the host) of one chunk.
pub struct Chunk {
    index: i64,
    noise: Tensor,
    condition: Condition,
    /// Class of each sample.
    pub labels: Tensor,
}

impl SampleSet {
    pub fn new(spec: &EvaluationSpec, device: Device) -> Self {
        Self { seed: spec.seed, teacher_steps: spec.teacher_steps.into(), device }
    }

    /// The first `count` samples of chunk `index`, which has [`CHUNK`] of them.
    pub fn chunk(&self, model: &dyn Denoiser, index: i64, count: i64) -> Chunk {
        let [channels, height, width] = model.sample_shape();
        let noise = self.noise(0, index, &[count, channels, height, width]);
        let first = index * CHUNK;
        let numbers = Tensor::arange_start(first, first + count, (Kind::Int64, Device::Cpu));
        match model.classes() {
            0 => Chunk { index, noise, condition: Condition::None, labels: numbers.zeros_like() },
            classes => {
                let labels = numbers.remainder(classes);
                let one_hot = labels.one_hot(classes).to_kind(Kind::Float).to_device(self.device);
                Chunk { index, noise, condition: Condition::Class(one_hot), labels }
            }
        }
    }

    /// The noise of one step for one chunk.
    fn noise(&self, step: u64, index: i64, shape: &[i64]) -> Tensor {
        Stream::new(self.seed, step, Purpose::Evaluation, index as u32, self.device).normal(shape)
    }

    /// Makes a chunk's images.
    pub fn sample(&self, sampler: Sampler<'_>, chunk: &Chunk) -> Tensor {
        let Chunk { index, noise, condition, .. } = chunk;
        no_grad(|| match sampler {
            Sampler::Teacher(teacher) => sampler::heun(teacher, noise, condition, &self.heun()),
            Sampler::Student { generator, times } => {
                let later = (1..times.len()).map(|step| self.noise(step as u64, *index, &noise.size()));
                let noises: Vec<Tensor> = std::iter::once(noise.shallow_clone()).chain(later).collect();
                generator::generate(generator, &noises, condition, times, 0, Mode::Eval)
            }
        })
    }

    /// The first `count` images, at most a chunk of them, on the host: for pictures.
    pub fn first_images(&self, sampler: Sampler<'_>, count: i64) -> Tensor {
        let chunk = self.chunk(sampler.network(), 0, count.min(CHUNK));
        self.sample(sampler, &chunk).to_device(Device::Cpu)
    }

    /// Network evaluations that one image costs.
    pub fn evaluations(&self, sampler: Sampler<'_>) -> u64 {
        match sampler {
            Sampler::Teacher(_) => self.heun().evaluations(),
            Sampler::Student { times, .. } => times.len() as u64,
        }
    }

    fn heun(&self) -> sampler::Heun {
        sampler::Heun { steps: self.teacher_steps, ..Default::default() }
    }
}
