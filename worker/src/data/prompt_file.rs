//! Prompts from text, JSONL and Parquet files.

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use parquet::{
    file::reader::{FileReader, SerializedFileReader},
    record::Field,
};
use potstill_storage::Source;
use serde_json::Value;

/// The content of a file of prompts.
#[derive(Debug, Default)]
pub struct Read {
    pub texts: Vec<String>,
    /// From a column `label` of integers beside the prompts, where every row has one.
    pub labels: Option<Vec<i64>>,
}

const LABEL: &str = "label";
/// Names the keys that set the prompts' column.
const COLUMN: &str = "the prompts' column (prompts.column, evaluation.prompts_column or --prompts-column)";

/// Reads a file: `.txt` with one prompt a line, `.jsonl` with an object a line, `.parquet`. Empty lines are skipped.
///
/// # Errors
/// It is missing, empty, not UTF-8, or lacks the column; with the line or row.
pub fn read_prompts(location: &str, column: &str) -> anyhow::Result<Read> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let bytes = runtime.block_on(async {
        let source = Source::open(location)?;
        source.read("").await
    })?;
    let read = match location.rsplit_once('.').map(|(_, extension)| extension) {
        Some("txt") => from_lines(&bytes)?,
        Some("jsonl") => from_json(&bytes, column)?,
        Some("parquet") => from_parquet(bytes, column)?,
        _ => bail!("expected a file of prompts: .txt (one a line), .jsonl or .parquet"),
    };
    ensure!(!read.texts.is_empty(), "holds no prompts");
    Ok(read)
}

/// Lines with their numbers from 1, without empty ones.
fn lines(bytes: &[u8]) -> impl Iterator<Item = anyhow::Result<(usize, &str)>> {
    bytes.split(|byte| *byte == b'\n').enumerate().filter_map(|(index, line)| {
        let line = match std::str::from_utf8(line) {
            Ok(line) => line.trim_end_matches('\r'),
            Err(error) => return Some(Err(anyhow::anyhow!("line {}: is not UTF-8: {error}", index + 1))),
        };
        (!line.trim().is_empty()).then_some(Ok((index + 1, line)))
    })
}

fn from_lines(bytes: &[u8]) -> anyhow::Result<Read> {
    let texts = lines(bytes).map(|line| Ok(line?.1.to_owned())).collect::<anyhow::Result<_>>()?;
    Ok(Read { texts, labels: None })
}

fn from_json(bytes: &[u8], column: &str) -> anyhow::Result<Read> {
    let (mut texts, mut labels) = (Vec::new(), Vec::new());
    for line in lines(bytes) {
        let (number, line) = line?;
        let value: Value =
            serde_json::from_str(line).with_context(|| format!("line {number}: is not JSON"))?;
        let text = value[column]
            .as_str()
            .with_context(|| format!("line {number}: has no text under {column:?}, {COLUMN}"))?;
        texts.push(text.to_owned());
        labels.extend(value[LABEL].as_i64());
    }
    Ok(Read { labels: (labels.len() == texts.len()).then_some(labels), texts })
}

fn from_parquet(bytes: Bytes, column: &str) -> anyhow::Result<Read> {
    let reader = SerializedFileReader::new(bytes).context("is not Parquet")?;
    let (mut texts, mut labels) = (Vec::new(), Vec::new());
    for (index, row) in reader.get_row_iter(None)?.enumerate() {
        let row = row.with_context(|| format!("row {index}"))?;
        let mut text = None;
        for (name, field) in row.get_column_iter() {
            match field {
                Field::Str(value) if name == column => text = Some(value.clone()),
                Field::Int(value) if name == LABEL => labels.push(i64::from(*value)),
                Field::Long(value) if name == LABEL => labels.push(*value),
                _ => {}
            }
        }
        texts.push(text.with_context(|| {
            let names: Vec<&String> = row.get_column_iter().map(|(name, _)| name).collect();
            format!("row {index}: has no text under {column:?}, {COLUMN}; its columns are {names:?}")
        })?);
    }
    Ok(Read { labels: (labels.len() == texts.len()).then_some(labels), texts })
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use parquet::{
        data_type::{ByteArray, ByteArrayType, Int64Type},
        file::writer::SerializedFileWriter,
        schema::parser::parse_message_type,
    };

    use super::*;

    fn read(name: &str, content: &[u8]) -> anyhow::Result<Read> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        read_prompts(path.to_str().unwrap(), "prompt")
    }

    pub fn parquet_file() -> Vec<u8> {
        let schema = "message m { required binary prompt (UTF8); required int64 label; }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let mut bytes = Vec::new();
        let mut writer = SerializedFileWriter::new(&mut bytes, schema, Arc::default()).unwrap();
        let mut rows = writer.next_row_group().unwrap();
        let mut column = rows.next_column().unwrap().unwrap();
        let texts = ["a red circle", "zwei blaue Würfel"].map(ByteArray::from);
        column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
        column.close().unwrap();
        let mut column = rows.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&[4, 9], None, None).unwrap();
        column.close().unwrap();
        rows.close().unwrap();
        writer.close().unwrap();
        bytes
    }

    #[test]
    fn prompts_come_from_three_kinds_of_file() {
        let text = read("p.txt", "a red circle\r\n\n  \nzwei blaue Würfel\n".as_bytes()).unwrap();
        assert_eq!(text.texts, ["a red circle", "zwei blaue Würfel"]);
        assert_eq!(text.labels, None);
        let json =
            "{\"prompt\": \"a red circle\", \"label\": 4}\n{\"prompt\": \"zwei blaue Würfel\", \"label\": 9}";
        for found in [read("p.jsonl", json.as_bytes()), read("p.parquet", &parquet_file())] {
            let found = found.unwrap();
            assert_eq!(found.texts, text.texts);
            assert_eq!(found.labels, Some(vec![4, 9]));
        }
    }

    #[test]
    fn what_is_wrong_says_where() {
        for (name, content, expected) in [
            ("p.txt", b"\n \n".as_slice(), "holds no prompts"),
            ("p.txt", b"good\nb\xffd\n", "line 2: is not UTF-8"),
            ("p.jsonl", b"{\"prompt\": \"x\"}\n{\"caption\": \"y\"}", "line 2: has no text under \"prompt\""),
            ("p.jsonl", b"nothing", "line 1: is not JSON"),
            ("p.parquet", b"nothing", "is not Parquet"),
            ("p.csv", b"x", ".jsonl or .parquet"),
        ] {
            let error = format!("{:#}", read(name, content).unwrap_err());
            assert!(error.contains(expected), "{name}: {error}");
        }
        assert!(read_prompts("/nowhere/prompts.txt", "prompt").is_err());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.parquet");
        std::fs::write(&path, parquet_file()).unwrap();
        let error = format!("{:#}", read_prompts(path.to_str().unwrap(), "caption").unwrap_err());
        assert!(error.contains("\"caption\"") && error.contains("\"prompt\", \"label\""), "{error}");
    }
}
