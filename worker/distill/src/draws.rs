//! The random numbers and the data of a micro-batch, as values: a run draws them from its named streams, a replay of a
//! recorded loop supplies them. The [phases](crate::phase) have no other randomness.

use potstill_models::{Condition, Denoiser};
use potstill_torch_ext::upload;
use tch::Tensor;

use crate::{
    adversarial::RealData,
    augmentation::Transforms,
    condition::Conditions,
    generator::Unroll,
    noise_distribution::NoiseDistribution,
    random::{Purpose, Stream},
    settings::Settings,
};

/// One micro-batch of N samples in one phase.
pub struct Draw {
    /// How many of the generator's steps are run, and which are trained.
    pub unroll: Unroll,
    /// Conditions of the generated samples; in the fake-score phase some may have been dropped.
    pub condition: Condition,
    /// N(0, 1), [N, C, H, W], one for each of the generator's steps that is run.
    pub latents: Vec<Tensor>,
    /// Diffusion times, `[N]`.
    pub time: Tensor,
    /// N(0, 1), [N, C, H, W]: the noise that diffuses generated samples, and real ones beside them.
    pub noise: Tensor,
    /// The augmentation of the generated samples before the fake score gets them.
    pub augmentation: Option<Transforms>,
    /// Real samples for the discriminator: in the fake-score phase of an adversarial run.
    pub real: Option<RealDraw>,
    /// Seed of libtorch's own generator, from which dropout draws.
    pub dropout_seed: i64,
}

impl Draw {
    /// Applies a function to each tensor, in one order. `None` where there are augmentations, which are not tensors.
    #[must_use]
    pub fn map(&self, f: &mut dyn FnMut(&Tensor) -> Tensor) -> Option<Self> {
        if self.augmentation.is_some() {
            return None;
        }
        Some(Self {
            unroll: self.unroll,
            condition: self.condition.map(f),
            latents: self.latents.iter().map(&mut *f).collect(),
            time: f(&self.time),
            noise: f(&self.noise),
            augmentation: None,
            real: self.real.as_ref().map(|real| RealDraw {
                samples: f(&real.samples),
                condition: real.condition.map(f),
                augmentation: None,
                perturbation: real.perturbation.as_ref().map(&mut *f),
            }),
            dropout_seed: self.dropout_seed,
        })
    }
}

/// Real samples of a micro-batch.
pub struct RealDraw {
    /// fp32 [N, C, H, W], in the networks' space.
    pub samples: Tensor,
    /// Their own conditions.
    pub condition: Condition,
    /// Their augmentation.
    pub augmentation: Option<Transforms>,
    /// N(0, 1), [N, C, H, W]: the perturbation of the approximate R1 penalty.
    pub perturbation: Option<Tensor>,
}

/// A source of micro-batches.
pub trait Draws {
    /// A micro-batch of the fake-score phase of an iteration.
    fn fake_score(&self, iteration: u64, micro_batch: u32) -> Draw;

    /// A micro-batch of the generator phase of an iteration.
    fn generator(&self, iteration: u64, micro_batch: u32) -> Draw;
}

/// Draws from the [streams](Stream) that iteration, phase and micro-batch name.
pub struct NamedStreams<'a> {
    /// Everything that decides a micro-batch besides the networks.
    pub settings: &'a Settings,
    /// Conditions of generated samples.
    pub conditions: &'a dyn Conditions,
    /// Real samples, in an adversarial run.
    pub real: Option<&'a dyn RealData>,
    /// Whether generated samples have the conditions of real ones, as in SiDA: of the same real samples in the
    /// fake-score phase, of others in the generator phase. Otherwise they have `conditions`.
    pub conditions_of_real: bool,
    /// Channels, height, width of a sample.
    pub sample_shape: [i64; 3],
}

impl<'a> NamedStreams<'a> {
    /// A source without real samples.
    #[must_use]
    pub fn data_free(settings: &'a Settings, conditions: &'a dyn Conditions, network: &dyn Denoiser) -> Self {
        let sample_shape = network.sample_shape();
        Self { settings, conditions, real: None, conditions_of_real: false, sample_shape }
    }

    fn shape(&self) -> [i64; 4] {
        let [channels, height, width] = self.sample_shape;
        [self.settings.micro_batch, channels, height, width]
    }

    fn draw(
        &self,
        stream: &mut Stream,
        iteration: u64,
        condition: Condition,
        law: NoiseDistribution,
    ) -> Draw {
        let Settings { micro_batch, device, .. } = *self.settings;
        let unroll = self.settings.unroll(iteration);
        Draw {
            condition,
            latents: (0..unroll.steps).map(|_| stream.normal(&self.shape())).collect(),
            time: law.draw(stream, micro_batch, device),
            noise: stream.normal(&self.shape()),
            augmentation: None,
            real: None,
            dropout_seed: stream.dropout_seed(),
            unroll,
        }
    }

    fn real_samples(&self, real: &dyn RealData, stream: &mut Stream) -> RealDraw {
        let Settings { micro_batch, device, .. } = *self.settings;
        let (samples, condition) = real.draw(stream, micro_batch, device);
        RealDraw { samples, condition, augmentation: None, perturbation: None }
    }

    /// The samples that keep their condition, fp32 [N, 1] of 0 and 1, where guidance drops some.
    fn kept_conditions(&self, stream: &mut Stream) -> Option<Tensor> {
        let share = self.settings.guidance.dropped_share();
        (share > 0.0).then(|| {
            let kept: Vec<f32> = stream
                .uniform(self.settings.micro_batch)
                .iter()
                .map(|u| f32::from(u8::from(*u >= share)))
                .collect();
            upload(&Tensor::from_slice(&kept), self.settings.device).unsqueeze(1)
        })
    }
}

impl Draws for NamedStreams<'_> {
    fn fake_score(&self, iteration: u64, micro_batch: u32) -> Draw {
        let Settings { seed, micro_batch: n, device, .. } = *self.settings;
        let mut stream = Stream::new(seed, iteration, Purpose::FakeScorePhase, micro_batch, device);
        let stream = &mut stream;
        let (condition, first) = match self.real.filter(|_| self.conditions_of_real) {
            Some(real) => {
                let real = self.real_samples(real, stream);
                (real.condition.shallow_clone(), Some(real))
            }
            None => (self.conditions.draw(stream, n, device), None),
        };
        // Conditions are dropped before samples are generated, so that the fake score learns without a condition from
        // samples that were generated without one (SiD-LSG, 2406.01561). The real samples beside them lose theirs too:
        // otherwise the discriminator could tell them apart by it.
        let kept = self.kept_conditions(stream);
        let keep = |condition: &Condition| match &kept {
            Some(kept) => condition.kept(kept),
            None => condition.shallow_clone(),
        };
        let mut draw = self.draw(stream, iteration, keep(&condition), self.settings.fake_score_times);
        let adversarial = self.settings.adversarial.as_ref();
        draw.real = adversarial.zip(self.real).map(|(adversarial, real)| {
            let mut real = first.unwrap_or_else(|| self.real_samples(real, stream));
            real.condition = keep(&real.condition);
            real.perturbation = (adversarial.approximate_r1 > 0.0).then(|| stream.normal(&self.shape()));
            real
        });
        if let Some(augmentation) = &self.settings.augmentation {
            draw.augmentation = Some(augmentation.draw(stream, n));
            if let Some(real) = &mut draw.real {
                real.augmentation = Some(augmentation.draw(stream, n));
            }
        }
        draw
    }

    fn generator(&self, iteration: u64, micro_batch: u32) -> Draw {
        let Settings { seed, micro_batch: n, device, .. } = *self.settings;
        let mut stream = Stream::new(seed, iteration, Purpose::GeneratorPhase, micro_batch, device);
        let condition = match self.real.filter(|_| self.conditions_of_real) {
            Some(real) => real.conditions(&mut stream, n, device),
            None => self.conditions.draw(&mut stream, n, device),
        };
        self.draw(&mut stream, iteration, condition, self.settings.generator_times)
    }
}
