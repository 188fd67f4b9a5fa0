//! Both phases on a small network: what they depend on, what they leave alone, what they do with broken samples.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::{Mutex, MutexGuard, PoisonError};

use potstill_distill::{
    generator::{Matching, generate},
    guidance::{self, Guidance},
    noise::{Karras, LogNormal},
    phase::{self, Settings},
    random::{Purpose, Stream},
    state::State,
};
use potstill_models::{Condition, Denoiser, EdmConfig, EdmNetwork, Mode};
use tch::{Device, Kind, Tensor, no_grad};

/// Dropout draws from libtorch's one generator: these tests take turns.
static GENERATOR: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    GENERATOR.lock().unwrap_or_else(PoisonError::into_inner)
}

fn teacher() -> EdmNetwork {
    let config = EdmConfig {
        img_resolution: 4,
        img_channels: 1,
        label_dim: 3,
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
        sigmas: vec![2.5],
        matching: Matching::UniformStep,
        alpha: 1.2,
        sigma_data: 0.5,
        fake_score_noise: LogNormal { mean: -1.2, std: 1.2 },
        generator_noise: Karras { sigma_min: 0.002, sigma_max: 80.0, rho: 7.0, u_max: 0.8 },
        guidance: Guidance::NONE,
        training_mode,
        device: Device::Cpu,
    }
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
            let batch = phase::fake_score(
                state.generator.as_ref(),
                state.fake_score.as_ref(),
                &settings,
                iteration,
                index,
            );
            value(&batch.loss)
        };
        let first = fake(3, 1);
        // libtorch's own generator is somewhere else by now.
        let _ = Tensor::rand([7], (Kind::Float, Device::Cpu));
        assert_eq!(first, fake(3, 1), "dropout too comes from the name alone");
        assert_ne!(first, fake(4, 1));
        assert_ne!(first, fake(3, 2));
    }
}

#[test]
fn each_phase_trains_its_own_network_only() {
    let _turn = turn();
    let teacher = teacher();
    let state = State::from_teacher(&teacher);
    // Apart from its teacher, so that the scores differ.
    let _ = no_grad(|| state.fake_score.parameters().flat().shallow_clone().g_mul_scalar_(1.5));
    let (frozen_teacher, frozen_fake) = (teacher.frozen(), state.fake_score.frozen());
    let settings = settings(Mode::Eval);
    let gradient = |network: &dyn Denoiser| network.parameters().flat_grad().norm().double_value(&[]);

    phase::fake_score(state.generator.as_ref(), state.fake_score.as_ref(), &settings, 0, 0).loss.backward();
    assert!(gradient(state.fake_score.as_ref()) > 0.0);
    assert_eq!(gradient(state.generator.as_ref()), 0.0);

    let before = gradient(state.fake_score.as_ref());
    let (generator, fake) = (state.generator.as_ref(), frozen_fake.as_ref());
    let batch = phase::generator(generator, fake, frozen_teacher.as_ref(), &settings, 0, 0);
    batch.loss.backward();
    assert!(gradient(generator) > 0.0);
    assert!(value(&batch.score_difference.unwrap()) > 0.0);
    assert_eq!(gradient(state.fake_score.as_ref()), before);
    assert_eq!(gradient(&teacher), 0.0);
}

#[test]
fn a_teacher_that_the_fake_score_equals_gives_no_gradient() {
    let _turn = turn();
    let teacher = teacher();
    let state = State::from_teacher(&teacher);
    let (frozen_teacher, frozen_fake) = (teacher.frozen(), state.fake_score.frozen());
    let generator = state.generator.as_ref();
    let settings = settings(Mode::Eval);
    let batch = phase::generator(generator, frozen_fake.as_ref(), frozen_teacher.as_ref(), &settings, 0, 0);
    assert_eq!(value(&batch.loss), 0.0);
    assert_eq!(value(&batch.score_difference.unwrap()), 0.0);
}

#[test]
fn samples_that_are_not_finite_are_left_out_and_counted() {
    let _turn = turn();
    let teacher = teacher();
    let state = State::from_teacher(&teacher);
    // A generator that has diverged makes NaN of everything.
    let _ = no_grad(|| state.generator.parameters().flat().shallow_clone().fill_(f64::NAN));
    let (frozen_teacher, frozen_fake) = (teacher.frozen(), state.fake_score.frozen());
    let settings = settings(Mode::Eval);
    let (generator, fake) = (state.generator.as_ref(), state.fake_score.as_ref());
    let batch = phase::fake_score(generator, fake, &settings, 0, 0);
    assert_eq!((value(&batch.loss), batch.dropped.int64_value(&[])), (0.0, 6));
    let batch = phase::generator(generator, frozen_fake.as_ref(), frozen_teacher.as_ref(), &settings, 0, 0);
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

/// Counts the rows that a network is asked for.
struct Counting {
    network: Box<dyn Denoiser>,
    rows: std::cell::RefCell<Vec<i64>>,
}

impl Denoiser for Counting {
    fn denoise(&self, x_t: &Tensor, time: &Tensor, condition: &Condition, mode: Mode) -> Tensor {
        self.rows.borrow_mut().push(x_t.size()[0]);
        self.network.denoise(x_t, time, condition, mode)
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
    fn duplicate(&self) -> Box<dyn Denoiser> {
        self.network.duplicate()
    }
    fn frozen(&self) -> Box<dyn Denoiser> {
        self.network.frozen()
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
        let counting = Counting { network: teacher.frozen(), rows: Vec::new().into() };
        let guided = no_grad(|| guidance::denoise(&counting, &x, &sigma, &condition, scale, Mode::Eval));
        assert!(guided.allclose(&(&u + (&c - &u) * scale), 1e-5, 1e-6, false), "scale {scale}");
        assert_eq!(*counting.rows.borrow(), [rows], "one call at scale {scale}");
    }
}

#[test]
fn guided_phases_differ_and_train_the_unconditional_score_too() {
    let _turn = turn();
    let teacher = teacher();
    let state = State::from_teacher(&teacher);
    no_grad(|| {
        let _ = state.fake_score.parameters().flat().shallow_clone().g_mul_scalar_(1.3);
    });
    let (generator, fake) = (state.generator.as_ref(), state.fake_score.as_ref());
    let (frozen_teacher, frozen_fake) = (teacher.frozen(), state.fake_score.frozen());
    let losses = |guidance: Guidance| {
        let settings = Settings { guidance, ..settings(Mode::Eval) };
        let first = phase::fake_score(generator, fake, &settings, 0, 0).loss;
        let second =
            phase::generator(generator, frozen_fake.as_ref(), frozen_teacher.as_ref(), &settings, 0, 0).loss;
        (value(&first), value(&second))
    };
    let none = losses(Guidance::NONE);
    for kappa in [1.5, 0.0, -1.0] {
        let guided =
            Guidance { fake_score_training: kappa, fake_score: kappa, teacher: 1.0, condition_dropout: 0.5 };
        let found = losses(guided);
        assert!(found.0 != none.0 && found.1 != none.1, "κ = {kappa}: {found:?} and {none:?}");
    }
    // Where nothing is guided, no condition is dropped.
    assert_eq!(losses(Guidance { condition_dropout: 0.9, ..Guidance::NONE }), none);
}
