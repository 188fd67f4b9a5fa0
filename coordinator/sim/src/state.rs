//! The state of a worker, as its history.

use potstill_proto::cursor::{Cursor, Phase};

/// A complete state: its cursor, and a hash over every step that led to it, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// What it computes next.
    pub cursor: Cursor,
    /// Hash of its history.
    pub lineage: u64,
}

impl State {
    /// The teacher's weights, before the first step.
    pub const FRESH: Self =
        Self { cursor: Cursor { iteration: 0, phase: Phase::FakeScore }, lineage: 0x9e37_79b9_7f4a_7c15 };

    /// The state after its next optimizer step.
    #[must_use]
    pub fn step(self) -> Self {
        let Cursor { iteration, phase } = self.cursor;
        let (cursor, salt) = match phase {
            Phase::FakeScore => (Cursor { iteration, phase: Phase::Generator }, 2 * iteration),
            Phase::Generator => (Cursor::boundary(iteration + 1), 2 * iteration + 1),
        };
        // SplitMix64's finalizer: the order of steps matters.
        let mut z = (self.lineage ^ salt).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self { cursor, lineage: z ^ (z >> 31) }
    }

    /// The state of an undisturbed run after `iterations` iterations.
    #[must_use]
    pub fn undisturbed(iterations: u64) -> Self {
        (0..2 * iterations).fold(Self::FRESH, |state, _| state.step())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_left_out_shows() {
        let three = State::undisturbed(3);
        assert_eq!(three.cursor, Cursor::boundary(3));
        assert_eq!(State::undisturbed(2).step().step(), three);
        let skipped = State { cursor: Cursor::boundary(2), ..State::undisturbed(1) }.step().step();
        assert_eq!(skipped.cursor, three.cursor);
        assert_ne!(skipped.lineage, three.lineage);
    }
}
