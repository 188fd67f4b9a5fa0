//! The samples that are scored and looked at: the same whoever makes them.
//!
//! They come in chunks, each with its own stream of noise, and classes go round, so that teacher and student, today's run
//! and tomorrow's, are compared on the same noise and the same classes.

use potstill_distill::{
    generator, guidance,
    random::{Purpose, Stream},
};
use potstill_models::{Condition, Denoiser, ForwardProcess, Mode, sampler};
use potstill_proto::spec::EvaluationSpec;
use tch::{Device, Kind, Tensor, no_grad};

use crate::model::{Prompts, Space};

/// Samples in a chunk.
pub const CHUNK: i64 = 100;
/// Positions of samples that go through a network at a time, so that memory does not grow with their size: 16 latents of SD's
/// 64×64, 4 of SDXL's 128×128.
const POSITIONS: i64 = 16 * 64 * 64;

/// Who makes the samples.
#[derive(Clone, Copy)]
pub enum Sampler<'a> {
    /// The sampler of the teacher's family over many noise levels: EDM's Heun sampler, or guided DDIM.
    Teacher(&'a dyn Denoiser),
    /// The K-step generator.
    Student {
        /// G_ema.
        generator: &'a dyn Denoiser,
        /// Time of each step.
        times: &'a [f64],
    },
}

/// What decides a run's samples.
pub struct SampleSet {
    seed: u64,
    teacher_steps: u32,
    teacher_guidance: f64,
    /// So many different prompts are used, where there are some.
    prompts: i64,
    space: Space,
    device: Device,
}

/// One chunk: its noise, and what it is made for.
pub struct Chunk {
    index: i64,
    noise: Tensor,
    /// What each sample is made for, int64 `[N]` on the host: its class, or the number of its prompt.
    pub groups: Tensor,
    /// What a classifier should see in each, int64 `[N]` on the host; not where nobody knows.
    pub labels: Option<Tensor>,
}

/// Samples of each prompt, where there are enough prompts for that: diversity is measured among them.
const SAMPLES_OF_A_PROMPT: i64 = 10;

impl SampleSet {
    pub fn new(spec: &EvaluationSpec, space: Space, device: Device) -> Self {
        let known = space.prompts().map_or(0, Prompts::len);
        Self {
            seed: spec.seed,
            teacher_steps: spec.teacher_steps,
            teacher_guidance: spec.teacher_guidance,
            prompts: known.min((i64::from(spec.samples) / SAMPLES_OF_A_PROMPT).max(1)),
            space,
            device,
        }
    }

    /// How many different things samples are made for; 0: nothing.
    pub fn groups(&self) -> i64 {
        self.space.classes.max(self.prompts)
    }

    /// The first `count` samples of chunk `index`, which has [`CHUNK`] of them.
    pub fn chunk(&self, index: i64, count: i64) -> Chunk {
        let [channels, height, width] = self.space.sample;
        let noise = self.noise(0, index, &[count, channels, height, width]);
        let first = index * CHUNK;
        let numbers = Tensor::arange_start(first, first + count, (Kind::Int64, Device::Cpu));
        let groups = match self.groups() {
            0 => numbers.zeros_like(),
            groups => numbers.remainder(groups),
        };
        let labels = match self.space.prompts() {
            Some(prompts) => {
                let labels = (first..first + count).map(|number| prompts.label(number % self.prompts));
                labels.collect::<Option<Vec<i64>>>().map(|labels| Tensor::from_slice(&labels))
            }
            None => (self.space.classes > 0).then(|| groups.shallow_clone()),
        };
        Chunk { index, noise, groups, labels }
    }

    /// The noise of one step for one chunk.
    fn noise(&self, step: u64, index: i64, shape: &[i64]) -> Tensor {
        Stream::new(self.seed, step, Purpose::Evaluation, index as u32, self.device).normal(shape)
    }

    /// Makes a chunk's images.
    pub fn sample(&self, sampler: Sampler<'_>, chunk: &Chunk) -> Tensor {
        let Chunk { index, noise, .. } = chunk;
        let later = match sampler {
            Sampler::Teacher(_) => 1..1,
            Sampler::Student { times, .. } => 1..times.len() as u64,
        };
        let noises: Vec<Tensor> = std::iter::once(noise.shallow_clone())
            .chain(later.map(|step| self.noise(step, *index, &noise.size())))
            .collect();
        let (count, [_, height, width]) = (noise.size()[0], self.space.sample);
        let most = (POSITIONS / (height * width)).max(1);
        let images: Vec<Tensor> = (0..count)
            .step_by(most as usize)
            .map(|first| {
                let length = most.min(count - first);
                let noises: Vec<Tensor> = noises.iter().map(|noise| noise.narrow(0, first, length)).collect();
                let condition = self.condition(chunk, first, length);
                let samples = no_grad(|| match sampler {
                    Sampler::Teacher(teacher) => self.teachers(teacher, &noises[0], &condition),
                    Sampler::Student { generator, times } => {
                        generator::generate(generator, &noises, &condition, times, 0, Mode::Eval)
                    }
                });
                self.space.images(&samples)
            })
            .collect();
        Tensor::cat(&images, 0)
    }

    /// What some of a chunk's samples are made for.
    fn condition(&self, chunk: &Chunk, first: i64, count: i64) -> Condition {
        let groups = chunk.groups.narrow(0, first, count);
        match self.space.prompts() {
            Some(prompts) => {
                prompts.condition(&Vec::try_from(groups).expect("numbers of prompts"), self.device)
            }
            None if self.space.classes > 0 => {
                let one_hot = groups.one_hot(self.space.classes).to_kind(Kind::Float);
                Condition::Class(one_hot.to_device(self.device))
            }
            None => Condition::None,
        }
    }

    fn teachers(&self, teacher: &dyn Denoiser, noise: &Tensor, condition: &Condition) -> Tensor {
        let ForwardProcess::Ddpm { alphas_cumprod, .. } = teacher.process() else {
            return sampler::heun(teacher, noise, condition, &self.heun());
        };
        let times = sampler::leading_timesteps(alphas_cumprod.len(), self.teacher_steps as usize);
        sampler::ddim(teacher.process(), noise, &times, |x, time| {
            let time = time.expand([x.size()[0]], false);
            guidance::denoise(teacher, x, &time, condition, self.teacher_guidance, Mode::Eval)
        })
    }

    /// The first `count` images, at most a chunk of them, on the host: for pictures.
    pub fn first_images(&self, sampler: Sampler<'_>, count: i64) -> Tensor {
        let chunk = self.chunk(0, count.min(CHUNK));
        self.sample(sampler, &chunk).to_device(Device::Cpu)
    }

    /// Network evaluations that one image costs.
    pub fn evaluations(&self, sampler: Sampler<'_>) -> u64 {
        match sampler {
            Sampler::Teacher(teacher) => match teacher.process() {
                // Both halves of a guided prediction.
                ForwardProcess::Ddpm { .. } if ![0.0, 1.0].contains(&self.teacher_guidance) => {
                    2 * u64::from(self.teacher_steps)
                }
                ForwardProcess::Ddpm { .. } => u64::from(self.teacher_steps),
                _ => self.heun().evaluations(),
            },
            Sampler::Student { times, .. } => times.len() as u64,
        }
    }

    fn heun(&self) -> sampler::Heun {
        sampler::Heun { steps: self.teacher_steps.into(), ..Default::default() }
    }
}
