//! The journal's records: all that a coordinator needs to know after a crash, and the history of the run.

use potstill_proto::{
    cursor::Generation,
    message::Source,
    scores::{self, Scores, Subject},
};
use serde::{Deserialize, Serialize};

use crate::observation::Outcome;

/// Version of the journal's format.
const VERSION: u32 = 1;

/// One entry of the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
pub enum Record {
    /// The first entry of a run.
    RunStarted {
        /// The coordinator that writes it.
        coordinator: String,
        /// The run's name.
        run_id: String,
        /// Address at which it can be reached.
        #[serde(default)]
        address: String,
        /// SHA-256 of its TLS certificate; none where it serves without TLS.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        certificate: Option<String>,
    },
    /// A coordinator took the run over.
    Resumed {
        /// The coordinator that writes it.
        coordinator: String,
        /// Iterations of the checkpoint that it continues from.
        iteration: u64,
        /// Iterations that the run is now to reach.
        iterations: u64,
        /// Address at which it can be reached.
        #[serde(default)]
        address: String,
        /// SHA-256 of its TLS certificate; none where it serves without TLS.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        certificate: Option<String>,
    },
    /// A generation exists; written before any member is told of it.
    GenerationOpened {
        /// Its number.
        generation: Generation,
        /// Its members, by rank.
        members: Vec<String>,
        /// Where its state comes from.
        source: Source,
        /// Completed iterations of that state; a peer may be further than its last message said.
        #[serde(default)]
        start: u64,
        /// Iterations that will be computed again, because no surviving worker holds their result.
        #[serde(default)]
        repeats: u64,
        /// Why it was opened.
        reason: String,
    },
    /// The teacher or the student was scored.
    Evaluated(Evaluation),
    /// A checkpoint exists.
    Committed {
        /// Completed iterations.
        iteration: u64,
        /// Its manifest's key below the run's folder.
        manifest_key: String,
    },
    /// The run ended; it may be resumed.
    Ended {
        /// The outcome.
        outcome: Outcome,
    },
}

/// One evaluation, as the journal keeps it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// The generation that evaluated.
    pub generation: Generation,
    /// Completed iterations.
    pub iteration: u64,
    /// Whether the teacher was scored rather than the student.
    pub of_teacher: bool,
    /// The result.
    #[serde(flatten)]
    pub scores: Scores,
}

impl Evaluation {
    /// A key that grows from one evaluation of a run to the next: a generation scores the teacher before its students.
    #[must_use]
    pub fn order(&self) -> (Generation, u64, bool) {
        (self.generation, self.iteration, !self.of_teacher)
    }
}

impl From<scores::Evaluation> for Evaluation {
    fn from(evaluation: scores::Evaluation) -> Self {
        let scores::Evaluation { generation, iteration, subject, scores } = evaluation;
        Self { generation, iteration, of_teacher: subject == Subject::Teacher, scores }
    }
}

/// A record that this version cannot read.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// Not JSON, or not a record of the journal.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    /// Written by a newer Potstill.
    #[error("it is in version {0} of the journal's format; this Potstill reads version {VERSION}")]
    Version(u32),
}

#[derive(Serialize, Deserialize)]
struct Versioned<R> {
    version: u32,
    #[serde(flatten)]
    record: R,
}

#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

impl Record {
    /// The journal's bytes for this record: JSON.
    ///
    /// # Errors
    /// None that a record made by this crate can cause.
    pub fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec(&Versioned { version: VERSION, record: self })
    }

    /// Reads [`Record::encode`]'s bytes.
    ///
    /// # Errors
    /// [`Unreadable`].
    pub fn decode(bytes: &[u8]) -> Result<Self, Unreadable> {
        let VersionOnly { version } = serde_json::from_slice(bytes)?;
        if version != VERSION {
            return Err(Unreadable::Version(version));
        }
        Ok(serde_json::from_slice::<Versioned<Self>>(bytes)?.record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_read_back_as_they_were_written() {
        let scores = Scores { fid: Some(1.5), samples: 3, ..Scores::default() };
        let evaluation = Evaluation { generation: Generation(2), iteration: 4, of_teacher: true, scores };
        for record in [
            Record::RunStarted {
                coordinator: "c".into(),
                run_id: "r".into(),
                address: "a:1".into(),
                certificate: Some("ab".into()),
            },
            Record::Resumed {
                coordinator: "c".into(),
                iteration: 3,
                iterations: 9,
                address: "a:1".into(),
                certificate: Some("ab".into()),
            },
            Record::GenerationOpened {
                generation: Generation(2),
                members: vec!["a".into()],
                source: Source::Checkpoint { manifest_key: "k".into() },
                start: 5,
                repeats: 2,
                reason: "b died".into(),
            },
            Record::Evaluated(evaluation),
            Record::Committed { iteration: 3, manifest_key: "k".into() },
            Record::Ended { outcome: Outcome::Stopped { iteration: 3, reason: "asked".into() } },
        ] {
            assert_eq!(Record::decode(&record.encode().unwrap()).unwrap(), record);
        }
    }

    #[test]
    fn a_newer_journal_is_refused_by_version() {
        let error = Record::decode(br#"{"version":2,"record":"merged"}"#).unwrap_err();
        assert!(error.to_string().contains("version 2"), "{error}");
    }
}
