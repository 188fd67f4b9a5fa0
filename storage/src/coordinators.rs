//! Where the coordinators of a run are: one object for each that has taken the run over, in their order, and the run's join key.

use bytes::Bytes;
use object_store::Error as StoreError;
use serde::{Deserialize, Serialize};

use crate::{Error, Run, journal::Journal, layout, new_file};

/// A coordinator, as its object tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coordinator {
    /// Its name. It tells a worker that its storage is the coordinator's, and a coordinator that another one has taken over.
    pub name: String,
    /// `host:port`, for other machines.
    pub address: String,
    /// SHA-256 of its TLS certificate, hexadecimal; absent where it serves without TLS and lets everybody in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
    /// How the run has ended under it. A worker that its last message did not reach reads it here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Ended>,
}

/// The end of a run, as its workers are told it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Whether the workers have done what they were to do.
    pub success: bool,
    /// Why it has ended.
    pub reason: String,
}

impl Run {
    /// Writes the object of the coordinator that has just written its first record into the journal: a later coordinator's
    /// object comes after it, whenever each is written.
    ///
    /// # Errors
    /// The store's error.
    pub async fn announce(&self, journal: &Journal, coordinator: &Coordinator) -> Result<(), Error> {
        let text = self.told(coordinator)?;
        self.create(&layout::coordinator_key(journal.length()), text).await
    }

    /// Adds to the object of a coordinator how the run has ended. `announced`: the journal's length when it was
    /// announced.
    ///
    /// # Errors
    /// The store's error.
    pub async fn announce_end(&self, announced: u64, coordinator: &Coordinator) -> Result<(), Error> {
        let text = self.told(coordinator)?;
        self.put(&layout::coordinator_key(announced), text).await
    }

    /// The run's newest coordinator, which may have ended; `None` when there was none.
    ///
    /// # Errors
    /// The store's error; [`Error::Damaged`].
    pub async fn coordinator(&self) -> Result<Option<Coordinator>, Error> {
        let keys = self.list(layout::COORDINATORS).await?.into_iter().map(|(key, _)| key);
        let newest = keys.rev().find(|key| layout::is_coordinator_key(key));
        let Some(newest) = newest else { return Ok(None) };
        let Some(bytes) = self.get(&newest).await? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|e| self.unusable(&newest, e))
    }

    /// Whether a coordinator of this name has announced itself in this storage, whether or not another one came after it.
    ///
    /// # Errors
    /// The store's error.
    pub async fn has_coordinator(&self, name: &str) -> Result<bool, Error> {
        for (key, _) in self.list(layout::COORDINATORS).await?.into_iter().rev() {
            let Some(bytes) = self.get(&key).await? else { continue };
            if serde_json::from_slice::<Coordinator>(&bytes).is_ok_and(|found| found.name == name) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The run's join key, as text; `None` when it has none.
    ///
    /// # Errors
    /// The store's error; [`Error::Damaged`] when it is not UTF-8.
    pub async fn join_key(&self) -> Result<Option<String>, Error> {
        let Some(bytes) = self.get(layout::JOIN_KEY).await? else { return Ok(None) };
        let text = String::from_utf8(bytes.into()).map_err(|e| self.unusable(layout::JOIN_KEY, e))?;
        Ok(Some(text.trim().to_owned()))
    }

    /// Writes the run's join key, unless it has one. In a folder only the user who writes it can read it.
    ///
    /// # Errors
    /// The store's error.
    pub async fn keep_join_key(&self, key: &str) -> Result<(), Error> {
        let text = Bytes::from(format!("{key}\n"));
        let written = match self.local(layout::JOIN_KEY) {
            Some(file) => new_file::create(&file, &text, new_file::SECRET).map_err(|source| match source {
                StoreError::AlreadyExists { .. } => {
                    Error::AlreadyExists { place: file.display().to_string() }
                }
                source => Error::Store { operation: "write", place: file.display().to_string(), source },
            }),
            None => self.create(layout::JOIN_KEY, text).await,
        };
        match written {
            Err(Error::AlreadyExists { .. }) => Ok(()),
            other => other,
        }
    }

    fn told(&self, coordinator: &Coordinator) -> Result<Bytes, Error> {
        let text = serde_json::to_vec_pretty(coordinator);
        text.map(Bytes::from).map_err(|e| self.unusable(layout::COORDINATORS, e))
    }

    fn unusable(&self, key: &str, problem: impl std::fmt::Display) -> Error {
        Error::Damaged { place: self.describe(key), problem: problem.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;
    use crate::Root;

    fn coordinator(name: &str) -> Coordinator {
        let certificate = Some("ab".into());
        Coordinator { name: name.into(), address: "host:1".into(), certificate, ended: None }
    }

    #[tokio::test]
    async fn a_coordinator_that_announces_itself_late_hides_no_later_one() {
        let run = Root::open("memory:///").unwrap().run(&"r".parse().unwrap());
        assert_eq!(run.coordinator().await.unwrap(), None);
        let (mut journal, _) = Journal::open(&run).await.unwrap();
        journal.append("first".into()).await.unwrap();
        let late = journal.clone();
        journal.append("second".into()).await.unwrap();
        run.announce(&journal, &coordinator("second")).await.unwrap();
        run.announce(&late, &coordinator("first")).await.unwrap();
        assert_eq!(run.coordinator().await.unwrap(), Some(coordinator("second")));
        for (name, known) in [("first", true), ("second", true), ("third", false)] {
            assert_eq!(run.has_coordinator(name).await.unwrap(), known);
        }
    }

    #[tokio::test]
    async fn the_join_key_is_written_once_and_only_its_writer_can_read_it() {
        let folder = tempfile::tempdir().unwrap();
        for root in [Root::open(folder.path().to_str().unwrap()).unwrap(), Root::open("memory:///").unwrap()]
        {
            let run = root.run(&"r".parse().unwrap());
            assert_eq!(run.join_key().await.unwrap(), None);
            run.keep_join_key("one").await.unwrap();
            run.keep_join_key("two").await.unwrap();
            assert_eq!(run.join_key().await.unwrap().as_deref(), Some("one"));
        }
        let mode = fs::metadata(folder.path().join("runs/r/join.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path().join("runs/r")).unwrap().count(), 1);
    }
}
