//! Where log lines go: standard error, for people or as JSON.

use std::io::IsTerminal;

use clap::ValueEnum;
use tracing_subscriber::{EnvFilter, fmt::time::ChronoUtc};

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

impl LogFormat {
    /// The value on the command line, for handing on to a child.
    pub fn as_argument(self) -> &'static str {
        match self {
            Self::Human => "human",
            Self::Json => "json",
        }
    }

    /// Starts logging. `RUST_LOG` chooses what; the default is `info`.
    pub fn start(self) {
        let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal());
        match self {
            Self::Human => {
                let time = ChronoUtc::new("%Y-%m-%d %H:%M:%SZ".to_owned());
                subscriber.with_target(false).compact().with_timer(time).init();
            }
            Self::Json => {
                std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
                subscriber.json().flatten_event(true).init();
            }
        }
    }
}
