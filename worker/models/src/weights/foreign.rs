//! Files that are no safetensors although they are called so, or are named in their place.

use std::{fs::File, io::Read, path::Path};

/// What a file is instead of any file: what a download has left that went wrong.
#[must_use]
pub fn failed_download(start: &[u8]) -> Option<&'static str> {
    let text: Vec<u8> =
        start.iter().take(64).copied().collect::<Vec<u8>>().trim_ascii_start().to_ascii_lowercase();
    if start.is_empty() {
        Some("is empty: its download was interrupted")
    } else if start.starts_with(b"version https://git-lfs") {
        Some("is a Git LFS pointer and not the file that it stands for: run `git lfs pull`")
    } else if text.starts_with(b"<!doctype") || text.starts_with(b"<html") {
        Some(
            "is an HTML page and not the file: its download led to a page, which may ask for a login or a licence",
        )
    } else {
        None
    }
}

/// What a file is instead of safetensors, as far as its beginning tells, and what to do about it.
pub fn what_it_is(file: &Path) -> Option<&'static str> {
    let mut start = [0; 64];
    let length = File::open(file).and_then(|mut file| file.read(&mut start)).ok()?;
    let start = &start[..length];
    // A header of safetensors may begin with these two bytes, too: then zeros follow.
    if start.starts_with(b"PK\x03\x04") || matches!(start, [0x80, 2..=5, next, ..] if *next != 0) {
        return Some(
            "is a pickle, which can run any code when it is read: take the model's .safetensors file, or convert one that you trust \
             with Python's safetensors",
        );
    }
    if start.starts_with(b"GGUF") {
        return Some("is a GGUF file, whose weights are quantized: take the model's .safetensors file");
    }
    failed_download(start)
}
