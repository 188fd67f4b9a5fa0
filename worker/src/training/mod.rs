//! A rank's work in one generation: takes over the state, then iterates until the run or the generation ends.

pub mod buckets;
mod claims;
mod control_lane;
mod gathered;
mod graphs;
pub mod groups;
mod interruption;
mod iteration;
mod job;
mod joining;
pub mod networks;
mod reduction;
#[cfg(test)]
mod replay;
pub mod step;
mod transfer;

use std::{sync::Arc, time::Duration};

use potstill_c10d::{ErrorKind, ReduceOp};
use potstill_distill::state::State;
use potstill_proto::{
    cursor::{Cursor, Generation, Phase},
    message::{Assignment, FromWorker},
    scores::{Evaluation, Subject},
    wire::ShardFailed,
};
use potstill_storage::layout::{SAMPLES, picture_key};
use tch::{Device, Tensor};

use self::{
    control_lane::Flags,
    interruption::Interruption,
    joining::{Pending, join, obtain_state},
    networks::{Networks, Sampled},
    step::Trainer,
};
#[cfg(test)]
pub use self::{
    job::settings,
    step::{Prepared, Recipe},
};
pub use self::{
    job::{Inputs, Job},
    joining::Holding,
};
use crate::{
    checkpoint::{self, Save, Share},
    evaluation::{Scoring, pictures, samples::Sampler},
    model::Watched,
    process::faults,
    session::Session,
};

/// How a generation has ended for this rank.
pub enum Ending {
    /// There is nothing left to compute.
    Finished,
    /// As all ranks agreed, it has left the group at a boundary.
    Yielded,
    /// The checkpoint that it was to start from cannot be read.
    Damaged {
        /// Key of the checkpoint's manifest.
        manifest_key: String,
        /// Which object, and what is wrong with it.
        error: String,
    },
    /// A slice of the state that it was to take over is gone with both of its holders.
    Incomplete {
        /// The earlier state that the ranks can put together and that it holds slices of; the start of the run: none.
        cursor: Cursor,
        /// What is missing.
        error: String,
    },
    /// It has left the group: it was ordered to, or a collective failed.
    Left(String),
}

/// One generation's work on this rank.
struct Member<'a> {
    job: &'a Job,
    session: &'a mut Session,
    assignment: &'a Assignment,
    trainer: Trainer<'a>,
    pending: &'a mut Pending,
    saving: &'a mut Option<Save>,
    /// How long the last save may wait for a storage that fails.
    patience: Duration,
    non_finite_streak: u32,
}

/// Leaves a generation when the coordinator orders it.
fn obey_orders(session: &mut Session, generation: Generation) -> Result<(), Interruption> {
    match session.orders()?.interruption(generation) {
        Some(reason) => Err(Interruption::Left(reason)),
        None => Ok(()),
    }
}

/// Takes part in the assigned generation until it is over. `holding` keeps the state in all cases, `saving` the newest
/// save, which may continue after the generation.
///
/// # Errors
/// An error that every other worker would have as well: the run must end.
pub fn run_generation(
    job: &Job,
    session: &mut Session,
    holding: &mut Holding,
    saving: &mut Option<Save>,
    assignment: &Assignment,
    host: &str,
    joining_timeout: Duration,
) -> anyhow::Result<Ending> {
    session.progress.set_generation(assignment.generation);
    session.progress.set_waiting(false);
    let result = take_part(job, session, holding, saving, assignment, host, joining_timeout);
    if result.is_err() {
        // What is in flight may wait for peers that no longer come.
        session.abort_groups();
    }
    session.leave_groups();
    match result {
        Ok(ending) => Ok(ending),
        Err(Interruption::Left(reason)) => Ok(Ending::Left(reason)),
        Err(Interruption::Incomplete { cursor, error }) => Ok(Ending::Incomplete { cursor, error }),
        Err(Interruption::Damaged { manifest_key, error }) => Ok(Ending::Damaged { manifest_key, error }),
        // Later, fewer ranks may need more memory each than they have, until another one joins.
        Err(Interruption::Collective(error)) if error.kind == ErrorKind::OutOfMemory && !job.has_worked.get() => {
            Err(anyhow::Error::new(error).context(
                "the memory of this rank does not suffice; `potstill plan` says how much a run needs and which settings save some",
            ))
        }
        Err(Interruption::Collective(error)) => {
            // It may have failed only because the session aborted the group.
            let called_away = session.orders()?.interruption(assignment.generation);
            Ok(Ending::Left(called_away.unwrap_or_else(|| error.to_string())))
        }
        Err(Interruption::Fatal(error)) => Err(error),
    }
}

fn take_part(
    job: &Job,
    session: &mut Session,
    holding: &mut Holding,
    saving: &mut Option<Save>,
    assignment: &Assignment,
    host: &str,
    timeout: Duration,
) -> Result<Ending, Interruption> {
    session.progress.set_activity("joining");
    session.progress.set_waiting(true);
    let groups = join(job, session, assignment, host, timeout)?;
    session.progress.set_waiting(false);
    // From here on an order to leave aborts the collectives at once.
    session.enter_groups(assignment.generation, groups.every());
    if let Some(reason) = session.orders()?.interruption(assignment.generation) {
        return Err(Interruption::Left(reason));
    }

    obtain_state(job, session, holding, assignment, &groups.all)?;
    let Holding { state: Some(state), cursor, pending, .. } = holding else {
        return Err(anyhow::anyhow!("there is no state to work with").into());
    };
    // Held from here on, so that no later failure loses it.
    session.progress.set_loaded(assignment.generation, *cursor);
    let (progress, draws) = (Arc::clone(&session.progress), job.draws());
    let slice_of_teacher = job.slice_of_teacher(assignment);
    let networks =
        Networks::new(state, job.teacher.as_ref(), slice_of_teacher.as_ref(), &groups.shards, &progress);
    let trainer = Trainer::new(
        &job.recipe,
        networks,
        &draws,
        groups,
        assignment.micro_batches.indices(),
        &progress,
        state,
        assignment.partners.map(|partners| partners.copied_by),
    )?;
    let patience = job.spec.cluster.wait_timeout;
    let mut member =
        Member { job, session, assignment, trainer, pending, saving, patience, non_finite_streak: 0 };
    member.work(state, cursor)
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        // The code below may change the state.
        self.wait_for_copy();
    }
}

impl Member<'_> {
    fn work(&mut self, state: &mut State, cursor: &mut Cursor) -> Result<Ending, Interruption> {
        if self.assignment.evaluate_teacher {
            self.evaluate(state, cursor.iteration, Subject::Teacher)?;
        }
        let iterations = self.job.spec.distillation.iterations;
        let mut flags = Flags::default();
        let mut save = false;
        loop {
            let stop = flags.stop;
            let at_boundary = cursor.phase == Phase::FakeScore;
            let last = at_boundary && cursor.iteration >= iterations;
            // Evaluated before it is saved: a collapsed student is not saved.
            let existing = self.assignment.existing;
            let evaluated = existing.evaluated == Some(cursor.iteration);
            if at_boundary && !stop && !evaluated && self.job.evaluation_due(cursor.iteration) {
                self.evaluate(state, cursor.iteration, Subject::Student)?;
            }
            if last || stop {
                self.finish_saving()?;
                if existing.saved != Some(cursor.iteration) {
                    // Nothing but this save is left to do, so it waits for a storage that fails.
                    self.save(state, cursor.iteration, self.patience);
                }
            } else if save {
                self.save(state, cursor.iteration, Duration::ZERO);
            }
            if at_boundary && !stop && (last || self.job.picture_due(cursor.iteration)) {
                self.draw(state, cursor.iteration, last)?;
            }
            if last || stop {
                return Ok(Ending::Finished);
            }
            if flags.yields {
                // A rank that is leaving must have saved.
                self.finish_saving()?;
                return Ok(Ending::Yielded);
            }
            self.session.progress.set_activity("training");
            flags = self.iterate(state, cursor)?;
            save = flags.checkpoint || cursor.iteration.is_multiple_of(self.job.spec.checkpoint.every);
        }
    }

    /// Starts to save this rank's shard. At most one save is under way, so that memory is bounded: while the previous
    /// one still runs, this one is skipped, and training continues.
    fn save(&mut self, state: &State, iteration: u64, patience: Duration) {
        let a = self.assignment;
        if self.saving.as_ref().is_some_and(|saving| !saving.is_over()) {
            let error = "skipped: the previous checkpoint is still being written; save less often".to_owned();
            return self.session.send(FromWorker::ShardFailed(ShardFailed {
                generation: a.generation.0,
                iteration,
                rank: a.rank,
                key: checkpoint::shard_key(iteration, a.generation, a.rank, a.world_size),
                error,
            }));
        }
        let replica = self.trainer.groups.replica();
        let share = Share::of(state, iteration, (a.rank, a.world_size), replica, self.job.staging.clone());
        let (runtime, run) = (&self.job.runtime, self.job.run.clone());
        let outbox = self.session.outbox();
        let save = share.save(runtime, run, a.generation, a.rank, a.world_size, outbox, patience);
        *self.saving = Some(save);
        faults::point("snapshot", iteration, a.rank);
    }

    /// Before the state changes: waits for a copy of it that is under way.
    fn wait_for_copy(&mut self) {
        if let Some(saving) = self.saving {
            saving.wait_for_copy();
        }
    }

    fn finish_saving(&mut self) -> anyhow::Result<()> {
        match self.saving.take() {
            Some(saving) => self.job.runtime.block_on(self.session.progress.while_busy(saving.finish())),
            None => Ok(()),
        }
    }

    /// The teacher, or G_ema.
    fn sampled(&self, state: &State, subject: Subject) -> Result<Sampled, Interruption> {
        let own = self.job.slice_of_teacher(self.assignment);
        let (own, shards) = (own.as_ref(), &self.trainer.groups.shards);
        let progress = &self.session.progress;
        Ok(match subject {
            Subject::Teacher => Sampled::teacher(self.job.teacher.as_ref(), state, own, shards, progress)?,
            Subject::Student => Sampled::average(state, own, shards, progress)?,
        })
    }

    fn sampler<'s>(&'s self, subject: Subject, network: &'s Watched<'s>) -> Sampler<'s> {
        match subject {
            Subject::Teacher => Sampler::Teacher(network),
            Subject::Student => {
                Sampler::Student { generator: network, times: &self.job.recipe.settings.times }
            }
        }
    }

    fn evaluate(&mut self, state: &State, iteration: u64, subject: Subject) -> Result<(), Interruption> {
        let Some(evaluator) = &self.job.evaluator else { return Ok(()) };
        let progress = &self.session.progress;
        progress.set_activity(match subject {
            Subject::Teacher => "evaluating the teacher",
            Subject::Student => "evaluating the student",
        });
        let sampled = self.sampled(state, subject)?;
        let network = Watched::new(sampled.network.as_ref());
        let (sampler, group) = (self.sampler(subject, &network), &self.trainer.groups.all);
        let scores = evaluator.score(sampler, group, sampled.is_gathered(), |what| {
            progress.set_waiting(what == Scoring::Gather);
        });
        progress.set_waiting(false);
        // Before an error that samples without weights have caused, and before scores of them are told.
        sampled.finish()?;
        progress.while_waiting(|| self.trainer.groups.settle())?;
        let scores = scores??;
        if self.assignment.rank == 0 {
            self.session.send(FromWorker::Evaluation(Evaluation {
                generation: self.assignment.generation,
                iteration,
                subject,
                scores,
            }));
        }
        obey_orders(self.session, self.assignment.generation)
    }

    /// Draws the student; at the run's end also `samples.png`: teacher above student, same noise, same classes. All ranks make
    /// their share of the images.
    fn draw(&mut self, state: &State, iteration: u64, last: bool) -> Result<(), Interruption> {
        let progress = &self.session.progress;
        progress.set_activity("drawing the student");
        let [columns, rows] = self.job.samples.picture_layout();
        let (rank, world) = (self.assignment.rank as usize, self.assignment.world_size as usize);
        let images = |subject| -> Result<Tensor, Interruption> {
            let sampled = self.sampled(state, subject)?;
            let network = Watched::new(sampled.network.as_ref());
            let (sampler, count) = (self.sampler(subject, &network), i64::from(columns * rows));
            let images = self.job.samples.picture(sampler, count, (rank, world), sampled.is_gathered());
            sampled.finish()?;
            let group = &self.trainer.groups.all;
            let sum = || group.all_reduce(&images, ReduceOp::Sum).and_then(|work| work.wait(None));
            progress.while_waiting(sum)?;
            progress.while_waiting(|| self.trainer.groups.settle())?;
            Ok(images.to_device(Device::Cpu))
        };
        let student = images(Subject::Student)?;
        if rank == 0 {
            let written = self.written_picture(picture_key(iteration), pictures::grid(&[&student], columns));
            match last {
                // This process is about to end.
                true => self.job.runtime.block_on(progress.while_busy(written)),
                // Training does not wait for a slow storage.
                false => drop(self.job.runtime.spawn(written)),
            }
        }
        if last {
            progress.set_activity("drawing the teacher");
            let teacher = images(Subject::Teacher)?;
            if rank == 0 {
                let png = pictures::grid(&[&teacher, &student], columns);
                let written = self.written_picture(SAMPLES.to_owned(), png);
                self.job.runtime.block_on(progress.while_busy(written));
            }
        }
        obey_orders(self.session, self.assignment.generation)
    }

    /// The checkpoint is what counts: a picture that cannot be drawn or written fails no run.
    fn written_picture(
        &self,
        key: String,
        png: anyhow::Result<Vec<u8>>,
    ) -> impl Future<Output = ()> + Send + use<> {
        let run = self.job.run.clone();
        async move {
            let written = match png {
                Ok(png) => run.put(&key, png.into()).await.map_err(anyhow::Error::from),
                Err(error) => Err(error),
            };
            if let Err(error) = written {
                tracing::warn!(error = format!("{error:#}"), "{key} could not be written");
            }
        }
    }
}
