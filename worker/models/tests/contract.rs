//! Tests the guarantees of [`Denoiser`], on an [`EdmNetwork`].

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{equal, small};
use potstill_models::{Condition, Denoiser, EdmConfig, EdmNetwork, Mode, edm::config::ModelType};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor, no_grad};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

struct Batch {
    x: Tensor,
    sigma: Tensor,
    condition: Condition,
}

fn batch(n: i64, config: &EdmConfig) -> Batch {
    let labels = Tensor::randint(config.label_dim, [n], (Kind::Int64, Device::Cpu));
    Batch {
        x: Tensor::randn([n, config.img_channels, config.img_resolution, config.img_resolution], CPU),
        sigma: Tensor::rand([n], CPU) + 0.2,
        condition: Condition::Class(labels.one_hot(config.label_dim).to_kind(Kind::Float)),
    }
}

/// A network whose last layers are not near 0, as initial weights are.
fn lively(config: EdmConfig) -> EdmNetwork {
    let network = EdmNetwork::initialise(config, 1, Device::Cpu).unwrap();
    let mut flat = network.parameters().flat().shallow_clone();
    flat += Tensor::randn(flat.size(), CPU) * 0.1;
    network
}

fn run(network: &dyn Denoiser, b: &Batch, mode: Mode) -> Tensor {
    network.denoise(&b.x, &b.sigma, &b.condition, mode)
}

#[test]
fn a_seed_decides_the_initial_weights() {
    let new = |seed| EdmNetwork::initialise(small(), seed, Device::Cpu).unwrap();
    let (a, b, c) = (new(3), new(3), new(4));
    assert!(equal(a.parameters().flat(), b.parameters().flat()));
    assert!(!equal(a.parameters().flat(), c.parameters().flat()));
    let batch = batch(2, &small());
    let x0 = run(&a, &batch, Mode::Eval);
    assert_eq!(x0.size(), batch.x.size());
    assert!(bool::try_from(x0.isfinite().all()).unwrap());
}

#[test]
fn parameters_are_views_into_one_vector() {
    let network = lively(small());
    let parameters = network.parameters();
    let mut offset = 0;
    for (entry, leaf) in parameters.entries().iter().zip(parameters.leaves()) {
        assert_eq!((entry.offset, entry.shape.as_slice()), (offset, leaf.size().as_slice()));
        offset += entry.numel();
        assert!(leaf.requires_grad() && leaf.is_leaf(), "{}", entry.name);
    }
    assert_eq!(parameters.flat().size(), [offset]);
    assert!(!parameters.flat().requires_grad());
    let _ = parameters.flat().shallow_clone().fill_(2.0);
    assert!(parameters.leaves().iter().all(|leaf| leaf.min().double_value(&[]) == 2.0));
}

#[test]
fn every_parameter_gets_a_gradient_whatever_is_left_out() {
    let network = lively(small());
    let b = batch(2, &small());
    assert!(equal(&network.parameters().flat_grad(), &network.parameters().flat().zeros_like()));
    network.denoise(&b.x, &b.sigma, &Condition::None, Mode::Eval).square().sum(Kind::Float).backward();
    assert!(network.parameters().leaves().iter().all(|leaf| leaf.grad().defined()));
    let gradient = network.parameters().flat_grad();
    assert_eq!(gradient.size(), network.parameters().flat().size());
    assert!(gradient.norm().double_value(&[]) > 0.0);
    let entry = &network.parameters().entries()[5];
    let slice = gradient.narrow(0, entry.offset, entry.numel()).view(entry.shape.as_slice());
    assert!(equal(&slice, &network.parameters().leaves()[5].grad()));
    network.parameters().zero_grad();
    assert_eq!(network.parameters().flat_grad().norm().double_value(&[]), 0.0);
}

#[test]
fn a_frozen_network_shares_its_weights_and_passes_gradients_to_its_input() {
    let network = lively(small());
    let frozen = network.frozen();
    let b = batch(2, &small());
    assert!(equal(&run(&network, &b, Mode::Eval), &run(frozen.as_ref(), &b, Mode::Eval)));

    let x = b.x.copy().set_requires_grad(true);
    frozen.denoise(&x, &b.sigma, &b.condition, Mode::Eval).square().sum(Kind::Float).backward();
    assert!(x.grad().norm().double_value(&[]) > 0.0);
    for leaf in frozen.parameters().leaves().iter().chain(network.parameters().leaves()) {
        assert!(!leaf.grad().defined());
    }
    assert!(frozen.parameters().leaves().iter().all(|leaf| !leaf.requires_grad()));

    let before = run(frozen.as_ref(), &b, Mode::Eval);
    let mut flat = network.parameters().flat().shallow_clone();
    flat += 0.01;
    let after = run(frozen.as_ref(), &b, Mode::Eval);
    assert!(!equal(&before, &after));
    assert!(equal(&after, &run(&network, &b, Mode::Eval)));
}

#[test]
fn the_bottleneck_is_the_same_with_and_without_the_decoder() {
    for config in [small(), EdmConfig { model_type: ModelType::DhariwalUNet, ..small() }] {
        let network = EdmNetwork::initialise(config.clone(), 0, Device::Cpu).unwrap();
        let x = Tensor::randn([2, 2, 8, 8], (Kind::Float, Device::Cpu));
        let sigma = Tensor::from_slice(&[0.3f32, 2.0]);
        let condition = Condition::Class(Tensor::eye(3, (Kind::Float, Device::Cpu)).narrow(0, 0, 2));
        let (x0, bottleneck) = network.denoise_and_encode(&x, &sigma, &condition, Mode::Eval);
        assert_eq!(x0.size(), x.size());
        let halvings = config.channel_mult.len() as i64 - 1;
        assert_eq!(bottleneck.size()[2..], [8 >> halvings, 8 >> halvings]);
        let alone = network.encode(&x, &sigma, &condition, Mode::Eval);
        assert!(alone.allclose(&bottleneck, 0.0, 0.0, false));
    }
}

#[test]
fn a_duplicate_is_equal_trainable_and_independent() {
    let network = lively(small());
    for copy in [network.duplicate(), network.frozen().duplicate()] {
        let b = batch(2, &small());
        let output = run(&network, &b, Mode::Eval);
        assert!(equal(&output, &run(copy.as_ref(), &b, Mode::Eval)));
        assert!(copy.parameters().leaves().iter().all(Tensor::requires_grad));
        let mut flat = copy.parameters().flat().shallow_clone();
        flat += 0.1;
        assert!(equal(&output, &run(&network, &b, Mode::Eval)));
        assert!(!equal(&output, &run(copy.as_ref(), &b, Mode::Eval)));
    }
}

#[test]
fn dropout_is_for_training() {
    let b = batch(4, &small());
    let network = lively(small());
    assert!(equal(&run(&network, &b, Mode::Eval), &run(&network, &b, Mode::Eval)));
    assert!(!equal(&run(&network, &b, Mode::Train), &run(&network, &b, Mode::Train)));

    let without = lively(EdmConfig { dropout: 0.0, ..small() });
    assert!(equal(&run(&without, &b, Mode::Train), &run(&without, &b, Mode::Eval)));

    // With labels dropped almost always, the condition has no effect.
    let labels = lively(EdmConfig { dropout: 0.0, label_dropout: 1.0 - 1e-9, ..small() });
    let unconditional = labels.denoise(&b.x, &b.sigma, &Condition::None, Mode::Eval);
    assert!(run(&labels, &b, Mode::Train).allclose(&unconditional, 1e-5, 1e-6, false));
    assert!(!run(&labels, &b, Mode::Eval).allclose(&unconditional, 1e-3, 1e-4, false));
}

fn augmentation(n: i64, config: &EdmConfig) -> Tensor {
    Tensor::randn([n, config.augment_dim], CPU)
}

#[test]
fn augmentation_labels_reach_every_output_of_their_own_sample() {
    for model_type in [ModelType::SongUNet, ModelType::DhariwalUNet] {
        let network = lively(EdmConfig { model_type, ..small() });
        let b = batch(3, &small());
        let labels = augmentation(3, &small());
        let condition = b.condition.shallow_clone().augmented(labels.shallow_clone());
        let (x0, bottleneck) = network.denoise_and_encode(&b.x, &b.sigma, &condition, Mode::Eval);
        assert!(equal(&network.denoise(&b.x, &b.sigma, &condition, Mode::Eval), &x0));
        assert!(equal(&network.encode(&b.x, &b.sigma, &condition, Mode::Eval), &bottleneck));
        let (silent, silent_bottleneck) =
            network.denoise_and_encode(&b.x, &b.sigma, &b.condition, Mode::Eval);
        assert!(!silent.allclose(&x0, 1e-3, 1e-3, false));
        assert!(!silent_bottleneck.allclose(&bottleneck, 1e-3, 1e-3, false));

        // Only the second sample's.
        let mask = Tensor::from_slice(&[0.0f32, 1.0, 0.0]).view([3, 1]);
        let second = b.condition.shallow_clone().augmented(&labels * mask);
        let mixed = network.denoise(&b.x, &b.sigma, &second, Mode::Eval);
        for (sample, expected) in [&silent, &x0, &silent].into_iter().enumerate() {
            let at = |x: &Tensor| x.get(sample as i64);
            assert!(at(&mixed).allclose(&at(expected), 1e-5, 1e-6, false), "sample {sample}");
        }

        // All-zero labels are the same as no labels.
        let zeros = b.condition.shallow_clone().augmented(labels.zeros_like());
        assert!(network.denoise(&b.x, &b.sigma, &zeros, Mode::Eval).allclose(&silent, 0.0, 1e-6, false));
    }
}

#[test]
fn a_condition_keeps_its_augmentation_labels() {
    let labels = augmentation(2, &small());
    let class = Condition::Class(Tensor::eye(3, CPU).narrow(0, 0, 2));
    let kept = Tensor::from_slice(&[1.0f32, 0.0]).view([2, 1]);
    let condition = class.augmented(Tensor::zeros([2, 9], CPU)).augmented(labels.shallow_clone());
    let parts = |condition: &Condition| match condition.split_augmentation() {
        (Condition::Class(class), Some(labels)) => (class.shallow_clone(), labels.shallow_clone()),
        _ => panic!("expected a class and augmentation labels"),
    };
    let rows = |rows: [[f32; 3]; 2]| Tensor::from_slice2(&rows);
    let (all, first) = (rows([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), rows([[1.0, 0.0, 0.0], [0.0; 3]]));
    let cases = [
        (condition.shallow_clone(), all.shallow_clone()),
        (condition.dropped(), all.zeros_like()),
        (condition.kept(&kept), first),
    ];
    for (got, expected) in cases {
        let (class, own) = parts(&got);
        assert!(equal(&class, &expected) && equal(&own, &labels));
    }
    let (class, own) = parts(&condition.doubled().unwrap());
    assert!(equal(&class, &Tensor::cat(&[&all.zeros_like(), &all], 0)));
    assert!(equal(&own, &Tensor::cat(&[&labels, &labels], 0)));

    let unconditional = Condition::None.augmented(labels.shallow_clone());
    assert!(unconditional.doubled().is_none());
    for same in [unconditional.shallow_clone(), unconditional.dropped(), unconditional.kept(&kept)] {
        let (Condition::None, Some(own)) = same.split_augmentation() else {
            panic!("expected labels and no class")
        };
        assert!(equal(own, &labels));
    }
    assert!(Condition::None.split_augmentation().1.is_none());
}

#[test]
fn a_network_says_how_many_augmentation_labels_it_takes() {
    assert_eq!(lively(small()).augment_dim(), 4);
    assert_eq!(lively(EdmConfig { augment_dim: 0, ..small() }).augment_dim(), 0);
}

#[test]
#[should_panic(expected = "augmentation labels given to a network that takes none")]
fn augmentation_labels_for_a_network_without_them_are_an_error() {
    let b = batch(1, &small());
    let network = lively(EdmConfig { augment_dim: 0, ..small() });
    let condition = b.condition.augmented(augmentation(1, &small()));
    let _ = network.denoise(&b.x, &b.sigma, &condition, Mode::Eval);
}

#[test]
#[should_panic(expected = "augmentation labels of another width than the network's")]
fn augmentation_labels_of_another_width_are_an_error() {
    let b = batch(1, &small());
    let condition = b.condition.augmented(Tensor::zeros([1, 9], CPU));
    let _ = lively(small()).encode(&b.x, &b.sigma, &condition, Mode::Eval);
}

#[test]
#[should_panic(expected = "class labels given to a network that takes none")]
fn labels_for_an_unconditional_network_are_an_error() {
    let b = batch(1, &small());
    let network = lively(EdmConfig { label_dim: 0, ..small() });
    let _ = run(&network, &b, Mode::Eval);
}

#[test]
fn invalid_configurations_say_why() {
    let cases = [
        (EdmConfig { img_resolution: 6, channel_mult: vec![1, 1, 1], ..small() }, "divisible by 2^2"),
        (EdmConfig { model_channels: 130, ..small() }, "130 channels do not split into 32 groups"),
        (EdmConfig { attn_resolutions: vec![4, 16], ..small() }, "attn_resolutions has 16"),
        (EdmConfig { channel_mult: vec![], ..small() }, "channel_mult is []"),
        (EdmConfig { dropout: 1.0, ..small() }, "dropout is 1"),
        (EdmConfig { resample_filter: vec![1.0, 2.0, 1.0], ..small() }, "even number of finite taps"),
        (EdmConfig { sigma_data: f64::NAN, ..small() }, "sigma_data is NaN"),
        (EdmConfig::default(), "img_resolution is 0"),
    ];
    for (config, expected) in cases {
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(EdmNetwork::initialise(config, 0, Device::Cpu).is_err());
    }
    for (json, expected) in [
        (r#"{"img_channels": 1, "model_type": "SongUNet"}"#, "img_resolution"),
        (r#"{"img_resolution": 8, "img_channels": 1, "model_type": "SongUNet", "chanels": 1}"#, "chanels"),
        (r#"{"img_resolution": 8, "img_channels": 1, "model_type": "Transformer"}"#, "Transformer"),
        (
            r#"{"img_resolution": 8, "img_channels": 1, "model_type": "DhariwalUNet", "encoder_type": "skip"}"#,
            "encoder_type is a field of SongUNet",
        ),
    ] {
        let error = serde_json::from_str::<EdmConfig>(json).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Every configuration is either rejected or valid; none panics. A valid one is unchanged by JSON.
    #[test]
    fn a_configuration_is_refused_or_works(
        song in any::<bool>(),
        img_resolution in 0..20i64,
        img_channels in 0..3i64,
        label_dim in 0..3i64,
        model_channels in 0..40i64,
        channel_mult in prop::collection::vec(1..4i64, 0..4),
        num_blocks in 0..3i64,
        encoder in 0..3usize,
        skip_decoder in any::<bool>(),
        fourier in any::<bool>(),
        taps in prop::sample::select(vec![vec![1.0, 1.0], vec![1.0, 3.0, 3.0, 1.0], vec![1.0], vec![1.0, -1.0]]),
    ) {
        let json = serde_json::json!({
            "img_resolution": img_resolution, "img_channels": img_channels, "label_dim": label_dim,
            "model_type": if song { "SongUNet" } else { "DhariwalUNet" },
            "model_channels": model_channels, "channel_mult": channel_mult, "channel_mult_emb": 1,
            "num_blocks": num_blocks, "attn_resolutions": [img_resolution],
            "encoder_type": song.then_some(["standard", "skip", "residual"][encoder]),
            "decoder_type": song.then_some(if skip_decoder { "skip" } else { "standard" }),
            "embedding_type": song.then_some(if fourier { "fourier" } else { "positional" }),
            "resample_filter": song.then_some(taps),
        });
        let config: EdmConfig = serde_json::from_value(json).unwrap();
        let again: EdmConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        prop_assert_eq!(&again, &config);
        prop_assert_eq!(config.validate().is_ok(), EdmNetwork::initialise(config.clone(), 0, Device::Cpu).is_ok());
        if let Ok(network) = EdmNetwork::initialise(config, 0, Device::Cpu) {
            let [c, h, w] = network.sample_shape();
            let x = Tensor::randn([2, c, h, w], CPU);
            let x0 = no_grad(|| network.denoise(&x, &Tensor::from(1.0f32), &Condition::None, Mode::Eval));
            prop_assert_eq!(x0.size(), x.size());
            prop_assert!(bool::try_from(x0.isfinite().all()).unwrap());
        }
    }
}
