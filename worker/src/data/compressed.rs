//! Compressed files.

use std::io::Read;

use anyhow::{Context, bail};
use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use potstill_models::weights::failed_download;

const GZIP: &[u8] = b"\x1f\x8b";
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";

/// The content of a file that may be compressed, whatever its name says: programs that copy files drop an ending, or unpack and
/// keep it.
///
/// # Errors
/// It is damaged, or what a failed download has left.
pub fn unpacked(bytes: Bytes) -> anyhow::Result<Bytes> {
    if let Some(problem) = failed_download(&bytes) {
        bail!(problem);
    }
    match &bytes[..] {
        start if start.starts_with(GZIP) => from_gzip(&bytes),
        start if start.starts_with(ZSTD) => from_zstd(&bytes),
        _ => Ok(bytes),
    }
}

fn from_gzip(bytes: &[u8]) -> anyhow::Result<Bytes> {
    let mut content = Vec::new();
    MultiGzDecoder::new(bytes).read_to_end(&mut content).context("is not gzip, or damaged")?;
    Ok(content.into())
}

fn from_zstd(bytes: &[u8]) -> anyhow::Result<Bytes> {
    Ok(zstd::decode_all(bytes).context("is not zstd, or damaged")?.into())
}

/// A file's name in lower case without the ending of a compression, and its content [unpacked].
///
/// # Errors
/// As [`unpacked`].
pub fn opened(name: &str, bytes: Bytes) -> anyhow::Result<(String, Bytes)> {
    let name = name.to_lowercase();
    let stem = [".gz", ".zst"].iter().find_map(|ending| name.strip_suffix(ending)).unwrap_or(&name);
    Ok((stem.to_owned(), unpacked(bytes)?))
}
