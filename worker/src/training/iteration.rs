//! One iteration: fake-score phase, then generator phase.

use std::time::{Duration, Instant};

use anyhow::Context;
use potstill_distill::{
    gradient::Gradient,
    phase::{self, MicroBatchLoss},
    state::State,
};
use potstill_proto::{
    cursor::{Cursor, Phase},
    message::FromWorker,
    wire::{StepReport, StepSeconds},
};
use tch::Tensor;

use super::{Interruption, Member};
use crate::control_lane::{Flags, Lane};

/// Sums of one rank's share of one iteration.
#[derive(Default)]
struct Totals {
    fake_score_loss: f64,
    generator_loss: f64,
    score_difference: f64,
    dropped: u32,
}

impl Member<'_> {
    /// One iteration, or the rest of it: fake-score phase, then generator phase.
    pub(super) fn iterate(&mut self, state: &mut State, cursor: &mut Cursor) -> Result<Flags, Interruption> {
        let started = Instant::now();
        let iteration = cursor.iteration;
        let generation = self.assignment.generation;
        self.heed()?;
        let orders = self.session.orders()?;
        let flags =
            Flags { stop: orders.stop_wanted(generation), checkpoint: orders.take_checkpoint(generation) };
        let lane = Lane::issue(&self.group, flags)?;

        let mut totals = Totals::default();
        let mut seconds = StepSeconds::default();
        let mut fake_score_gradient = (f64::NAN, 0);
        let d = &self.job.spec.distillation;
        let o = &self.job.spec.optimiser;

        if cursor.phase == Phase::FakeScore {
            let gradient = self.accumulate(state, Phase::FakeScore, iteration, &mut totals, &mut seconds)?;
            let step = Instant::now();
            let gradient = Gradient::repaired(gradient);
            state.step_fake_score(&gradient, iteration, &self.job.adam(o.fake_score_learning_rate));
            self.fake_score.zero_grad()?;
            seconds.optimiser += step.elapsed().as_secs_f64();
            fake_score_gradient = (gradient.norm, gradient.non_finite);
            cursor.phase = Phase::Generator;
            self.session.progress.set_cursor(*cursor);
        } else {
            // The first half was done in another generation, whose sums are not at hand.
            totals.fake_score_loss = f64::NAN;
        }

        let gradient = self.accumulate(state, Phase::Generator, iteration, &mut totals, &mut seconds)?;
        let step = Instant::now();
        let gradient = Gradient::repaired(gradient);
        let adam = self.job.adam(o.generator_learning_rate);
        state.step_generator(&gradient, iteration, &adam, o.ema_half_life_images, d.global_batch);
        self.generator.zero_grad()?;
        seconds.optimiser += step.elapsed().as_secs_f64();
        *cursor = Cursor::boundary(iteration + 1);
        self.session.progress.set_cursor(*cursor);

        let non_finite_gradients = fake_score_gradient.1 + gradient.non_finite;
        let share = self.assignment.micro_batches;
        seconds.total = started.elapsed().as_secs_f64();
        self.session.send(FromWorker::StepReport(StepReport {
            generation: generation.0,
            iteration,
            first_micro_batch: share.first,
            micro_batches: share.count,
            samples: share.count * d.micro_batch,
            fake_score_loss_sum: totals.fake_score_loss,
            generator_loss_sum: totals.generator_loss,
            score_difference_sum: totals.score_difference,
            fake_score_grad_norm: fake_score_gradient.0,
            generator_grad_norm: gradient.norm,
            non_finite_samples: totals.dropped,
            non_finite_gradients,
            seconds: Some(seconds),
        }));
        self.watch_finiteness(iteration, non_finite_gradients)?;
        // Read only now: the iteration is done and reported, whatever becomes of the group.
        Ok(lane.read()?)
    }

    /// Ends the run when gradients have not been finite for too long. Gradients are equal on all ranks, so all ranks
    /// come to the same end.
    fn watch_finiteness(&mut self, iteration: u64, non_finite: u64) -> anyhow::Result<()> {
        self.non_finite_streak = if non_finite > 0 { self.non_finite_streak + 1 } else { 0 };
        let limit = self.job.spec.distillation.non_finite_limit;
        anyhow::ensure!(
            self.non_finite_streak < limit,
            "{limit} iterations in a row, up to iteration {iteration}, had gradients that were not finite ({non_finite} \
             elements in the last): the run has diverged. Nothing was saved since; lower the learning rates and resume from \
             the newest checkpoint, or start again"
        );
        Ok(())
    }

    /// Runs this rank's micro-batches of one phase and returns the gradient of the mean loss over the global batch, equal
    /// on all ranks. Adds to the totals and to the times.
    fn accumulate(
        &mut self,
        state: &State,
        phase: Phase,
        iteration: u64,
        totals: &mut Totals,
        seconds: &mut StepSeconds,
    ) -> Result<Tensor, Interruption> {
        let started = Instant::now();
        // The reducer takes the mean over ranks; this makes it the sum over samples divided by the global batch.
        let scale =
            f64::from(self.assignment.world_size) / f64::from(self.job.spec.distillation.global_batch);
        let indices = self.assignment.micro_batches.indices();
        let last = indices.end - 1;
        let mut exposed = Duration::ZERO;
        let mut reported = Vec::with_capacity(indices.len());
        for index in indices {
            self.heed()?;
            let micro_batch = self.micro_batch(state, phase, iteration, index);
            let scaled = &micro_batch.loss * scale;
            if index == last {
                let reducer = match phase {
                    Phase::FakeScore => &self.fake_score,
                    Phase::Generator => &self.generator,
                };
                exposed = reducer.backward(&scaled)?;
            } else {
                scaled.f_backward().context("backward pass")?;
            }
            let MicroBatchLoss { loss, score_difference, dropped } = micro_batch;
            reported.push((loss.detach(), score_difference, dropped));
            self.session.progress.tick();
        }
        for (loss, score_difference, dropped) in reported {
            let total = match phase {
                Phase::FakeScore => &mut totals.fake_score_loss,
                Phase::Generator => &mut totals.generator_loss,
            };
            *total += loss.double_value(&[]);
            totals.score_difference += score_difference.map_or(0.0, |s| s.double_value(&[]));
            totals.dropped += dropped.int64_value(&[]) as u32;
        }
        let network = match phase {
            Phase::FakeScore => &state.fake_score,
            Phase::Generator => &state.generator,
        };
        let gradient = network.parameters().flat_grad();
        seconds.communication += exposed.as_secs_f64();
        seconds.compute += started.elapsed().saturating_sub(exposed).as_secs_f64();
        Ok(gradient)
    }

    fn micro_batch(&self, state: &State, phase: Phase, iteration: u64, index: u32) -> MicroBatchLoss {
        let settings = &self.job.settings;
        let generator = state.generator.as_ref();
        match phase {
            Phase::FakeScore => {
                phase::fake_score(generator, state.fake_score.as_ref(), settings, iteration, index)
            }
            Phase::Generator => {
                let (fake_score, teacher) = (self.frozen_fake_score.as_ref(), self.job.teacher.as_ref());
                phase::generator(generator, fake_score, teacher, settings, iteration, index)
            }
        }
    }
}
