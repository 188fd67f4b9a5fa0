//! Why the work of a generation stops before its end.

use potstill_c10d::{Error, ErrorKind};
use potstill_proto::cursor::Cursor;

/// Why the work of a generation stops before its end.
pub enum Interruption {
    Left(String),
    Damaged {
        manifest_key: String,
        error: String,
    },
    /// A slice of the state is gone with both of the ranks that held it. `cursor`: an earlier state that the ranks can put
    /// together and that this one holds slices of; the start of the run: none.
    Incomplete {
        cursor: Cursor,
        error: String,
    },
    Collective(Error),
    Fatal(anyhow::Error),
}

impl Interruption {
    /// Its first line.
    pub fn reason(&self) -> String {
        let text = match self {
            Self::Left(reason) => reason.clone(),
            Self::Damaged { error, .. } | Self::Incomplete { error, .. } => error.clone(),
            Self::Collective(error) => error.to_string(),
            Self::Fatal(error) => format!("{error:#}"),
        };
        text.lines().next().unwrap_or_default().to_owned()
    }
}

impl From<potstill_torch_ext::Error> for Interruption {
    fn from(error: potstill_torch_ext::Error) -> Self {
        Self::from(Error::from(error))
    }
}

impl From<Error> for Interruption {
    fn from(error: Error) -> Self {
        match error.kind {
            // Another generation would end in the same way.
            ErrorKind::InvalidInput => Self::Fatal(error.into()),
            _ => Self::Collective(error),
        }
    }
}

impl From<anyhow::Error> for Interruption {
    fn from(error: anyhow::Error) -> Self {
        Self::Fatal(error)
    }
}
