//! The masks of adapters' dropout, named so that a block that is computed again draws the same ones.
//!
//! Each pass of a network in training mode takes a seed from libtorch's own generator, which the caller seeds. A mask is drawn from
//! the seed of its pass and its number in it, in which a block counts as one and has numbers of its own. Outside of such a pass
//! there are no masks.

use std::cell::Cell;

use potstill_torch_ext::bernoulli;
use tch::{Device, Kind, Tensor};

/// The seed of a pass, or of a block in it, and how many masks and blocks it has had.
type Names = (u64, u64);

thread_local! {
    static NAMES: Cell<Option<Names>> = const { Cell::new(None) };
}

/// Runs `forward`, in which adapters have dropout if it is `active`.
pub(crate) fn pass<T>(active: bool, forward: impl FnOnce() -> T) -> T {
    // On the host, whose generator is the same for every device.
    let seed = active.then(|| Tensor::randint(i64::MAX, [1], (Kind::Int64, Device::Cpu)).int64_value(&[0]));
    within(seed, forward)
}

/// Runs `forward` with the names of this seed; without one there are no masks.
pub(crate) fn within<T>(seed: Option<i64>, forward: impl FnOnce() -> T) -> T {
    // Put back also where `forward` panics: a block's panic is caught.
    struct Before(Option<Names>);
    impl Drop for Before {
        fn drop(&mut self) {
            NAMES.set(self.0);
        }
    }
    let _before = Before(NAMES.replace(seed.map(|seed| (seed.cast_unsigned(), 0))));
    forward()
}

/// The seed of the next mask or block; `None` outside of a pass that has masks.
pub(crate) fn next() -> Option<i64> {
    let (seed, count) = NAMES.get()?;
    NAMES.set(Some((seed, count + 1)));
    // SplitMix64: every bit of the result depends on every bit of both.
    let mut mixed = seed.wrapping_add((count + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    Some((mixed ^ (mixed >> 31)).cast_signed())
}

/// x, of which each element is 0 with this probability, and the others are divided by the probability to be none.
pub(crate) fn dropped(x: &Tensor, probability: f64, seed: i64) -> Tensor {
    let kept = 1.0 - probability;
    // Not libtorch's dropout, whose mask depends on the strides of x: a block that is computed again may have others.
    let mut mask = Tensor::empty(x.size(), (x.kind(), x.device()));
    if let Err(error) = bernoulli(&mask, kept, seed.cast_unsigned()) {
        panic!("{error}");
    }
    x * mask.g_div_scalar_(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_from_the_seed_alone_and_end_with_the_pass() {
        let names = |seed| within(Some(seed), || [next(), within(next(), next), next()]);
        assert_eq!(names(7), names(7));
        let all: std::collections::BTreeSet<_> = names(7).into_iter().chain(names(8)).collect();
        assert_eq!(all.len(), 6);
        assert_eq!(next(), None);
        assert_ne!(pass(true, next), pass(true, next), "each pass has its own");
        assert_eq!(pass(false, next), None);
    }

    #[test]
    fn a_mask_leaves_the_mean() {
        let x = Tensor::ones([200_000], (Kind::Float, Device::Cpu));
        let seen = dropped(&x, 0.25, 3);
        assert!((seen.mean(Kind::Float).double_value(&[]) - 1.0).abs() < 0.01);
        let kept = seen.ne(0.0).sum(Kind::Int64).int64_value(&[]) as f64 / 2e5;
        assert!((kept - 0.75).abs() < 0.01, "{kept}");
        assert_eq!(seen, dropped(&x, 0.25, 3));
        assert_ne!(seen, dropped(&x, 0.25, 4));
        // Whatever the strides.
        let square = x.view([400, 500]);
        let transposed = square.transpose(0, 1).contiguous().transpose(0, 1);
        assert_eq!(dropped(&square, 0.25, 3), dropped(&transposed, 0.25, 3));
    }
}
