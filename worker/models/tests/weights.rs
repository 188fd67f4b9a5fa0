//! Tests writing and reading networks.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeMap;

use common::{equal, fixtures, network, small};
use potstill_models::{
    Denoiser, EdmConfig, EdmNetwork, SaveError,
    weights::{self, Archive},
};
use tch::{Device, Kind, Tensor};

fn saved() -> (EdmNetwork, Vec<u8>) {
    let config = serde_json::from_value(serde_json::json!({
        "img_resolution": 4, "img_channels": 1, "model_type": "SongUNet", "model_channels": 4, "channel_mult": [1, 1],
        "num_blocks": 1, "attn_resolutions": [], "embedding_type": "fourier", "resample_filter": [1, 3, 3, 1],
        "sigma_max": 80.0,
    }));
    let network = EdmNetwork::initialise(config.unwrap(), 5, Device::Cpu).unwrap();
    let bytes =
        network.to_safetensors(&BTreeMap::from([("note".into(), "n".into()), ("by".into(), "b".into())]));
    (network, bytes.unwrap())
}

#[test]
fn what_was_saved_is_loaded_bit_for_bit() {
    let (network, bytes) = saved();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("network.safetensors");
    std::fs::write(&path, &bytes).unwrap();
    let loaded = EdmNetwork::load(&path, Device::Cpu).unwrap();
    assert_eq!(loaded.config(), network.config());
    assert!(equal(loaded.parameters().flat(), network.parameters().flat()));
    assert_eq!(loaded.parameters().entries(), network.parameters().entries());
    let (a, b) = (loaded.parameters().buffers(), network.parameters().buffers());
    assert!(!b.is_empty() && a.keys().eq(b.keys()) && a.values().zip(b.values()).all(|(a, b)| equal(a, b)));
    let archive = Archive::from_bytes(&bytes).unwrap();
    assert_eq!(archive.metadata["note"], "n");
    // Written again, it gives the same bytes.
    let metadata: BTreeMap<_, _> = archive.metadata.into_iter().filter(|(key, _)| key != "config").collect();
    assert_eq!(loaded.to_safetensors(&metadata).unwrap(), bytes);
}

#[test]
fn the_configuration_is_not_to_be_overwritten() {
    let (network, _) = saved();
    let metadata = BTreeMap::from([("config".to_owned(), String::new())]);
    assert!(matches!(network.to_safetensors(&metadata), Err(SaveError::ReservedKey)));
}

#[test]
fn official_weights_survive() {
    let archive = Archive::read(&fixtures().join("edm_ncsnpp.safetensors")).unwrap();
    let network = network(&archive, "weights.");
    let again = Archive::from_bytes(&network.to_safetensors(&BTreeMap::new()).unwrap()).unwrap();
    let expected = archive.with_prefix("weights.");
    assert!(again.tensors.keys().eq(expected.keys()));
    assert!(again.tensors.values().zip(expected.values()).all(|(a, b)| equal(a, b)));
}

#[test]
fn every_tensor_that_does_not_fit_is_named() {
    let (network, bytes) = saved();
    let mut tensors = Archive::from_bytes(&bytes).unwrap().tensors;
    tensors.remove("model.map_layer0.weight");
    tensors.remove("model.map_noise.freqs");
    tensors.insert("model.extra".into(), Tensor::zeros([2], (Kind::Float, Device::Cpu)));
    tensors.insert("model.map_layer0.bias".into(), Tensor::zeros([3], (Kind::Float, Device::Cpu)));
    tensors.insert("model.map_layer1.bias".into(), Tensor::zeros([16], (Kind::Int64, Device::Cpu)));
    let error =
        EdmNetwork::from_tensors(network.config().clone(), &tensors, Device::Cpu).err().unwrap().to_string();
    for expected in [
        "model.map_layer0.weight [16, 4] is missing",
        "model.map_noise.freqs [2] is missing",
        "model.extra [2] is not part of the network",
        "model.map_layer0.bias has shape [3], expected [16]",
        "model.map_layer1.bias is of kind Int64",
    ] {
        assert!(error.contains(expected), "{error}");
    }
    assert_eq!(error.lines().count(), 6, "{error}");

    let tensors = Archive::from_bytes(&bytes).unwrap().tensors;
    let other = EdmConfig { resample_filter: vec![1.0, 2.0, 2.0, 1.0], ..network.config().clone() };
    let error = EdmNetwork::from_tensors(other, &tensors, Device::Cpu).err().unwrap().to_string();
    assert!(error.contains("enc.2x2_down.conv0.resample_filter differs"), "{error}");
}

#[test]
fn half_precision_is_read_as_fp32() {
    let (network, bytes) = saved();
    let mut tensors = Archive::from_bytes(&bytes).unwrap().tensors;
    for tensor in tensors.values_mut() {
        *tensor = tensor.to_kind(Kind::BFloat16);
    }
    let loaded = EdmNetwork::from_tensors(network.config().clone(), &tensors, Device::Cpu).unwrap();
    let expected = network.parameters().flat().to_kind(Kind::BFloat16).to_kind(Kind::Float);
    assert!(equal(loaded.parameters().flat(), &expected));
}

#[test]
fn damaged_files_are_refused_by_name() {
    let (_, bytes) = saved();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("teacher.safetensors");
    for length in [0, 7, 9, 200, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..length]).unwrap();
        let error = EdmNetwork::load(&path, Device::Cpu).err().unwrap().to_string();
        assert!(
            error.contains("teacher.safetensors") && error.contains("damaged"),
            "{length} bytes: {error}"
        );
    }
    let missing = folder.path().join("nowhere.safetensors");
    let error = EdmNetwork::load(&missing, Device::Cpu).err().unwrap().to_string();
    assert!(error.contains("cannot read") && error.contains("nowhere.safetensors"), "{error}");
}

#[test]
fn a_file_without_a_configuration_is_refused() {
    let data = [0u8; 4];
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1], &data).unwrap();
    let bytes = safetensors::serialize([("a", view)], None).unwrap();
    let error = EdmNetwork::from_bytes(&bytes, Device::Cpu).err().unwrap().to_string();
    assert!(error.contains("no `config`"), "{error}");
}

#[test]
fn infinity_survives_json() {
    let config = small();
    assert_eq!(config.sigma_max, f64::INFINITY);
    let json = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<EdmConfig>(&json).unwrap(), config);
}

#[test]
fn files_of_another_kind_are_called_what_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    for (content, said) in [
        (&b""[..], "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "is an HTML page"),
        (b"PK\x03\x04archive", "is a pickle"),
        (b"\x80\x02}q", "is a pickle"),
        // As in EDM's files.
        (b"\x80\x04\x95\x10", "is a pickle"),
        (b"\x80\x02\0\0\0\0\0\0{", "not a safetensors file"),
        (b"GGUF\x03\0\0\0", "is a GGUF file"),
        (b"something else entirely", "not a safetensors file"),
    ] {
        std::fs::write(&file, content).unwrap();
        for error in [weights::map(&file).err().unwrap(), Archive::read(&file).err().unwrap()] {
            let text = error.to_string();
            assert!(text.contains(said) && text.contains("model.safetensors"), "{text}");
        }
    }
}

#[test]
fn eight_bit_weights_are_refused_in_one_sentence() {
    let bytes = [0u8; 4];
    let view = || safetensors::tensor::TensorView::new(safetensors::Dtype::F8_E4M3, vec![4], &bytes).unwrap();
    let file = safetensors::serialize([("a", view()), ("b", view())], None).unwrap();
    let error = Archive::from_bytes(&file).err().unwrap().to_string();
    assert!(error.contains("2 of 2 tensors") && error.contains("F8_E4M3"), "{error}");
}
