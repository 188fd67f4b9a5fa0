//! One iteration: fake-score phase, then generator phase.

use std::time::Instant;

use potstill_distill::{counters::Network, state::State};
use potstill_proto::{
    cursor::{Cursor, Phase},
    message::FromWorker,
    wire::{StepReport, StepSeconds},
};

use super::{Member, interruption::Interruption, obey_orders, step::Totals};
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
        let lane = Lane::issue(&self.trainer.group, flags)?;
        let mut seconds = StepSeconds::default();

        let fake_score = match cursor.phase {
            Phase::FakeScore => {
                let trained = self.train(state, Network::FakeScore, iteration, &mut seconds)?;
                cursor.phase = Phase::Generator;
                self.session.progress.set_cursor(*cursor);
                trained
            }
            // Done in another generation, whose sums are not known here.
            Phase::Generator => Trained::nothing(),
        };
        let generator = match self.job.recipe.settings.schedule.trains_generator(iteration) {
            true => self.train(state, Network::Generator, iteration, &mut seconds)?,
            false => Trained::nothing(),
        };
        self.wait_for_copy();
        self.trainer.update_average(state, iteration);
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
        lifeline::worked();
        self.watch_health(iteration, samples, &[fake_score, generator])?;
        faults::point("reported", iteration, self.assignment.rank);
        // Read only now: the iteration is complete and reported, even if the group fails.
        let group = &self.trainer.group;
        Ok(self.session.progress.while_waiting(|| {
            let flags = lane.read()?;
            group.settle().map(|()| flags)
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

    /// One phase: its gradient over the global batch, and the step of the network that it trains.
    fn train(
        &mut self,
        state: &mut State,
        network: Network,
        iteration: u64,
        seconds: &mut StepSeconds,
    ) -> Result<Trained, Interruption> {
        let (session, generation) = (&mut *self.session, self.assignment.generation);
        let reduced =
            self.trainer.gradient(state, network, iteration, seconds, || obey_orders(session, generation))?;
        self.wait_for_copy();
        let (norm, non_finite) = (reduced.gradient.norm, reduced.gradient.non_finite);
        let sick = self.trainer.step(state, network, iteration, reduced.gradient, seconds)?;
        let (totals, loss_scale) = (reduced.totals, reduced.loss_scale);
        Ok(Trained { totals, norm, non_finite, loss_scale, sick })
    }
}
