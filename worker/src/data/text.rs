//! Texts of files, as users' programs write them.

use std::borrow::Cow;

use anyhow::{Context, bail, ensure};
use csv::StringRecord;
use serde_json::Value;

/// The text of a file in UTF-8 or, with its mark, UTF-16; without the mark.
///
/// # Errors
/// It is in another encoding, or no text; with the line.
pub fn decode(bytes: &[u8]) -> anyhow::Result<Cow<'_, str>> {
    let text: Cow<'_, str> = match bytes {
        [0xef, 0xbb, 0xbf, rest @ ..] => utf8(rest)?.into(),
        [0xff, 0xfe, rest @ ..] => utf16(rest, u16::from_le_bytes)?.into(),
        [0xfe, 0xff, rest @ ..] => utf16(rest, u16::from_be_bytes)?.into(),
        _ => utf8(bytes)?.into(),
    };
    if let Some(at) = text.find('\0') {
        bail!(
            "line {}: holds a NUL character: it is UTF-16 without a mark, or no text; save it as UTF-8",
            line_of(text.as_bytes(), at)
        );
    }
    Ok(text)
}

fn utf8(bytes: &[u8]) -> anyhow::Result<&str> {
    std::str::from_utf8(bytes).map_err(|error| {
        let line = line_of(bytes, error.valid_up_to());
        anyhow::anyhow!("line {line}: is not UTF-8: {error}; save it as UTF-8")
    })
}

fn utf16(bytes: &[u8], number: fn([u8; 2]) -> u16) -> anyhow::Result<String> {
    let units = bytes.chunks_exact(2);
    ensure!(units.remainder().is_empty(), "is marked as UTF-16 and has an odd number of bytes");
    let units: Vec<u16> = units.map(|pair| number([pair[0], pair[1]])).collect();
    String::from_utf16(&units).map_err(|_| anyhow::anyhow!("is marked as UTF-16, which it is not"))
}

fn line_of(bytes: &[u8], at: usize) -> usize {
    1 + bytes[..at].iter().filter(|byte| **byte == b'\n').count()
}

/// Lines with their numbers from 1, without empty ones. They end with LF, CR LF, or CR.
pub fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    // Where there are LFs, a CR only stands before one.
    let with_lf = text.contains('\n');
    let ends = move |c: char| c == '\n' || (c == '\r' && !with_lf);
    let numbered = text.split(ends).enumerate().map(|(index, line)| (index + 1, line.trim_end_matches('\r')));
    numbered.filter(|(_, line)| !line.trim().is_empty())
}

/// A table with a header.
pub struct Table {
    /// The names of its columns.
    pub names: Vec<String>,
    /// Its rows; each has as many fields as there are columns, or says what is wrong.
    pub rows: Vec<anyhow::Result<StringRecord>>,
}

/// Reads CSV, or TSV. Where the header has no `delimiter`, and a comma, a tab or a semicolon, that is the delimiter: programs of
/// some languages write semicolons.
///
/// # Errors
/// It has no header, or a quote that is not closed.
pub fn table(text: &str, delimiter: u8) -> anyhow::Result<Table> {
    let header = text.lines().next().unwrap_or_default();
    let has = |delimiter: &u8| header.contains(char::from(*delimiter));
    let delimiter = [delimiter, b',', b'\t', b';'].into_iter().find(has).unwrap_or(delimiter);
    let mut reader =
        csv::ReaderBuilder::new().delimiter(delimiter).flexible(true).from_reader(text.as_bytes());
    let names: Vec<String> =
        reader.headers().context("is not a table")?.iter().map(|name| name.trim().to_owned()).collect();
    let records: Vec<csv::Result<StringRecord>> = reader.records().collect();
    // A quote that is not closed takes all that follows into one field of the last row.
    if let Some(Ok(last)) = records.last()
        && last.iter().any(|field| field.contains('\n'))
    {
        let index = records.len() - 1;
        ensure!(text.matches('"').count().is_multiple_of(2), "row {index}: has a quote that is not closed");
    }
    let whole = |record: csv::Result<StringRecord>| {
        let record = record.context("is no row of a table")?;
        ensure!(
            record.len() == names.len(),
            "has {} fields, the header has {}: a text with commas, tabs or semicolons is put into quotes",
            record.len(),
            names.len()
        );
        Ok(record)
    };
    let rows = records.into_iter().map(whole).collect();
    Ok(Table { names, rows })
}

/// JSON in UTF-8, with or without a mark. NaN and infinities, which Python writes and JSON does not have, are null.
///
/// # Errors
/// It is not JSON.
pub fn json(bytes: &[u8]) -> Result<Value, serde_json::Error> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    serde_json::from_slice(bytes).or_else(|error| {
        let Ok(text) = std::str::from_utf8(bytes) else { return Err(error) };
        serde_json::from_str(&without_nan(text)).map_err(|_| error)
    })
}

/// A whole number, also where it was written as 4.0 or "4".
pub fn whole(value: &Value) -> Option<i64> {
    let float = || value.as_f64().filter(|x| x.fract() == 0.0 && x.abs() < 9e15).map(|x| x as i64);
    value.as_i64().or_else(float).or_else(|| value.as_str()?.trim().parse().ok())
}

/// JSON with null for each NaN and infinity outside strings.
fn without_nan(text: &str) -> String {
    let (mut out, mut rest, mut in_string) = (String::with_capacity(text.len()), text, false);
    while let Some(c) = rest.chars().next() {
        let number =
            ["NaN", "-Infinity", "Infinity"].iter().find(|name| !in_string && rest.starts_with(**name));
        if let Some(name) = number {
            out.push_str("null");
            rest = &rest[name.len()..];
            continue;
        }
        let escaped = in_string && c == '\\';
        let length = match escaped {
            true => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            false => c.len_utf8(),
        };
        in_string ^= c == '"';
        out.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_and_utf_16_are_read() {
        let utf16 = |number: fn(u16) -> [u8; 2]| -> Vec<u8> {
            "\u{feff}café".encode_utf16().flat_map(number).collect()
        };
        for bytes in ["café".into(), "\u{feff}café".into(), utf16(u16::to_le_bytes), utf16(u16::to_be_bytes)]
        {
            assert_eq!(decode(&bytes).unwrap(), "café");
        }
        for (bytes, expected) in [
            (&b"a\nb\xe9\n"[..], "line 2: is not UTF-8"),
            (b"a\0b\0", "line 1: holds a NUL"),
            (b"\xff\xfea", "odd number"),
            (b"\xff\xfe\x00\xd8", "which it is not"),
        ] {
            let error = decode(bytes).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn lines_end_in_three_ways() {
        for text in ["a\nb \n\n c\n", "a\r\nb \r\n\r\n c\r\n", "a\rb \r\r c\r"] {
            assert_eq!(lines(text).collect::<Vec<_>>(), [(1, "a"), (2, "b "), (4, " c")]);
        }
    }

    #[test]
    fn numbers_that_are_none_are_null() {
        let value = json(b"\xef\xbb\xbf{\"a\": NaN, \"b \\\" NaN\": [-Infinity, Infinity, 1]}").unwrap();
        assert_eq!(value, serde_json::json!({"a": null, "b \" NaN": [null, null, 1]}));
        assert!(json(b"nothing").is_err());
        assert!(json(b"").is_err());
    }
}
