//! Time and memory of full SiD iterations of a text-to-image network with random weights, on one device and without a cluster:
//! what `scripts/bench/gpu_check.py` puts beside the same iteration in eager PyTorch.
//!
//! `iteration UNET_CONFIG SIDE TOKENS MICRO_BATCH ITERATIONS cpu|cuda` prints a JSON object: seconds of each part,
//! median over all iterations but the first, and the peak of allocated bytes. Weights are bf16 on a GPU with fp32
//! master weights, activations are recomputed, guidance is LSG 1.5, the generator has one step.

use std::{error::Error, rc::Rc, time::Instant};

use potstill_distill::{
    adam::AdamSettings,
    condition::Conditions,
    counters::{Counters, Network},
    draws::{Draws, NamedStreams},
    generator::Matching,
    gradient::Gradient,
    guidance::Guidance,
    loss::Weighting,
    noise_distribution::NoiseDistribution,
    phase,
    random::Stream,
    schedule::Schedule,
    settings::Settings,
    state::{Layout, Slice, State},
};
use potstill_models::{
    Condition, Denoiser, Embedded, Mode, TextCondition,
    diffusers::{LatentDenoiser, ScheduleConfig, UNetConfig},
};
use potstill_torch_ext::MemoryMeter;
use tch::{Cuda, Device, Kind, Tensor, no_grad};

/// Text embeddings of noise, with the widths of the network.
struct Noise {
    tokens: i64,
    width: i64,
    pooled: Option<i64>,
    side: i64,
}

impl Conditions for Noise {
    fn draw(&self, stream: &mut Stream, n: i64, device: Device) -> Condition {
        let mut embedded = |n: i64| Embedded {
            states: stream.normal(&[n, self.tokens, self.width]),
            pooled: self.pooled.map(|width| stream.normal(&[n, width])),
        };
        let (texts, null) = (embedded(n), embedded(1));
        let side = 8.0 * self.side as f32;
        let sizes = self.pooled.map(|_| {
            Tensor::from_slice(&[side, side, 0.0, 0.0, side, side]).to_device(device).expand([n, 6], true)
        });
        Condition::Text(TextCondition::new(texts, Rc::new(null), sizes))
    }
}

/// Seconds since `started`, after the device has finished.
fn since(started: Instant, device: Device) -> f64 {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
    started.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [config, side, tokens, micro_batch, iterations, device] = &arguments[..] else {
        return Err("expected UNET_CONFIG SIDE TOKENS MICRO_BATCH ITERATIONS cpu|cuda".into());
    };
    let (side, tokens): (i64, i64) = (side.parse()?, tokens.parse()?);
    let (micro_batch, iterations): (i64, u64) = (micro_batch.parse()?, iterations.parse()?);
    let (device, kind) = match device.as_str() {
        "cuda" => {
            potstill_torch_ext::load_cuda()?;
            (Device::Cuda(0), Kind::BFloat16)
        }
        _ => (Device::Cpu, Kind::Float),
    };
    let config = UNetConfig::parse(&std::fs::read_to_string(config)?)?;
    let noise = Noise {
        tokens,
        width: config.cross_attention_dim.at(0),
        pooled: config.takes_text_time().then(|| config.pooled_width()),
        side,
    };
    let schedule = ScheduleConfig::parse(
        r#"{"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}"#,
    )?;
    let meter = MemoryMeter::start(device)?;
    let teacher = {
        // Constant weights would do for time and memory, but not for finite gradients.
        let drawn = LatentDenoiser::initialise(config, schedule, 0, Device::Cpu)?;
        let drawn = drawn.with_sides([side, side]).with_recomputation(true);
        drawn.over(drawn.parameters().flat().to_kind(kind).to_device(device), false)
    };
    let layout = Layout {
        slice: Slice::WHOLE,
        weights: kind,
        average_on_host: device.is_cuda(),
        first_moments: [false; 2],
    };
    let mut state = State::starting_from(teacher.as_ref(), teacher.as_ref(), Counters::new(false), layout);
    let frozen = state.fake_score.network().frozen();
    let settings = Settings {
        seed: 0,
        micro_batch,
        times: vec![625.0],
        matching: Matching::OneStep { weights: vec![1.0] },
        alpha: 1.0,
        weighting: Weighting::ScoreIdentity,
        score_identity_weight: 1.0,
        fake_score_times: NoiseDistribution::Uniform { first: 20, last: 979 },
        generator_times: NoiseDistribution::Uniform { first: 20, last: 979 },
        guidance: Guidance {
            fake_score_training: 1.5,
            fake_score: 1.5,
            teacher: 1.5,
            condition_dropout: 0.1,
        },
        augmentation: None,
        adversarial: None,
        schedule: Schedule {
            global_batch: micro_batch as u64,
            generator_start_images: None,
            join_images: None,
            fake_score_updates: 1,
        },
        training_mode: Mode::Train,
        device,
    };
    let draws = NamedStreams::data_free(&settings, &noise, teacher.as_ref());
    let adam = AdamSettings { learning_rate: 1e-6, betas: [0.0, 0.999], epsilon: 1e-8 };
    const PARTS: [&str; 6] = [
        "fake score: forward",
        "fake score: backward",
        "fake score: step",
        "generator: forward",
        "generator: backward",
        "generator: step",
    ];
    let mut seconds: Vec<Vec<f64>> = vec![Vec::new(); PARTS.len()];
    let mut losses = Vec::new();
    for iteration in 0..iterations {
        let mut note = |part: usize, started: Instant| {
            let taken = since(started, device);
            if iteration > 0 || iterations == 1 {
                seconds[part].push(taken);
            }
        };
        for phase in 0..2 {
            let (generator, fake) = (state.generator.network(), state.fake_score.network());
            let started = Instant::now();
            let batch = match phase {
                0 => phase::fake_score(generator, fake, &draws.fake_score(iteration, 0), &settings),
                _ => {
                    let draw = draws.generator(iteration, 0);
                    phase::generator(
                        generator,
                        frozen.as_ref(),
                        teacher.as_ref(),
                        &draw,
                        &settings,
                        iteration,
                    )
                }
            };
            note(3 * phase, started);
            let started = Instant::now();
            (&batch.loss / micro_batch as f64).backward();
            losses.push(batch.loss.double_value(&[]));
            note(3 * phase + 1, started);
            drop(batch);
            let started = Instant::now();
            let trained = if phase == 0 { fake } else { generator };
            let sum = Tensor::zeros(trained.parameters().flat().size(), (Kind::Float, device));
            no_grad(|| trained.parameters().add_gradients_to(&sum));
            potstill_torch_ext::clear_gradients(trained.parameters().leaves())?;
            let gradient = Gradient::repaired(sum);
            state.step(if phase == 0 { Network::FakeScore } else { Network::Generator }, &gradient, &adam);
            if phase == 1 {
                let batch = micro_batch as f64;
                state.update_average(50_000.0, iteration as f64 * batch, batch);
            }
            note(3 * phase + 2, started);
        }
    }
    let parts: serde_json::Map<String, serde_json::Value> =
        PARTS.iter().zip(seconds).map(|(name, times)| ((*name).to_owned(), median(times).into())).collect();
    let total: f64 = parts.values().filter_map(serde_json::Value::as_f64).sum();
    let finite = losses.iter().all(|loss| loss.is_finite());
    let report = serde_json::json!({
        "parameters": teacher.parameters().flat().numel(),
        "seconds": parts,
        "seconds_per_iteration": total,
        "peak_bytes": meter.peak()?,
        "finite": finite,
    });
    println!("{report}");
    Ok(())
}
