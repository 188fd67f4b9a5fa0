//! Log lines on standard error, and errors with their causes on one line, for both programs.
//!
//! ```
//! let error = anyhow::anyhow!("not found").context("cannot read x: not found").context("loading");
//! assert_eq!(potstill_logging::chain(&error), "loading: cannot read x: not found");
//! ```

use std::{
    fmt::Display,
    io::{ErrorKind, IsTerminal, Write},
};

use clap::ValueEnum;
use tracing_subscriber::{
    EnvFilter,
    fmt::{MakeWriter, time::ChronoUtc},
};

/// The storage's client tells of each of its own retries; what fails in the end is told by the program.
const DEFAULT_LEVELS: &str = "info,object_store=warn";

/// The format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Text; with a progress bar on a terminal.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

impl LogFormat {
    /// Its name on the command line, for a child process.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Human => "human",
            Self::Json => "json",
        }
    }

    /// Starts logging to standard error.
    pub fn start(self) {
        self.start_with(std::io::stderr);
    }

    /// Starts logging to a writer that stands for standard error. `RUST_LOG` sets the log level; the default is `info`, but for libraries.
    /// A logger that is set up already stays, as in tests.
    pub fn start_with(self, writer: impl for<'a> MakeWriter<'a> + Send + Sync + 'static) {
        let colours =
            std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        let log = tracing_subscriber::fmt()
            .with_env_filter(
                EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_LEVELS)),
            )
            .with_ansi(colours)
            .with_writer(writer);
        let _ = match self {
            Self::Human => log
                .compact()
                .with_target(false)
                .with_timer(ChronoUtc::new("%Y-%m-%d %H:%M:%SZ".to_owned()))
                .try_init(),
            Self::Json => {
                std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
                log.json().flatten_event(true).try_init()
            }
        };
    }
}

/// Writes a line to standard output. A reader that has gone away, as `head` does, ends the program as SIGPIPE would, without a
/// panic.
pub fn print(line: impl Display) {
    if writeln!(std::io::stdout().lock(), "{line}").is_err_and(|error| error.kind() == ErrorKind::BrokenPipe)
    {
        std::process::exit(128 + 13);
    }
}

/// The error and its causes on one line, each once: many errors repeat their cause in their own text.
#[must_use]
pub fn chain(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if !line.contains(&text) {
            let separator = if line.is_empty() { "" } else { ": " };
            line = line + separator + &text;
        }
    }
    line
}
