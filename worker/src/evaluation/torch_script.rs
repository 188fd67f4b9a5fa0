//! TorchScript modules from files.

use anyhow::anyhow;
use potstill_storage::digest::hexadecimal;
use sha2::{Digest, Sha256};
use tch::{CModule, Device};

/// SHA-256 of a file's bytes, hexadecimal.
pub fn digest_of(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

/// A TorchScript module from the bytes of its file.
///
/// # Errors
/// It is not one.
pub fn torch_script(bytes: &[u8], device: Device) -> anyhow::Result<CModule> {
    CModule::load_data_on_device(&mut &bytes[..], device)
        .map_err(|e| anyhow!("is not a TorchScript module: {}", first_line(&e)))
}

/// The first line of libtorch's error, without the place in its source.
pub fn first_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
