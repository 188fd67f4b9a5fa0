//! Tests both phases on a small network: what they depend on, which networks they change, and how they treat broken
//! samples.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::{Mutex, MutexGuard, PoisonError};

use potstill_distill::{
    adversarial::{Adversarial, RealData, RealSamples, Scaling},
    augmentation::Augmentation,
    condition::Classes,
    draws::{Draws, NamedStreams, RealDraw},
    generator::{Matching, generate},
    guidance::{self, Guidance},
    loss::Weighting,
    noise_distribution::NoiseDistribution,
    phase::{self, MicroBatchLoss},
    random::{Purpose, Stream},
    schedule::Schedule,
    settings::Settings,
    state::State,
};
use potstill_models::{Condition, Denoiser, EdmConfig, EdmNetwork, ForwardProcess, Mode};
use tch::{Device, Kind, Tensor, no_grad};

/// Dropout draws from libtorch's one generator, so these tests do not run at the same time.
static GENERATOR: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    GENERATOR.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The teacher's.
const CLASSES: Classes = Classes(3);

fn teacher() -> EdmNetwork {
    teacher_with(0)
}

/// A network with this many augmentation labels.
fn teacher_with(augment_dim: i64) -> EdmNetwork {
    let config = EdmConfig {
        img_resolution: 4,
        img_channels: 1,
        label_dim: 3,
        augment_dim,
        model_channels: 8,
        channel_mult: vec![1],
        num_blocks: 1,
        attn_resolutions: vec![],
        dropout: 0.2,
        ..EdmConfig::default()
    };
    let network = EdmNetwork::initialise(config, 1, Device::Cpu).unwrap();
    // Fresh weights are near zero in each block's last layer, which would hide what the condition does.
    let flat = network.parameters().flat();
    let mut stream = Stream::new(2, 0, Purpose::Evaluation, 0, Device::Cpu);
    let _ = no_grad(|| flat.shallow_clone().g_add_(&(stream.normal(&flat.size()) * 0.1)));
    network
}

fn settings(training_mode: Mode) -> Settings {
    Settings {
        seed: 5,
        micro_batch: 6,
        times: vec![2.5],
        matching: Matching::OneStep { weights: vec![1.0] },
        alpha: 1.2,
        weighting: Weighting::ScoreIdentity,
        fake_score_times: NoiseDistribution::LogNormal { mean: -1.2, std: 1.2 },
        generator_times: NoiseDistribution::Karras {
            sigma_min: 0.002,
            sigma_max: 80.0,
            rho: 7.0,
            u_max: 0.8,
        },
        score_identity_weight: 100.0,
        guidance: Guidance::NONE,
        augmentation: None,
        adversarial: None,
        schedule: Schedule {
            global_batch: 6,
            generator_start_images: None,
            join_images: None,
            fake_score_updates: 1,
        },
        training_mode,
        device: Device::Cpu,
    }
}

fn draws<'a>(settings: &'a Settings, real: Option<&'a dyn RealData>) -> NamedStreams<'a> {
    let conditions_of_real = real.is_some();
    NamedStreams { settings, conditions: &CLASSES, real, conditions_of_real, sample_shape: [1, 4, 4] }
}

/// A micro-batch of the fake-score phase, with a run's random numbers.
fn fake_phase(
    networks: (&dyn Denoiser, &dyn Denoiser),
    real: Option<&dyn RealData>,
    settings: &Settings,
    iteration: u64,
    index: u32,
) -> MicroBatchLoss {
    let draw = draws(settings, real).fake_score(iteration, index);
    phase::fake_score(networks.0, networks.1, &draw, settings)
}

/// A micro-batch of the generator phase, with a run's random numbers.
fn generator_phase(
    (generator, fake_score, teacher): (&dyn Denoiser, &dyn Denoiser, &dyn Denoiser),
    real: Option<&dyn RealData>,
    settings: &Settings,
    iteration: u64,
) -> MicroBatchLoss {
    let draw = draws(settings, real).generator(iteration, 0);
    phase::generator(generator, fake_score, teacher, &draw, settings, iteration)
}

fn value(loss: &Tensor) -> f64 {
    loss.double_value(&[])
}

#[test]
fn a_micro_batch_is_named_by_iteration_phase_and_index() {
    let _turn = turn();
    let teacher = teacher();
    let state = State::from_teacher(&teacher);
    for mode in [Mode::Eval, Mode::Train] {
        let settings = settings(mode);
        let fake = |iteration, index| {
            let networks = (state.generator.network(), state.fake_score.network());
            value(&fake_phase(networks, None, &settings, iteration, index).loss)
        };
        let first = fake(3, 1);
        // libtorch's own generator has another state by now.
        let _ = Tensor::rand([7], (Kind::Float, Device::Cpu));
        assert_eq!(first, fake(3, 1), "dropout too depends on the name alone");
        assert_ne!(first, fake(4, 1));
        assert_ne!(first, fake(3, 2));
    }
}

#[test]
fn each_phase_trains_its_own_network_only() {
    let _turn = turn();
    let teacher = teacher();
    let state = State::from_teacher(&teacher);
    // Different from its teacher, so that the scores differ.
    let _ = no_grad(|| state.fake_score.network().parameters().flat().shallow_clone().g_mul_scalar_(1.5));
    let (frozen_teacher, frozen_fake) = (teacher.frozen(), state.fake_score.network().frozen());
    let settings = settings(Mode::Eval);
    let gradient = |network: &dyn Denoiser| network.parameters().flat_grad().norm().double_value(&[]);

    let networks = (state.generator.network(), state.fake_score.network());
    fake_phase(networks, None, &settings, 0, 0).loss.backward();
    assert!(gradient(state.fake_score.network()) > 0.0);
    assert_eq!(gradient(state.generator.network()), 0.0);

    let before = gradient(state.fake_score.network());
    let (generator, fake) = (state.generator.network(), frozen_fake.as_ref());
    let batch = generator_phase((generator, fake, frozen_teacher.as_ref()), None, &settings, 0);
    batch.loss.backward();
    assert!(gradient(generator) > 0.0);
    assert!(value(&batch.score_difference.unwrap()) > 0.0);
    assert_eq!(gradient(state.fake_score.network()), before);
    assert_eq!(gradient(&teacher), 0.0);
}

#[test]
fn a_teacher_that_the_fake_score_equals_gives_no_gradient() {
    let _turn = turn();
    let teacher = teacher();
    let state = State::from_teacher(&teacher);
    let (frozen_teacher, frozen_fake) = (teacher.frozen(), state.fake_score.network().frozen());
    let generator = state.generator.network();
    let settings = settings(Mode::Eval);
    let networks = (generator, frozen_fake.as_ref(), frozen_teacher.as_ref());
    let batch = generator_phase(networks, None, &settings, 0);
    assert_eq!(value(&batch.loss), 0.0);
    assert_eq!(value(&batch.score_difference.unwrap()), 0.0);
}

#[test]
fn samples_that_are_not_finite_are_left_out_and_counted() {
    let _turn = turn();
    let teacher = teacher();
    let state = State::from_teacher(&teacher);
    // All samples of a diverged generator are NaN.
    let _ = no_grad(|| state.generator.network().parameters().flat().shallow_clone().fill_(f64::NAN));
    let (frozen_teacher, frozen_fake) = (teacher.frozen(), state.fake_score.network().frozen());
    let settings = settings(Mode::Eval);
    let (generator, fake) = (state.generator.network(), state.fake_score.network());
    let batch = fake_phase((generator, fake), None, &settings, 0, 0);
    assert_eq!((value(&batch.loss), batch.dropped.int64_value(&[])), (0.0, 6));
    let networks = (generator, frozen_fake.as_ref(), frozen_teacher.as_ref());
    let batch = generator_phase(networks, None, &settings, 0);
    assert_eq!((value(&batch.loss), batch.dropped.int64_value(&[])), (0.0, 6));
}

#[test]
fn only_the_chosen_step_is_trained_through() {
    let _turn = turn();
    let teacher = teacher();
    let network: &dyn Denoiser = &teacher;
    let sigmas = [2.5, 1.0, 0.4];
    let shape = [2, 1, 4, 4];
    let noises: Vec<Tensor> = (0..3)
        .map(|i| {
            Tensor::full(shape, 0.1 * f64::from(i) + 0.2, (Kind::Float, Device::Cpu)).set_requires_grad(true)
        })
        .collect();
    let condition = Condition::None;
    // By hand: denoise, add noise, denoise, …
    let by_hand = no_grad(|| {
        let mut x = Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        for (noise, sigma) in noises.iter().zip(sigmas) {
            let time = Tensor::from_slice(&[sigma as f32, sigma as f32]);
            x = network.denoise(&(x + noise * sigma), &time, &condition, Mode::Eval);
        }
        x
    });
    let made = generate(network, &noises, &condition, &sigmas, 2, Mode::Eval);
    assert!(made.allclose(&by_hand, 1e-5, 1e-6, false));
    made.sum(Kind::Float).backward();
    assert!(!noises[0].grad().defined() && !noises[1].grad().defined() && noises[2].grad().defined());

    generate(network, &noises, &condition, &sigmas, 0, Mode::Eval).sum(Kind::Float).backward();
    assert!(noises[0].grad().defined(), "final-step matching trains through all");
}

/// Counts the rows of a network's inputs.
struct Counting {
    network: Box<dyn Denoiser>,
    rows: std::cell::RefCell<Vec<i64>>,
    encoded: std::cell::RefCell<Vec<i64>>,
}

impl Denoiser for Counting {
    fn denoise_and_encode(
        &self,
        x_t: &Tensor,
        time: &Tensor,
        condition: &Condition,
        mode: Mode,
    ) -> (Tensor, Tensor) {
        self.rows.borrow_mut().push(x_t.size()[0]);
        self.network.denoise_and_encode(x_t, time, condition, mode)
    }
    fn encode(&self, x_t: &Tensor, time: &Tensor, condition: &Condition, mode: Mode) -> Tensor {
        self.encoded.borrow_mut().push(x_t.size()[0]);
        self.network.encode(x_t, time, condition, mode)
    }
    fn process(&self) -> &ForwardProcess {
        self.network.process()
    }
    fn parameters(&self) -> &potstill_models::Parameters {
        self.network.parameters()
    }
    fn sample_shape(&self) -> [i64; 3] {
        self.network.sample_shape()
    }
    fn classes(&self) -> i64 {
        self.network.classes()
    }
    fn over(&self, flat: Tensor, trainable: bool) -> Box<dyn Denoiser> {
        self.network.over(flat, trainable)
    }
    fn config_json(&self) -> String {
        self.network.config_json()
    }
}

#[test]
fn guidance_mixes_the_halves_and_skips_the_one_that_does_not_count() {
    let _turn = turn();
    let teacher = teacher();
    let x = Tensor::linspace(-1.0, 1.0, 2 * 16, (Kind::Float, Device::Cpu)).reshape([2, 1, 4, 4]);
    let sigma = Tensor::from_slice(&[0.5f32, 1.5]);
    let labels = Tensor::from_slice(&[0i64, 2]).one_hot(3).to_kind(Kind::Float);
    let condition = Condition::Class(labels);
    let (c, u) = no_grad(|| {
        (
            teacher.denoise(&x, &sigma, &condition, Mode::Eval),
            teacher.denoise(&x, &sigma, &Condition::None, Mode::Eval),
        )
    });
    for (scale, rows) in [(1.0, 2), (0.0, 2), (1.5, 4), (-1.0, 4)] {
        let counting =
            Counting { network: teacher.frozen(), rows: Vec::new().into(), encoded: Vec::new().into() };
        let guided = no_grad(|| guidance::denoise(&counting, &x, &sigma, &condition, scale, Mode::Eval));
        assert!(guided.allclose(&(&u + (&c - &u) * scale), 1e-5, 1e-6, false), "scale {scale}");
        assert_eq!(*counting.rows.borrow(), [rows], "one call at scale {scale}");
        assert!(counting.encoded.borrow().is_empty());

        // With a discriminator: the conditional half's bottleneck, whatever the scale.
        let expected = no_grad(|| teacher.encode(&x, &sigma, &condition, Mode::Eval));
        let (again, bottleneck) =
            no_grad(|| guidance::denoise_and_encode(&counting, &x, &sigma, &condition, scale, Mode::Eval));
        assert!(again.allclose(&guided, 1e-5, 1e-6, false));
        assert!(bottleneck.allclose(&expected, 1e-5, 1e-6, false), "scale {scale}");
        let encoded: &[i64] = if scale == 0.0 { &[2] } else { &[] };
        assert_eq!(*counting.encoded.borrow(), encoded);
    }
}

#[test]
fn guided_phases_differ_and_train_the_unconditional_score_too() {
    let _turn = turn();
    let teacher = teacher();
    let state = State::from_teacher(&teacher);
    no_grad(|| {
        let _ = state.fake_score.network().parameters().flat().shallow_clone().g_mul_scalar_(1.3);
    });
    let (generator, fake) = (state.generator.network(), state.fake_score.network());
    let (frozen_teacher, frozen_fake) = (teacher.frozen(), state.fake_score.network().frozen());
    let losses = |guidance: Guidance| {
        let settings = Settings { guidance, ..settings(Mode::Eval) };
        let first = fake_phase((generator, fake), None, &settings, 0, 0).loss;
        let networks = (generator, frozen_fake.as_ref(), frozen_teacher.as_ref());
        let second = generator_phase(networks, None, &settings, 0).loss;
        (value(&first), value(&second))
    };
    let none = losses(Guidance::NONE);
    for kappa in [1.5, 0.0, -1.0] {
        let guided =
            Guidance { fake_score_training: kappa, fake_score: kappa, teacher: 1.0, condition_dropout: 0.5 };
        let found = losses(guided);
        assert!(found.0 != none.0 && found.1 != none.1, "κ = {kappa}: {found:?} and {none:?}");
    }
    // Without guidance no condition is dropped.
    assert_eq!(losses(Guidance { condition_dropout: 0.9, ..Guidance::NONE }), none);
}

/// Three real samples, one of each class.
fn real_samples() -> RealSamples {
    let pixels: Vec<u8> = (0..3 * 16).map(|i| (i * 5 % 17) as u8).collect();
    let pixels = Tensor::from_slice(&pixels).reshape([3, 1, 4, 4]);
    RealSamples::new(pixels, 16.0, Tensor::from_slice(&[0i64, 1, 2]), 3)
}

fn adversarial() -> Adversarial {
    Adversarial {
        scaling: Scaling::Sida,
        generator_weight: 0.01,
        discriminator_weight: 1.0,
        approximate_r1: 0.0,
        approximate_r1_sigma: 0.1,
    }
}

/// The discriminator learns from the first image; the generator's term joins later, and halves the score's.
#[test]
fn the_adversarial_term_waits_and_the_discriminator_does_not() {
    let _turn = turn();
    let teacher = teacher();
    let state = State::from_teacher(&teacher);
    let _ = no_grad(|| state.fake_score.network().parameters().flat().shallow_clone().g_mul_scalar_(1.3));
    let (generator, fake) = (state.generator.network(), state.fake_score.network());
    let (frozen_teacher, frozen_fake) = (teacher.frozen(), state.fake_score.network().frozen());
    let real = real_samples();
    for scaling in [Scaling::Sida, Scaling::SidDit] {
        for scale in [1.0, 0.0, -1.0, 2.0] {
            let guidance = Guidance {
                fake_score_training: scale,
                fake_score: scale,
                teacher: 1.0,
                condition_dropout: 0.3,
            };
            let mut with = Settings { guidance, ..settings(Mode::Eval) };
            with.adversarial = Some(Adversarial { scaling, ..adversarial() });
            // 54 images are not more than 54: the term joins in iteration 10.
            with.schedule.join_images = Some(54);
            let plain = Settings { adversarial: None, ..with.clone() };
            for iteration in [0, 9, 10] {
                let joined = iteration == 10;
                let first = fake_phase((generator, fake), Some(&real), &with, iteration, 0);
                let without = fake_phase((generator, fake), Some(&real), &plain, iteration, 0);
                let relative = value(&first.score_loss) / value(&without.loss) - 1.0;
                assert!(relative.abs() < 1e-5, "the score's part stays what it is: {relative}");
                // Logits near 0 do not discriminate: six samples of about ln 2.
                let d = value(&first.adversarial_loss.unwrap());
                assert!(d > 0.5 && d < 60.0, "{d}");
                assert!(value(&first.loss) > value(&first.score_loss) + 1.0, "scale {scale}");

                let networks = (generator, frozen_fake.as_ref(), frozen_teacher.as_ref());
                let second = generator_phase(networks, Some(&real), &with, iteration);
                assert_eq!(second.adversarial_loss.is_some(), joined);
                let sid = 100.0 * value(&second.score_loss);
                match joined {
                    false => assert!((value(&second.loss) - sid).abs() <= 1e-5 * sid.abs()),
                    true => assert!(value(&second.loss) > 0.5 * sid, "its adversarial term is positive"),
                }
            }
        }
    }
}

/// At κ₁ = 0 the fake score learns the unconditional score of conditional samples. No condition is dropped then: a
/// discriminator would see generated samples without their class and no real ones.
#[test]
fn what_the_discriminator_is_told_has_one_distribution() {
    let _turn = turn();
    let real = real_samples();
    for (kappa, dropped) in [(0.0, false), (1.5, true), (-1.0, true)] {
        let guidance =
            Guidance { fake_score_training: kappa, fake_score: kappa, teacher: 1.0, condition_dropout: 0.5 };
        let settings = Settings { guidance, adversarial: Some(adversarial()), ..settings(Mode::Eval) };
        let draw = draws(&settings, Some(&real)).fake_score(3, 1);
        let rows = |condition: &Condition| match condition {
            Condition::Class(labels) => Vec::<f32>::try_from(labels.reshape([-1])).unwrap(),
            _ => panic!("classes were given"),
        };
        let (made, beside) = (rows(&draw.condition), rows(&draw.real.unwrap().condition));
        assert_eq!(made, beside, "generated samples have the conditions of the real ones beside them");
        let kept = made.iter().sum::<f32>();
        assert_eq!(kept < 6.0, dropped, "{kept} of 6 keep their class at κ₁ = {kappa}");
    }
}

#[test]
fn augmentation_is_of_what_the_fake_score_learns_from_alone() {
    let _turn = turn();
    let teacher = teacher_with(9);
    let state = State::from_teacher(&teacher);
    let _ = no_grad(|| state.fake_score.network().parameters().flat().shallow_clone().g_mul_scalar_(1.3));
    let real = real_samples();
    let plain = Settings { adversarial: Some(adversarial()), ..settings(Mode::Eval) };
    let augmented = Settings { augmentation: Some(Augmentation { probability: 1.0 }), ..plain.clone() };
    let draw = draws(&augmented, Some(&real)).fake_score(0, 0);
    let (of_generated, of_real) = (draw.augmentation.unwrap(), draw.real.unwrap().augmentation.unwrap());
    assert!(of_generated != of_real, "generated and real samples are augmented apart");
    let (frozen_teacher, frozen_fake) = (teacher.frozen(), state.fake_score.network().frozen());
    let losses = |settings: &Settings| {
        let (generator, fake) = (state.generator.network(), state.fake_score.network());
        let first = fake_phase((generator, fake), Some(&real), settings, 0, 0);
        let networks = (generator, frozen_fake.as_ref(), frozen_teacher.as_ref());
        let second = generator_phase(networks, Some(&real), settings, 0);
        [first.score_loss, first.adversarial_loss.unwrap(), second.loss].map(|loss| value(&loss))
    };
    let (with, without) = (losses(&augmented), losses(&plain));
    assert!(with[0] != without[0] && with[1] != without[1], "{with:?} {without:?}");
    assert_eq!(with[2], without[2], "the generator phase augments nothing");
}

#[test]
fn the_approximate_r1_penalty_adds_to_the_discriminators_loss() {
    let _turn = turn();
    let teacher = teacher();
    let state = State::from_teacher(&teacher);
    let real = real_samples();
    let loss = |approximate_r1: f64| {
        let adversarial = Some(Adversarial { approximate_r1, ..adversarial() });
        let settings = Settings { adversarial, ..settings(Mode::Eval) };
        let networks = (state.generator.network(), state.fake_score.network());
        value(&fake_phase(networks, Some(&real), &settings, 0, 0).loss)
    };
    let (none, once, twice) = (loss(0.0), loss(100.0), loss(200.0));
    assert!(once > none);
    assert!(((twice - none) / (once - none) - 2.0).abs() < 1e-2);
}

/// Both phases against their formulas written out, for one micro-batch with SiD-DiT's scaling; gradients too.
#[test]
fn both_phases_are_their_formulas_written_out() {
    let _turn = turn();
    let teacher = teacher();
    let state = State::from_teacher(&teacher);
    let _ = no_grad(|| state.fake_score.network().parameters().flat().shallow_clone().g_mul_scalar_(1.3));
    let (frozen_teacher, frozen_fake) = (teacher.frozen(), state.fake_score.network().frozen());
    let real = real_samples();
    let adversarial = Adversarial { scaling: Scaling::SidDit, generator_weight: 3.0, ..adversarial() };
    let settings = Settings { adversarial: Some(adversarial), ..settings(Mode::Eval) };
    let (n, d) = (6, 16.0);
    let start = Tensor::full([n], 2.5, (Kind::Float, Device::Cpu));
    let flat_sigma = |sigma: &Tensor| sigma.view([-1]);
    let per_sample = |x: &Tensor| x.sum_dim_intlist([1i64, 2, 3].as_slice(), false, Kind::Float);
    let log_sigmoid_mean = |logits: &Tensor| {
        let map = logits.mean_dim([1i64].as_slice(), false, Kind::Float).clamp(-10.0, 10.0);
        -map.sigmoid().log().mean_dim([1i64, 2].as_slice(), false, Kind::Float)
    };

    // Fake score.
    let draw = draws(&settings, Some(&real)).fake_score(0, 0);
    let (condition, noise, sigma) = (&draw.condition, &draw.noise, draw.time.view([-1, 1, 1, 1]));
    let RealDraw { samples, condition: own, .. } = draw.real.as_ref().unwrap();
    let generated = no_grad(|| {
        state.generator.network().denoise(&(&draw.latents[0] * 2.5), &start, condition, Mode::Eval)
    });
    let fake = state.fake_score.network();
    let time = flat_sigma(&sigma);
    let (denoised, bottleneck) =
        fake.denoise_and_encode(&(&generated + noise * &sigma), &time, condition, Mode::Eval);
    let on_real = fake.encode(&(samples + noise * &sigma), &time, own, Mode::Eval);
    let weight = ((sigma.square() + 0.25) / (&sigma * 0.5).square()).view([-1]);
    let discriminator = (log_sigmoid_mean(&on_real) + log_sigmoid_mean(&-bottleneck)) * 0.5;
    let expected =
        (per_sample(&(denoised - &generated).square()) * &weight + discriminator * d).sum(Kind::Float);
    expected.backward();
    let gradient = fake.parameters().flat_grad();
    fake.parameters().zero_grad();
    let batch = phase::fake_score(state.generator.network(), fake, &draw, &settings);
    batch.loss.backward();
    assert!((value(&batch.loss) / value(&expected) - 1.0).abs() < 1e-5);
    let apart = (fake.parameters().flat_grad() - &gradient).norm() / gradient.norm();
    assert!(value(&apart) < 1e-4, "{}", value(&apart));

    // Generator.
    let draw = draws(&settings, Some(&real)).generator(0, 0);
    let (condition, noise, sigma) = (&draw.condition, &draw.noise, draw.time.view([-1, 1, 1, 1]));
    let generator = state.generator.network();
    let generated = generator.denoise(&(&draw.latents[0] * 2.5), &start, condition, Mode::Eval);
    let (noisy, time) = (&generated + noise * &sigma, flat_sigma(&sigma));
    let f_phi = frozen_teacher.denoise(&noisy, &time, condition, Mode::Eval);
    let (f_psi, bottleneck) = frozen_fake.denoise_and_encode(&noisy, &time, condition, Mode::Eval);
    let omega = no_grad(|| {
        let mean = (&generated - &f_phi).abs().mean_dim([1i64, 2, 3].as_slice(), false, Kind::Float);
        mean.clamp_min(1e-5).reciprocal()
    });
    let delta = &f_phi - &f_psi;
    let sid = per_sample(&(&delta * (&f_phi - &generated - &delta * 1.2))) * &omega;
    let expected = (sid * 50.0 + log_sigmoid_mean(&bottleneck) * &omega * (0.5 * 3.0 * d)).sum(Kind::Float);
    expected.backward();
    let gradient = generator.parameters().flat_grad();
    generator.parameters().zero_grad();
    let networks = (generator, frozen_fake.as_ref(), frozen_teacher.as_ref());
    let batch = generator_phase(networks, Some(&real), &settings, 0);
    batch.loss.backward();
    assert!((value(&batch.loss) / value(&expected) - 1.0).abs() < 1e-4);
    let apart = (generator.parameters().flat_grad() - &gradient).norm() / gradient.norm();
    assert!(value(&apart) < 1e-4, "{}", value(&apart));
}
