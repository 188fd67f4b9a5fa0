//! Counts broken images, or rows, among many.

use anyhow::ensure;

/// Counts broken images, or rows: they are left out, unless there are too many.
#[derive(Default)]
pub(super) struct Tally {
    broken: usize,
    /// The first few errors, for the message.
    shown: Vec<String>,
}

/// The run fails when more than one in this many is broken.
const ONE_BROKEN_IN: usize = 100;
/// Number of errors in the message.
const SHOWN: usize = 3;

impl Tally {
    /// Counts a broken one with its error.
    pub(super) fn broken(&mut self, what: String) {
        self.broken += 1;
        if self.shown.len() < SHOWN {
            self.shown.push(what);
        }
    }

    /// Reports the broken ones beside `good` good ones; `what` they are, in the plural.
    ///
    /// # Errors
    /// Too many are broken.
    pub(super) fn judge(&self, good: usize, what: &str) -> anyhow::Result<()> {
        let (broken, shown) = (self.broken, self.shown.join("; "));
        ensure!(
            broken <= good.div_ceil(ONE_BROKEN_IN),
            "{broken} of {} {what} cannot be used: {shown}",
            good + broken
        );
        if broken > 0 {
            tracing::warn!(broken, good, "broken {what} are left out: {shown}");
        }
        Ok(())
    }
}
