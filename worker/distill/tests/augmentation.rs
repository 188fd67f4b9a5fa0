//! Tests EDM's augmentation: against results of the public code, and its invariants.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{collections::BTreeMap, f64::consts::PI, path::Path};

use potstill_distill::{
    augmentation::{Augmentation, LABELS, Transform, Transforms},
    guidance,
    random::{Purpose, Stream},
};
use potstill_models::{Condition, Denoiser, EdmConfig, EdmNetwork, Mode, weights::Archive};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor, no_grad};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

fn stream(index: u32) -> Stream {
    Stream::new(3, 1, Purpose::FakeScorePhase, index, Device::Cpu)
}

fn largest(x: &Tensor) -> f64 {
    x.abs().max().double_value(&[])
}

/// Smooth images within [−1, 1], and no two pixels alike.
fn smooth(side: i64) -> Tensor {
    let at = Tensor::linspace(-1.0, 1.0, side, CPU);
    let (x, y) = (at.view([1, 1, 1, side]), at.view([1, 1, side, 1]));
    (x.square() * -2.0 + &x + &y * &x * 0.7 - y * 0.4).sin()
}

/// The recorded draws of a case as transforms. A draw counts where its coin is below the probability.
fn recorded(archive: &Archive, case: &str, probability: f64) -> Transforms {
    let draw = |name: &str| -> Vec<f64> {
        let numbers = &archive.tensors[&format!("{case}.draw.{name}")];
        Vec::try_from(numbers.to_kind(Kind::Double).view([-1])).unwrap()
    };
    let kept = |name: &str, probability: f64| -> Vec<f64> {
        let coins = draw(&format!("{name}.coin"));
        let values = draw(name);
        assert_eq!(values.len() % coins.len(), 0);
        let coins = coins.iter().cycle();
        values.iter().zip(coins).map(|(v, coin)| if *coin < probability { *v } else { 0.0 }).collect()
    };
    let angle = |uniform: f64| (2.0 * uniform - 1.0) * PI;
    let flip_x = kept("flip_x", probability * 1e8);
    let flip_y = kept("flip_y", probability);
    let scale = kept("scale", probability);
    // Angles are drawn as uniform numbers, so a draw that does not count is not 0.
    let (rotation, rotated) = (draw("rotation"), draw("rotation.coin"));
    let stretch = kept("stretch", probability);
    let (axis, oblique) = (draw("stretch_angle"), draw("stretch_angle.coin"));
    let shift = kept("shift", probability);
    let count = scale.len();
    let transforms = (0..count).map(|i| Transform {
        flip_x: flip_x[i] == 1.0,
        flip_y: flip_y[i] == 1.0,
        scale: scale[i],
        rotation: if rotated[i] < probability { angle(rotation[i]) } else { 0.0 },
        stretch: stretch[i],
        stretch_axis: if oblique[i] < 0.5 { angle(axis[i]) } else { 0.0 },
        shift: [shift[i], shift[count + i]],
    });
    Transforms(transforms.collect())
}

#[test]
fn equals_the_public_code() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/augmentation.safetensors");
    let archive = Archive::read(&path).unwrap();
    let cases: BTreeMap<String, f64> = serde_json::from_str(&archive.metadata["probability"]).unwrap();
    assert!(cases.len() >= 14);
    for (case, probability) in cases {
        let tensor = |name: &str| &archive.tensors[&format!("{case}.{name}")];
        let images = tensor("images").to_kind(Kind::Float) / 127.5 - 1.0;
        let (augmented, labels) = recorded(&archive, &case, probability).apply(&images);
        assert_eq!((augmented.kind(), labels.kind()), (Kind::Float, Kind::Float));
        let off = [largest(&(augmented - tensor("output"))), largest(&(labels - tensor("labels")))];
        println!(
            "{case} {:?}, p = {probability}: images {:.1e}, labels {:.1e}",
            images.size(),
            off[0],
            off[1]
        );
        assert!(off[0] <= 1e-5 && off[1] <= 1e-6, "{case}: images and labels are off by {off:?}");
    }
}

/// The meaning of a draw is part of the trajectory, as the numbers of a stream are.
#[test]
fn the_draws_never_change() {
    let mut stream = Stream::new(7, 11, Purpose::FakeScorePhase, 5, Device::Cpu);
    let drawn = Augmentation { probability: 0.7 }.draw(&mut stream, 3);
    let expected = vec![
        Transform {
            flip_x: true,
            scale: 1.3447303232881656,
            rotation: -0.804546690622962,
            shift: [0.663773240755124, 1.156506059328542],
            ..Transform::default()
        },
        Transform {
            flip_y: true,
            scale: 0.6104667702915506,
            stretch: 1.4648652984332486,
            stretch_axis: 1.0409470243536294,
            shift: [-1.209072991152877, -1.3426041420981325],
            ..Transform::default()
        },
        Transform {
            rotation: 0.5255922410459062,
            stretch: -1.4855004726225807,
            stretch_axis: 0.6356164304297361,
            ..Transform::default()
        },
    ];
    assert_eq!(drawn.0, expected);
    // A draw takes a fixed count of numbers.
    assert_eq!(stream.uniform(1), [0.922049014443041]);
}

#[test]
fn a_stream_decides_the_draws_whatever_the_device_and_the_order_of_calls() {
    let augmentation = Augmentation { probability: 0.6 };
    let images = Tensor::randn([5, 2, 9, 12], CPU);
    let first = augmentation.draw(&mut stream(0), 5);
    let (augmented, labels) = first.apply(&images);
    let other = augmentation.draw(&mut stream(1), 5);
    assert_ne!(first, other);
    let _ = other.apply(&images);
    // The device of a stream is that of its tensors, which need not exist here.
    let mut elsewhere = Stream::new(3, 1, Purpose::FakeScorePhase, 0, Device::Cuda(0));
    assert_eq!(augmentation.draw(&mut elsewhere, 5), first);
    let (again, labels_again) = first.apply(&images);
    assert!(augmented.equal(&again) && labels.equal(&labels_again));
    if Device::cuda_if_available().is_cuda() {
        let (there, labels_there) = first.apply(&images.to_device(Device::Cuda(0)));
        assert_eq!(there.device(), Device::Cuda(0));
        assert!(largest(&(there.to_device(Device::Cpu) - augmented)) < 1e-6);
        assert!(labels_there.to_device(Device::Cpu).equal(&labels));
    }
}

#[test]
fn draws_follow_their_laws() {
    let (count, p) = (40_000, 0.15);
    let Transforms(drawn) = Augmentation { probability: p }.draw(&mut stream(0), count);
    let share =
        |holds: &dyn Fn(&Transform) -> bool| drawn.iter().filter(|t| holds(t)).count() as f64 / count as f64;
    let near = |got: f64, expected: f64| assert!((got - expected).abs() < 0.01, "{got}, expected {expected}");
    near(share(&|t| t.flip_x), 0.5);
    near(share(&|t| t.flip_y), p / 2.0);
    near(share(&|t| t.scale != 0.0), p);
    near(share(&|t| t.rotation != 0.0), p);
    near(share(&|t| t.stretch != 0.0), p);
    near(share(&|t| t.stretch_axis != 0.0), 0.5);
    near(share(&|t| t.shift != [0.0, 0.0]), p);
    near(share(&|t| t.scale != 0.0 && t.rotation != 0.0), p * p);
    let square = |of: &dyn Fn(&Transform) -> f64| {
        let some: Vec<f64> = drawn.iter().map(of).filter(|x| *x != 0.0).collect();
        some.iter().map(|x| x * x).sum::<f64>() / some.len() as f64
    };
    for normal in
        [square(&|t| t.scale), square(&|t| t.stretch), square(&|t| t.shift[0]), square(&|t| t.shift[1])]
    {
        assert!((normal - 1.0).abs() < 0.06, "{normal}");
    }
    let uniform = PI * PI / 3.0;
    for angle in [square(&|t| t.rotation), square(&|t| t.stretch_axis)] {
        assert!((angle / uniform - 1.0).abs() < 0.06, "{angle}");
    }
    assert!(drawn.iter().all(|t| t.rotation.abs() <= PI && t.stretch_axis.abs() <= PI));
}

#[test]
fn with_probability_0_images_only_flip_left_to_right() {
    let drawn = Augmentation { probability: 0.0 }.draw(&mut stream(0), 32);
    let images = Tensor::randn([32, 3, 8, 8], CPU);
    let (augmented, labels) = drawn.apply(&images);
    let flipped: Vec<bool> = drawn.0.iter().map(|t| t.flip_x).collect();
    assert!(flipped.contains(&true) && flipped.contains(&false));
    for (i, flipped) in flipped.into_iter().enumerate() {
        let at = |x: &Tensor| x.get(i as i64);
        let expected = if flipped { at(&images).flip([2]) } else { at(&images) };
        assert!(at(&augmented).equal(&expected));
    }
    assert!(labels.narrow(1, 1, LABELS - 1).equal(&Tensor::zeros([32, LABELS - 1], CPU)));
}

/// The lattice has a sample at each pixel's center, so shifts by whole pixels are exact.
#[test]
fn a_shift_by_whole_pixels_moves_right_and_down_and_reflects_at_the_edge() {
    let images = Tensor::randn([1, 2, 24, 16], CPU);
    let (shifted, labels) =
        Transforms(vec![Transform { shift: [1.0, -2.0], ..Transform::default() }]).apply(&images);
    let mirrored = |index: Vec<i64>, side: i64| {
        let index =
            index.into_iter().map(|i: i64| i.rem_euclid(2 * side - 2)).map(|i| i.min(2 * side - 2 - i));
        Tensor::from_slice(&index.collect::<Vec<_>>())
    };
    let columns = mirrored((0..16).map(|x| x - 2).collect(), 16);
    let rows = mirrored((0..24).map(|y| y + 6).collect(), 24);
    let expected = images.index_select(3, &columns).index_select(2, &rows);
    assert!(largest(&(shifted - expected)) < 1e-6);
    let expected = Tensor::from_slice(&[0.0f32, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, -2.0]);
    assert!(labels.equal(&expected.view([1, LABELS])));
}

#[test]
fn angles_are_counter_clockwise_and_scales_enlarge() {
    let images = smooth(32);
    let one = |transform| Transforms(vec![transform]).apply(&images).0;
    let nothing = Transform::default();
    let middle = |x: &Tensor| x.narrow(2, 4, 24).narrow(3, 4, 24);
    let near = |got: &Tensor, expected: &Tensor| {
        let off = largest(&(got - expected));
        assert!(off < 0.05, "off by {off}");
    };
    let rotated = one(Transform { rotation: PI / 2.0, ..nothing });
    near(&middle(&rotated), &middle(&images.rot90(1, [2, 3])));

    // Twice as large: pixel x of the result shows x/2 from the center.
    let enlarged = one(Transform { scale: 5.0, ..nothing });
    let grid = |x: f64, y: f64| {
        let theta = Tensor::from_slice(&[x as f32, 0.0, 0.0, 0.0, y as f32, 0.0]).view([1, 2, 3]);
        Tensor::affine_grid_generator(&theta, [1, 1, 32, 32], false)
    };
    let resized = |x: f64, y: f64| images.grid_sampler(&grid(x, y), 0, 1, false);
    near(&middle(&enlarged), &middle(&resized(0.5, 0.5)));
    let wide = one(Transform { stretch: 5.0, ..nothing });
    near(&wide.narrow(2, 10, 12).narrow(3, 4, 24), &resized(0.5, 2.0).narrow(2, 10, 12).narrow(3, 4, 24));
    let tall = one(Transform { stretch: 5.0, stretch_axis: PI / 2.0, ..nothing });
    near(&tall.narrow(3, 10, 12).narrow(2, 4, 24), &resized(2.0, 0.5).narrow(3, 10, 12).narrow(2, 4, 24));

    // An axis is rotated as an image is: stretching along it is the same as rotating back, stretching, and rotating
    // again.
    let oblique = one(Transform { stretch: 1.0, stretch_axis: 0.6, ..nothing });
    let turn = |x: &Tensor, rotation| Transforms(vec![Transform { rotation, ..nothing }]).apply(x).0;
    let back = Transforms(vec![Transform { rotation: -0.6, stretch: 1.0, ..nothing }]).apply(&images).0;
    let core = |x: &Tensor| x.narrow(2, 10, 12).narrow(3, 10, 12);
    near(&core(&turn(&back, 0.6)), &core(&oblique));
}

#[test]
fn the_smallest_images_work() {
    for size in [[2, 1, 1, 1], [2, 3, 1, 5], [2, 1, 2, 3]] {
        let drawn = Augmentation { probability: 1.0 }.draw(&mut stream(0), 2);
        let (augmented, _) = drawn.apply(&Tensor::randn(size, CPU));
        assert_eq!(augmented.size(), size);
        assert!(bool::try_from(augmented.isfinite().all()).unwrap());
    }
}

#[test]
fn the_kind_of_the_images_stays_and_nothing_takes_a_gradient() {
    let drawn = Augmentation { probability: 1.0 }.draw(&mut stream(0), 2);
    for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
        let images = Tensor::randn([2, 1, 8, 8], CPU).to_kind(kind).set_requires_grad(true);
        for transforms in [&drawn, &Transforms(vec![Transform::default(); 2])] {
            let (augmented, labels) = transforms.apply(&images);
            assert_eq!((augmented.kind(), labels.kind()), (kind, Kind::Float));
            assert!(!augmented.requires_grad() && !labels.requires_grad());
        }
    }
}

#[test]
#[should_panic(expected = "each image has one transform")]
fn a_wrong_number_of_images_is_an_error() {
    let _ = Transforms(vec![Transform::default(); 3]).apply(&Tensor::zeros([2, 1, 8, 8], CPU));
}

/// At every scale, both halves of a guided prediction get the same augmentation labels.
#[test]
fn guided_predictions_and_logits_are_told_the_augmentation() {
    let config = EdmConfig {
        img_resolution: 8,
        img_channels: 1,
        label_dim: 3,
        augment_dim: LABELS,
        model_channels: 8,
        channel_mult: vec![1],
        num_blocks: 1,
        attn_resolutions: vec![],
        ..EdmConfig::default()
    };
    let network = EdmNetwork::initialise(config, 1, Device::Cpu).unwrap();
    let flat = network.parameters().flat();
    let mut stream = stream(0);
    // Fresh weights are near 0 in each block's last layer, which would hide what the labels do.
    let _ = no_grad(|| flat.shallow_clone().g_add_(&(stream.normal(&flat.size()) * 0.1)));
    let drawn = Augmentation { probability: 0.9 }.draw(&mut stream, 4);
    let (x, labels) = drawn.apply(&stream.normal(&[4, 1, 8, 8]));
    let time = Tensor::from_slice(&[0.3f32, 1.0, 2.0, 0.7]);
    let class = || Condition::Class(Tensor::eye(4, CPU).narrow(1, 0, 3));
    let told = |condition: Condition| condition.augmented(labels.shallow_clone());
    let predict = |condition: &Condition| network.denoise_and_encode(&x, &time, condition, Mode::Eval);
    let ((u, _), (c, logits)) = (predict(&told(Condition::None)), predict(&told(class())));
    let silent = predict(&class());
    assert!(largest(&(&silent.0 - &c)) > 1e-3 && largest(&(&silent.1 - &logits)) > 1e-3);
    for scale in [-1.0, 0.0, 1.0, 2.5] {
        let expected = &u + (&c - &u) * scale;
        let condition = told(class());
        let guided = guidance::denoise(&network, &x, &time, &condition, scale, Mode::Eval);
        assert!(largest(&(guided - &expected)) < 1e-5, "κ = {scale}");
        let (guided, bottleneck) =
            guidance::denoise_and_encode(&network, &x, &time, &condition, scale, Mode::Eval);
        assert!(largest(&(guided - &expected)) < 1e-5, "κ = {scale}");
        assert!(largest(&(bottleneck - &logits)) < 1e-5, "κ = {scale}");
        // An unconditional network gets the augmentation labels too.
        let condition = told(Condition::None);
        let plain = guidance::denoise(&network, &x, &time, &condition, scale, Mode::Eval);
        assert!(largest(&(plain - &u)) < 1e-5, "κ = {scale}");
    }
}

/// Any transform, in which each part is absent half of the time.
fn transform() -> impl Strategy<Value = Transform> {
    let some = |range| prop_oneof![Just(0.0), range];
    (
        any::<bool>(),
        any::<bool>(),
        some(-3.0..3.0f64),
        some(-PI..PI),
        some(-3.0..3.0f64),
        some(-PI..PI),
        some(-3.0..3.0f64),
        some(-3.0..3.0f64),
    )
        .prop_map(|(flip_x, flip_y, scale, rotation, stretch, stretch_axis, x, y)| Transform {
            flip_x,
            flip_y,
            scale,
            rotation,
            stretch,
            stretch_axis,
            shift: [x, y],
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn labels_are_0_exactly_for_what_was_not_done(transforms in prop::collection::vec(transform(), 1..5)) {
        let count = transforms.len() as i64;
        let images = Tensor::randn([count, 1, 6, 9], CPU);
        let (augmented, labels) = Transforms(transforms.clone()).apply(&images);
        prop_assert_eq!(augmented.size(), images.size());
        prop_assert!(bool::try_from(augmented.isfinite().all()).unwrap());
        for (i, transform) in transforms.iter().enumerate() {
            let labels: Vec<f32> = Vec::try_from(labels.get(i as i64)).unwrap();
            prop_assert_eq!(labels[0] != 0.0, transform.flip_x);
            prop_assert_eq!(labels[1] != 0.0, transform.flip_y);
            prop_assert_eq!(labels[2] != 0.0, transform.scale != 0.0);
            prop_assert_eq!(labels[3] != 0.0 || labels[4] != 0.0, transform.rotation != 0.0);
            prop_assert_eq!(labels[5] != 0.0 || labels[6] != 0.0, transform.stretch != 0.0);
            prop_assert_eq!(labels[7] != 0.0, transform.shift[0] != 0.0);
            prop_assert_eq!(labels[8] != 0.0, transform.shift[1] != 0.0);
            let untouched = labels.iter().all(|label| *label == 0.0);
            prop_assert_eq!(augmented.get(i as i64).equal(&images.get(i as i64)), untouched);
        }
    }

    #[test]
    fn flips_undo_themselves(flips in prop::collection::vec(any::<(bool, bool)>(), 1..6)) {
        let flips = flips.iter().map(|&(flip_x, flip_y)| Transform { flip_x, flip_y, ..Transform::default() });
        let flips = Transforms(flips.collect());
        let images = Tensor::randn([flips.0.len() as i64, 3, 5, 4], CPU);
        prop_assert!(flips.apply(&flips.apply(&images).0).0.equal(&images));
    }
}
