//! Standard error, shared by the log and the progress bar so that their output does not mix.

use std::io::{self, IsTerminal, Write};

use indicatif::{MultiProgress, ProgressDrawTarget};
use potstill_logging::LogFormat;

/// Standard error. Clones share it.
#[derive(Clone, Debug)]
pub struct Screen {
    bars: MultiProgress,
}

impl Screen {
    /// Takes over standard error, and sends the log there. `RUST_LOG` sets the log level; without it, `info` and above.
    #[must_use]
    pub fn new(format: LogFormat) -> Self {
        let terminal = io::stderr().is_terminal();
        let target = match format {
            LogFormat::Human if terminal => ProgressDrawTarget::stderr(),
            _ => ProgressDrawTarget::hidden(),
        };
        let screen = Self { bars: MultiProgress::with_draw_target(target) };
        let writer = screen.clone();
        format.start_with(move || writer.clone());
        screen
    }

    /// A screen that shows no bar and leaves the log alone.
    #[cfg(test)]
    pub fn without_bar() -> Self {
        Self { bars: MultiProgress::with_draw_target(ProgressDrawTarget::hidden()) }
    }

    /// Whether it shows a bar, above which all other output must be written.
    #[must_use]
    pub fn has_bar(&self) -> bool {
        !self.bars.is_hidden()
    }

    /// Removes the bars from the screen for good.
    pub fn clear(&self) {
        let _ = self.bars.clear();
        self.bars.set_draw_target(ProgressDrawTarget::hidden());
    }

    /// Adds a bar.
    #[must_use]
    pub fn add(&self, bar: indicatif::ProgressBar) -> indicatif::ProgressBar {
        self.bars.add(bar)
    }
}

/// Never fails: a log that can no longer be written does not end a run.
impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bars.suspend(|| {
            let _ = io::stderr().write_all(bytes);
        });
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
