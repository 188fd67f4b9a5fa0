//! Compares outputs, bottlenecks and gradients with those of the official code, stored in
//! `tests/fixtures/edm_*.safetensors`.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::path::PathBuf;

use common::{fixtures, network, relative_error, relative_error_of_elements};
use potstill_models::{Condition, Denoiser, Mode, weights::Archive};
use tch::{Kind, Tensor};

/// Results of other files' networks.
const BOTTLENECKS: &str = "edm_bottleneck.safetensors";

#[test]
fn equals_the_official_networks() {
    let mut files: Vec<_> = std::fs::read_dir(fixtures())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("edm_"))
        .filter(|path| !path.ends_with(BOTTLENECKS))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no reference files in {}", fixtures().display());

    for file in files {
        let name = file.file_stem().unwrap().to_string_lossy().into_owned();
        let archive = Archive::read(&file).unwrap();
        let network = network(&archive, "weights.");
        let order: Vec<String> = match archive.metadata.get("param_order") {
            Some(order) => serde_json::from_str(order).unwrap(),
            None => network.parameters().entries().iter().map(|e| e.name.clone()).collect(),
        };
        let own: Vec<_> = network.parameters().entries().iter().map(|e| e.name.as_str()).collect();
        assert_eq!(own, order, "{name}: order of parameters");

        let x = archive.tensors["input.x"].copy().set_requires_grad(true);
        let condition = match archive.tensors.get("input.labels") {
            Some(labels) => Condition::Class(labels.shallow_clone()),
            None => Condition::None,
        };
        let condition = match archive.tensors.get("input.augment_labels") {
            Some(labels) => condition.augmented(labels.shallow_clone()),
            None => condition,
        };
        let x0 = network.denoise(&x, &archive.tensors["input.sigma"], &condition, Mode::Eval);
        let direction = Tensor::linspace(-1.0, 1.0, x0.numel() as i64, (Kind::Float, x0.device()));
        (&x0 * direction.view_as(&x0)).sum(Kind::Float).backward();
        let norms: Vec<_> = network.parameters().leaves().iter().map(|leaf| leaf.grad().norm()).collect();

        let compared = [
            ("x0", x0.detach(), "output.x0", 1e-5),
            ("gradient of x", x.grad(), "output.grad_x", 1e-4),
            ("norms of the parameters' gradients", Tensor::stack(&norms, 0), "output.param_grad_norms", 1e-4),
        ];
        for (what, got, key, tolerance) in compared {
            let expected = &archive.tensors[key];
            let error = relative_error(&got, expected);
            let worst = relative_error_of_elements(&got, expected);
            println!("{name}: {what}: {error:.1e}, worst element {worst:.1e}");
            assert!(error <= tolerance, "{name}: {what} is off by {error:.2e}");
            assert!(worst <= tolerance, "{name}: {what} is off by {worst:.2e} in an element");
        }
        // Each norm by itself, unless it is rounding noise: the gradient of a bias before a normalization is 0.
        let expected = &archive.tensors["output.param_grad_norms"];
        let floor = expected.max().double_value(&[]) * 1e-5;
        for (index, (got, parameter)) in norms.iter().zip(&order).enumerate() {
            let (got, expected) = (got.double_value(&[]), expected.double_value(&[index as i64]));
            let off = (got - expected).abs();
            assert!(
                off <= 1e-4 * expected + 1e-4 * floor,
                "{name}: gradient norm of {parameter}: {got}, officially {expected}"
            );
        }
    }
}

/// The discriminator's logits are the bottleneck's mean over channels (2410.14919), recorded from SiDA's networks.
#[test]
fn equals_the_official_bottleneck() {
    // Recorded from exactly these files.
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    let recorded = Archive::read(&folder.join(BOTTLENECKS)).unwrap();
    for name in ["edm_adm", "edm_ddpmpp", "edm_ncsnpp"] {
        let archive = Archive::read(&folder.join(format!("{name}.safetensors"))).unwrap();
        let network = network(&archive, "weights.");
        let condition = match archive.tensors.get("input.labels") {
            Some(labels) => Condition::Class(labels.shallow_clone()),
            None => Condition::None,
        };
        let sigma = &archive.tensors["input.sigma"];
        let expected = |key: &str| &recorded.tensors[&format!("{name}.{key}")];
        for whole in [true, false] {
            let x = archive.tensors["input.x"].copy().set_requires_grad(true);
            let bottleneck = if whole {
                network.denoise_and_encode(&x, sigma, &condition, Mode::Eval).1
            } else {
                network.encode(&x, sigma, &condition, Mode::Eval)
            };
            let logits = bottleneck.mean_dim([1i64].as_slice(), true, Kind::Float);
            let direction = Tensor::linspace(-1.0, 1.0, logits.numel() as i64, (Kind::Float, x.device()));
            (&logits * direction.view_as(&logits)).sum(Kind::Float).backward();
            let gradient = x.grad();
            let compared = [
                ("bottleneck", bottleneck.detach(), "bottleneck"),
                ("logits", logits.detach(), "logits"),
                ("gradient of x", gradient.copy(), "grad_x"),
                ("norm of the gradient of x", gradient.norm().view([1]), "grad_norm"),
            ];
            for (what, got, key) in compared {
                let error = relative_error(&got, expected(key));
                let worst = relative_error_of_elements(&got, expected(key));
                println!("{name}: {what}, with the decoder: {whole}: {error:.1e}, worst element {worst:.1e}");
                assert!(error <= 1e-5 && worst <= 1e-5, "{name}: {what} is off by {error:.2e}, {worst:.2e}");
            }
        }
    }
}
