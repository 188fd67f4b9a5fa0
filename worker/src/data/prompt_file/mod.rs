//! Prompts from files of text, JSON lines, CSV and Parquet.

pub(super) mod parquet;
mod rows;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use potstill_storage::Source;
use serde_json::Value;

pub use self::rows::Read;
use self::rows::{COLUMN, LABEL, Row, Rows, from_object};
use super::{compressed, formats::Foreign, text};

const ARROW: &str =
    "an Arrow file, as Dataset.save_to_disk writes it, which is not read: write it with Dataset.to_parquet";
const EXPECTED: &str = "expected a file of prompts: .txt (one a line), .jsonl, .json, .csv, .tsv or .parquet, also with .gz or .zst \
                        behind it, or a folder of .parquet files";

/// What the tables beside the parts of a folder may be called.
const TABLES: [&str; 4] = [".jsonl", ".ndjson", ".csv", ".tsv"];

/// Reads a file: `.txt` with one prompt a line, `.jsonl` or `.ndjson` with an object a line, `.json` with a list of objects,
/// `.csv` or `.tsv` with a header, `.parquet`, or a folder of the last. Empty prompts are passed over, and a few broken rows.
///
/// # Errors
/// It is missing, empty, of another kind, or lacks the column; with the line or row.
pub fn read_prompts(location: &str, column: &str) -> anyhow::Result<Read> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(read(location, column))
}

async fn read(location: &str, column: &str) -> anyhow::Result<Read> {
    let source = Source::open(location)?;
    let names = source.list().await?;
    let mut rows = Rows::default();
    if names == [""] {
        read_file(source.name(), source.read("").await?, column, "", &mut rows)?;
        return rows.finish();
    }
    // Spark and others leave hidden files beside the parts.
    let hidden = |name: &str| name.rsplit('/').next().is_some_and(|file| file.starts_with(['.', '_']));
    let is_part = |name: &&String| name.to_lowercase().ends_with(".parquet") && !hidden(name);
    let parts: Vec<&String> = names.iter().filter(is_part).collect();
    if let Some(name) = names.iter().find(|name| name.to_lowercase().ends_with(".arrow")) {
        bail!("holds {name}: {ARROW}");
    }
    let is_table =
        |name: &&String| TABLES.iter().any(|end| name.to_lowercase().contains(end)) && !hidden(name);
    if let (Some(table), Some(part)) = (names.iter().find(is_table), parts.first()) {
        bail!(
            "holds {table} beside {part}: name the file that has the prompts, or a folder of .parquet files alone"
        );
    }
    ensure!(!parts.is_empty(), "is a folder without .parquet files; {EXPECTED}");
    for part in parts {
        let bytes = source.read(part).await?;
        read_file(part, bytes, column, &format!("{part}: "), &mut rows).with_context(|| part.clone())?;
    }
    rows.finish()
}

/// Reads the rows of one file; `prefix` comes before their places in messages.
fn read_file(name: &str, bytes: Bytes, column: &str, prefix: &str, rows: &mut Rows) -> anyhow::Result<()> {
    let (name, bytes) = compressed::opened(name, bytes)?;
    let extension = name.rsplit_once('.').map(|(_, extension)| extension);
    match extension {
        // A zip inside.
        Some("xlsx" | "ods" | "xls") => bail!("is a spreadsheet: save it as .csv, in UTF-8"),
        Some("arrow" | "feather") => bail!("is {ARROW}"),
        _ => {}
    }
    if let Some(kind) = Foreign::of(&bytes) {
        bail!("{kind}");
    }
    match extension {
        // Links and caches have names of their own.
        _ if parquet::is_one(&bytes) => parquet::read(bytes, column, prefix, rows),
        Some("txt") => from_lines(&text::decode(&bytes)?, column, rows),
        Some("jsonl" | "ndjson") => from_json_lines(&text::decode(&bytes)?, column, rows),
        Some("json") => from_json(&bytes, column, rows),
        Some("csv") => from_table(&text::decode(&bytes)?, b',', column, rows),
        Some("tsv") => from_table(&text::decode(&bytes)?, b'\t', column, rows),
        Some("parquet") => parquet::read(bytes, column, prefix, rows),
        _ => bail!(EXPECTED),
    }
}

/// Whether a line is the header of a table: names without spaces, one of which is that of a column of prompts, or two of which are
/// those of usual columns.
fn is_header(line: &str, column: &str) -> bool {
    const USUAL: [&str; 8] = ["prompt", "caption", "text", "label", "image", "url", "file_name", "filename"];
    let names: Vec<String> =
        line.split([',', '\t', ';']).map(|name| name.trim().trim_matches('"').to_lowercase()).collect();
    let is_name = |name: &String| !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || c == '_');
    let prompts = names.iter().any(|name| [column, "prompt", "caption"].contains(&name.as_str()));
    let usual = names.iter().filter(|name| USUAL.contains(&name.as_str())).count();
    let alone = |name: &String| [column, "prompt", "prompts", "caption", "captions"].contains(&name.as_str());
    match &names[..] {
        [one] => alone(one),
        several => several.iter().all(is_name) && (prompts || usual > 1),
    }
}

fn from_lines(text: &str, column: &str, rows: &mut Rows) -> anyhow::Result<()> {
    if let Some((number, header)) = text::lines(text).next() {
        ensure!(
            !is_header(header, column),
            "line {number}: {header:?} is the header of a table: name the file .csv or .tsv"
        );
        let object = text::json(header.as_bytes()).is_ok_and(|value| value.is_object());
        ensure!(!object, "line {number} is a JSON object: name the file .jsonl");
    }
    for (number, line) in text::lines(text) {
        rows.add(&format!("line {number}"), Ok(Row { text: line.to_owned(), label: None }));
    }
    Ok(())
}

fn from_json_lines(text: &str, column: &str, rows: &mut Rows) -> anyhow::Result<()> {
    for (number, line) in text::lines(text) {
        let row =
            text::json(line.as_bytes()).context("is not JSON").and_then(|value| from_object(&value, column));
        rows.add(&format!("line {number}"), row);
    }
    Ok(())
}

fn from_json(bytes: &[u8], column: &str, rows: &mut Rows) -> anyhow::Result<()> {
    let text = text::decode(bytes)?;
    let value =
        text::json(text.as_bytes()).context("is not JSON; a file with an object a line is called .jsonl")?;
    let Value::Array(values) = value else { bail!("is not a list of objects, as a .json of prompts is") };
    for (index, value) in values.iter().enumerate() {
        let row = match value {
            Value::String(text) => Ok(Row { text: text.clone(), label: None }),
            value => from_object(value, column),
        };
        rows.add(&format!("item {index}"), row);
    }
    Ok(())
}

fn from_table(text: &str, delimiter: u8, column: &str, rows: &mut Rows) -> anyhow::Result<()> {
    let text::Table { names, rows: records } = text::table(text, delimiter)?;
    let place = |wanted: &str| names.iter().position(|name| name == wanted);
    let prompts = place(column)
        .with_context(|| format!("has no column {column:?}, {COLUMN}; its columns are {names:?}"))?;
    let labels = place(LABEL);
    for (index, record) in records.into_iter().enumerate() {
        let row = record.map(|record| {
            let label = labels.map(|at| &record[at]).filter(|label| !label.is_empty());
            let label = label.map(|label| Value::String(label.to_owned()));
            Row { text: record[prompts].to_owned(), label }
        });
        rows.add(&format!("row {index}"), row);
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use ::parquet::{
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

    /// The values of a column without a mark of its kind.
    enum Column {
        Bytes(&'static [u8]),
        Lists,
    }

    /// A file of one row.
    fn parquet_of(name: &str, column: Column) -> Vec<u8> {
        let field = match column {
            Column::Bytes(_) => format!("required binary {name};"),
            Column::Lists => {
                format!(
                    "required group {name} (LIST) {{ repeated group list {{ required binary element (UTF8); }} }}"
                )
            }
        };
        let schema = Arc::new(parse_message_type(&format!("message m {{ {field} }}")).unwrap());
        let mut bytes = Vec::new();
        let mut writer = SerializedFileWriter::new(&mut bytes, schema, Arc::default()).unwrap();
        let mut rows = writer.next_row_group().unwrap();
        let mut values = rows.next_column().unwrap().unwrap();
        let typed = values.typed::<ByteArrayType>();
        match column {
            Column::Bytes(content) => typed.write_batch(&[ByteArray::from(content)], None, None),
            Column::Lists => {
                typed.write_batch(&["a", "b"].map(ByteArray::from), Some(&[1, 1]), Some(&[0, 1]))
            }
        }
        .unwrap();
        values.close().unwrap();
        rows.close().unwrap();
        writer.close().unwrap();
        bytes
    }

    #[test]
    fn prompts_come_from_many_kinds_of_file() {
        let lines = "a red circle\r\n\n  \nzwei blaue Würfel\n";
        let json =
            "{\"prompt\": \"a red circle\", \"label\": 4}\n{\"prompt\": \"zwei blaue Würfel\", \"label\": 9}";
        let list = format!("[{}]", json.replace('\n', ","));
        let csv = "label,prompt\n4,a red circle\n9,zwei blaue Würfel\n";
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut gz, json.as_bytes()).unwrap();
        let zst = zstd::encode_all(json.as_bytes(), 1).unwrap();
        let utf16: Vec<u8> = format!("\u{feff}{lines}").encode_utf16().flat_map(u16::to_le_bytes).collect();
        let gz = gz.finish().unwrap();
        let files = [
            ("p.txt", lines.into(), false),
            ("P.TXT", format!("\u{feff}{lines}").into(), false),
            ("utf16.txt", utf16, false),
            ("old-mac.txt", "a red circle\rzwei blaue Würfel".into(), false),
            ("p.jsonl", json.into(), true),
            ("p.ndjson", format!("\u{feff}{json}").into(), true),
            ("p.json", list.clone().into(), true),
            (
                "utf16.json",
                format!("\u{feff}{list}").encode_utf16().flat_map(u16::to_le_bytes).collect(),
                true,
            ),
            ("p.csv", csv.into(), true),
            ("p.tsv", csv.replace(',', "\t").into(), true),
            ("german.csv", csv.replace(',', ";").into(), true),
            ("tabs.csv", csv.replace(',', "\t").into(), true),
            ("p.jsonl.gz", gz.clone(), true),
            ("p.jsonl.zst", zst.clone(), true),
            ("P.JSONL.ZST", zst.clone(), true),
            // A program that copied it dropped the ending, or unpacked it and kept the ending.
            ("p.jsonl", gz, true),
            ("q.jsonl", zst, true),
            ("unpacked.jsonl.gz", json.into(), true),
            ("p.parquet", parquet_file(), true),
            ("0a1b2c3d", parquet_file(), true),
            ("bytes.parquet", parquet_of("prompt", Column::Bytes(b"a red circle")), false),
            ("floats.jsonl", json.replace('4', "4.0").replace('9', "\"9\"").into(), true),
        ];
        for (name, content, labelled) in files {
            let found = read(name, &content).unwrap();
            let expected = ["a red circle", "zwei blaue Würfel"];
            assert_eq!(found.texts, expected[..found.texts.len()], "{name}");
            assert_eq!(found.texts.len(), if name.starts_with("bytes") { 1 } else { 2 }, "{name}");
            assert_eq!(found.labels, labelled.then(|| vec![4, 9]), "{name}");
        }
        // Tags, as some models are prompted with, are no header.
        assert_eq!(read("tags.txt", b"text, english text\nlogo,red\n").unwrap().texts.len(), 2);
        let folder = tempfile::tempdir().unwrap();
        for name in ["part-1.parquet", "part-0.parquet", "_SUCCESS", "._part-0.parquet"] {
            let content = if name.starts_with("part") { parquet_file() } else { vec![] };
            std::fs::write(folder.path().join(name), content).unwrap();
        }
        let found = read_prompts(folder.path().to_str().unwrap(), "prompt").unwrap();
        assert_eq!((found.texts.len(), found.labels), (4, Some(vec![4, 9, 4, 9])));
    }

    #[test]
    fn a_few_broken_rows_and_empty_prompts_are_left_out() {
        let good = "{\"prompt\": \"x\", \"label\": 1}\n";
        for (broken, texts) in [
            ("{\"prompt\": null}", 2),
            ("{\"caption\": \"x\"}", 2),
            ("{\"prompt\": [\"x\"]}", 2),
            ("{\"prompt\": \"a \\ud83d\"}", 2),
            ("{\"prompt\": \"  \"}", 2),
            ("{\"prompt\": \"y\", \"score\": NaN}", 3),
            ("nothing", 2),
        ] {
            let found = read("p.jsonl", format!("{good}{broken}\n{good}").as_bytes()).unwrap();
            assert_eq!(found.texts.len(), texts, "{broken}");
            // Some rows have a label, some have none.
            assert_eq!(found.labels.is_some(), texts == 2, "{broken}");
        }
        for strange in ["true", "0.5", "\"cat\"", "[1]"] {
            let line = format!("{{\"prompt\": \"x\", \"label\": {strange}}}\n{good}");
            assert_eq!(read("p.jsonl", line.as_bytes()).unwrap().labels, None, "{strange}");
        }
    }

    #[test]
    fn what_is_wrong_says_where() {
        let twice = |line: &str| format!("{{\"prompt\": \"x\"}}\n{line}\n{line}").into_bytes();
        for (name, content, expected) in [
            ("p.txt", b"\n \n".to_vec(), "holds no prompts"),
            ("p.txt", b"good\nb\xffd\n".to_vec(), "line 2: is not UTF-8"),
            ("p.txt", b"prompt,label\na red circle,0\n".to_vec(), "is the header of a table"),
            ("p.txt", b"prompt\na red circle\n".to_vec(), "is the header of a table"),
            ("p.txt", b"{\"prompt\": \"a red circle\"}\n".to_vec(), "name the file .jsonl"),
            ("p.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n".to_vec(), "Git LFS"),
            ("p.csv", b"<!DOCTYPE html><html></html>".to_vec(), "HTML page"),
            ("p.txt", b"prompt;label\na red circle;0\n".to_vec(), "is the header of a table"),
            ("p.txt.lz4", b"\x04\x22\x4d\x18x".to_vec(), "is compressed with lz4, which is not read"),
            ("p.jsonl", b"\xfd7zXZ\0x".to_vec(), "is compressed with xz, which is not read"),
            ("p.csv", b"PK\x03\x04x".to_vec(), "is a zip archive: unpack it"),
            ("p.xlsx", b"PK\x03\x04x".to_vec(), "is a spreadsheet: save it as .csv"),
            ("p.arrow", b"ARROW1\0\0".to_vec(), "write it with Dataset.to_parquet"),
            ("p.csv", b"label;prompt\n1;a; b\n".to_vec(), "has 3 fields, the header has 2"),
            (
                "p.parquet",
                parquet_of("prompt", Column::Lists),
                "has a list, and not one text, under \"prompt\"",
            ),
            ("p.parquet", parquet_of("prompt", Column::Bytes(b"caf\xe9")), "has no text under \"prompt\""),
            ("p.csv", b"id,prompt\n1,a red circle, on white\n".to_vec(), "has 3 fields, the header has 2"),
            (
                "p.csv",
                format!("prompt\n{}\"a red circle\na blue one\n", "x\n".repeat(300)).into(),
                "row 300: has a quote that is not closed",
            ),
            ("p.jsonl", twice("{\"caption\": \"y\"}"), "line 2: has nothing under \"prompt\""),
            ("p.jsonl", twice("{\"caption\": \"y\"}"), "its keys are [\"caption\"]"),
            ("p.jsonl", twice("nothing"), "2 of 3 rows cannot be used: line 2: is not JSON"),
            ("p.json", b"{}".to_vec(), "is not a list of objects"),
            ("p.csv", b"text,label\nx,1\n".to_vec(), "its columns are [\"text\", \"label\"]"),
            ("p.parquet", b"nothing".to_vec(), "is not Parquet"),
            ("p.txt.gz", b"\x1f\x8b nothing".to_vec(), "is not gzip"),
            ("p.doc", b"x".to_vec(), ".csv, .tsv or .parquet"),
            ("prompts", b"x".to_vec(), "expected a file of prompts"),
        ] {
            let error = format!("{:#}", read(name, &content).unwrap_err());
            assert!(error.contains(expected), "{name}: {error}");
        }
        assert!(read_prompts("/nowhere/prompts.txt", "prompt").is_err());
        let folder = tempfile::tempdir().unwrap();
        let error = format!("{:#}", read_prompts(folder.path().to_str().unwrap(), "prompt").unwrap_err());
        assert!(error.contains("is a folder without .parquet files"), "{error}");
        let path = folder.path().join("p.parquet");
        std::fs::write(&path, parquet_file()).unwrap();
        for (beside, said) in
            [("q.jsonl.gz", "holds q.jsonl.gz beside p.parquet"), ("data.arrow", "Dataset.to_parquet")]
        {
            let beside = folder.path().join(beside);
            std::fs::write(&beside, b"x").unwrap();
            let error = format!("{:#}", read_prompts(folder.path().to_str().unwrap(), "prompt").unwrap_err());
            assert!(error.contains(said), "{error}");
            std::fs::remove_file(beside).unwrap();
        }
        let error = format!("{:#}", read_prompts(path.to_str().unwrap(), "caption").unwrap_err());
        assert!(error.contains("\"caption\"") && error.contains("\"prompt\", \"label\""), "{error}");
    }
}
