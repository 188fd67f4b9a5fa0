//! Ranks that compute more slowly than the others for many iterations in a row. All others wait for them at every reduction.

/// Iterations in a row after which a rank is a straggler, or is none any more.
const IN_A_ROW: u32 = 20;

/// Observes how long each rank of a generation computes.
#[derive(Debug)]
pub struct Stragglers {
    factor: f64,
    ranks: Vec<Rank>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Rank {
    straggles: bool,
    /// Iterations in a row that speak against that.
    against: u32,
    pace: f64,
}

/// A rank has become a straggler, or is none any more.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    /// The rank.
    pub rank: u32,
    /// Whether it straggles from now on.
    pub straggles: bool,
    /// Seconds that it computed for a micro-batch in the last iteration.
    pub seconds: f64,
    /// The median over all ranks.
    pub median: f64,
}

impl Stragglers {
    /// A rank straggles when it takes `factor` times the median.
    #[must_use]
    pub fn new(factor: f64) -> Self {
        Self { factor, ranks: Vec::new() }
    }

    /// A generation of so many ranks is opened: other processes may have its ranks.
    pub fn open(&mut self, world_size: u32) {
        self.ranks = vec![Rank::default(); world_size as usize];
    }

    /// An iteration is finished; `paces` are the seconds of each rank's forward and backward passes for a micro-batch. The median
    /// is the lower one, so that of two ranks the slower can straggle.
    pub fn finished(&mut self, paces: &[f64]) -> Vec<Change> {
        let mut sorted = paces.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let Some(median) = sorted.get(sorted.len().saturating_sub(1) / 2).copied() else { return vec![] };
        if sorted.len() < 2 || !median.is_finite() || median <= 0.0 {
            return vec![];
        }
        let mut changes = Vec::new();
        for (number, (rank, pace)) in (0u32..).zip(self.ranks.iter_mut().zip(paces)) {
            rank.pace = *pace;
            let slow = *pace > self.factor * median;
            rank.against = if slow == rank.straggles { 0 } else { rank.against + 1 };
            if rank.against == IN_A_ROW {
                *rank = Rank { straggles: slow, against: 0, pace: *pace };
                changes.push(Change { rank: number, straggles: slow, seconds: *pace, median });
            }
        }
        changes
    }

    /// Seconds that a rank computed for a micro-batch in the last finished iteration, and whether it straggles; none before the first.
    #[must_use]
    pub fn of(&self, rank: u32) -> Option<(f64, bool)> {
        let rank = self.ranks.get(rank as usize)?;
        (rank.pace > 0.0).then_some((rank.pace, rank.straggles))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn many(stragglers: &mut Stragglers, paces: &[f64], times: u32) -> Vec<Change> {
        (0..times).flat_map(|_| stragglers.finished(paces)).collect()
    }

    #[test]
    fn one_that_stays_slow_is_named_once_and_again_when_it_keeps_up() {
        for (paces, median) in
            [(vec![1.0, 1.6], 1.0), (vec![1.0, 1.7, 1.1], 1.1), (vec![1.0, 1.9, 1.1, 1.2], 1.1)]
        {
            let mut stragglers = Stragglers::new(1.5);
            stragglers.open(paces.len() as u32);
            assert!(many(&mut stragglers, &paces, IN_A_ROW - 1).is_empty());
            let named = many(&mut stragglers, &paces, 3 * IN_A_ROW);
            assert_eq!(named, [Change { rank: 1, straggles: true, seconds: paces[1], median }]);
            assert_eq!(stragglers.of(1), Some((paces[1], true)));
            let even = vec![1.0; paces.len()];
            let again = many(&mut stragglers, &even, 2 * IN_A_ROW);
            assert_eq!(again, [Change { rank: 1, straggles: false, seconds: 1.0, median: 1.0 }]);
        }
    }

    #[test]
    fn a_moment_does_not_count_and_neither_does_another_generation() {
        let mut stragglers = Stragglers::new(1.5);
        stragglers.open(2);
        for _ in 0..5 {
            assert!(many(&mut stragglers, &[1.0, 3.0], IN_A_ROW - 1).is_empty());
            assert!(many(&mut stragglers, &[1.0, 1.0], 1).is_empty());
        }
        assert!(many(&mut stragglers, &[1.0, 3.0], IN_A_ROW - 1).is_empty());
        stragglers.open(2);
        assert!(many(&mut stragglers, &[1.0, 3.0], IN_A_ROW - 1).is_empty());
    }

    #[test]
    fn a_single_rank_or_a_zero_time_names_no_straggler() {
        let mut stragglers = Stragglers::new(1.5);
        stragglers.open(1);
        assert!(many(&mut stragglers, &[9.0], 50).is_empty());
        stragglers.open(2);
        assert!(many(&mut stragglers, &[0.0, 9.0], 50).is_empty());
        assert!(many(&mut stragglers, &[f64::NAN, f64::NAN], 50).is_empty());
    }
}
