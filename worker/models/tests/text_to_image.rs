//! Text-to-image models beside the real diffusers and transformers: `tests/fixtures/sd_*.safetensors`, which
//! `scripts/fixtures/text_to_image.py` writes.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{collections::BTreeMap, path::Path, rc::Rc};

use common::{files, folder, relative_error, relative_error_of_elements};
use potstill_models::{
    Condition, Denoiser, Embedded, ForwardProcess, Mode, TextCondition,
    diffusers::{
        LatentDenoiser, ModelFolder, ScheduleConfig, Tokenizer, UNetConfig, UNetInputs,
        guided::{fix_guidance, takes_guidance},
    },
    process::DdpmPrediction,
    sampler,
    weights::{self, Archive, Stored},
};
use tch::{Device, Kind, Tensor, no_grad};

const TOLERANCE: f64 = 1e-4;

#[track_caller]
fn assert_close(place: &str, what: &str, found: &Tensor, expected: &Tensor) {
    let error = relative_error(found, expected);
    let worst = relative_error_of_elements(found, expected);
    println!("{place}: {what}: {error:.1e}, worst element {worst:.1e}");
    assert!(
        error <= TOLERANCE && worst <= TOLERANCE,
        "{place}: {what} is off by {error:.2e}, {worst:.2e} in an element"
    );
}

/// Compares output, bottleneck and gradients of a U-Net with the stored ones, with and without recomputing activations.
fn compare_unet(name: &str, load: impl Fn() -> LatentDenoiser, archive: &Archive) {
    for recompute in [false, true] {
        let network = load();
        let place = format!("{name}{}", if recompute { ", recomputed" } else { "" });
        let input = |key: &str| archive.tensors.get(&format!("run.input.{key}"));
        let output = |key: &str| &archive.tensors[&format!("run.output.{key}")];
        let x = input("sample").unwrap().copy().set_requires_grad(true);
        let states = input("states").unwrap().copy().set_requires_grad(true);
        let inputs = UNetInputs {
            time: input("time").unwrap(),
            states: &states,
            text_time: input("text_embeds").zip(input("time_ids")),
            class_labels: input("class_labels"),
            recompute,
        };
        let (prediction, bottleneck) = network.predict(&x, &inputs);
        assert_close(&place, "prediction", &prediction.detach(), output("sample"));
        assert_close(&place, "bottleneck", &bottleneck.detach(), output("bottleneck"));
        let direction = Tensor::linspace(-1.0, 1.0, prediction.numel() as i64, (Kind::Float, Device::Cpu));
        (&prediction * direction.view_as(&prediction)).sum(Kind::Float).backward();
        assert_close(&place, "gradient of the latents", &x.grad(), output("grad_sample"));
        assert_close(&place, "gradient of the text", &states.grad(), output("grad_states"));
        let norms: BTreeMap<&str, f64> = network
            .parameters()
            .entries()
            .iter()
            .zip(network.parameters().leaves())
            .map(|(entry, leaf)| (entry.name.as_str(), leaf.grad().norm().double_value(&[])))
            .collect();
        let expected = archive.with_prefix("run.output.grad_norm.");
        if expected.is_empty() {
            continue;
        }
        assert_eq!(norms.len(), expected.len(), "{place}");
        let largest = norms.values().fold(0.0f64, |a, b| a.max(*b));
        for (parameter, expected) in &expected {
            let (found, expected) = (norms[parameter.as_str()], expected.double_value(&[]));
            // The gradient of a bias before a normalization is 0 but for rounding.
            let allowed = TOLERANCE * expected + 1e-7 * largest;
            assert!(
                (found - expected).abs() <= allowed,
                "{place}: gradient norm of {parameter}: {found}, officially {expected}"
            );
        }
    }
}

/// The network of a file of one U-Net.
fn latent_denoiser(archive: &Archive) -> LatentDenoiser {
    let config = UNetConfig::parse(&archive.metadata["unet"]).unwrap();
    let schedule = ScheduleConfig::parse(r#"{"_class_name": "DDIMScheduler"}"#).unwrap();
    let tensors = archive.with_prefix("unet.").into_iter();
    let tensors = tensors.map(|(name, tensor)| (name, Stored::Memory(tensor))).collect();
    LatentDenoiser::from_tensors(config, schedule, &tensors, (Kind::Float, Device::Cpu)).unwrap()
}

#[test]
fn u_nets_equal_diffusers() {
    for (name, archive) in files("sd_unet_") {
        compare_unet(&name, || latent_denoiser(&archive), &archive);
    }
}

#[test]
#[should_panic(expected = "augmentation labels given to a network that takes none")]
fn a_u_net_of_texts_takes_no_augmentation_labels() {
    let (_, archive) = files("sd_unet_").into_iter().next().unwrap();
    let network = latent_denoiser(&archive);
    let states = archive.tensors["run.input.states"].shallow_clone();
    let null = Rc::new(Embedded { states: states.narrow(0, 0, 1), pooled: None });
    let condition = Condition::Text(TextCondition::new(Embedded { states, pooled: None }, null, None));
    let condition = condition.augmented(Tensor::zeros([1, 9], (Kind::Float, Device::Cpu)));
    let (x, time) = (&archive.tensors["run.input.sample"], &archive.tensors["run.input.time"]);
    let _ = network.denoise(x, time, &condition, Mode::Eval);
}

#[test]
fn whole_models_equal_diffusers() {
    for (name, archive) in files("sd_model_") {
        let path = folder(&archive);
        let model = ModelFolder::open(path.path()).unwrap();
        let network = model.denoiser(Device::Cpu).unwrap();
        compare_unet(&name, || model.denoiser(Device::Cpu).unwrap(), &archive);

        let text = model.text(Device::Cpu).unwrap();
        model.check(&text).unwrap();
        let prompts: Vec<String> = serde_json::from_str(&archive.metadata["prompts"]).unwrap();
        let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
        let embedded = text.embed(&prompts).unwrap();
        assert_close(&name, "states of the text", &embedded.states, &archive.tensors["states"]);
        if let Some(pooled) = archive.tensors.get("pooled") {
            assert_close(&name, "pooled text", embedded.pooled.as_ref().unwrap(), pooled);
        }

        let autoencoder = model.autoencoder(Device::Cpu).unwrap();
        let run = |key: &str| &archive.tensors[&format!("vae_run.{key}")];
        let scale = autoencoder.config().scaling_factor;
        let (latents, images) = no_grad(|| {
            let (mean, log_variance) = autoencoder.moments(run("image"));
            assert_close(&name, "mean of the latents", &mean, run("mean"));
            assert_close(&name, "log variance of the latents", &log_variance, run("logvar"));
            let scaled = run("latents") * scale;
            assert_close(&name, "decoded", &autoencoder.decode(&scaled), run("decoded"));
            assert_close(&name, "decoded in tiles", &autoencoder.decode_tiled(&scaled), run("tiled"));

            let null = Rc::new(text.null().unwrap());
            let sizes = model.is_xl().then(|| {
                let side = 16i64;
                Tensor::from_slice(&[side, side, 0, 0, side, side]).to_kind(Kind::Float).unsqueeze(0)
            });
            let first = embedded.map(|x| x.narrow(0, 0, 1));
            let condition = Condition::Text(TextCondition::new(first, null, sizes));
            let noises: Vec<Tensor> = archive.tensors["noises"].unbind(0);
            let times: Vec<f64> = serde_json::from_str(&archive.metadata["times"]).unwrap();
            let guidance: f64 = serde_json::from_str(&archive.metadata["guidance"]).unwrap();
            let few = {
                let mut x0 = noises[0].zeros_like();
                for (noise, time) in noises.iter().zip(&times) {
                    let time = Tensor::full([1], *time, (Kind::Float, Device::Cpu));
                    let noisy = network.process().add_noise(&x0, noise, &time);
                    x0 = network.denoise(&noisy, &time, &condition, Mode::Eval);
                }
                x0
            };
            let both = condition.doubled().unwrap();
            let times = sampler::leading_timesteps(1000, 4);
            let guided = sampler::ddim(network.process(), &noises[0], &times, |x, time| {
                let halves = network.denoise(&Tensor::cat(&[x, x], 0), time, &both, Mode::Eval).chunk(2, 0);
                &halves[0] + (&halves[1] - &halves[0]) * guidance
            });
            ([few, guided], ["image.few_step", "image.ddim"])
        });
        for (latents, key) in latents.iter().zip(images) {
            let image = no_grad(|| autoencoder.decode(latents)) * 0.5 + 0.5;
            assert_close(&name, key, &image.clamp(0.0, 1.0), &archive.tensors[key]);
        }
    }
}

#[test]
fn schedules_equal_diffusers() {
    for (name, archive) in files("sd_schedules") {
        for (case, json) in &archive.metadata {
            let process = ScheduleConfig::parse(json).unwrap().process();
            let ForwardProcess::Ddpm { alphas_cumprod, .. } = &process else { panic!("a DDPM process") };
            let value = |key: &str| archive.tensors.get(&format!("{case}.{key}"));
            let expected = value("alphas_cumprod").unwrap();
            assert_close(&name, case, &Tensor::from_slice(alphas_cumprod), expected);
            let Some(times) = value("times") else { continue };
            let (x, noise) = (value("x").unwrap(), value("noise").unwrap());
            let x_t = process.add_noise(x, noise, times);
            assert_close(&name, &format!("{case}, noised"), &x_t, value("x_t").unwrap());
            let x0 = process.to_x0(value("native").unwrap(), &x_t, times);
            assert_close(&name, &format!("{case}, x0"), &x0, value("x0").unwrap());
        }
    }
    let sample =
        ScheduleConfig::parse(r#"{"_class_name": "DDIMScheduler", "prediction_type": "sample"}"#).unwrap();
    assert!(matches!(sample.process(), ForwardProcess::Ddpm { prediction: DdpmPrediction::Sample, .. }));
}

#[test]
fn tokens_equal_transformers() {
    for (name, archive) in files("sd_tokenizer") {
        let folder = tempfile::tempdir().unwrap();
        for file in ["vocab.json", "merges.txt"] {
            std::fs::write(folder.path().join(file), &archive.metadata[file]).unwrap();
        }
        let texts: Vec<String> = serde_json::from_str(&archive.metadata["texts"]).unwrap();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let found = Tokenizer::load(folder.path(), 77).unwrap().encode(&texts).unwrap();
        for (row, text) in texts.iter().enumerate() {
            let ids = |x: &Tensor| Vec::<i64>::try_from(x.get(row as i64)).unwrap();
            assert_eq!(ids(&found), ids(&archive.tensors["ids"]), "{name}: {text:?}");
        }
    }
}

#[test]
fn tokenizers_in_one_file_and_added_tokens_equal_transformers() {
    for (name, archive) in files("sd_tokenizer") {
        let texts = |key: &str| -> Vec<String> { serde_json::from_str(&archive.metadata[key]).unwrap() };
        for (form, texts, ids) in [
            ("whole", texts("texts"), "ids"),
            ("added", texts("added_texts"), "added/ids"),
            ("legacy", texts("added_texts"), "legacy/ids"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            for (path, content) in &archive.metadata {
                if let Some(file) = path.strip_prefix(&format!("{form}/")) {
                    std::fs::write(folder.path().join(file), content).unwrap();
                }
            }
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            let found = Tokenizer::load(folder.path(), 77).unwrap().encode(&texts).unwrap();
            for (row, text) in texts.iter().enumerate() {
                let ids_of = |x: &Tensor| Vec::<i64>::try_from(x.get(row as i64)).unwrap();
                assert_eq!(ids_of(&found), ids_of(&archive.tensors[ids]), "{name}, {form}: {text:?}");
            }
        }
    }
}

#[test]
fn settings_and_added_tokens_that_are_not_clips_are_refused() {
    let (_, archive) = files("sd_tokenizer").swap_remove(0);
    let folder = tempfile::tempdir().unwrap();
    for file in ["vocab.json", "merges.txt"] {
        std::fs::write(folder.path().join(file), &archive.metadata[file]).unwrap();
    }
    for (name, content, part) in [
        ("tokenizer_config.json", r#"{"padding_side": "left"}"#, "padding_side"),
        ("tokenizer_config.json", r#"{"truncation_side": "left"}"#, "truncation_side"),
        ("tokenizer_config.json", r#"{"added_tokens_decoder": []}"#, "added_tokens_decoder"),
        ("tokenizer_config.json", "[]", "is no object"),
        ("added_tokens.json", "[]", "is no object"),
    ] {
        std::fs::write(folder.path().join(name), content).unwrap();
        let error = Tokenizer::load(folder.path(), 77).err().unwrap().to_string();
        assert!(error.contains(part), "{content}: {error}");
        std::fs::remove_file(folder.path().join(name)).unwrap();
    }
    std::fs::write(folder.path().join("added_tokens.json"), r#"{"<sks>": 100000}"#).unwrap();
    let error = Tokenizer::load(folder.path(), 77).err().unwrap().to_string();
    assert!(error.contains("<sks>") && error.contains("100000"), "{error}");
    for file in ["vocab.json", "merges.txt"] {
        std::fs::remove_file(folder.path().join(file)).unwrap();
    }
    let error = Tokenizer::load(folder.path(), 77).err().unwrap().to_string();
    assert!(error.contains("vocab.json is missing") && error.contains("tokenizer.json"), "{error}");
    for content in ["[]", "{}", r#"{"model": {"type": "WordPiece", "vocab": {}}}"#] {
        std::fs::write(folder.path().join("tokenizer.json"), content).unwrap();
        let error = Tokenizer::load(folder.path(), 77).err().unwrap().to_string();
        assert!(error.contains("is not the tokenizer of a CLIP text encoder"), "{content}: {error}");
    }
}

#[test]
fn a_tokenizer_that_is_incomplete_is_refused() {
    let (_, archive) = files("sd_tokenizer").swap_remove(0);
    let folder = tempfile::tempdir().unwrap();
    let said = |vocabulary: &str, merges: &str| {
        std::fs::write(folder.path().join("vocab.json"), vocabulary).unwrap();
        std::fs::write(folder.path().join("merges.txt"), merges).unwrap();
        Tokenizer::load(folder.path(), 77).err().map_or_else(String::new, |error| error.to_string())
    };
    let [vocabulary, merges] = ["vocab.json", "merges.txt"].map(|name| archive.metadata[name].as_str());
    let lines: Vec<&str> = merges.lines().collect();
    let first = |count: usize| lines[..count].join("\n");
    assert_eq!(said(vocabulary, merges), "");
    assert_eq!(said(vocabulary, &first(lines.len())), "", "without the last line's end");
    // Cut at a line's end, within a line's second token, and within its first one.
    let (cut, last) = (first(30), lines[30]);
    let half = &last[..=last.find(' ').unwrap() + 1];
    assert!(half.len() < last.len(), "{last}");
    for (merges, counts) in [
        (cut.clone(), "it has 29, without pairs for 7"),
        (format!("{cut}\n{half}"), "it has 30, without pairs for 7"),
    ] {
        let error = said(vocabulary, &merges);
        assert!(error.contains("merges.txt must have 36 pairs") && error.contains(counts), "{error}");
    }
    let error = said(vocabulary, &format!("{cut}\n{}", &last[..1]));
    assert!(error.contains("merges.txt, line 31") && error.contains("not two tokens"), "{error}");
    // More than the vocabulary has.
    let error = said(vocabulary, &format!("{merges}wor wor\n"));
    assert!(error.contains("it has 37, without pairs for 0 of these tokens, and 1 for others"), "{error}");
    for (change, part) in [
        (("word</w>", 547, 600), "numbers from 0 to 549, but none has 547"),
        (("word</w>", 547, 546), "none has 547"),
        (("!", 0, 0), "lacks 1 of the 512 tokens of single bytes"),
        (("<|startoftext|>", 548, 548), "vocab.json has no \"<|startoftext|>\""),
    ] {
        let (token, number, new) = change;
        let mut changed: serde_json::Value = serde_json::from_str(vocabulary).unwrap();
        assert_eq!(changed[token], number);
        match number == new {
            // Another token in its place.
            true => {
                changed.as_object_mut().unwrap().remove(token);
                changed["another"] = new.into();
            }
            false => changed[token] = new.into(),
        }
        let error = said(&changed.to_string(), merges);
        assert!(error.contains(part), "{token}: {error}");
    }
    // The same in one file.
    let whole = tempfile::tempdir().unwrap();
    let mut content: serde_json::Value =
        serde_json::from_str(&archive.metadata["whole/tokenizer.json"]).unwrap();
    content["model"]["merges"].as_array_mut().unwrap().truncate(20);
    std::fs::write(whole.path().join("tokenizer.json"), content.to_string()).unwrap();
    let error = Tokenizer::load(whole.path(), 77).err().unwrap().to_string();
    assert!(error.contains("tokenizer.json must have 36 pairs") && error.contains("it has 20"), "{error}");
}

/// A U-Net that takes the guidance scale is at one scale an ordinary one.
#[test]
fn guided_u_nets_equal_diffusers() {
    for (name, mut archive) in files("sd_guided") {
        // The layer after the embedded scale has other inputs here.
        archive.tensors.retain(|key, _| !key.contains("grad_norm"));
        let (_, whole) = files("sd_model_sd15").swap_remove(0);
        let path = folder(&whole);
        let unet = path.path().join("unet");
        std::fs::write(unet.join("config.json"), &archive.metadata["unet"]).unwrap();
        let tensors: Vec<(String, Tensor)> = archive.with_prefix("unet.").into_iter().collect();
        let tensors: Vec<(&str, &Tensor)> = tensors.iter().map(|(name, x)| (name.as_str(), x)).collect();
        let bytes = weights::archive(&tensors, &BTreeMap::new()).unwrap();
        std::fs::write(unet.join("diffusion_pytorch_model.safetensors"), bytes).unwrap();
        let index = path.path().join("model_index.json");
        let pipeline = std::fs::read_to_string(&index).unwrap();
        let pipeline = pipeline.replace("StableDiffusionPipeline", "LatentConsistencyModelPipeline");
        std::fs::write(&index, pipeline).unwrap();

        assert!(takes_guidance(path.path()));
        let error = ModelFolder::open(path.path()).unwrap().denoiser(Device::Cpu).err().unwrap().to_string();
        assert!(error.contains("time_cond_proj_dim"), "{error}");
        fix_guidance(path.path()).unwrap();
        assert!(!takes_guidance(path.path()));
        let model = ModelFolder::open(path.path()).unwrap();
        assert_eq!(model.index()["_class_name"], "StableDiffusionPipeline");
        compare_unet(&name, || model.denoiser(Device::Cpu).unwrap(), &archive);
    }
}

/// A folder from the SD 1.5 reference, changed by `change`; returns the error of loading it.
fn said_of(change: impl FnOnce(&Path)) -> String {
    let (_, archive) = files("sd_model_sd15").swap_remove(0);
    let path = folder(&archive);
    change(path.path());
    let load = || {
        let model = ModelFolder::open(path.path())?;
        model.denoiser(Device::Cpu)?;
        model.autoencoder(Device::Cpu)?;
        let text = model.text(Device::Cpu)?;
        model.check(&text)
    };
    match load() {
        Ok(()) => "it loads".to_owned(),
        Err(error) => {
            let mut said = error.to_string();
            said = said.replace(&path.path().display().to_string(), "");
            said
        }
    }
}

#[test]
fn a_folder_may_hold_its_weights_in_several_forms() {
    assert_eq!(said_of(|_| {}), "it loads");
    let unet = |path: &Path| path.join("unet/diffusion_pytorch_model.safetensors");
    // In fp16, under the variant's name.
    assert_eq!(
        said_of(|path| {
            std::fs::rename(unet(path), path.join("unet/diffusion_pytorch_model.fp16.safetensors")).unwrap();
        }),
        "it loads"
    );
    // In two files with an index.
    assert_eq!(
        said_of(|path| {
            let whole = Archive::read(&unet(path)).unwrap();
            let mut map = BTreeMap::new();
            for (half, file) in [(0, "a.safetensors"), (1, "b.safetensors")] {
                let part: Vec<(&str, &Tensor)> = whole
                    .tensors
                    .iter()
                    .enumerate()
                    .filter(|(index, _)| index % 2 == half)
                    .map(|(_, (name, tensor))| (name.as_str(), tensor))
                    .collect();
                map.extend(part.iter().map(|(name, _)| ((*name).to_owned(), file)));
                let bytes = weights::archive(&part, &BTreeMap::new()).unwrap();
                std::fs::write(path.join("unet").join(file), bytes).unwrap();
            }
            std::fs::remove_file(unet(path)).unwrap();
            let index = serde_json::json!({ "weight_map": map }).to_string();
            std::fs::write(path.join("unet/diffusion_pytorch_model.safetensors.index.json"), index).unwrap();
        }),
        "it loads"
    );
}

#[test]
fn what_is_wrong_with_a_folder_is_named() {
    let write = |name: &'static str, content: &'static str| {
        move |path: &Path| std::fs::write(path.join(name), content).unwrap()
    };
    let remove = |name: &'static str| move |path: &Path| std::fs::remove_file(path.join(name)).unwrap();
    let edit = |name: &'static str, from: &'static str, to: &'static str| {
        move |path: &Path| {
            let text = std::fs::read_to_string(path.join(name)).unwrap();
            assert!(text.contains(from), "{text}");
            std::fs::write(path.join(name), text.replace(from, to)).unwrap();
        }
    };
    type Change = Box<dyn FnOnce(&Path)>;
    let cases: Vec<(Change, &[&str])> = vec![
        (Box::new(remove("model_index.json")), &["/model_index.json", "cannot read"]),
        (Box::new(remove("unet/config.json")), &["/unet/config.json"]),
        (Box::new(remove("tokenizer/merges.txt")), &["/tokenizer", "merges.txt is missing"]),
        (
            Box::new(remove("vae/diffusion_pytorch_model.safetensors")),
            &["/vae", "diffusion_pytorch_model.safetensors is missing"],
        ),
        (
            Box::new(|path| {
                let unet = path.join("unet");
                std::fs::rename(
                    unet.join("diffusion_pytorch_model.safetensors"),
                    unet.join("diffusion_pytorch_model.bin"),
                )
                .unwrap();
            }),
            &["a pickle", "safe_serialization=True"],
        ),
        (Box::new(|path| std::fs::remove_dir_all(path.join("vae")).unwrap()), &["names \"vae\""]),
        (
            Box::new(edit("model_index.json", "StableDiffusionPipeline", "KandinskyPipeline")),
            &["KandinskyPipeline", "StableDiffusionXLPipeline"],
        ),
        (
            Box::new(edit(
                "scheduler/scheduler_config.json",
                "DDIMScheduler",
                "FlowMatchEulerDiscreteScheduler",
            )),
            &["/scheduler/scheduler_config.json", "FlowMatchEulerDiscreteScheduler"],
        ),
        (
            Box::new(edit("unet/config.json", "\"layers_per_block\": 1", "\"layers_per_block\": 2")),
            &["down_blocks.0.attentions.1.", "is missing", " more"],
        ),
        (
            Box::new(edit("unet/config.json", "\"cross_attention_dim\": 12", "\"cross_attention_dim\": 14")),
            &["to_k.weight has shape [8, 12], expected [8, 14]"],
        ),
        (Box::new(edit("unet/config.json", "\"act_fn\": \"silu\"", "\"act_fn\": \"mish\"")), &["act_fn"]),
        (
            Box::new(edit("text_encoder/config.json", "\"vocab_size\": 550", "\"vocab_size\": 300")),
            &["tokens up to 549", "another encoder's tokenizer"],
        ),
        (Box::new(edit("tokenizer/vocab.json", "<|endoftext|>", "<|theend|>")), &["/tokenizer"]),
        (
            Box::new(edit(
                "unet/config.json",
                "\"cross_attention_dim\": 12",
                "\"cross_attention_dim\": [[12]]",
            )),
            &["/unet/config.json", "`cross_attention_dim` is [[12]]"],
        ),
        (
            Box::new(|path| {
                let file = path.join("unet/diffusion_pytorch_model.safetensors");
                let tensors = weights::map(&file).unwrap().into_iter();
                let wrapped = tensors
                    .map(|(name, stored)| (format!("_orig_mod.{name}"), Stored::Memory(stored.tensor())));
                weights::write(&file, &wrapped.collect(), None, &BTreeMap::new()).unwrap();
            }),
            &["\"_orig_mod.\"", "saved wrapped"],
        ),
        (
            Box::new(write("vae/diffusion_pytorch_model.safetensors", "no such thing")),
            &["not a safetensors file"],
        ),
    ];
    for (change, expected) in cases {
        let said = said_of(change);
        for part in expected {
            assert!(said.contains(part), "{part:?} is not in {said:?}");
        }
    }
}

/// What [`said_of`] says when the index of a folder is another one.
fn said_of_index(change: impl FnOnce(&mut serde_json::Value)) -> String {
    said_of(|path| {
        let file = path.join("model_index.json");
        let mut index = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
        change(&mut index);
        std::fs::write(&file, index.to_string()).unwrap();
    })
}

#[test]
fn classes_that_are_not_supported_are_named() {
    for (part, library, class, supported) in [
        ("unet", "diffusers", "UNet3DConditionModel", "UNet2DConditionModel"),
        ("vae", "diffusers", "AutoencoderTiny", "AutoencoderKL"),
        ("vae", "diffusers", "AsymmetricAutoencoderKL", "AutoencoderKL"),
        ("text_encoder", "transformers", "T5EncoderModel", "CLIPTextModel, CLIPTextModelWithProjection"),
        ("tokenizer", "transformers", "T5Tokenizer", "CLIPTokenizer, CLIPTokenizerFast"),
        ("scheduler", "diffusers", "FlowMatchEulerDiscreteScheduler", "DDIMScheduler"),
    ] {
        let said = said_of_index(|index| index[part] = serde_json::json!([library, class]));
        let expected = format!("/model_index.json: \"{part}\" is a {class}; supported: {supported}");
        assert!(said.starts_with(&expected), "{said}");
        let Some(own) = ["unet", "vae"].into_iter().find(|own| *own == part) else { continue };
        let said = said_of(|path| {
            let file = path.join(own).join("config.json");
            let config = std::fs::read_to_string(&file).unwrap();
            let config = config.replacen('{', &format!("{{\"_class_name\": \"{class}\", "), 1);
            std::fs::write(&file, config).unwrap();
        });
        let expected = format!("/{own}/config.json: `_class_name` is \"{class}\"; supported: {supported}");
        assert_eq!(said, expected);
    }
    let said = said_of_index(|index| {
        index["unet"] = serde_json::json!([null, null]);
        index["transformer"] = serde_json::json!(["diffusers", "PixArtTransformer2DModel"]);
    });
    assert!(
        said.contains("needs \"unet\"") && said.contains("PixArtTransformer2DModel, which is not"),
        "{said}"
    );
    let said = said_of(|path| {
        let config = r#"{"model_type": "clip", "architectures": ["CLIPModel"], "text_config": {}}"#;
        std::fs::write(path.join("text_encoder/config.json"), config).unwrap();
    });
    assert!(
        said.starts_with("/text_encoder/config.json: is the configuration of a whole CLIP model"),
        "{said}"
    );
    // What the published models have beside these.
    let said = said_of_index(|index| {
        index["tokenizer"] = serde_json::json!(["transformers", "CLIPTokenizerFast"]);
        index["scheduler"] = serde_json::json!(["diffusers", "PNDMScheduler"]);
        index["safety_checker"] = serde_json::json!(["stable_diffusion", "StableDiffusionSafetyChecker"]);
        index["feature_extractor"] = serde_json::json!(["transformers", "CLIPImageProcessor"]);
        index["image_encoder"] = serde_json::json!([null, null]);
    });
    assert_eq!(said, "it loads");
}

#[test]
fn one_part_of_a_model_is_called_that() {
    let (_, archive) = files("sd_model_sd15").swap_remove(0);
    let model = folder(&archive);
    let error = ModelFolder::open(&model.path().join("unet")).unwrap_err().to_string();
    assert!(error.contains("/unet: is one part of a model: name the folder above it"), "{error}");
}

#[test]
fn small_files_that_a_download_left_are_called_what_they_are() {
    for name in [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
    ] {
        for (content, what) in [
            ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
            ("<!DOCTYPE html><html>", "is an HTML page"),
            ("", "is empty"),
        ] {
            let said = said_of(|path| std::fs::write(path.join(name), content).unwrap());
            let (part, file) = name.rsplit_once('/').unwrap_or(("", name));
            assert!(said.contains(part) && said.contains(file) && said.contains(what), "{name}: {said}");
        }
    }
    let said = said_of(|path| {
        std::fs::remove_file(path.join("tokenizer/vocab.json")).unwrap();
        let pointer = "version https://git-lfs.github.com/spec/v1\n";
        std::fs::write(path.join("tokenizer/tokenizer.json"), pointer).unwrap();
    });
    assert!(said.contains("tokenizer.json is a Git LFS pointer"), "{said}");
}

#[test]
fn what_the_public_libraries_pass_over_is_passed_over() {
    let (_, archive) = files("sd_model_sd15").remove(0);
    let model = folder(&archive);
    for (part, name) in
        [("text_encoder/model", "logit_scale"), ("vae/diffusion_pytorch_model", "loss.logvar")]
    {
        let file = model.path().join(format!("{part}.safetensors"));
        let tensors = weights::map(&file).unwrap().into_iter();
        let mut tensors: weights::Named =
            tensors.map(|(name, stored)| (name, Stored::Memory(stored.tensor()))).collect();
        tensors.insert(name.to_owned(), Stored::Memory(Tensor::from(1.0f32)));
        weights::write(&file, &tensors, None, &BTreeMap::new()).unwrap();
    }
    // Half precision by another name.
    let unet = model.path().join("unet");
    let half = |kind: &str| unet.join(format!("diffusion_pytorch_model{kind}.safetensors"));
    std::fs::rename(half(""), half(".bf16")).unwrap();
    let read = ModelFolder::open(model.path()).unwrap();
    read.check(&read.text(Device::Cpu).unwrap()).unwrap();
    let (denoiser, autoencoder) =
        (read.denoiser(Device::Cpu).unwrap(), read.autoencoder(Device::Cpu).unwrap());
    assert!(denoiser.parameters().flat().numel() > 0 && autoencoder.size() > 0);
}
