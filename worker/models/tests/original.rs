//! Models in one file in the original layout, there and back; and adapters of other programs, added to a model. That the layout is
//! the public one is shown by diffusers, which reads such files in `tests/single_file.rs`.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{collections::BTreeMap, path::Path};

use common::{files, folder};
use potstill_models::{
    Denoiser,
    diffusers::{ModelFolder, merge, original},
    lora::{
        Lora,
        file::{Naming, named},
    },
    weights::{self, Archive, Precision, Stored},
};
use tch::{Device, Kind, Tensor};

/// The tensors of a part of a folder.
fn part(folder: &Path, part: &str) -> BTreeMap<String, Tensor> {
    let file = if part.starts_with("text") { "model" } else { "diffusion_pytorch_model" };
    Archive::read(&folder.join(part).join(format!("{file}.safetensors"))).unwrap().tensors
}

/// Puts the U-Net of a reference file in the place of a folder's.
fn put_unet(folder: &Path, archive: &Archive) {
    let tensors = archive.with_prefix("unet.");
    let tensors: Vec<(&str, &Tensor)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let unet = folder.join("unet");
    std::fs::write(unet.join("config.json"), &archive.metadata["unet"]).unwrap();
    let bytes = weights::archive(&tensors, &BTreeMap::new()).unwrap();
    std::fs::write(unet.join("diffusion_pytorch_model.safetensors"), bytes).unwrap();
}

/// A model's folder as one file.
fn packed(folder: &Path, file: &Path, precision: Precision) {
    let unet = part(folder, "unet").into_iter().collect();
    let header = BTreeMap::from([("modelspec.license".to_owned(), "openrail++".to_owned())]);
    original::pack(&ModelFolder::open(folder).unwrap(), unet, precision, &header, file).unwrap();
}

fn with_prefix(name: &str, part: &str) -> String {
    let bare = !part.starts_with("text_encoder") || name.starts_with("text_");
    if bare { name.to_owned() } else { format!("text_model.{name}") }
}

#[test]
fn a_model_in_one_file_is_the_model() {
    let ssd = ("sd_unet_asymmetric".to_owned(), files("sd_model_sd15").remove(0).1);
    for (name, archive) in files("sd_model_").into_iter().chain([ssd]) {
        let (model, out) = (folder(&archive), tempfile::tempdir().unwrap());
        if name.starts_with("sd_unet") {
            // Of SSD-1B's kind: attention differs within a block, and the middle has none.
            put_unet(model.path(), &files(&name).remove(0).1);
        }
        let file = out.path().join("model.safetensors");
        packed(model.path(), &file, Precision::Fp32);
        let names: Vec<String> = weights::map(&file).unwrap().into_keys().collect();
        assert!(
            names.iter().any(|name| name == "model.diffusion_model.input_blocks.0.0.weight"),
            "{names:?}"
        );
        let again = out.path().join("again");
        std::fs::create_dir(&again).unwrap();
        original::unpack(&file, Some(model.path()), &again).unwrap();
        let read = ModelFolder::open(&again).unwrap();
        assert_eq!(read.license().as_deref(), Some("openrail++"));
        let with_weights = ["unet", "vae", "text_encoder", "text_encoder_2"];
        for part_name in read.parts().filter(|part| with_weights.contains(part)) {
            let found = part(&again, part_name);
            let expected = part(model.path(), part_name);
            let expected: BTreeMap<String, &Tensor> = expected
                .iter()
                .filter(|(name, _)| !name.ends_with("position_ids"))
                .map(|(name, tensor)| (with_prefix(name, part_name), tensor))
                .collect();
            assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{name}");
            for (tensor_name, tensor) in expected {
                assert!(found[&tensor_name].equal(tensor), "{name}: {part_name}: {tensor_name}");
            }
        }
        // Everything can be loaded.
        read.check(&read.text(Device::Cpu).unwrap()).unwrap();
        let (network, autoencoder) =
            (read.denoiser(Device::Cpu).unwrap(), read.autoencoder(Device::Cpu).unwrap());
        assert!(network.parameters().flat().numel() > 0 && autoencoder.size() > 0);
        // Weights keep their data type.
        packed(model.path(), &file, Precision::Fp16);
        let half = out.path().join("half");
        std::fs::create_dir(&half).unwrap();
        original::unpack(&file, Some(model.path()), &half).unwrap();
        assert!(part(&half, "unet").values().all(|tensor| tensor.kind() == Kind::Half));
    }
}

#[test]
fn what_does_not_belong_to_a_model_of_one_file_is_named() {
    let (_, archive) = files("sd_model_sdxl").remove(0);
    let (model, out) = (folder(&archive), tempfile::tempdir().unwrap());
    let file = out.path().join("model.safetensors");
    packed(model.path(), &file, Precision::Fp32);
    let original = weights::map(&file).unwrap();
    let refused = |change: &dyn Fn(&mut weights::Named)| {
        let mut tensors: weights::Named =
            original.iter().map(|(name, stored)| (name.clone(), Stored::Memory(stored.tensor()))).collect();
        change(&mut tensors);
        let (changed, to) = (out.path().join("changed.safetensors"), tempfile::tempdir().unwrap());
        weights::write(&changed, &tensors, None, &BTreeMap::new()).unwrap();
        original::unpack(&changed, Some(model.path()), to.path()).unwrap_err().to_string()
    };
    let one = || Stored::Memory(Tensor::zeros([2, 2], (Kind::Float, Device::Cpu)));
    let add = |name: &'static str| refused(&move |tensors| drop(tensors.insert(name.to_owned(), one())));
    assert!(
        add("model.diffusion_model.more.weight").contains("model.diffusion_model.more.weight is not part")
    );
    let first = "model.diffusion_model.input_blocks.0.0.bias";
    let message = refused(&|tensors| drop(tensors.remove(first)));
    assert!(message.contains(&format!("{first} is missing")), "{message}");
    let message = refused(&|tensors| drop(tensors.insert(first.to_owned(), one())));
    assert!(message.contains(&format!("{first} has shape [2, 2], expected [")), "{message}");
    // Each of these is another kind of file.
    for (kept, added, what) in [
        ("none", "double_blocks.0.img_attn.qkv.weight", "FLUX"),
        ("none", "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("none", "conditioner.embedders.0.model.token_embedding.weight", "refiner"),
        ("none", "lora_unet_x.lora_down.weight", "low-rank adapters"),
        ("none", "unet.x.lora_A.weight", "low-rank adapters"),
        (
            "none",
            "down_blocks.0.resnets.0.norm1.weight",
            "one part of a model in diffusers' layout, its U-Net",
        ),
        (
            "none",
            "encoder.down_blocks.0.resnets.0.norm1.weight",
            "its autoencoder: name the whole model's folder",
        ),
        (
            "none",
            "decoder.up_blocks.0.resnets.0.norm1.weight",
            "its autoencoder: name the whole model's folder",
        ),
        ("none", "text_model.final_layer_norm.weight", "its text encoder: name the whole model's folder"),
        ("none", "vision_model.post_layernorm.weight", "a whole CLIP model"),
        ("none", "decoder.up.0.block.0.norm1.weight", "its autoencoder: name the whole model's file"),
        ("first_stage_model.", "x", "its autoencoder: name the whole model's file"),
        ("model.diffusion_model.", "x", "without text encoders"),
        ("conditioner.", "x", "no U-Net"),
        ("none", "something.else", "such as something.else"),
    ] {
        let message = refused(&|tensors| {
            tensors.retain(|name, _| name.starts_with(kept));
            tensors.insert(added.to_owned(), one());
        });
        assert!(message.contains(what) && message.contains("changed.safetensors"), "{added}: {message}");
    }
    for (bytes, what) in
        [(&b"PK\x03\x04archive/data.pkl"[..], "is a pickle"), (b"{}", "not a safetensors file")]
    {
        std::fs::write(&file, bytes).unwrap();
        let message = original::unpack(&file, None, out.path()).unwrap_err().to_string();
        assert!(message.contains(what), "{message}");
    }
}

#[test]
fn adapters_are_added_to_unet_and_text_encoders_by_all_names() {
    let (_, archive) = files("sd_model_sdxl").remove(0);
    let model = folder(&archive);
    let network = ModelFolder::open(model.path()).unwrap().denoiser(Device::Cpu).unwrap();
    let lora = Lora {
        rank: 2,
        alpha: 1.0,
        targets: Some(vec!["to_q".to_owned(), "conv1".to_owned()]),
        dropout: 0.0,
    };
    let adapted =
        network.adapted(&lora, &mut |shape| Tensor::randn(shape, (Kind::Float, Device::Cpu))).unwrap();
    let flat = adapted.parameters().flat();
    tch::no_grad(|| flat.shallow_clone().copy_(&(flat + flat.randn_like() * 0.1)));
    let peft = named(adapted.parameters(), &lora, Naming::Peft);
    let kohya = named(adapted.parameters(), &lora, Naming::Kohya);
    // kohya's scripts name the layers of SDXL as the original layout does.
    let original_names: Vec<(String, Tensor)> = kohya
        .iter()
        .map(|(name, tensor)| {
            let name = name
                .replace("down_blocks_1_attentions_0", "input_blocks_3_1")
                .replace("mid_block_attentions_0", "middle_block_1")
                .replace("down_blocks_0_resnets_0_conv1", "input_blocks_1_0_in_layers_2");
            (name, tensor.shallow_clone())
        })
        .collect();
    assert!(
        original_names
            .iter()
            .any(|(name, _)| name.contains("middle_block_1_transformer_blocks_0_attn1_to_q"))
    );
    let query = "encoder.layers.0.self_attn.q_proj";
    let width = part(model.path(), "text_encoder_2")[&format!("text_model.{query}.weight")].size();
    let halves = |prefix: &str, name: &str| {
        let some = |rows: i64, columns: i64| Tensor::ones([rows, columns], (Kind::Float, Device::Cpu));
        [
            (format!("{prefix}{name}.lora_down.weight"), some(1, width[1])),
            (format!("{prefix}{name}.lora_up.weight"), some(width[0], 1)),
        ]
    };
    let text = halves("lora_te2_text_model_", &query.replace('.', "_"));
    for (what, tensors) in [("peft", peft), ("kohya", kohya), ("original names", original_names)] {
        let changed = folder(&archive);
        let file = changed.path().join("adapters.safetensors");
        let tensors: Vec<(&str, &Tensor)> =
            tensors.iter().chain(&text).map(|(name, tensor)| (name.as_str(), tensor)).collect();
        std::fs::write(&file, weights::archive(&tensors, &BTreeMap::new()).unwrap()).unwrap();
        merge(changed.path(), &[(file.clone(), 0.5), (file, 0.5)]).unwrap();
        let found = ModelFolder::open(changed.path()).unwrap().denoiser(Device::Cpu).unwrap();
        let error = common::relative_error(found.parameters().flat(), adapted.merged().parameters().flat());
        assert!(error < 1e-6, "{what}: {error:.1e}");
        let name = format!("text_model.{query}.weight");
        let added =
            &part(changed.path(), "text_encoder_2")[&name] - &part(model.path(), "text_encoder_2")[&name];
        assert!((added - 1.0).abs().max().double_value(&[]) < 1e-5, "{what}");
        assert!(part(changed.path(), "vae").iter().all(|(name, t)| part(model.path(), "vae")[name].equal(t)));
    }
}
