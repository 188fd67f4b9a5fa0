//! The run for TensorBoard: event files in the run's `tensorboard/` folder, with the numbers of `metrics.jsonl`, the pictures of the
//! student, and the specification as text.
//!
//! A file is a sequence of records: the length and its checksum, a message, and the message's checksum (CRC-32C, masked). The
//! messages are TensorFlow's `Event` (tensorflow/core/util/event.proto), of which the fields below are used. In a folder of this
//! machine each coordinator appends to a file of its own. An object store cannot append: there each save is a file, which readers
//! take in the order of their names.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    path::Path,
};

use anyhow::Context;
use potstill_storage::{
    Run,
    layout::{self, PICTURES},
};
use prost::Message;

use super::{metrics::Row, scalars};

/// Folder of the event files below the run's.
pub const FOLDER: &str = "tensorboard";
/// The format's version, which each file begins with.
const VERSION: &str = "brain.Event:2";

#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

/// Tells readers to forget what they have read at this event's step and beyond.
#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// `SessionLog.SessionStatus.START`.
const START: i32 = 1;

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    values: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(message, optional, tag = "9")]
    metadata: Option<Metadata>,
    #[prost(oneof = "Content", tags = "2, 4, 8")]
    content: Option<Content>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Content {
    #[prost(float, tag = "2")]
    Simple(f32),
    #[prost(message, tag = "4")]
    Image(Image),
    #[prost(message, tag = "8")]
    Tensor(Texts),
}

#[derive(Clone, PartialEq, Message)]
struct Image {
    #[prost(int32, tag = "1")]
    height: i32,
    #[prost(int32, tag = "2")]
    width: i32,
    /// Channels.
    #[prost(int32, tag = "3")]
    colorspace: i32,
    /// A PNG.
    #[prost(bytes = "vec", tag = "4")]
    encoded: Vec<u8>,
}

/// A `TensorProto` of texts.
#[derive(Clone, PartialEq, Message)]
struct Texts {
    /// `DT_STRING`.
    #[prost(int32, tag = "1")]
    dtype: i32,
    #[prost(bytes = "vec", repeated, tag = "8")]
    texts: Vec<Vec<u8>>,
}

const DT_STRING: i32 = 7;

#[derive(Clone, PartialEq, Message)]
struct Metadata {
    #[prost(message, optional, tag = "1")]
    plugin: Option<Plugin>,
}

#[derive(Clone, PartialEq, Message)]
struct Plugin {
    #[prost(string, tag = "1")]
    name: String,
}

/// Writes a run's event files.
#[derive(Debug)]
pub struct Tensorboard {
    run: Run,
    specification: String,
    /// None before the first save.
    writer: Option<Writer>,
    /// `wall_seconds` of the newest row that is written.
    written: f64,
    /// Iteration of the newest picture that is written.
    picture: Option<u64>,
    /// Where training has gone back to, since the last save.
    rewound: Option<u64>,
}

#[derive(Debug)]
enum Writer {
    Appending(File),
    /// The time in the names, and the number of the next file.
    Numbered(i64, u64),
}

impl Tensorboard {
    /// Continues the files of a run whose metrics have rows up to `written` seconds, and up to the iteration `reached`. Writes
    /// nothing yet.
    #[must_use]
    pub fn new(run: Run, specification: String, written: f64, reached: Option<u64>) -> Self {
        Self { run, specification, writer: None, written, picture: reached, rewound: None }
    }

    /// Training continues from the state after `iteration` iterations.
    pub fn rewind(&mut self, iteration: u64) {
        self.rewound = Some(self.rewound.map_or(iteration, |before| before.min(iteration)));
        self.picture = self.picture.map(|picture| picture.min(iteration));
    }

    /// Writes the rows that are new, and the pictures of iterations before `before`: later ones may be of a state from which training
    /// has gone back. `wall_seconds` is the present on the clock of the rows, `now` the same moment in seconds since 1970.
    ///
    /// # Errors
    /// The storage's error: what could not be written is written the next time.
    pub async fn save(
        &mut self,
        rows: impl Iterator<Item = &Row>,
        before: u64,
        wall_seconds: f64,
        now: f64,
    ) -> anyhow::Result<()> {
        let first = self.writer.is_none();
        let mut events = Vec::new();
        if let Some(iteration) = self.rewound {
            let log = SessionLog { status: START };
            events.push(Event {
                wall_time: now,
                step: iteration as i64 + 1,
                what: Some(What::SessionLog(log)),
            });
        }
        if first {
            events.push(summary(now, 0, vec![text("specification", &self.specification)]));
        }
        let mut written = self.written;
        for row in rows {
            let (iteration, at, numbers) = scalars::of(row);
            if at > self.written {
                written = written.max(at);
                let values = numbers.iter().map(|(name, number)| scalar(name, *number)).collect();
                events.push(summary(now - (wall_seconds - at), iteration, values));
            }
        }
        let mut picture = self.picture;
        for (iteration, key) in self.pictures().await? {
            if picture.is_none_or(|newest| iteration > newest)
                && iteration < before
                && let Some(png) = self.run.get(&key).await?
            {
                events.extend(image("student", iteration, now, png.into()));
                picture = Some(iteration);
            }
        }
        if events.is_empty() {
            return Ok(());
        }
        self.write(&events, now).await?;
        (self.written, self.picture, self.rewound) = (written, picture, None);
        Ok(())
    }

    /// The pictures of the student in storage, oldest first.
    async fn pictures(&self) -> anyhow::Result<Vec<(u64, String)>> {
        let listed = self.run.list(PICTURES).await?;
        Ok(listed.into_iter().filter_map(|(key, _)| Some((layout::picture_iteration(&key)?, key))).collect())
    }

    async fn write(&mut self, events: &[Event], now: f64) -> anyhow::Result<()> {
        let records: Vec<u8> = events.iter().flat_map(|event| record(&event.encode_to_vec())).collect();
        let version = Event { wall_time: now, step: 0, what: Some(What::FileVersion(VERSION.to_owned())) };
        let head = record(&version.encode_to_vec());
        let seconds = now as i64;
        let writer = match self.writer.take() {
            Some(writer) => writer,
            None => {
                let (seconds, number) = self.after_those_there(seconds).await?;
                match self.run.local(FOLDER) {
                    Some(folder) => Writer::Appending(begin(&folder, seconds, number, &head)?),
                    None => Writer::Numbered(seconds, number),
                }
            }
        };
        self.writer = Some(match writer {
            Writer::Appending(mut file) => {
                file.write_all(&records).context("cannot append to TensorBoard's file")?;
                Writer::Appending(file)
            }
            Writer::Numbered(seconds, number) => {
                let key = format!("{FOLDER}/{}", name(seconds, number));
                let written = self.run.put(&key, [head, records].concat().into()).await;
                // The same number again after an error, so that no file is missing in the order.
                self.writer = Some(Writer::Numbered(seconds, number));
                written?;
                Writer::Numbered(seconds, number + 1)
            }
        });
        Ok(())
    }

    /// Time and number of a name that follows on those of earlier coordinators, whatever their clocks said: readers do not go back
    /// to earlier files.
    async fn after_those_there(&self, seconds: i64) -> anyhow::Result<(i64, u64)> {
        let newest = self.run.list(FOLDER).await?.into_iter().filter_map(|(key, _)| {
            let (_, rest) = key.rsplit_once("tfevents.")?;
            let (seconds, number) = rest.split_once(".potstill.")?;
            Some((seconds.parse::<i64>().ok()?, number.parse::<u64>().ok()?))
        });
        Ok(match newest.max() {
            Some((before, number)) if before >= seconds => (before, number + 1),
            _ => (seconds, 0),
        })
    }
}

/// Starts a file that no other process writes.
fn begin(folder: &Path, seconds: i64, first: u64, head: &[u8]) -> anyhow::Result<File> {
    let context = || format!("cannot write to {}", folder.display());
    std::fs::create_dir_all(folder).with_context(context)?;
    for number in first.. {
        match OpenOptions::new().append(true).create_new(true).open(folder.join(name(seconds, number))) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            opened => {
                let mut file = opened.with_context(context)?;
                file.write_all(head).with_context(context)?;
                return Ok(file);
            }
        }
    }
    anyhow::bail!(context())
}

/// Readers look for the word in the middle, and order files by their names.
fn name(seconds: i64, number: u64) -> String {
    format!("events.out.tfevents.{seconds:010}.potstill.{number:06}")
}

fn summary(wall_time: f64, iteration: u64, values: Vec<Value>) -> Event {
    Event { wall_time, step: iteration as i64, what: Some(What::Summary(Summary { values })) }
}

fn scalar(tag: &str, number: f64) -> Value {
    Value { tag: tag.to_owned(), metadata: None, content: Some(Content::Simple(number as f32)) }
}

/// A text, as Markdown that shows it as it is.
fn text(tag: &str, text: &str) -> Value {
    let indented: String = text.lines().map(|line| format!("    {line}\n")).collect();
    let plugin = Plugin { name: "text".to_owned() };
    let tensor = Texts { dtype: DT_STRING, texts: vec![indented.into_bytes()] };
    Value {
        tag: format!("{tag}/text_summary"),
        metadata: Some(Metadata { plugin: Some(plugin) }),
        content: Some(Content::Tensor(tensor)),
    }
}

fn image(tag: &str, iteration: u64, now: f64, png: Vec<u8>) -> Option<Event> {
    let reader = image::ImageReader::with_format(std::io::Cursor::new(&png), image::ImageFormat::Png);
    let (width, height) = reader.into_dimensions().ok()?;
    let content =
        Content::Image(Image { height: height as i32, width: width as i32, colorspace: 3, encoded: png });
    let value = Value { tag: tag.to_owned(), metadata: None, content: Some(content) };
    Some(summary(now, iteration, vec![value]))
}

/// A message with its length and the checksums of both.
fn record(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    let parts: [&[u8]; 4] =
        [&length, &masked(&length).to_le_bytes(), message, &masked(message).to_le_bytes()];
    parts.concat()
}

/// A CRC-32C in a form that is not itself a checksum of what holds it.
fn masked(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use potstill_proto::scores::Subject;
    use potstill_storage::Root;

    use super::*;
    use crate::monitor::{
        fixtures::{evaluation, spec, totals},
        metrics::Metrics,
    };

    /// The events in a file's bytes.
    fn events(mut bytes: &[u8]) -> Vec<Event> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
            let (checksum, rest) = rest.split_first_chunk::<4>().unwrap();
            assert_eq!(u32::from_le_bytes(*checksum), masked(length));
            let (message, rest) = rest.split_at(u64::from_le_bytes(*length) as usize);
            let (checksum, rest) = rest.split_first_chunk::<4>().unwrap();
            assert_eq!(u32::from_le_bytes(*checksum), masked(message));
            found.push(Event::decode(message).unwrap());
            bytes = rest;
        }
        found
    }

    fn steps(events: &[Event], wanted: &str) -> Vec<i64> {
        let has = |event: &&Event| match &event.what {
            Some(What::Summary(summary)) => summary.values.iter().any(|value| value.tag == wanted),
            _ => false,
        };
        events.iter().filter(has).map(|event| event.step).collect()
    }

    #[test]
    fn checksums_are_those_of_the_format() {
        // A record of TensorFlow's own tests: the length 0 and no content.
        assert_eq!(masked(&0u64.to_le_bytes()).to_le_bytes(), [0x29, 0x03, 0x98, 0x07]);
        assert_eq!(masked(b"").to_le_bytes(), [0xd8, 0xea, 0x82, 0xa2]);
    }

    /// Rows of two attempts, the second one from iteration 20 on, and a picture.
    async fn attempts(root: &Root) -> Run {
        let run = root.run(&"r".parse().unwrap());
        let mut metrics = Metrics::new(&spec(40));
        let mut board = Tensorboard::new(run.clone(), "[teacher]\n".into(), 0.0, None);
        metrics.evaluation(&evaluation(Subject::Teacher, 0, 3.0), 1.0);
        for i in 0..30 {
            metrics.iteration(totals(i), 2.0 + i as f64);
        }
        board.save(metrics.rows(), 30, 40.0, 1000.0).await.unwrap();
        board.save(metrics.rows(), 30, 41.0, 1001.0).await.unwrap();
        let mut png = std::io::Cursor::new(Vec::new());
        image::RgbImage::new(6, 4).write_to(&mut png, image::ImageFormat::Png).unwrap();
        for iteration in [20, 30] {
            run.put(&layout::picture_key(iteration), png.get_ref().clone().into()).await.unwrap();
        }
        board.save(metrics.rows(), 30, 42.0, 1002.0).await.unwrap();
        // Another coordinator, whose clock is behind.
        let mut board = Tensorboard::new(run.clone(), "[teacher]\n".into(), metrics.wall_seconds(), Some(30));
        metrics.rewind(20);
        board.rewind(20);
        for i in 20..40 {
            metrics.iteration(totals(i), 50.0 + i as f64);
        }
        board.save(metrics.rows(), u64::MAX, 90.0, 990.0).await.unwrap();
        run
    }

    #[tokio::test]
    async fn files_hold_each_row_once_and_say_where_training_went_back() {
        let folder = tempfile::tempdir().unwrap();
        for root in [Root::open(folder.path().to_str().unwrap()).unwrap(), Root::open("memory:///").unwrap()]
        {
            let run = attempts(&root).await;
            let files: Vec<String> =
                run.list(FOLDER).await.unwrap().into_iter().map(|(key, _)| key).collect();
            if run.local(FOLDER).is_none() {
                assert_eq!(files.len(), 3, "{files:?}");
            } else {
                assert_eq!(files.len(), 2, "each coordinator has its own: {files:?}");
            }
            let mut all = Vec::new();
            for file in &files {
                let found = events(&run.get(file).await.unwrap().unwrap());
                assert_eq!(found[0].what, Some(What::FileVersion(VERSION.into())), "{file}");
                all.extend(found);
            }
            assert_eq!(steps(&all, "loss/generator"), [10, 20, 30, 30, 40]);
            assert_eq!(steps(&all, "teacher/fid"), [0]);
            assert_eq!(steps(&all, "student"), [20, 30], "the pictures");
            let restart = |event: &Event| {
                matches!(event.what, Some(What::SessionLog(SessionLog { status: START })))
                    .then_some(event.step)
            };
            assert_eq!(all.iter().filter_map(restart).collect::<Vec<_>>(), [21]);
            let row = all.iter().find(|event| event.step == 10).unwrap();
            assert!((row.wall_time - (1000.0 - (40.0 - 11.0))).abs() < 1e-9, "{}", row.wall_time);
        }
    }
}
