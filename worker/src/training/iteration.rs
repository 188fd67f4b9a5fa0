//! One iteration: fake-score phase, then generator phase.

use std::time::{Duration, Instant};

use potstill_c10d::{Autocast, ReduceOp};
use potstill_distill::{
    gradient::Gradient,
    loss_scale::Network,
    phase::{self, MicroBatchLoss},
    state::State,
};
use potstill_proto::{
    cursor::{Cursor, Phase},
    message::FromWorker,
    wire::{StepReport, StepSeconds},
};
use tch::Tensor;

use super::{Interruption, Member, reduction::Reduction};
use crate::{
    control_lane::{Flags, Lane},
    faults, transfer,
};

/// Sums of one rank's share of one phase.
#[derive(Default)]
struct Totals {
    score_loss: f64,
    adversarial_loss: Option<f64>,
    score_difference: f64,
    dropped: u32,
}

/// What a phase came to.
struct Trained {
    totals: Totals,
    /// L2 norm of the reduced gradient.
    norm: f64,
    /// Its elements that were not finite.
    non_finite: u64,
    /// What its loss was multiplied with.
    loss_scale: f64,
    /// Whether something was wrong that a smaller loss scale will not mend.
    sick: bool,
}

impl Trained {
    /// A phase that was not run here and now.
    fn nothing() -> Self {
        let totals = Totals { score_loss: f64::NAN, ..Totals::default() };
        Self { totals, norm: f64::NAN, non_finite: 0, loss_scale: 1.0, sick: false }
    }
}

impl Member<'_> {
    /// One iteration, or the rest of it: fake-score phase, then generator phase.
    pub(super) fn iterate(&mut self, state: &mut State, cursor: &mut Cursor) -> Result<Flags, Interruption> {
        let started = Instant::now();
        let iteration = cursor.iteration;
        let generation = self.assignment.generation;
        self.heed()?;
        let orders = self.session.orders()?;
        let flags = Flags {
            checkpoint: orders.take_checkpoint(generation),
            stop: orders.stop_wanted(generation),
            part: orders.parting_wanted(generation),
        };
        let lane = Lane::issue(&self.group, flags)?;
        let mut seconds = StepSeconds::default();

        let fake_score = match cursor.phase {
            Phase::FakeScore => {
                let trained = self.train(state, Phase::FakeScore, iteration, &mut seconds)?;
                cursor.phase = Phase::Generator;
                self.session.progress.set_cursor(*cursor);
                trained
            }
            // Done in another generation, whose sums are not at hand.
            Phase::Generator => Trained::nothing(),
        };
        let generator = match self.job.trains_generator(iteration) {
            true => self.train(state, Phase::Generator, iteration, &mut seconds)?,
            false => Trained::nothing(),
        };
        *cursor = Cursor::boundary(iteration + 1);
        self.session.progress.set_cursor(*cursor);

        let share = self.assignment.micro_batches;
        let samples = share.count * self.job.spec.distillation.micro_batch;
        seconds.total = started.elapsed().as_secs_f64();
        self.session.send(FromWorker::StepReport(StepReport {
            generation: generation.0,
            iteration,
            first_micro_batch: share.first,
            micro_batches: share.count,
            samples,
            fake_score_loss_sum: fake_score.totals.score_loss,
            generator_loss_sum: generator.totals.score_loss,
            score_difference_sum: generator.totals.score_difference,
            fake_score_grad_norm: fake_score.norm,
            generator_grad_norm: generator.norm,
            non_finite_samples: fake_score.totals.dropped + generator.totals.dropped,
            non_finite_gradients: fake_score.non_finite + generator.non_finite,
            seconds: Some(seconds),
            discriminator_loss_sum: fake_score.totals.adversarial_loss,
            generator_adversarial_loss_sum: generator.totals.adversarial_loss,
            fake_score_loss_scale: fake_score.loss_scale,
            generator_loss_scale: generator.loss_scale,
        }));
        self.watch_health(iteration, samples, &[fake_score, generator])?;
        faults::point("reported", iteration, self.assignment.rank);
        // Read only now: the iteration is done and reported, whatever becomes of the group.
        Ok(self.session.progress.while_waiting(|| lane.read())?)
    }

    /// Ends the run when too many iterations in a row had gradients that were not finite, or nothing but samples that were
    /// not.
    fn watch_health(&mut self, iteration: u64, samples: u32, phases: &[Trained]) -> anyhow::Result<()> {
        let sick = phases.iter().any(|phase| phase.sick || phase.totals.dropped >= samples);
        self.non_finite_streak = if sick { self.non_finite_streak + 1 } else { 0 };
        let limit = self.job.spec.distillation.non_finite_limit;
        let elements: u64 = phases.iter().map(|phase| phase.non_finite).sum();
        let dropped: u32 = phases.iter().map(|phase| phase.totals.dropped).sum();
        anyhow::ensure!(
            self.non_finite_streak < limit,
            "{limit} iterations in a row, up to iteration {iteration}, had gradients or samples that were not finite \
             ({elements} elements of the gradients and {dropped} samples of this rank in the last): the run has diverged. \
             Nothing was saved since; lower the learning rates and resume from the newest checkpoint, or start again"
        );
        Ok(())
    }

    /// One phase: its gradient over the global batch, and the step of the network that it trains.
    fn train(
        &mut self,
        state: &mut State,
        phase: Phase,
        iteration: u64,
        seconds: &mut StepSeconds,
    ) -> Result<Trained, Interruption> {
        let network = match phase {
            Phase::FakeScore => Network::FakeScore,
            Phase::Generator => Network::Generator,
        };
        let loss_scale = state.loss_scales.scale(network);
        let mut totals = Totals::default();
        let mut flat = self.accumulate(state, phase, iteration, loss_scale, &mut totals, seconds)?;
        let step = Instant::now();
        faults::point("reduced", iteration, self.assignment.rank);
        if loss_scale != 1.0 {
            let _ = flat.g_mul_scalar_(loss_scale.recip());
        }
        let gradient = Gradient::repaired_slice(flat, |numbers| self.sum_over_slices(numbers))?;
        let overflowed = gradient.non_finite > 0;
        let sick = overflowed && !state.loss_scales.can_shrink(network);
        let trained =
            Trained { totals, norm: gradient.norm, non_finite: gradient.non_finite, loss_scale, sick };
        self.wait_for_copy();
        let accepted = state.loss_scales.accept(network, !overflowed);
        let (o, batch) = (&self.job.spec.optimiser, self.job.spec.distillation.global_batch);
        let gradient = gradient.clipped_slice(self.job.clip(), |numbers| self.sum_over_slices(numbers))?;
        if accepted {
            match phase {
                Phase::FakeScore => {
                    let adam = self.job.adam(o.fake_score_learning_rate, iteration);
                    state.step_fake_score(&gradient, iteration, &adam);
                }
                Phase::Generator => {
                    let adam = self.job.adam(o.generator_learning_rate, iteration);
                    state.step_generator(&gradient, iteration, &adam, o.ema_half_life_images, batch);
                }
            }
        }
        self.reduction(phase).clear()?;
        seconds.optimiser += step.elapsed().as_secs_f64();
        if state.torn {
            let gathering = Instant::now();
            let trained = match phase {
                Phase::FakeScore => &state.fake_score,
                Phase::Generator => &state.generator,
            };
            self.session.progress.while_waiting(|| transfer::gather_weights(&self.group, trained))?;
            state.torn = false;
            seconds.communication += gathering.elapsed().as_secs_f64();
        }
        faults::point("stepped", iteration, self.assignment.rank);
        Ok(trained)
    }

    fn reduction(&self, phase: Phase) -> &Reduction {
        match phase {
            Phase::FakeScore => &self.fake_score,
            Phase::Generator => &self.generator,
        }
    }

    /// Numbers that each rank has of its slice of a gradient, summed over all slices; as they are where each rank has the whole.
    fn sum_over_slices(&self, numbers: [f64; 2]) -> Result<[f64; 2], potstill_c10d::Error> {
        if !self.job.spec.memory.shard_optimiser || self.assignment.world_size == 1 {
            return Ok(numbers);
        }
        let sum = Tensor::from_slice(&numbers).to_device(self.group.device());
        self.session.progress.while_waiting(|| self.group.all_reduce(&sum, ReduceOp::Sum)?.wait(None))?;
        Ok([sum.double_value(&[0]), sum.double_value(&[1])])
    }

    /// Runs this rank's micro-batches of one phase and returns the gradient of the mean loss over the global batch, times
    /// `loss_scale`: equal on all ranks, or each rank's slice of it. Adds to the totals and to the times.
    fn accumulate(
        &mut self,
        state: &State,
        phase: Phase,
        iteration: u64,
        loss_scale: f64,
        totals: &mut Totals,
        seconds: &mut StepSeconds,
    ) -> Result<Tensor, Interruption> {
        let started = Instant::now();
        let network = match phase {
            Phase::FakeScore => state.fake_score.network(),
            Phase::Generator => state.generator.network(),
        };
        let batch = self.job.spec.distillation.global_batch;
        let scale = self.reduction(phase).scale(self.assignment.world_size, batch) * loss_scale;
        let indices = self.assignment.micro_batches.indices();
        let last = indices.end - 1;
        let mut exposed = Duration::ZERO;
        let mut reported = Vec::with_capacity(indices.len());
        for index in indices {
            self.heed()?;
            let micro_batch = self.micro_batch(state, phase, iteration, index)?;
            faults::point("forward", iteration, self.assignment.rank);
            let scaled = &micro_batch.loss * scale;
            let reduction = self.reduction(phase);
            if index == last {
                faults::point("reducing", iteration, self.assignment.rank);
                // It ends when the gradients of all ranks are in.
                exposed =
                    self.session.progress.while_waiting(|| reduction.backward(network, &scaled, true))?;
            } else {
                reduction.backward(network, &scaled, false)?;
                faults::point("backward", iteration, self.assignment.rank);
            }
            let MicroBatchLoss { score_loss, adversarial_loss, score_difference, dropped, .. } = micro_batch;
            reported.push((score_loss, adversarial_loss, score_difference, dropped));
            self.session.progress.tick();
        }
        for (score_loss, adversarial_loss, score_difference, dropped) in reported {
            totals.score_loss += score_loss.double_value(&[]);
            if let Some(loss) = adversarial_loss {
                *totals.adversarial_loss.get_or_insert(0.0) += loss.double_value(&[]);
            }
            totals.score_difference += score_difference.map_or(0.0, |s| s.double_value(&[]));
            totals.dropped += dropped.int64_value(&[]) as u32;
        }
        let (gradient, waited) =
            self.session.progress.while_waiting(|| self.reduction(phase).finish(network, &self.group))?;
        exposed += waited;
        seconds.communication += exposed.as_secs_f64();
        seconds.compute += started.elapsed().saturating_sub(exposed).as_secs_f64();
        Ok(gradient)
    }

    fn micro_batch(
        &self,
        state: &State,
        phase: Phase,
        iteration: u64,
        index: u32,
    ) -> Result<MicroBatchLoss, Interruption> {
        let (settings, conditions) = (&self.job.settings, self.job.conditions.as_ref());
        let generator = state.generator.network();
        let _autocast = match self.job.mixed_precision() {
            Some(precision) => Some(Autocast::enter(settings.device, precision)?),
            None => None,
        };
        Ok(match phase {
            Phase::FakeScore => {
                let (fake_score, real) = (state.fake_score.network(), self.job.real.as_deref());
                phase::fake_score(generator, fake_score, conditions, real, settings, iteration, index)
            }
            Phase::Generator => {
                let (fake_score, teacher) = (self.frozen_fake_score.as_ref(), self.job.teacher.as_ref());
                phase::generator(generator, fake_score, teacher, conditions, settings, iteration, index)
            }
        })
    }
}
