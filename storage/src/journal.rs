//! The journal: a run's history as create-only records, which also fences coordinators.
//!
//! Two coordinators of one run cannot both create record n + 1: the second one gets an error, and must stop.

use bytes::Bytes;

use crate::{Error, Run, layout};

/// A journal, positioned after its newest record. The caller interprets the records.
#[derive(Debug)]
pub struct Journal {
    run: Run,
    next: u64,
}

impl Journal {
    /// Opens a run's journal and reads its records, in order.
    ///
    /// # Errors
    /// The store's error; [`Error::Damaged`] when a record is missing.
    pub async fn open(run: &Run) -> Result<(Self, Vec<Bytes>), Error> {
        let mut records = Vec::new();
        for (key, _) in run.list(layout::JOURNAL).await? {
            let Some(sequence) = layout::journal_sequence(&key) else { continue };
            let missing = || Error::Damaged {
                place: run.describe(&layout::journal_key(records.len() as u64)),
                problem: format!("it is missing, though record {sequence} exists"),
            };
            if sequence != records.len() as u64 {
                return Err(missing());
            }
            let record = run.get(&key).await?.ok_or_else(missing)?;
            records.push(record);
        }
        Ok((Self { run: run.clone(), next: records.len() as u64 }, records))
    }

    /// A check, to be run in the background, whether another coordinator has written to the journal: a coordinator that
    /// writes nothing would not notice it otherwise. Returns the number of the record that was found, if there is one.
    pub fn watch(&self) -> impl Future<Output = Option<u64>> + use<> {
        let (run, next) = (self.run.clone(), self.next);
        // After an error nothing is known; the check is repeated later.
        async move { run.get(&layout::journal_key(next)).await.ok().flatten().map(|_| next) }
    }

    /// Marks the record that [`watch`](Self::watch) has found as another coordinator's.
    ///
    /// # Errors
    /// [`Error::Fenced`].
    pub fn watched(&self, found: u64) -> Result<(), Error> {
        if found < self.next {
            return Ok(());
        }
        Err(Error::Fenced { place: self.run.describe(&layout::journal_key(found)) })
    }

    /// Writes the next record.
    ///
    /// # Errors
    /// [`Error::Fenced`] when another coordinator has written it; otherwise the store's error.
    pub async fn append(&mut self, record: Bytes) -> Result<(), Error> {
        match self.run.create(&layout::journal_key(self.next), record).await {
            Ok(()) => {
                self.next += 1;
                Ok(())
            }
            Err(Error::AlreadyExists { place }) => Err(Error::Fenced { place }),
            Err(error) => Err(error),
        }
    }
}
