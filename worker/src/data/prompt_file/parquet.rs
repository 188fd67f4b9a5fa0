//! Prompts, and captions, from Parquet.

use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::Context;
use bytes::Bytes;
use parquet::{
    file::reader::{FileReader, SerializedFileReader},
    record::Field,
};
use serde_json::Value;

use super::rows::{COLUMN, LABEL, LIST, NO_TEXT, NULL, Row, Rows};

/// Whether it is Parquet, by the marks at its ends.
pub fn is_one(bytes: &[u8]) -> bool {
    const MARK: &[u8] = b"PAR1";
    bytes.len() > 2 * MARK.len() && bytes.starts_with(MARK) && bytes.ends_with(MARK)
}

/// Reads with the library, which panics about some damaged files: here that is an error, and what was read is not used.
fn guarded<T>(read: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let read = catch_unwind(AssertUnwindSafe(read));
    read.unwrap_or_else(|_| Err(anyhow::anyhow!("is damaged Parquet")))
}

/// Reads the rows of one file; `prefix` comes before their places in messages.
///
/// # Errors
/// It is not Parquet, or lacks the column.
pub fn read(bytes: Bytes, column: &str, prefix: &str, rows: &mut Rows) -> anyhow::Result<()> {
    guarded(|| read_rows(bytes, column, prefix, rows))
}

fn read_rows(bytes: Bytes, column: &str, prefix: &str, rows: &mut Rows) -> anyhow::Result<()> {
    let reader = SerializedFileReader::new(bytes).context("is not Parquet")?;
    let schema = reader.metadata().file_metadata().schema_descr_ptr();
    let names: Vec<&str> = schema.root_schema().get_fields().iter().map(|field| field.name()).collect();
    anyhow::ensure!(names.contains(&column), "has no column {column:?}, {COLUMN}; its columns are {names:?}");
    for (index, row) in reader.get_row_iter(None)?.enumerate() {
        let row = row.with_context(|| format!("row {index}"))?;
        let (mut text, mut label) = (Err(NO_TEXT), None);
        for (name, field) in row.get_column_iter() {
            if name == column {
                text = prompt(field);
            } else if name == LABEL && *field != Field::Null {
                label = Some(json(field));
            }
        }
        let row = text
            .map(|text| Row { text, label })
            .map_err(|what| anyhow::anyhow!("has {what} under {column:?}, {COLUMN}"));
        rows.add(&format!("{prefix}row {index}"), row);
    }
    Ok(())
}

/// Some columns of all rows, as objects.
///
/// # Errors
/// It is not Parquet, or is damaged.
pub fn objects(bytes: Bytes, columns: &[&str]) -> anyhow::Result<Vec<Value>> {
    guarded(|| read_objects(bytes, columns))
}

fn read_objects(bytes: Bytes, columns: &[&str]) -> anyhow::Result<Vec<Value>> {
    let reader = SerializedFileReader::new(bytes).context("is not Parquet")?;
    let mut objects = Vec::new();
    for (index, row) in reader.get_row_iter(None)?.enumerate() {
        let row = row.with_context(|| format!("row {index}"))?;
        let taken = row.get_column_iter().map(|(name, field)| {
            let value = if columns.contains(&name.as_str()) { json(field) } else { Value::Null };
            (name.clone(), value)
        });
        objects.push(Value::Object(taken.collect()));
    }
    Ok(objects)
}

/// The prompt in a field, or what it has instead.
fn prompt(field: &Field) -> Result<String, &'static str> {
    match field {
        Field::Str(text) => Ok(text.clone()),
        // Some programs mark no column as text.
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).map(str::to_owned).map_err(|_| NO_TEXT),
        Field::Null => Err(NULL),
        Field::ListInternal(_) => Err(LIST),
        _ => Err(NO_TEXT),
    }
}

/// A field's value; what is no number and no text becomes its text, which is no number either.
fn json(field: &Field) -> Value {
    match field {
        Field::Byte(value) => (*value).into(),
        Field::Short(value) => (*value).into(),
        Field::Int(value) => (*value).into(),
        Field::Long(value) => (*value).into(),
        Field::UByte(value) => (*value).into(),
        Field::UShort(value) => (*value).into(),
        Field::UInt(value) => (*value).into(),
        Field::ULong(value) => (*value).into(),
        Field::Float(value) => (*value).into(),
        Field::Double(value) => (*value).into(),
        Field::Null => Value::Null,
        Field::Str(_) | Field::Bytes(_) => prompt(field).map_or(Value::Null, Value::from),
        Field::ListInternal(list) => list.elements().iter().map(json).collect(),
        other => other.to_string().trim_matches('"').into(),
    }
}
