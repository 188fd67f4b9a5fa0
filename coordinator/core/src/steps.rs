//! Exact accounting: every micro-batch of every finished iteration counts exactly once.
//!
//! Ranks report each iteration separately, in order. An iteration is finished when every rank of its generation has
//! reported it and their shares cover all micro-batches. When a generation ends, an iteration that some rank had
//! completed stays finished, even where a dead rank's report was lost: a completed collective proves that every share
//! went in. An iteration that no survivor has completed is computed again, as a whole, by the next generation.

use std::collections::BTreeMap;

use potstill_proto::{micro_batches::MicroBatches, wire::StepReport};

use crate::{assignment::Start, observation::IterationTotals};

/// An iteration was not computed as it was assigned: the run's result can no longer be trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("sample accounting of iteration {iteration} is violated by rank {rank} of {world_size}: {problem}")]
pub struct Violation {
    iteration: u64,
    rank: u32,
    world_size: u32,
    problem: String,
}

/// The result of a report.
#[derive(Clone, Debug, PartialEq)]
pub enum Reported {
    /// Other ranks have still to report this iteration.
    Incomplete,
    /// The iteration is finished.
    Finished {
        /// What was computed.
        totals: IterationTotals,
        /// Seconds of each rank's forward and backward passes for a micro-batch.
        paces: Vec<f64>,
    },
    /// This rank had reported the iteration already.
    Repeated,
}

/// The account of one run.
#[derive(Debug)]
pub struct Steps {
    micro_batches: u32,
    micro_batch: u32,
    world_size: u32,
    start: Start,
    /// Whether another coordinator opened this generation.
    reopened: bool,
    /// The first iteration that this generation reports, once a rank has.
    first: Option<u64>,
    /// The iteration that each rank reports next, once it has reported one.
    next: BTreeMap<u32, u64>,
    pending: BTreeMap<u64, BTreeMap<u32, StepReport>>,
    finished: u64,
}

impl Steps {
    /// The account of a run with `micro_batches` micro-batches in an iteration, of `micro_batch` samples each.
    #[must_use]
    pub fn new(micro_batches: u32, micro_batch: u32, start: Start) -> Self {
        Self {
            micro_batches,
            micro_batch,
            world_size: 0,
            start,
            reopened: false,
            first: None,
            next: BTreeMap::new(),
            pending: BTreeMap::new(),
            finished: start.cursor.iteration,
        }
    }

    /// Iterations finished: every index below this.
    #[must_use]
    pub fn finished(&self) -> u64 {
        self.finished
    }

    /// Ranks of the generation that is accounted for.
    #[must_use]
    pub fn world_size(&self) -> u32 {
        self.world_size
    }

    /// A new generation starts. Returns the iterations that the old one finished although some ranks died before they
    /// reported them; iterations at or beyond `start` will be computed again.
    pub fn open(&mut self, world_size: u32, start: Start) -> Vec<IterationTotals> {
        let beyond = self.pending.split_off(&start.cursor.iteration);
        drop(beyond);
        let closed = std::mem::take(&mut self.pending);
        let closed =
            closed.into_iter().map(|(iteration, reports)| self.totals(iteration, &reports)).collect();
        self.world_size = world_size;
        self.start = start;
        self.reopened = false;
        self.first = None;
        self.next.clear();
        self.finished = start.cursor.iteration;
        closed
    }

    /// A generation that another coordinator opened continues. Its ranks send their reports again, some from an earlier
    /// iteration than others: reports before `start` are counted already.
    pub fn reopen(&mut self, world_size: u32, start: Start) {
        self.open(world_size, start);
        self.reopened = true;
    }

    /// Takes the report of a rank of the live generation.
    ///
    /// # Errors
    /// [`Violation`] when the rank left an iteration out or computed other micro-batches than its own.
    pub fn report(&mut self, rank: u32, report: StepReport) -> Result<Reported, Violation> {
        let iteration = report.iteration;
        let world_size = self.world_size;
        let violation = |problem| Err(Violation { iteration, rank, world_size, problem });

        let expected = self.next.get(&rank).copied().or(self.first);
        match expected {
            Some(expected) if iteration < expected => return Ok(Reported::Repeated),
            Some(expected) if iteration > expected => {
                return violation(format!("it should have reported iteration {expected} first"));
            }
            None if self.reopened && iteration < self.start.cursor.iteration => {
                return Ok(Reported::Repeated);
            }
            None if iteration < self.start.cursor.iteration
                || (self.start.exact && iteration > self.start.cursor.iteration) =>
            {
                return violation(format!("this generation started at {}", self.start.cursor));
            }
            _ => {}
        }
        let share = MicroBatches::share(self.micro_batches, rank, self.world_size);
        let computed = MicroBatches { first: report.first_micro_batch, count: report.micro_batches };
        if computed != share {
            return violation(format!(
                "it computed micro-batches {:?}; its share is {:?}",
                computed.first..computed.first.saturating_add(computed.count),
                share.indices()
            ));
        }
        let samples = share.count * self.micro_batch;
        if report.samples != samples {
            return violation(format!("it computed {} samples; its share has {samples}", report.samples));
        }

        self.first.get_or_insert(iteration);
        self.next.insert(rank, iteration + 1);
        let reports = self.pending.entry(iteration).or_default();
        reports.insert(rank, report);
        if reports.len() < self.world_size as usize {
            return Ok(Reported::Incomplete);
        }
        let reports = self.pending.remove(&iteration).unwrap_or_default();
        self.finished = iteration + 1;
        let pace = |report: &StepReport| {
            report.seconds.unwrap_or_default().compute / f64::from(report.micro_batches.max(1))
        };
        let paces = reports.values().map(pace).collect();
        Ok(Reported::Finished { totals: self.totals(iteration, &reports), paces })
    }

    /// Sums the reports. Means are over the samples of the ranks that reported.
    fn totals(&self, iteration: u64, reports: &BTreeMap<u32, StepReport>) -> IterationTotals {
        let sum = |of: fn(&StepReport) -> f64| reports.values().map(of).sum::<f64>();
        let samples = sum(|r| f64::from(r.samples)).max(1.0);
        let optional = |of: fn(&StepReport) -> Option<f64>| {
            reports.values().map(of).sum::<Option<f64>>().map(|sum| sum / samples)
        };
        // Reduced gradients are equal on every rank: the lowest rank's values are used.
        let lowest = reports.values().next();
        let slowest = reports
            .values()
            .filter_map(|r| r.seconds)
            .max_by(|a, b| a.total.total_cmp(&b.total))
            .unwrap_or_default();
        IterationTotals {
            iteration,
            world_size: self.world_size,
            samples: self.micro_batches * self.micro_batch,
            fake_score_loss: sum(|r| r.fake_score_loss_sum) / samples,
            generator_loss: sum(|r| r.generator_loss_sum) / samples,
            score_difference: sum(|r| r.score_difference_sum) / samples,
            fake_score_grad_norm: lowest.map_or(0.0, |r| r.fake_score_grad_norm),
            generator_grad_norm: lowest.map_or(0.0, |r| r.generator_grad_norm),
            non_finite_samples: reports.values().map(|r| r.non_finite_samples).sum(),
            non_finite_gradients: lowest.map_or(0, |r| r.non_finite_gradients),
            discriminator_loss: optional(|r| r.discriminator_loss_sum),
            generator_adversarial_loss: optional(|r| r.generator_adversarial_loss_sum),
            loss_scales: lowest.map_or([1.0; 2], |r| [r.fake_score_loss_scale, r.generator_loss_scale]),
            seconds: slowest,
            memory_peak: reports.values().map(|r| r.memory_peak_bytes).max().filter(|peak| *peak > 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use potstill_proto::{cursor::Cursor, wire::StepSeconds};

    use super::*;

    const MICRO_BATCHES: u32 = 3;

    fn at(iteration: u64, exact: bool) -> Start {
        Start { cursor: Cursor::boundary(iteration), exact }
    }

    fn steps(world_size: u32) -> Steps {
        let mut steps = Steps::new(MICRO_BATCHES, 4, at(0, true));
        steps.open(world_size, at(0, true));
        steps
    }

    fn report(iteration: u64, rank: u32, world_size: u32) -> StepReport {
        let share = MicroBatches::share(MICRO_BATCHES, rank, world_size);
        StepReport {
            iteration,
            first_micro_batch: share.first,
            micro_batches: share.count,
            samples: share.count * 4,
            fake_score_loss_sum: f64::from(share.count),
            fake_score_grad_norm: f64::from(rank) + 1.0,
            seconds: Some(StepSeconds { total: f64::from(rank), ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn an_iteration_is_finished_when_every_rank_has_reported_it() {
        let mut steps = steps(2);
        assert_eq!(steps.report(1, report(0, 1, 2)), Ok(Reported::Incomplete));
        assert_eq!(steps.report(1, report(1, 1, 2)), Ok(Reported::Incomplete));
        assert_eq!(steps.report(1, report(0, 1, 2)), Ok(Reported::Repeated));
        let Ok(Reported::Finished { totals, .. }) = steps.report(0, report(0, 0, 2)) else { panic!() };
        assert_eq!((totals.iteration, totals.samples, totals.world_size), (0, 12, 2));
        assert_eq!((totals.fake_score_loss, totals.fake_score_grad_norm), (0.25, 1.0));
        assert_eq!(totals.seconds.total, 1.0);
        assert_eq!(steps.finished(), 1);
    }

    #[test]
    fn leaving_out_or_taking_others_micro_batches_is_a_violation() {
        let mut other_share = report(0, 1, 2);
        other_share.first_micro_batch = 0;
        let mut too_few = report(0, 1, 2);
        too_few.samples = 3;
        for (wrong, says) in [
            (report(1, 1, 2), "this generation started at iteration 0"),
            (other_share, "its share is 2..3"),
            (too_few, "3 samples; its share has 4"),
        ] {
            let error = steps(2).report(1, wrong).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("rank 1 of 2"), "{error}");
        }
        let mut steps = steps(1);
        steps.report(0, report(0, 0, 1)).unwrap();
        let error = steps.report(0, report(2, 0, 1)).unwrap_err().to_string();
        assert!(error.contains("iteration 2") && error.contains("iteration 1 first"), "{error}");
    }

    #[test]
    fn a_completed_iteration_survives_the_loss_of_a_report() {
        let mut steps = steps(2);
        steps.report(0, report(0, 0, 2)).unwrap();
        steps.report(0, report(1, 0, 2)).unwrap();
        // Rank 0 holds the state after both iterations; rank 1's reports were lost with it.
        let closed = steps.open(1, at(2, false));
        let said: Vec<_> = closed.iter().map(|t| (t.iteration, t.samples, t.fake_score_loss)).collect();
        assert_eq!(said, [(0, 12, 0.25), (1, 12, 0.25)]);
        assert_eq!(steps.finished(), 2);
        assert!(matches!(steps.report(0, report(2, 0, 1)), Ok(Reported::Finished { .. })));
    }

    #[test]
    fn what_no_survivor_completed_is_computed_again() {
        let mut steps = steps(2);
        steps.report(1, report(0, 1, 2)).unwrap();
        assert_eq!(steps.open(1, at(0, true)), []);
        assert!(matches!(steps.report(0, report(0, 0, 1)), Ok(Reported::Finished { .. })));
        assert!(steps.report(0, report(2, 0, 1)).is_err());
    }

    #[test]
    fn a_peer_may_have_moved_on_since_it_last_spoke() {
        let mut steps = steps(1);
        steps.open(1, at(4, false));
        assert!(steps.report(0, report(3, 0, 1)).is_err());
        assert!(matches!(steps.report(0, report(6, 0, 1)), Ok(Reported::Finished { .. })));
        assert_eq!(steps.finished(), 7);
    }
}
