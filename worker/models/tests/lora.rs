//! Low-rank adapters beside the literal W + (α/r)·B·A.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeMap;

use common::{
    adapters::{CPU, adapted, lora, networks, stirred, unet},
    equal, relative_error,
};
use potstill_models::{
    Condition, Denoiser, Lora, LoraError, Mode,
    lora::{
        DOWN, UP,
        file::{self, Naming},
    },
    weights::{Precision, archive_in},
};
use tch::{Kind, Tensor, no_grad};

fn loss(network: &dyn Denoiser, x: &Tensor, time: &Tensor, condition: &Condition, weight: &Tensor) -> Tensor {
    (network.denoise(x, time, condition, Mode::Eval) * weight).sum(Kind::Float)
}

#[test]
fn new_adapters_change_nothing_and_have_the_names_of_the_public_library() {
    for (network, x, time, condition) in networks() {
        let with = adapted(network.as_ref(), &lora(2, None));
        let [a, b] = [&network, &with].map(|n| no_grad(|| n.denoise(&x, &time, &condition, Mode::Eval)));
        assert!(equal(&a, &b), "B is 0");
        let parameters = with.parameters();
        assert!(parameters.flat().numel() < network.parameters().flat().numel());
        let full: BTreeMap<&str, &[i64]> =
            network.parameters().entries().iter().map(|e| (e.name.as_str(), e.shape.as_slice())).collect();
        for pair in parameters.entries().chunks(2) {
            let module = pair[0].name.strip_suffix(DOWN).unwrap();
            assert_eq!(pair[1].name, format!("{module}{UP}"));
            let weight = full[format!("{module}weight").as_str()];
            assert_eq!((pair[0].shape[0], &pair[0].shape[1..]), (2, &weight[1..]));
            assert_eq!(pair[1].shape[..2], [weight[0], 2]);
        }
        let first = &parameters.entries()[0];
        let down = parameters.flat().narrow(0, 0, first.numel());
        assert!(down.abs().max().double_value(&[]) > 0.0);
    }
}

#[test]
fn gradients_are_those_of_the_literal_product() {
    for (network, x, time, condition) in networks() {
        let rank = 3;
        let lora = lora(rank, None);
        let with = stirred(adapted(network.as_ref(), &lora));
        let merged = with.merged().duplicate();
        let weight = x.randn_like();
        let losses = [&with, &merged].map(|n| loss(n.as_ref(), &x, &time, &condition, &weight));
        for loss in &losses {
            loss.backward();
        }
        let [found, expected] = losses.map(|loss| loss.double_value(&[]));
        assert!((found / expected - 1.0).abs() < 1e-4, "{found} {expected}");
        // dL/dB = (α/r)·dL/dW·Aᵀ and dL/dA = (α/r)·Bᵀ·dL/dW.
        let full: BTreeMap<&str, Tensor> = merged
            .parameters()
            .entries()
            .iter()
            .zip(merged.parameters().leaves())
            .map(|(entry, leaf)| (entry.name.as_str(), leaf.grad()))
            .collect();
        let rows = |x: &Tensor| x.detach().reshape([x.size()[0], -1]);
        let parameters = with.parameters();
        let mut compared = 0;
        for (entries, leaves) in parameters.entries().chunks(2).zip(parameters.leaves().chunks(2)) {
            let module = entries[0].name.strip_suffix(DOWN).unwrap();
            let gradient = rows(&full[format!("{module}weight").as_str()]) * lora.scale();
            let (down, up) = (rows(&leaves[0]), rows(&leaves[1]));
            let expected = [up.transpose(0, 1).matmul(&gradient), gradient.matmul(&down.transpose(0, 1))];
            for (leaf, expected) in leaves.iter().zip(expected) {
                let error = relative_error(&rows(&leaf.grad()), &expected);
                assert!(error < 1e-4, "{module}: {error:.1e}");
                compared += 1;
            }
        }
        assert!(compared > 10);
        assert!(merged.parameters().entries() == network.parameters().entries());
        assert!(with.parameters().leaves().iter().all(Tensor::requires_grad));
    }
}

#[test]
fn recomputed_blocks_give_adapters_the_same_gradients() {
    let (_, x, time, condition) = networks().remove(1);
    let weight = x.randn_like();
    let values = stirred(adapted(&unet(), &lora(2, None))).parameters().flat().copy();
    let gradients = [false, true].map(|again| {
        let with = adapted(&unet().with_recomputation(again), &lora(2, None)).over(values.copy(), true);
        loss(with.as_ref(), &x, &time, &condition, &weight).backward();
        with.parameters().flat_grad()
    });
    // Sums over a layer's two uses are made in another order.
    let error = relative_error(&gradients[0], &gradients[1]);
    assert!(error < 1e-6, "{error:.1e}");
    assert!(gradients[0].abs().sum(Kind::Float).double_value(&[]) > 0.0);
}

/// W + (α/r)·B·A at B = 0: a step of B along −dL/dB with A = I changes W along −dL/dW.
#[test]
fn full_rank_adapters_train_like_the_weights_to_first_order() {
    let (network, x, time, condition) = networks().remove(0);
    let target = "map_layer1";
    let name = "model.map_layer1.weight";
    let width = network.parameters().entries().iter().find(|e| e.name == name).unwrap().shape[0];
    let lora =
        Lora { rank: width, alpha: width as f64, targets: Some(vec![target.to_owned()]), dropout: 0.0 };
    // A = I, as `draw` is divided by the rank.
    let with = network.adapted(&lora, &mut |_| Tensor::eye(width, CPU) * width as f64).unwrap();
    let weight = x.randn_like();
    let full = network.duplicate();
    for network in [&with, &full] {
        loss(network.as_ref(), &x, &time, &condition, &weight).backward();
    }
    let up = &with.parameters().leaves()[1];
    let index = full.parameters().entries().iter().position(|e| e.name == name).unwrap();
    assert!(relative_error(&up.grad(), &full.parameters().leaves()[index].grad()) < 1e-5);
}

#[test]
fn a_base_of_lower_precision_has_adapters_of_fp32() {
    let (network, x, time, condition) = networks().remove(1);
    let half = network.over(network.parameters().flat().to_kind(Kind::BFloat16), false);
    let with = stirred(adapted(half.as_ref(), &lora(2, None)));
    assert_eq!(with.parameters().flat().kind(), Kind::Float);
    let x0 = with.denoise(&x, &time, &condition, Mode::Eval);
    x0.square().mean(Kind::Float).backward();
    assert_eq!((x0.kind(), with.parameters().leaves()[0].grad().kind()), (Kind::Float, Kind::Float));
    let whole = network.over(half.parameters().flat().to_kind(Kind::Float), false);
    let whole = adapted(whole.as_ref(), &lora(2, None)).over(with.parameters().flat().copy(), false);
    let error = relative_error(&x0, &whole.denoise(&x, &time, &condition, Mode::Eval));
    assert!(error < 0.03, "{error}");
}

#[test]
fn what_a_network_cannot_have_is_named() {
    let (network, ..) = networks().remove(1);
    let refused = |lora: &Lora| network.adapted(lora, &mut |s| Tensor::zeros(s, CPU)).err().unwrap();
    let LoraError::UnknownTargets { targets } = refused(&lora(2, Some(&["to_q", "to_qq", "ff.net.0.prj"])))
    else {
        panic!("both are unknown")
    };
    assert!(targets[0].starts_with("to_qq (nearest: to_q"), "{targets:?}");
    assert!(targets[1].contains("ff.net.0.proj") || targets[1].contains("net.0.proj"), "{targets:?}");
    let error = refused(&lora(300, None));
    assert!(matches!(&error, LoraError::Rank { rank: 300, most, .. } if *most < 300), "{error}");
    assert!(error.to_string().contains("rank 300 is above what"), "{error}");
    assert!(!with_names(network.as_ref(), &["to_v"]).iter().any(|name| name.contains("to_q")));
}

fn with_names(network: &dyn Denoiser, targets: &[&str]) -> Vec<String> {
    let with = adapted(network, &lora(1, Some(targets)));
    with.parameters().entries().iter().map(|entry| entry.name.clone()).collect()
}

#[test]
fn files_of_both_namings_give_back_the_adapters() {
    let (network, ..) = networks().remove(1);
    let lora = lora(2, None);
    let with = stirred(adapted(network.as_ref(), &lora));
    for naming in [Naming::Peft, Naming::Kohya] {
        let tensors: BTreeMap<String, Tensor> =
            file::named(with.parameters(), &lora, naming).into_iter().collect();
        let updates = file::parse(&tensors, &BTreeMap::new(), &[network.layers()]).unwrap();
        let again = adapted(network.as_ref(), &lora);
        file::fill(&updates, &lora, again.parameters()).unwrap();
        let error = relative_error(again.parameters().flat(), with.parameters().flat());
        assert!(error < 1e-6, "{naming:?}: {error:.1e}");
    }
}

#[test]
fn alpha_is_that_of_the_file() {
    let (network, ..) = networks().remove(1);
    let lora = lora(2, Some(&["to_q"]));
    let with = stirred(adapted(network.as_ref(), &lora));
    let scale = |tensors: &BTreeMap<String, Tensor>, metadata: &BTreeMap<String, String>| {
        file::parse(tensors, metadata, &[network.layers()]).unwrap()[0].scale
    };
    let none = BTreeMap::new();
    let peft: BTreeMap<String, Tensor> =
        file::named(with.parameters(), &lora, Naming::Peft).into_iter().collect();
    assert_eq!(scale(&peft, &none), 1.0, "without α it is the rank");
    let metadata = r#"{"unet.r": 2, "unet.lora_alpha": 8, "unet.target_modules": ["to_q"]}"#;
    let metadata = BTreeMap::from([("lora_adapter_metadata".to_owned(), metadata.to_owned())]);
    assert_eq!(scale(&peft, &metadata), 4.0);
    let metadata = r#"{"unet.lora_alpha": 8, "unet.alpha_pattern": {"to_q": 1}}"#;
    let metadata = BTreeMap::from([("lora_adapter_metadata".to_owned(), metadata.to_owned())]);
    assert_eq!(scale(&peft, &metadata), 0.5, "a layer's own α");
    let mut kohya: BTreeMap<String, Tensor> =
        file::named(with.parameters(), &lora, Naming::Kohya).into_iter().collect();
    assert_eq!(scale(&kohya, &none), 1.0);
    for (_, alpha) in kohya.iter_mut().filter(|(name, _)| name.ends_with(".alpha")) {
        *alpha = Tensor::from(1.0f32);
    }
    assert_eq!(scale(&kohya, &none), 0.5);
}

#[test]
fn what_a_file_has_for_another_network_is_named() {
    let (network, ..) = networks().remove(1);
    let lora = lora(2, Some(&["to_q"]));
    let with = stirred(adapted(network.as_ref(), &lora));
    let tensors: BTreeMap<String, Tensor> =
        file::named(with.parameters(), &lora, Naming::Peft).into_iter().collect();
    let refused = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let mut tensors: BTreeMap<String, Tensor> =
            tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        change(&mut tensors);
        file::parse(&tensors, &BTreeMap::new(), &[network.layers()]).unwrap_err().to_string()
    };
    let first = tensors.keys().next().unwrap().clone();
    let small = || Tensor::zeros([2, 2], CPU);
    let renamed = |name: &str| {
        let name = name.to_owned();
        refused(&move |tensors| {
            tensors.insert(name.clone(), small());
        })
    };
    assert!(renamed("text_encoder.x.lora_A.weight").contains("adapts a text encoder"));
    assert!(renamed("model.weight").contains("model.weight is not the name of an adapter"));
    assert!(renamed("lora_unet_mid_to_q.alpha").contains("is not the name of an adapter"), "α is one number");
    let message = refused(&|tensors| {
        tensors.insert("lora_unet_mid_to_q.alpha".to_owned(), Tensor::from(1.0f32));
    });
    assert!(message.contains("mid_to_q has only one half"), "{message}");
    assert!(renamed("lora_te2_x.lora_down.weight").contains("adapts a text encoder"));
    assert!(renamed("unet.mid.to_q.lora_A.weight").contains("mid.to_q has only one half"));
    let message = refused(&|tensors| {
        tensors.insert(first.clone(), small());
    });
    assert!(message.contains("A is [2, 2]") && message.contains("another base"), "{message}");
    let message = refused(&|tensors| {
        for half in ["lora_A", "lora_B"] {
            tensors.insert(format!("unet.a.to_q.{half}.weight"), small());
        }
    });
    assert!(message.contains("it adapts a.to_q, which this network does not have"), "{message}");
    assert!(refused(&BTreeMap::clear).contains("no adapters"));
}

#[test]
fn numbers_beyond_half_precision_are_counted_and_named() {
    let large = Tensor::from_slice(&[1.0f32, 7e4, -8e4]);
    let tensors = [("small", &Tensor::ones([2], CPU)), ("large", &large)];
    let written = |precision| archive_in(precision, &tensors, &BTreeMap::new());
    assert!(written(Precision::Bf16).is_ok());
    let error = written(Precision::Fp16).unwrap_err().to_string();
    assert!(error.starts_with("2 numbers are beyond the range of Half, the first in large"), "{error}");
}
