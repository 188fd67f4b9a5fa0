//! Parity of both losses with the official SiD code: losses, and the gradients of the network that each phase trains.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{fs, path::PathBuf};

use potstill_distill::loss;
use potstill_models::{Condition, Denoiser, EdmConfig, EdmNetwork, Mode, weights::Archive};
use tch::{Device, Kind, Tensor};

fn fixtures() -> Vec<PathBuf> {
    let own = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    let folder = std::env::var_os("POTSTILL_FIXTURES").map_or(own, PathBuf::from);
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("sid_losses"))
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no sid_losses*.safetensors in {}", folder.display());
    files
}

fn relative(a: &Tensor, b: &Tensor) -> f64 {
    ((a - b).norm() / b.norm()).double_value(&[])
}

#[test]
fn both_losses_agree_with_the_official_code() {
    for path in fixtures() {
        let archive = Archive::read(&path).unwrap();
        let config: EdmConfig = serde_json::from_str(&archive.metadata["config"]).unwrap();
        let network = |prefix| {
            EdmNetwork::from_tensors(config.clone(), &archive.with_prefix(prefix), Device::Cpu).unwrap()
        };
        let (teacher, fake_score) = (network("teacher."), network("fake."));
        let tensor = |name: &str| match archive.tensors.get(name) {
            Some(tensor) => tensor.shallow_clone(),
            None => panic!("{} lacks {name}", path.display()),
        };
        let images = tensor("images");
        let labels = archive.tensors.get("labels");
        let condition = labels.map_or(Condition::None, |labels| Condition::Class(labels.shallow_clone()));
        let batch = images.size()[0] as f64;
        let diffuse = |x: &Tensor, phase: &str| {
            let sigma = tensor(&format!("{phase}.sigma"));
            let noise = tensor(&format!("{phase}.noise"));
            (x + noise * sigma.view([-1, 1, 1, 1]), sigma)
        };

        let (noisy, sigma) = diffuse(&images, "fake_phase");
        let denoised = fake_score.denoise(&noisy, &sigma, &condition, Mode::Eval);
        let weight = fake_score.process().loss_weight(&sigma);
        let value = loss::denoising(&denoised, &images, &weight).sum(Kind::Float) / batch;
        value.backward();
        let error = relative(&value.detach().view([1]), &tensor("fake_phase.loss"));
        assert!(error <= 1e-5, "{}: fake-score loss {error}", path.display());
        let norms: Vec<f64> =
            fake_score.parameters().leaves().iter().map(|l| l.grad().norm().double_value(&[])).collect();
        let expected: Vec<f32> = Vec::try_from(tensor("fake_phase.grad_norms")).unwrap();
        assert_eq!(norms.len(), expected.len());
        let total = expected.iter().map(|n| f64::from(*n).powi(2)).sum::<f64>().sqrt();
        for (index, (ours, theirs)) in norms.iter().zip(&expected).enumerate() {
            let difference = (ours - f64::from(*theirs)).abs();
            let name = &fake_score.parameters().entries()[index].name;
            assert!(
                difference <= 1e-5 * f64::from(*theirs).max(1e-3 * total),
                "{}: gradient of {name}: {ours} and {theirs}",
                path.display()
            );
        }

        let alphas: Vec<&str> = archive
            .tensors
            .keys()
            .filter_map(|name| name.strip_prefix("generator_phase.alpha")?.strip_suffix(".loss"))
            .collect();
        assert!(!alphas.is_empty(), "{} has no generator phase", path.display());
        for alpha in alphas {
            let phase = format!("generator_phase.alpha{alpha}");
            let alpha = alpha.parse().unwrap();
            let generated = images.detach().set_requires_grad(true);
            let (noisy, sigma) = diffuse(&generated, &phase);
            let (teacher, fake_score) = (teacher.frozen(), fake_score.frozen());
            let real = teacher.denoise(&noisy, &sigma, &condition, Mode::Eval);
            let fake = fake_score.denoise(&noisy, &sigma, &condition, Mode::Eval);
            let weight = loss::score_identity_weight(&generated, &real);
            let losses = loss::score_identity(&generated, &real, &fake, alpha, &weight);
            let value = losses.sum(Kind::Float) / batch;
            value.backward();
            let error = relative(&value.detach().view([1]), &tensor(&format!("{phase}.loss")));
            let gradient = relative(&generated.grad(), &tensor(&format!("{phase}.grad_images")));
            println!("{phase}: loss {error:.1e}, gradient {gradient:.1e}");
            assert!(error <= 1e-5, "{}: {phase}: loss {error}", path.display());
            assert!(gradient <= 1e-5, "{}: {phase}: gradient {gradient}", path.display());
            let untouched = fake_score.parameters().leaves().iter().all(|l| !l.grad().defined());
            assert!(untouched, "a frozen network's weights take no gradient");
        }
    }
}
