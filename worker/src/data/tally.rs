//! What is broken among many files.

use anyhow::ensure;

/// Counts what is broken among many files: it is left out, until there is too much of it.
#[derive(Default)]
pub(super) struct Tally {
    broken: usize,
    /// The first few, for the message.
    shown: Vec<String>,
}

/// One in so many may be broken.
const ONE_BROKEN_IN: usize = 100;
/// So many of them are shown.
const SHOWN: usize = 3;

impl Tally {
    /// One more, and what is wrong with it.
    pub(super) fn broken(&mut self, what: String) {
        self.broken += 1;
        if self.shown.len() < SHOWN {
            self.shown.push(what);
        }
    }

    /// Reports what is broken beside so many `good` ones.
    ///
    /// # Errors
    /// It is too much.
    pub(super) fn judge(&self, good: usize) -> anyhow::Result<()> {
        let (broken, shown) = (self.broken, self.shown.join("; "));
        ensure!(
            broken <= good.div_ceil(ONE_BROKEN_IN),
            "{broken} of {} images cannot be used: {shown}",
            good + broken
        );
        if broken > 0 {
            tracing::warn!(broken, good, "images that cannot be used are left out: {shown}");
        }
        Ok(())
    }
}
