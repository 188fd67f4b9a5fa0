//! The tiny text-to-image models of `tests/fixtures/sd_model_*.safetensors`, as folders in a hub's layout.

use std::{collections::HashMap, path::Path};

use safetensors::{SafeTensors, tensor::TensorView};

use crate::repository;

/// Writes the model of a family (`sd15`, `sd21`, `sdxl`) below `folder`.
///
/// # Panics
/// The fixture cannot be read, or the folder cannot be written.
pub fn write(family: &str, folder: &Path) {
    let bytes = fixture_bytes(&format!("sd_model_{family}"));
    let metadata = strings(&bytes);
    let archive = SafeTensors::deserialize(&bytes).expect("the fixture is safetensors");
    let write = |name: &str, content: &[u8]| {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().expect("a file has a folder")).expect("a folder");
        std::fs::write(path, content).expect("a file");
    };
    let class = match metadata.contains_key("text_encoder_2") {
        true => "StableDiffusionXLPipeline",
        false => "StableDiffusionPipeline",
    };
    let mut index: serde_json::Value = serde_json::from_str(&metadata["model_index"]).expect("JSON");
    index["_class_name"] = class.into();
    write("model_index.json", index.to_string().as_bytes());
    write("scheduler/scheduler_config.json", metadata["scheduler"].as_bytes());
    for (name, content) in metadata.iter().filter(|(name, _)| name.starts_with("tokenizer")) {
        write(name, content.as_bytes());
        // transformers needs this; the loader here takes it from the encoder.
        if let Some(folder) = name.strip_suffix("special_tokens_map.json") {
            let mut config: serde_json::Value = serde_json::from_str(content).expect("JSON");
            config["model_max_length"] = 77.into();
            config["tokenizer_class"] = "CLIPTokenizer".into();
            write(&format!("{folder}tokenizer_config.json"), config.to_string().as_bytes());
        }
    }
    for (part, stem) in [
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
        ("text_encoder_2", "model"),
    ] {
        let Some(config) = metadata.get(part) else { continue };
        write(&format!("{part}/config.json"), config.as_bytes());
        let prefix = format!("{part}.");
        let tensors: Vec<(String, TensorView)> = archive
            .iter()
            .filter_map(|(name, view)| Some((name.strip_prefix(&prefix)?.to_owned(), view)))
            .collect();
        let bytes = safetensors::serialize(tensors, None).expect("safetensors");
        write(&format!("{part}/{stem}.safetensors"), &bytes);
    }
}

/// Puts the U-Net of a fixture in the place of that of a model's folder.
///
/// # Panics
/// The fixture cannot be read, or the folder cannot be written.
pub fn replace_unet(folder: &Path, fixture: &str) {
    let bytes = fixture_bytes(fixture);
    let metadata = strings(&bytes);
    let archive = SafeTensors::deserialize(&bytes).expect("the fixture is safetensors");
    let tensors: Vec<(String, TensorView)> = archive
        .iter()
        .filter_map(|(name, view)| Some((name.strip_prefix("unet.")?.to_owned(), view)))
        .collect();
    let bytes = safetensors::serialize(tensors, None).expect("safetensors");
    let unet = folder.join("unet");
    std::fs::write(unet.join("config.json"), &metadata["unet"]).expect("a file");
    std::fs::write(unet.join("diffusion_pytorch_model.safetensors"), bytes).expect("a file");
}

/// Puts the same tokenizer as transformers 5 writes it, in one file, in the place of that of a model's folder.
///
/// # Panics
/// The fixture cannot be read, or the folder cannot be written.
pub fn join_tokenizer(folder: &Path) {
    let metadata = strings(&fixture_bytes("sd_tokenizer"));
    let folder = folder.join("tokenizer");
    std::fs::remove_dir_all(&folder).expect("a folder");
    std::fs::create_dir(&folder).expect("a folder");
    for (name, content) in &metadata {
        if let Some(name) = name.strip_prefix("whole/") {
            std::fs::write(folder.join(name), content).expect("a file");
        }
    }
}

fn fixture_bytes(name: &str) -> Vec<u8> {
    std::fs::read(repository().join(format!("tests/fixtures/{name}.safetensors")))
        .expect("the fixture can be read")
}

fn strings(fixture: &[u8]) -> HashMap<String, String> {
    let (_, header) = SafeTensors::read_metadata(fixture).expect("the fixture is safetensors");
    header.metadata().clone().expect("the fixture has metadata")
}

/// Writes a tar in the WebDataset layout.
///
/// # Panics
/// It cannot be written.
pub fn write_tar(path: &Path, members: &[(String, Vec<u8>)]) {
    let mut builder = tar::Builder::new(std::fs::File::create(path).expect("a file"));
    for (name, content) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        builder.append_data(&mut header, name, content.as_slice()).expect("a member");
    }
    builder.finish().expect("a tar");
}
