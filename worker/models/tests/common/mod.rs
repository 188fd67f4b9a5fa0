//! Helpers of several test files.

#![allow(dead_code, clippy::unwrap_used, reason = "each test file uses its own part, and a test may panic")]

use std::path::PathBuf;

use potstill_models::{EdmConfig, EdmNetwork, weights::Archive};
use tch::{Device, Tensor};

/// Folder of the reference values; `POTSTILL_FIXTURES` names another one.
pub fn fixtures() -> PathBuf {
    std::env::var_os("POTSTILL_FIXTURES")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures"), PathBuf::from)
}

/// The network of a reference file: its configuration, and the weights under `prefix`.
pub fn network(archive: &Archive, prefix: &str) -> EdmNetwork {
    let config = serde_json::from_str(&archive.metadata["config"]).unwrap();
    EdmNetwork::from_tensors(config, &archive.with_prefix(prefix), Device::Cpu).unwrap()
}

/// A small SongUNet.
pub fn small() -> EdmConfig {
    serde_json::from_str(
        r#"{"img_resolution": 8, "img_channels": 2, "label_dim": 3, "model_type": "SongUNet", "augment_dim": 4,
            "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.3}"#,
    )
    .unwrap()
}

/// |a − b| / |b|, Euclidean.
pub fn relative_error(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let (a, b) = (a.to_kind(tch::Kind::Double), b.to_kind(tch::Kind::Double));
    ((a - &b).norm() / b.norm()).double_value(&[])
}

/// max |a − b| / max |b|.
pub fn relative_error_of_elements(a: &Tensor, b: &Tensor) -> f64 {
    ((a - b).abs().max() / b.abs().max()).double_value(&[])
}

/// Bit for bit.
pub fn equal(a: &Tensor, b: &Tensor) -> bool {
    a.size() == b.size() && a.equal(b)
}
