//! The samples of evaluations and pictures, the same for every process that makes them.
//!
//! They come in chunks, each with its own stream of noise, and classes or prompts are used in turn, so that teacher and
//! student, and different runs, are compared on the same noise and the same classes, all of them equally often to
//! within one sample.

use std::{collections::HashMap, ops::Range};

use potstill_distill::{
    generator, guidance,
    random::{Purpose, Stream},
};
use potstill_models::{Condition, Denoiser, ForwardProcess, Mode, sampler};
use potstill_spec::EvaluationSpec;
use tch::{Device, Kind, Tensor, no_grad};

use crate::model::Space;

/// Samples in a chunk.
pub const CHUNK: i64 = 100;
/// Positions of the samples that go through a network at a time, so that memory does not grow with their size: 16
/// latents of SD's 64×64, 4 of SDXL's 128×128.
const POSITIONS: i64 = 16 * 64 * 64;

/// Greatest width and height of a picture's half, in pixels, and most images in a row and rows.
const PICTURE_SIDES: [u32; 2] = [5_120, 2_560];
const MOST_IN_PICTURE: [u32; 2] = [10, 4];

/// The network that makes the samples.
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

/// Everything that decides the samples.
pub struct SampleSet {
    seed: u64,
    teacher_steps: u32,
    teacher_guidance: f64,
    samples: i64,
    /// Numbers of the prompts that are used, in the order of their use; empty for a model without prompts.
    prompts: Vec<i64>,
    space: Space,
    device: Device,
}

/// One chunk: its noise, and its conditions.
pub struct Chunk {
    index: i64,
    noise: Tensor,
    /// The condition of each sample, int64 `[N]` on the host: its class, or the number of its prompt.
    pub numbers: Tensor,
}

/// Numbers of `count` prompts, or of all if there are fewer, in the order of their use: in the order of the file if
/// they have no labels; else so that labels are used in turn, each label's prompts in the order of the file.
fn order(labels: Option<&[i64]>, known: i64, count: i64) -> Vec<i64> {
    let count = known.min(count) as usize;
    let Some(labels) = labels else { return (0..count as i64).collect() };
    // Labels in the order in which they first appear, and how often each has been seen.
    let mut seen: Vec<(i64, usize)> = Vec::new();
    let mut places: HashMap<i64, usize> = HashMap::new();
    let mut order: Vec<(usize, usize, i64)> = (0..)
        .zip(labels)
        .map(|(number, label)| {
            let place = *places.entry(*label).or_insert_with(|| {
                seen.push((*label, 0));
                seen.len() - 1
            });
            seen[place].1 += 1;
            (seen[place].1, place, number)
        })
        .collect();
    order.sort_unstable();
    order.into_iter().take(count).map(|(_, _, number)| number).collect()
}

impl SampleSet {
    pub fn new(spec: &EvaluationSpec, space: Space, device: Device) -> Self {
        let samples = i64::from(spec.samples);
        let prompts = space.evaluation_prompts().map(|prompts| {
            order(
                prompts.labels(),
                prompts.len(),
                (samples / i64::from(spec.samples_per_prompt.max(1))).max(1),
            )
        });
        Self {
            seed: spec.seed,
            teacher_steps: spec.teacher_steps,
            teacher_guidance: spec.teacher_guidance,
            samples,
            prompts: prompts.unwrap_or_default(),
            space,
            device,
        }
    }

    /// Number of different conditions; 0: there are none. Sample i has condition i modulo this number.
    pub fn groups(&self) -> i64 {
        self.space.classes.max(self.prompts.len() as i64)
    }

    /// Whether diversity can be measured: it needs several samples of one prompt or class.
    pub fn has_pairs(&self) -> bool {
        self.prompts.is_empty() || self.samples >= 2 * self.prompts.len() as i64
    }

    /// Channels, height, width of the images.
    pub fn image_shape(&self) -> [i64; 3] {
        self.space.image_shape()
    }

    /// The conditions of samples `first` to `first + count`: see [`Chunk::numbers`].
    fn numbers(&self, first: i64, count: i64) -> Vec<i64> {
        let number = |index: i64| match (self.groups(), &self.prompts[..]) {
            (0, _) => 0,
            (classes, []) => index % classes,
            (_, prompts) => prompts[index as usize % prompts.len()],
        };
        (first..first + count).map(number).collect()
    }

    /// The class of each sample according to its condition, int64 `[N]` on the host; none where prompts have no labels.
    pub fn labels(&self) -> Option<Tensor> {
        let numbers = self.numbers(0, self.samples);
        match self.space.evaluation_prompts() {
            Some(prompts) => {
                let labels = prompts.labels()?;
                let labels: Vec<i64> = numbers.iter().map(|number| labels[*number as usize]).collect();
                Some(Tensor::from_slice(&labels))
            }
            None => (self.space.classes > 0).then(|| Tensor::from_slice(&numbers)),
        }
    }

    /// Makes the first `count` samples of chunk `index`, which has [`CHUNK`] of them.
    pub fn chunk(&self, index: i64, count: i64) -> Chunk {
        let [channels, height, width] = self.space.sample;
        let noise = self.noise(0, index, &[count, channels, height, width]);
        Chunk { index, noise, numbers: Tensor::from_slice(&self.numbers(index * CHUNK, count)) }
    }

    /// The noise of one step for one chunk.
    fn noise(&self, step: u64, index: i64, shape: &[i64]) -> Tensor {
        Stream::new(self.seed, step, Purpose::Evaluation, index as u32, self.device).normal(shape)
    }

    /// Makes a chunk's images.
    pub fn sample(&self, sampler: Sampler<'_>, chunk: &Chunk) -> Tensor {
        self.sample_rows(sampler, chunk, 0..chunk.noise.size()[0])
    }

    /// Samples that go through a network at a time.
    fn at_a_time(&self) -> i64 {
        let [_, height, width] = self.space.sample;
        (POSITIONS / (height * width)).max(1)
    }

    /// How many times so many samples go through a network.
    pub fn passes(&self, samples: i64) -> i64 {
        (samples + self.at_a_time() - 1) / self.at_a_time()
    }

    /// Evaluates a network as often as `passes` passes of samples do, for other ranks that need this one's part of its weights.
    pub fn accompany(&self, sampler: Sampler<'_>, passes: i64) {
        let one = self.chunk(0, 1);
        for _ in 0..passes {
            let _ = self.sample(sampler, &one);
        }
    }

    /// Makes some of a chunk's images.
    fn sample_rows(&self, sampler: Sampler<'_>, chunk: &Chunk, rows: Range<i64>) -> Tensor {
        let Chunk { index, noise, .. } = chunk;
        let later = match sampler {
            Sampler::Teacher(_) => 1..1,
            Sampler::Student { times, .. } => 1..times.len() as u64,
        };
        let noises: Vec<Tensor> = std::iter::once(noise.shallow_clone())
            .chain(later.map(|step| self.noise(step, *index, &noise.size())))
            .collect();
        let most = self.at_a_time();
        let images: Vec<Tensor> = rows
            .clone()
            .step_by(most as usize)
            .map(|first| {
                let length = most.min(rows.end - first);
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

    /// The conditions of some of a chunk's samples.
    fn condition(&self, chunk: &Chunk, first: i64, count: i64) -> Condition {
        let numbers = chunk.numbers.narrow(0, first, count);
        match self.space.evaluation_prompts() {
            Some(prompts) => {
                prompts.condition(&Vec::try_from(numbers).expect("numbers of prompts"), self.device)
            }
            None if self.space.classes > 0 => {
                let one_hot = numbers.one_hot(self.space.classes).to_kind(Kind::Float);
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

    /// Columns and rows of a picture's images: fewer of large ones, so that it can be looked at.
    pub fn picture_layout(&self) -> [u32; 2] {
        let [_, height, width] = self.image_shape().map(|side| side.max(1) as u32);
        [
            (PICTURE_SIDES[0] / width).clamp(1, MOST_IN_PICTURE[0]),
            (PICTURE_SIDES[1] / height).clamp(1, MOST_IN_PICTURE[1]),
        ]
    }

    /// The first `count` images, at most one chunk, for a picture, of which one of `world` ranks makes its share: fp32
    /// [N, C, H, W], 0 where another rank's are. The sum over ranks is the picture's images. With `in_step` all ranks evaluate the
    /// network equally often.
    pub fn picture(
        &self,
        sampler: Sampler<'_>,
        count: i64,
        (rank, world): (usize, usize),
        in_step: bool,
    ) -> Tensor {
        let chunk = self.chunk(0, count.min(CHUNK));
        let count = chunk.noise.size()[0];
        let bound = |rank: usize| count * rank as i64 / world as i64;
        let rows = bound(rank)..bound(rank + 1);
        let [channels, height, width] = self.image_shape();
        let images = Tensor::zeros([count, channels, height, width], (Kind::Float, self.device));
        if !rows.is_empty() {
            let place = images.narrow(0, rows.start, rows.end - rows.start);
            no_grad(|| place.shallow_clone().copy_(&self.sample_rows(sampler, &chunk, rows.clone())));
        }
        if in_step {
            let passes = |rank| self.passes(bound(rank + 1) - bound(rank));
            let most = (0..world).map(passes).max().unwrap_or(0);
            self.accompany(sampler, most - passes(rank));
        }
        images
    }

    /// Network evaluations per image.
    pub fn evaluations(&self, sampler: Sampler<'_>) -> u64 {
        match sampler {
            Sampler::Teacher(teacher) => match teacher.process() {
                // A guided prediction has two halves.
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

#[cfg(test)]
mod tests {
    use std::{cell::Cell, collections::BTreeMap};

    use potstill_models::{EdmConfig, EdmNetwork};

    use super::*;
    use crate::model::Watched;

    fn counts(numbers: &[i64]) -> Vec<usize> {
        let mut counts = BTreeMap::new();
        numbers.iter().for_each(|number| *counts.entry(*number).or_insert(0) += 1);
        counts.into_values().collect()
    }

    fn small(classes: i64) -> EdmNetwork {
        let config = EdmConfig {
            img_resolution: 8,
            img_channels: 1,
            label_dim: classes,
            model_channels: 16,
            channel_mult: vec![1],
            num_blocks: 1,
            attn_resolutions: vec![],
            ..EdmConfig::default()
        };
        EdmNetwork::initialise(config, 0, Device::Cpu).unwrap()
    }

    #[test]
    fn every_class_has_as_many_samples_as_the_others_or_one_more() {
        let network = small(7);
        let space = Space::of(&network);
        let spec = EvaluationSpec { samples: 223, ..EvaluationSpec::default() };
        let set = SampleSet::new(&spec, space, Device::Cpu);
        let labels = Vec::<i64>::try_from(set.labels().unwrap()).unwrap();
        assert_eq!(counts(&labels), [32, 32, 32, 32, 32, 32, 31]);
        let chunks: Vec<i64> =
            (0..3).flat_map(|index| set.numbers(index * CHUNK, CHUNK.min(223 - index * CHUNK))).collect();
        assert_eq!(chunks, labels, "the last chunk is not full");
    }

    #[test]
    fn ranks_in_step_evaluate_the_network_equally_often() {
        let network = small(3);
        let set = SampleSet::new(&EvaluationSpec::default(), Space::of(&network), Device::Cpu);
        let evaluations = |rank, world, in_step| {
            let count = Cell::new(0);
            let counted = || count.set(count.get() + 1);
            let generator = Watched::after(&network, &counted);
            let sampler = Sampler::Student { generator: &generator, times: &[80.0, 2.0] };
            let images = set.picture(sampler, 3, (rank, world), in_step);
            assert_eq!(images.size()[0], 3);
            count.get()
        };
        // Of five ranks two have no image.
        assert_eq!([0, 1, 2, 3, 4].map(|rank| evaluations(rank, 5, false)).iter().sum::<i32>(), 3 * 2);
        assert_eq!([0, 1, 2, 3, 4].map(|rank| evaluations(rank, 5, true)), [2; 5]);
    }

    #[test]
    fn prompts_are_chosen_so_that_their_labels_are_equally_many() {
        // Sorted by label, as a file may be: its first five prompts have one label.
        let labels = [4, 4, 4, 4, 4, 9, 9, 9, -1, -1];
        let chosen = order(Some(&labels), 10, 5);
        assert_eq!(chosen, [0, 5, 8, 1, 6]);
        for count in 1..=6 {
            let found: Vec<i64> =
                order(Some(&labels), 10, count).iter().map(|i| labels[*i as usize]).collect();
            let counts = counts(&found);
            assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "{count}: {found:?}");
        }
        assert_eq!(order(Some(&labels), 10, 20).len(), 10, "there are no more");
        assert_eq!(
            order(Some(&[0, 1, 2, 0, 1, 2]), 6, 4),
            [0, 1, 2, 3],
            "labels that go round stay as they are"
        );
        assert_eq!(order(None, 10, 3), [0, 1, 2]);
    }
}
