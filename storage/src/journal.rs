//! The journal: a run's history as create-only records, which also fences coordinators.
//!
//! Two coordinators of one run cannot both create record n + 1: the second one gets an error, and must stop. So records are
//! never removed. To read a long journal in few requests, each thousand records are also kept in one object, a segment.

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use crate::{Error, Run, layout};

/// Records that are read at a time.
const READS_AT_ONCE: usize = 64;

/// A journal, positioned after its newest record. The caller interprets the records, which hold no line feed.
#[derive(Clone, Debug)]
pub struct Journal {
    run: Run,
    next: u64,
    /// Segments that are known to exist: the first ones.
    segments: u64,
}

impl Journal {
    /// Opens a run's journal and reads its records, in order.
    ///
    /// # Errors
    /// The store's error; [`Error::Damaged`] when a record is missing.
    pub async fn open(run: &Run) -> Result<(Self, Vec<Bytes>), Error> {
        let mut records = Vec::new();
        let mut segments = 0;
        let keys = run.list(layout::SEGMENTS).await?.into_iter().map(|(key, _)| key);
        let keys: Vec<_> = (0..)
            .zip(keys)
            .map_while(|(n, key)| (layout::segment_index(&key)? == n).then_some(key))
            .collect();
        let mut reading = stream::iter(&keys).map(|key| run.get(key)).buffered(READS_AT_ONCE);
        while let Some(segment) = reading.try_next().await? {
            let Some(lines) = segment.and_then(records_of) else { break };
            records.extend(lines);
            segments += 1;
        }
        let mut last = None;
        if segments > 0 {
            last = Some(layout::journal_key(segments * layout::SEGMENT - 1));
        }
        let mut keys = Vec::new();
        for (key, _) in run.list_after(layout::JOURNAL, last.as_deref()).await? {
            let Some(sequence) = layout::journal_sequence(&key) else { continue };
            let expected = (records.len() + keys.len()) as u64;
            if sequence != expected {
                let problem = format!("it is missing, though record {sequence} exists");
                return Err(Error::Damaged { place: run.describe(&layout::journal_key(expected)), problem });
            }
            keys.push(key);
        }
        let tail: Vec<Bytes> = read(run, &keys).await?;
        records.extend(tail);
        Ok((Self { run: run.clone(), next: records.len() as u64, segments }, records))
    }

    /// A check, to be run in the background: whether another coordinator has written to the journal, or the newest record
    /// is gone. A coordinator that writes nothing would not notice it otherwise. An error of the store says nothing.
    pub fn watch(&self) -> impl Future<Output = Seen> + use<> {
        let (run, next) = (self.run.clone(), self.next);
        async move {
            if let Ok(true) = run.exists(&layout::journal_key(next)).await {
                return Seen::Another(next);
            }
            match next.checked_sub(1) {
                Some(newest) if matches!(run.exists(&layout::journal_key(newest)).await, Ok(false)) => {
                    Seen::Gone(newest)
                }
                _ => Seen::Nothing,
            }
        }
    }

    /// The meaning of what [`watch`](Self::watch) has seen, unless this coordinator has written meanwhile.
    ///
    /// # Errors
    /// [`Error::Fenced`], [`Error::Vanished`].
    pub fn watched(&self, seen: Seen) -> Result<(), Error> {
        let place = |sequence| self.run.describe(&layout::journal_key(sequence));
        match seen {
            Seen::Another(found) if found >= self.next => Err(Error::Fenced { place: place(found) }),
            Seen::Gone(newest) => Err(Error::Vanished { place: place(newest) }),
            Seen::Another(_) | Seen::Nothing => Ok(()),
        }
    }

    /// The number of records.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.next
    }

    /// Writes the next record.
    ///
    /// # Errors
    /// [`Error::Fenced`] when another coordinator has written it; [`Error::Vanished`] when the record before it is gone, and
    /// nothing was written; otherwise the store's error, and the record may or may not be there: it must be written again.
    pub async fn append(&mut self, record: Bytes) -> Result<(), Error> {
        if let Some(newest) = self.next.checked_sub(1)
            && !self.run.exists(&layout::journal_key(newest)).await?
        {
            return Err(Error::Vanished { place: self.run.describe(&layout::journal_key(newest)) });
        }
        match self.run.create(&layout::journal_key(self.next), record).await {
            Ok(()) => {
                self.next += 1;
                Ok(())
            }
            Err(Error::AlreadyExists { place }) => Err(Error::Fenced { place }),
            Err(error) => Err(error),
        }
    }

    /// Writes the next segment, in the background, if enough records exist.
    pub fn segment(&mut self) -> Option<impl Future<Output = Result<(), Error>> + use<>> {
        let index = self.segments;
        if (index + 1) * layout::SEGMENT > self.next {
            return None;
        }
        // Where it fails, the next coordinator writes it.
        self.segments += 1;
        let run = self.run.clone();
        Some(async move {
            let first = index * layout::SEGMENT;
            let keys: Vec<_> = (first..first + layout::SEGMENT).map(layout::journal_key).collect();
            let records = read(&run, &keys).await?;
            match run.create(&layout::segment_key(index), records.join(&b"\n"[..]).into()).await {
                // Another coordinator was faster: the records are the same.
                Err(Error::AlreadyExists { .. }) => Ok(()),
                other => other,
            }
        })
    }
}

/// What [`Journal::watch`] has seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Nothing new.
    Nothing,
    /// A record of this number, which this coordinator had not written when it looked.
    Another(u64),
    /// The newest record, of this number, is not there.
    Gone(u64),
}

/// These records, in order.
async fn read(run: &Run, keys: &[String]) -> Result<Vec<Bytes>, Error> {
    let one = async |key: &String| {
        let missing = || Error::Damaged { place: run.describe(key), problem: "it is missing".to_owned() };
        run.get(key).await?.ok_or_else(missing)
    };
    stream::iter(keys).map(one).buffered(READS_AT_ONCE).try_collect().await
}

/// The records of a segment; `None` where there are not as many as there should be.
fn records_of(segment: Bytes) -> Option<Vec<Bytes>> {
    let records: Vec<_> = segment.split(|byte| *byte == b'\n').map(|line| segment.slice_ref(line)).collect();
    (records.len() as u64 == layout::SEGMENT).then_some(records)
}
