//! One iteration: fake-score phase, then generator phase.

use std::time::Instant;

use potstill_distill::{counters::Network, state::State};
use potstill_proto::{
    cursor::{Cursor, Phase},
    message::FromWorker,
    wire::{StepReport, StepSeconds},
};

use super::{
    Member,
    interruption::Interruption,
    obey_orders,
    step::{self, Prepared, Reduced, Stepped, Totals},
};
use crate::{
    process::{faults, lifeline},
    training::control_lane::{Flags, Lane},
};

/// The result of a phase.
struct Trained {
    totals: Totals,
    /// L2 norm of the reduced gradient.
    norm: f64,
    /// Number of its elements that were not finite.
    non_finite: u64,
    /// The factor of its loss.
    loss_scale: f64,
    /// Whether values were not finite in a way that a smaller loss scale does not repair.
    sick: bool,
}

impl Trained {
    /// The result of a phase that was not run here.
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
        obey_orders(self.session, generation)?;
        let orders = self.session.orders()?;
        let flags = Flags {
            checkpoint: orders.take_checkpoint(generation),
            stop: orders.stop_wanted(generation),
            yields: orders.yield_wanted(generation),
        };
        let lane = Lane::issue(&self.trainer.groups.all, flags)?;
        let mut seconds = StepSeconds::default();

        let fake_score = match cursor.phase {
            Phase::FakeScore => self.train(state, Network::FakeScore, cursor, &mut seconds)?,
            // Done in another generation, whose sums are not known here.
            Phase::Generator => Trained::nothing(),
        };
        let generator = match cursor.phase {
            Phase::Generator if self.job.recipe.settings.schedule.trains_generator(iteration) => {
                self.train(state, Network::Generator, cursor, &mut seconds)?
            }
            // It is not trained in this iteration, which an earlier version has left between its phases.
            Phase::Generator => {
                self.wait_for_copy();
                *cursor = step::end_iteration(&self.job.recipe, state, iteration);
                self.session.progress.set_cursor(*cursor);
                Trained::nothing()
            }
            Phase::FakeScore => Trained::nothing(),
        };

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
            memory_peak_bytes: self.job.memory.peak(),
        }));
        lifeline::completed(iteration);
        self.job.has_worked.set(true);
        self.watch_health(iteration, samples, &[fake_score, generator])?;
        faults::point("reported", iteration, self.assignment.rank);
        // Read only now: the iteration is complete and reported, even if the group fails.
        let groups = &self.trainer.groups;
        Ok(self.session.progress.while_waiting(|| {
            let flags = lane.read()?;
            groups.settle().map(|()| flags)
        })?)
    }

    /// Ends the run when too many iterations in a row had gradients that were not finite, or no sample that was finite.
    fn watch_health(&mut self, iteration: u64, samples: u32, phases: &[Trained]) -> anyhow::Result<()> {
        let sick = phases.iter().any(|phase| phase.sick || phase.totals.dropped >= samples);
        self.non_finite_streak = if sick { self.non_finite_streak + 1 } else { 0 };
        let limit = self.job.spec.distillation.non_finite_limit;
        let elements: u64 = phases.iter().map(|phase| phase.non_finite).sum();
        let dropped: u32 = phases.iter().map(|phase| phase.totals.dropped).sum();
        let first = (iteration + 1).saturating_sub(limit.into());
        anyhow::ensure!(
            self.non_finite_streak < limit,
            "{limit} iterations in a row, from iteration {first} to {iteration}, had gradients or samples that were not finite \
             ({elements} elements of the gradients and {dropped} samples of this rank in the last): the run has diverged. \
             Lower the learning rates and go on from a checkpoint before iteration {first} (potstill checkpoint restore), or \
             start again"
        );
        Ok(())
    }

    /// One phase: its gradient over the global batch, and the step of the network that it trains. The cursor follows.
    fn train(
        &mut self,
        state: &mut State,
        network: Network,
        cursor: &mut Cursor,
        seconds: &mut StepSeconds,
    ) -> Result<Trained, Interruption> {
        let (session, generation) = (&mut *self.session, self.assignment.generation);
        let iteration = cursor.iteration;
        let Reduced { totals, gradient, loss_scale } =
            self.trainer.gradient(state, network, iteration, seconds, || obey_orders(session, generation))?;
        self.wait_for_copy();
        let prepared = Prepared::new(self.trainer.recipe, network, iteration, gradient);
        let whole = match self.trainer.agree(&prepared, seconds) {
            Ok(whole) => whole,
            Err(error) => {
                // Others may have made the step, and then need it to be made here too.
                self.pending.prepared = self.job.is_sliced().then_some(prepared);
                return Err(error);
            }
        };
        let Stepped { cursor: next, sick } = self.trainer.step(state, prepared, whole, seconds);
        *cursor = next;
        self.pending.made = Some((next, whole));
        self.session.progress.set_cursor(next);
        self.trainer.clear(network)?;
        let (norm, non_finite) = (whole.norm(), whole.non_finite as u64);
        Ok(Trained { totals, norm, non_finite, loss_scale, sick })
    }
}
