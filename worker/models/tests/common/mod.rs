//! Helpers of several test files.

#![allow(dead_code, clippy::unwrap_used, reason = "each test file uses its own part, and a test may panic")]

pub mod adapters;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use potstill_models::{
    EdmConfig, EdmNetwork,
    weights::{self, Archive},
};
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

/// The reference files whose names begin so.
pub fn files(prefix: &str) -> Vec<(String, Archive)> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(fixtures())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.file_name().unwrap().to_string_lossy().starts_with(prefix))
        .collect();
    found.sort();
    assert!(!found.is_empty(), "no {prefix}* in {}", fixtures().display());
    let name = |path: &Path| path.file_stem().unwrap().to_string_lossy().into_owned();
    found.into_iter().map(|path| (name(&path), Archive::read(&path).unwrap())).collect()
}

/// Writes the model of a reference file as a folder of a hub.
pub fn folder(archive: &Archive) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    };
    let xl = archive.metadata.contains_key("text_encoder_2");
    let mut index: serde_json::Value = serde_json::from_str(&archive.metadata["model_index"]).unwrap();
    index["_class_name"] = if xl { "StableDiffusionXLPipeline" } else { "StableDiffusionPipeline" }.into();
    write("model_index.json", &index.to_string());
    write("scheduler/scheduler_config.json", &archive.metadata["scheduler"]);
    for (name, content) in archive.metadata.iter().filter(|(name, _)| name.starts_with("tokenizer")) {
        write(name, content);
    }
    for (part, stem) in [
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
        ("text_encoder_2", "model"),
    ] {
        let Some(config) = archive.metadata.get(part) else { continue };
        write(&format!("{part}/config.json"), config);
        let tensors = archive.with_prefix(&format!("{part}."));
        let tensors: Vec<(&str, &Tensor)> = tensors.iter().map(|(name, t)| (name.as_str(), t)).collect();
        let bytes = weights::archive(&tensors, &BTreeMap::new()).unwrap();
        std::fs::write(folder.path().join(part).join(format!("{stem}.safetensors")), bytes).unwrap();
    }
    folder
}
