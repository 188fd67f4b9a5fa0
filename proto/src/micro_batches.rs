//! The distribution of an iteration's micro-batches over the ranks.

use serde::{Deserialize, Serialize};

/// The micro-batches `first .. first + count` of every iteration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MicroBatches {
    /// Index of the first one.
    pub first: u32,
    /// Their number.
    pub count: u32,
}

impl MicroBatches {
    /// The share of `rank` when `total` micro-batches are spread over `world_size` ranks as evenly as possible: shares
    /// differ by at most one, lower ranks take the larger ones, and together they cover each index exactly once.
    ///
    /// `rank` must be below `world_size`.
    ///
    /// ```
    /// use potstill_proto::micro_batches::MicroBatches;
    ///
    /// let shares = [0, 1, 2].map(|rank| MicroBatches::share(8, rank, 3).indices());
    /// assert_eq!(shares, [0..3, 3..6, 6..8]);
    /// ```
    #[must_use]
    pub fn share(total: u32, rank: u32, world_size: u32) -> Self {
        let (each, extra) = (total / world_size, total % world_size);
        Self { first: rank * each + rank.min(extra), count: each + u32::from(rank < extra) }
    }

    /// The indices.
    pub fn indices(self) -> std::ops::Range<u32> {
        self.first..self.first + self.count
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn shares_cover_every_micro_batch_once_and_evenly(total in 0u32..5000, world in 1u32..700) {
            let shares: Vec<_> = (0..world).map(|r| MicroBatches::share(total, r, world)).collect();
            let covered: Vec<u32> = shares.iter().flat_map(|s| s.indices()).collect();
            prop_assert_eq!(covered, (0..total).collect::<Vec<_>>());
            let (least, most) = (shares.iter().map(|s| s.count).min(), shares.iter().map(|s| s.count).max());
            prop_assert!(most.unwrap() - least.unwrap() <= 1);
        }
    }
}
