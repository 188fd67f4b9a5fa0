//! Compressed files.

use std::io::Read;

use anyhow::Context;
use bytes::Bytes;
use flate2::read::MultiGzDecoder;

/// A file's name in lower case without the ending of a compression, and its content without the compression.
///
/// # Errors
/// It has the ending of a compression and is not compressed so, or is damaged.
pub fn opened(name: &str, bytes: Bytes) -> anyhow::Result<(String, Bytes)> {
    let name = name.to_lowercase();
    let tar = || name.strip_suffix(".tgz").map(|stem| format!("{stem}.tar"));
    if let Some(name) = name.strip_suffix(".gz").map(str::to_owned).or_else(tar) {
        let mut content = Vec::new();
        MultiGzDecoder::new(&bytes[..]).read_to_end(&mut content).context("is not gzip, or damaged")?;
        return Ok((name, content.into()));
    }
    if let Some(name) = name.strip_suffix(".zst") {
        let content = zstd::decode_all(&bytes[..]).context("is not zstd, or damaged")?;
        return Ok((name.to_owned(), content.into()));
    }
    Ok((name, bytes))
}
