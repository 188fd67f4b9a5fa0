//! One rank's share of one phase: its micro-batches, the gradient reduced over all ranks, and the optimizer's step.
//!
//! This module does not depend on a coordinator: random numbers come in as [`Draws`], so that a recorded loop can be
//! replayed.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use potstill_c10d::{ProcessGroup, ReduceOp};
use potstill_distill::{
    adam::AdamSettings,
    counters::Network,
    draws::Draws,
    gradient::{Clip, Gradient},
    phase::{self, MicroBatchLoss},
    settings::Settings,
    state::{Slice, State},
};
use potstill_models::Denoiser;
use potstill_proto::wire::StepSeconds;
use potstill_spec::{DecaySpec, OptimizerSpec, Precision, RunSpec};
use potstill_torch_ext::{Autocast, LowerPrecision};
use tch::Tensor;

use super::{interruption::Interruption, reduction::Reduction};
use crate::{model::Watched, process::faults, session::Progress, training::transfer};

/// Everything that decides an optimizer step besides the gradient.
#[derive(Clone, Debug, PartialEq)]
pub struct Optimizer {
    // Pairs of the generator's value and the fake score's.
    learning_rates: [f64; 2],
    betas: [[f64; 2]; 2],
    epsilon: f64,
    clip_values: [Option<f64>; 2],
    clip_norm: Option<f64>,
    decay: Option<DecaySpec>,
    ema_half_life_images: f64,
}

impl Optimizer {
    /// The settings of a specification.
    pub fn new(spec: &OptimizerSpec) -> Self {
        Self {
            learning_rates: [spec.generator_learning_rate, spec.fake_score_learning_rate],
            betas: [spec.generator_betas.unwrap_or(spec.betas), spec.betas],
            epsilon: spec.epsilon,
            clip_values: [spec.generator_clip_value, spec.fake_score_clip_value],
            clip_norm: spec.clip_norm,
            decay: spec.decay.clone(),
            ema_half_life_images: spec.ema_half_life_images,
        }
    }

    /// Whether Adam has a first moment, of generator and fake score.
    pub fn first_moments(&self) -> [bool; 2] {
        self.betas.map(|[first, _]| first != 0.0)
    }

    /// Adam's settings for a network after `images`.
    fn adam(&self, network: Network, images: u64) -> AdamSettings {
        let factor = self.decay.as_ref().map_or(1.0, |decay| decay.factor(images));
        AdamSettings {
            learning_rate: self.learning_rates[network as usize] * factor,
            betas: self.betas[network as usize],
            epsilon: self.epsilon,
        }
    }

    fn clip(&self, network: Network) -> Clip {
        Clip { value: self.clip_values[network as usize], norm: self.clip_norm }
    }
}

/// Everything that decides the training of a run, the same on all ranks.
pub struct Recipe {
    /// Everything that decides a micro-batch.
    pub settings: Settings,
    /// Everything that decides a step.
    pub optimizer: Optimizer,
    /// The mixed precision of fp32 weights, where networks compute in another data type than that of their weights.
    pub mixed_precision: Option<LowerPrecision>,
}

impl Recipe {
    /// From a specification, for a teacher.
    pub fn new(spec: &RunSpec, settings: Settings) -> Self {
        let mixed_precision = match spec.distillation.precision {
            _ if spec.memory.bf16_weights => None,
            Precision::Fp32 => None,
            Precision::Bf16 => Some(LowerPrecision::BFloat16),
            Precision::Fp16 => Some(LowerPrecision::Half),
        };
        Self { settings, optimizer: Optimizer::new(&spec.optimizer), mixed_precision }
    }
}

/// Sums of one rank's share of one phase.
#[derive(Default)]
pub struct Totals {
    /// The complete loss that is back-propagated, without the loss scale.
    pub loss: f64,
    /// See [`MicroBatchLoss::score_loss`].
    pub score_loss: f64,
    /// See [`MicroBatchLoss::adversarial_loss`].
    pub adversarial_loss: Option<f64>,
    /// See [`MicroBatchLoss::score_difference`].
    pub score_difference: f64,
    /// See [`MicroBatchLoss::dropped`].
    pub dropped: u32,
}

/// The result of a phase's micro-batches, before the step.
pub struct Reduced {
    /// This rank's sums.
    pub totals: Totals,
    /// The gradient of the mean loss over the global batch, with non-finite elements set to 0, not yet clipped; or this
    /// rank's slice of it.
    pub gradient: Gradient,
    /// The factor of the loss; the gradient is without it.
    pub loss_scale: f64,
}

/// One rank's training in one generation.
pub struct Trainer<'a> {
    /// The settings.
    pub recipe: &'a Recipe,
    /// f_φ, frozen.
    pub teacher: &'a dyn Denoiser,
    /// The source of micro-batches.
    pub draws: &'a dyn Draws,
    /// The ranks.
    pub group: ProcessGroup,
    /// This rank's micro-batches.
    pub micro_batches: Range<u32>,
    /// Receives each wait and each micro-batch.
    pub progress: &'a Progress,
    slice: Slice,
    rank: u32,
    fake_score: Reduction,
    generator: Reduction,
    /// A view of the fake score for the generator phase.
    frozen_fake_score: Box<dyn Denoiser>,
}

impl<'a> Trainer<'a> {
    /// A trainer for the networks of a state.
    ///
    /// # Errors
    /// The collectives' errors.
    pub fn new(
        recipe: &'a Recipe,
        teacher: &'a dyn Denoiser,
        draws: &'a dyn Draws,
        group: ProcessGroup,
        micro_batches: Range<u32>,
        progress: &'a Progress,
        state: &State,
    ) -> Result<Self, potstill_c10d::Error> {
        let networks = [state.fake_score.network(), state.generator.network()];
        let slice = state.layout().slice;
        let [fake_score, generator] = Reduction::of(networks, slice, &group)?;
        let rank = group.member().rank as u32;
        let frozen_fake_score = state.fake_score.network().frozen();
        Ok(Self {
            recipe,
            teacher,
            draws,
            group,
            micro_batches,
            progress,
            slice,
            rank,
            fake_score,
            generator,
            frozen_fake_score,
        })
    }

    fn reduction(&self, network: Network) -> &Reduction {
        match network {
            Network::FakeScore => &self.fake_score,
            Network::Generator => &self.generator,
        }
    }

    /// Computes this rank's micro-batches of the phase that trains `network`, and reduces the gradient. Adds to the
    /// times. `obey_orders` is called before each micro-batch and can interrupt the phase.
    ///
    /// # Errors
    /// A collective failed, or `obey_orders` interrupted the phase.
    pub fn gradient(
        &self,
        state: &State,
        network: Network,
        iteration: u64,
        seconds: &mut StepSeconds,
        mut obey_orders: impl FnMut() -> Result<(), Interruption>,
    ) -> Result<Reduced, Interruption> {
        let started = Instant::now();
        let loss_scale = state.counters.scale(network);
        let trained = match network {
            Network::FakeScore => state.fake_score.network(),
            Network::Generator => state.generator.network(),
        };
        let reduction = self.reduction(network);
        let batch = self.recipe.settings.schedule.global_batch as f64;
        let scale = reduction.scale(self.group.member().world, batch) * loss_scale;
        let last = self.micro_batches.end - 1;
        let mut exposed = Duration::ZERO;
        let mut reported = Vec::with_capacity(self.micro_batches.len());
        for index in self.micro_batches.clone() {
            obey_orders()?;
            let micro_batch = self.micro_batch(state, network, iteration, index)?;
            faults::point("forward", iteration, self.rank);
            let scaled = &micro_batch.loss * scale;
            if index == last {
                faults::point("reducing", iteration, self.rank);
                // The backward pass of the last micro-batch ends when the gradients of all ranks are reduced.
                exposed = self.progress.while_waiting(|| reduction.backward(trained, &scaled, true))?;
            } else {
                reduction.backward(trained, &scaled, false)?;
                faults::point("backward", iteration, self.rank);
            }
            reported.push(MicroBatchLoss { loss: micro_batch.loss.detach(), ..micro_batch });
            self.progress.tick();
        }
        let mut totals = Totals::default();
        for batch in reported {
            totals.loss += batch.loss.double_value(&[]);
            totals.score_loss += batch.score_loss.double_value(&[]);
            if let Some(loss) = batch.adversarial_loss {
                *totals.adversarial_loss.get_or_insert(0.0) += loss.double_value(&[]);
            }
            totals.score_difference += batch.score_difference.map_or(0.0, |s| s.double_value(&[]));
            totals.dropped += batch.dropped.int64_value(&[]) as u32;
        }
        let (mut flat, waited) = self.progress.while_waiting(|| reduction.finish(trained, &self.group))?;
        exposed += waited;
        seconds.communication += exposed.as_secs_f64();
        seconds.compute += started.elapsed().saturating_sub(exposed).as_secs_f64();
        let step = Instant::now();
        faults::point("reduced", iteration, self.rank);
        if faults::tears("reduced", iteration, self.rank) {
            let _ = flat.g_mul_scalar_(3.0);
            self.group.abort()?;
        }
        if loss_scale != 1.0 {
            let _ = flat.g_mul_scalar_(loss_scale.recip());
        }
        let gradient = Gradient::repaired_slice(flat, |numbers| self.sum_over_slices(numbers))?;
        seconds.optimizer += step.elapsed().as_secs_f64();
        Ok(Reduced { totals, gradient, loss_scale })
    }

    /// Steps `network` with its gradient, unless fp16 overflowed. Adds to the times. Returns whether values were not
    /// finite in a way that a smaller loss scale does not repair.
    ///
    /// # Errors
    /// A collective failed.
    pub fn step(
        &self,
        state: &mut State,
        network: Network,
        iteration: u64,
        gradient: Gradient,
        seconds: &mut StepSeconds,
    ) -> Result<bool, Interruption> {
        let step = Instant::now();
        let overflowed = gradient.non_finite > 0;
        let sick = overflowed && !state.counters.can_shrink(network);
        if state.counters.accept(network, !overflowed) {
            let Recipe { optimizer, settings, .. } = self.recipe;
            let clip = optimizer.clip(network);
            let gradient = gradient.clipped_slice(clip, |numbers| self.sum_over_slices(numbers))?;
            let images = settings.schedule.images_seen(iteration);
            // A reduction that was cut short changes nothing.
            self.group.settle()?;
            state.step(network, &gradient, &optimizer.adam(network, images));
        }
        self.reduction(network).clear()?;
        seconds.optimizer += step.elapsed().as_secs_f64();
        if state.torn && self.group.member().world == 1 {
            // One rank is measured alone, as if it were one of several: the other slices do not exist.
            state.torn = false;
        }
        if state.torn {
            let gathering = Instant::now();
            let trained = match network {
                Network::FakeScore => &state.fake_score,
                Network::Generator => &state.generator,
            };
            self.progress.while_waiting(|| {
                transfer::gather_weights(&self.group, trained)?;
                self.group.settle()
            })?;
            state.torn = false;
            seconds.communication += gathering.elapsed().as_secs_f64();
        }
        faults::point("stepped", iteration, self.rank);
        Ok(sick)
    }

    /// Clears a gradient with which no step is made.
    ///
    /// # Errors
    /// libtorch's error.
    #[cfg(test)]
    pub fn forget(&self, network: Network) -> Result<(), potstill_c10d::Error> {
        self.reduction(network).clear()
    }

    /// The work at the end of every iteration.
    pub fn update_average(&self, state: &mut State, iteration: u64) {
        let Recipe { optimizer, settings, .. } = self.recipe;
        let schedule = &settings.schedule;
        let images = schedule.images_seen(iteration) as f64;
        state.update_average(optimizer.ema_half_life_images, images, schedule.global_batch as f64);
    }

    /// Values of each rank's slice of a gradient, summed over all slices; unchanged where each rank has the complete
    /// gradient.
    fn sum_over_slices(&self, numbers: [f64; 2]) -> Result<[f64; 2], potstill_c10d::Error> {
        if self.slice.world == 1 || self.group.member().world == 1 {
            return Ok(numbers);
        }
        let sum = Tensor::from_slice(&numbers).to_device(self.group.device());
        self.progress.while_waiting(|| self.group.all_reduce(&sum, ReduceOp::Sum)?.wait(None))?;
        Ok([sum.double_value(&[0]), sum.double_value(&[1])])
    }

    fn micro_batch(
        &self,
        state: &State,
        network: Network,
        iteration: u64,
        index: u32,
    ) -> Result<MicroBatchLoss, Interruption> {
        let Recipe { settings, mixed_precision, .. } = self.recipe;
        let draw = match network {
            Network::FakeScore => self.draws.fake_score(iteration, index),
            Network::Generator => self.draws.generator(iteration, index),
        };
        let (generator, fake_score) = (state.generator.network(), state.fake_score.network());
        let (generator, fake_score, teacher) =
            (Watched(generator), Watched(fake_score), Watched(self.teacher));
        let _autocast = match mixed_precision {
            Some(precision) => Some(Autocast::enter(settings.device, *precision)?),
            None => None,
        };
        Ok(match network {
            Network::FakeScore => phase::fake_score(&generator, &fake_score, &draw, settings),
            Network::Generator => {
                let fake_score = Watched(self.frozen_fake_score.as_ref());
                phase::generator(&generator, &fake_score, &teacher, &draw, settings, iteration)
            }
        })
    }
}
