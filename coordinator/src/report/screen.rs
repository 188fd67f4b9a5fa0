//! Standard error, shared by the log and the progress bar so that they do not tear each other.

use std::io::{self, IsTerminal, Write};

use indicatif::{MultiProgress, ProgressDrawTarget};
use tracing_subscriber::{EnvFilter, fmt::time::ChronoUtc};

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people; with a progress bar on a terminal.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

impl LogFormat {
    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Human => "human",
            Self::Json => "json",
        }
    }
}

/// Standard error. Clones share it.
#[derive(Clone, Debug)]
pub struct Screen {
    bars: MultiProgress,
}

impl Screen {
    /// Takes standard error, and sends the log there. `RUST_LOG` chooses what is logged; without it, `info` and above.
    #[must_use]
    pub fn new(format: LogFormat) -> Self {
        let terminal = io::stderr().is_terminal();
        let target = match format {
            LogFormat::Human if terminal => ProgressDrawTarget::stderr(),
            _ => ProgressDrawTarget::hidden(),
        };
        let screen = Self { bars: MultiProgress::with_draw_target(target) };
        let writer = screen.clone();
        let log = tracing_subscriber::fmt()
            .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")))
            .with_ansi(terminal && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()))
            .with_writer(move || writer.clone());
        // An error here means that a log is already set up, as it is in tests: it stays.
        let _ = match format {
            LogFormat::Human => log
                .compact()
                .with_target(false)
                .with_timer(ChronoUtc::new("%Y-%m-%d %H:%M:%SZ".into()))
                .try_init(),
            LogFormat::Json => {
                std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
                log.json().flatten_event(true).try_init()
            }
        };
        screen
    }

    /// A screen that shows no bar and leaves the log alone.
    #[must_use]
    pub fn without_bar() -> Self {
        Self { bars: MultiProgress::with_draw_target(ProgressDrawTarget::hidden()) }
    }

    /// Whether a bar is on it, above which everything else must be written.
    #[must_use]
    pub fn has_bar(&self) -> bool {
        !self.bars.is_hidden()
    }

    /// Takes the bars off the screen for good.
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

/// Never fails: that nobody can see the log any more is no reason to end a run.
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
