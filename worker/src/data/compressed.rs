//! Compressed files.

use std::io::Read;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use potstill_models::weights::failed_download;

/// A file's name in lower case without the ending of a compression, and its content without the compression.
///
/// # Errors
/// It has the ending of a compression and is not compressed so, or the reverse; it is damaged, or what a failed download has left.
pub fn opened(name: &str, bytes: Bytes) -> anyhow::Result<(String, Bytes)> {
    let name = name.to_lowercase();
    if let Some(problem) = failed_download(&bytes) {
        bail!(problem);
    }
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
    for (mark, ending) in [(&b"\x1f\x8b"[..], ".gz"), (&b"\x28\xb5\x2f\xfd"[..], ".zst")] {
        ensure!(!bytes.starts_with(mark), "is compressed: name it {name}{ending}");
    }
    Ok((name, bytes))
}
