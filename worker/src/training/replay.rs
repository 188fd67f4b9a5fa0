//! Replays of the official training loops, recorded iteration by iteration on tiny networks: SiD and SiDA on an EDM
//! network, SiD-LSG on a U-Net, SiD-DiT on a stand-in. The recorded random numbers are given to the code of a real run:
//! the phases, the accumulation, the optimizer's steps, the average.
//!
//! The files are `*_trajectory*.safetensors` of `tests/fixtures`, or of the folder that `POTSTILL_FIXTURES` names.

use std::{
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use potstill_c10d::{Backend, ProcessGroup, Store};
use potstill_distill::{
    counters::{Counters, Network},
    draws::{Draw, Draws, RealDraw},
    ema,
    generator::Unroll,
    noise_distribution::NoiseDistribution,
    state::{Layout, Start, State},
};
use potstill_models::{
    Condition, Denoiser, EdmConfig, EdmNetwork, Embedded, ForwardProcess, Mode, Parameters, TextCondition,
    diffusers::{LatentDenoiser, ScheduleConfig, UNetConfig},
    weights::{Archive, Stored},
};
use potstill_proto::wire::StepSeconds;
use potstill_spec::{AdversarialSpec, GuidancePreset, Matching, PromptsSpec, RunSpec, Scaling, Weighting};
use serde_json::Value;
use tch::{Device, Kind, Tensor, no_grad};

use super::{
    job::settings,
    networks::Networks,
    step::{Prepared, Recipe, Trainer},
};
use crate::session::Progress;

/// The tolerance of losses, norms and weights, each as a vector relative to its own norm.
const CLOSE: f64 = 1e-5;

fn files() -> Vec<PathBuf> {
    let own = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    let folder = std::env::var_os("POTSTILL_FIXTURES").map_or(own, PathBuf::from);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .filter(|path| path.file_name().unwrap().to_string_lossy().contains("_trajectory"))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no *_trajectory*.safetensors in {}", folder.display());
    files
}

/// The stand-in network of the flow recordings: two convolutions with a residual, a time and a text vector. Its logits
/// are means over positions, one per channel.
struct StandIn {
    parameters: Parameters,
    shape: [i64; 3],
}

impl StandIn {
    fn hidden(&self, x: &Tensor, time: &Tensor, condition: &Condition) -> Tensor {
        let [conv1, bias1, of_time, of_text, conv2, bias2, ..] = self.parameters.leaves() else {
            panic!("the stand-in has 8 parameters")
        };
        let Condition::Text(text) = condition else { panic!("the stand-in takes texts") };
        let convolve = |x: &Tensor, weight: &Tensor, bias: &Tensor| {
            x.conv2d(weight, Some(bias), [1, 1], [1, 1], [1, 1], 1)
        };
        let t = time.view([-1]);
        let phi = Tensor::stack(&[t.shallow_clone(), (&t * 3.0).sin(), (&t * 3.0).cos()], 1);
        let text = text.embedded().states.mean_dim([1i64].as_slice(), false, Kind::Float);
        let added = phi.matmul(&of_time.tr()) + text.matmul(&of_text.tr());
        let first = (convolve(x, conv1, bias1) + added.unsqueeze(-1).unsqueeze(-1)).silu();
        let second = convolve(&first, conv2, bias2).silu();
        first + second
    }

    fn bottleneck(hidden: &Tensor) -> Tensor {
        // Logits are the mean over the second dimension: over positions.
        hidden.flatten(2, -1).transpose(1, 2).unsqueeze(-1)
    }
}

impl Denoiser for StandIn {
    fn denoise_and_encode(
        &self,
        x_t: &Tensor,
        time: &Tensor,
        condition: &Condition,
        _: Mode,
    ) -> (Tensor, Tensor) {
        let hidden = self.hidden(x_t, time, condition);
        let leaves = self.parameters.leaves();
        let velocity = hidden.conv2d(&leaves[6], Some(&leaves[7]), [1, 1], [1, 1], [1, 1], 1);
        (x_t - velocity * time.view([-1, 1, 1, 1]), Self::bottleneck(&hidden))
    }
    fn encode(&self, x_t: &Tensor, time: &Tensor, condition: &Condition, _: Mode) -> Tensor {
        Self::bottleneck(&self.hidden(x_t, time, condition))
    }
    fn process(&self) -> &ForwardProcess {
        &ForwardProcess::Flow
    }
    fn parameters(&self) -> &Parameters {
        &self.parameters
    }
    fn sample_shape(&self) -> [i64; 3] {
        self.shape
    }
    fn classes(&self) -> i64 {
        0
    }
    fn over(&self, flat: Tensor, trainable: bool) -> Box<dyn Denoiser> {
        Box::new(Self { parameters: self.parameters.over(flat, trainable), shape: self.shape })
    }
    fn config_json(&self) -> String {
        "{}".to_owned()
    }
}

/// An opened recording.
struct Recording {
    name: String,
    archive: Archive,
    run: Value,
}

impl Recording {
    fn open(path: &Path) -> Self {
        let archive = Archive::read(path).unwrap();
        assert_eq!(archive.metadata["format"], "potstill-trajectory-1", "{}", path.display());
        let run = serde_json::from_str(&archive.metadata["run"]).unwrap();
        Self { name: path.file_stem().unwrap().to_string_lossy().into_owned(), archive, run }
    }

    fn has(&self, tensor: &str) -> bool {
        self.archive.tensors.contains_key(tensor)
    }

    fn tensor(&self, name: &str) -> Tensor {
        match self.archive.tensors.get(name) {
            Some(tensor) => tensor.shallow_clone(),
            None => panic!("{} lacks {name}", self.name),
        }
    }

    /// The values of one micro-batch in a tensor.
    fn at(&self, name: &str, iteration: u64, micro_batch: u32) -> Tensor {
        self.tensor(name).get(iteration as i64).get(i64::from(micro_batch))
    }

    fn number(&self, key: &str) -> f64 {
        self.run[key].as_f64().unwrap_or_else(|| panic!("{}: run.{key} is no number", self.name))
    }

    fn count(&self, key: &str) -> u64 {
        self.number(key) as u64
    }

    fn pair(&self, key: &str) -> [f64; 2] {
        serde_json::from_value(self.run[key].clone()).unwrap()
    }

    /// The sum of a value over micro-batches, for each iteration.
    fn per_iteration(&self, name: &str) -> Vec<f64> {
        Vec::try_from(self.tensor(name).sum_dim_intlist([1i64].as_slice(), false, Kind::Double)).unwrap()
    }

    fn vector(&self, name: &str) -> Vec<f64> {
        Vec::try_from(self.tensor(name).to_kind(Kind::Double)).unwrap()
    }

    fn counts(&self, name: &str) -> Option<Vec<u64>> {
        let counts: Option<Vec<i64>> = self.has(name).then(|| Vec::try_from(self.tensor(name)).unwrap());
        counts.map(|counts| counts.iter().map(|count| *count as u64).collect())
    }

    fn is_flow(&self) -> bool {
        self.archive.metadata.contains_key("formula")
    }

    fn is_latent(&self) -> bool {
        self.archive.metadata.contains_key("scheduler")
    }

    fn network(&self, prefix: &str) -> Box<dyn Denoiser> {
        let mut tensors = self.archive.with_prefix(prefix);
        let config = &self.archive.metadata["config"];
        if self.is_flow() {
            let order: Vec<String> = serde_json::from_str(&self.archive.metadata["param_order"]).unwrap();
            let named: Vec<(&str, Tensor)> =
                order.iter().map(|name| (name.as_str(), tensors[name].shallow_clone())).collect();
            let config: Value = serde_json::from_str(config).unwrap();
            let side = config["size"].as_i64().unwrap();
            let shape = [config["in_channels"].as_i64().unwrap(), side, side];
            return Box::new(StandIn { parameters: Parameters::from_named(&named, true), shape });
        }
        if self.is_latent() {
            let schedule = ScheduleConfig::parse(&self.archive.metadata["scheduler"]).unwrap();
            let named = tensors.into_iter().map(|(name, tensor)| (name, Stored::Memory(tensor))).collect();
            let network = LatentDenoiser::from_tensors(
                UNetConfig::parse(config).unwrap(),
                schedule,
                &named,
                (Kind::Float, Device::Cpu),
            );
            return Box::new(network.unwrap());
        }
        let mut config: Value = serde_json::from_str(config).unwrap();
        let sigma_data = self.number("sigma_data");
        config["sigma_data"] = sigma_data.into();
        let config: EdmConfig = serde_json::from_value(config).unwrap();
        // Constants such as resampling filters are not recorded.
        let fresh = EdmNetwork::initialise(config.clone(), 0, Device::Cpu).unwrap();
        tensors.extend(fresh.parameters().buffers().iter().map(|(name, b)| (name.clone(), b.copy())));
        Box::new(EdmNetwork::from_tensors(config, &tensors, Device::Cpu).unwrap())
    }

    /// The run file of the recording.
    fn spec(&self) -> RunSpec {
        let mut spec = RunSpec::default();
        assert_eq!(self.number("ls"), 1.0, "the denoising loss has no weight of its own");
        let d = &mut spec.distillation;
        d.global_batch = self.count("batch") as u32;
        d.micro_batch = self.count("micro_batch") as u32;
        d.iterations = self.count("iterations");
        d.alpha = self.number("alpha");
        d.score_identity_weight = self.number("lsg");
        d.generator_start_images = self.run["generator_start_nimg"].as_u64();
        if self.is_flow() {
            d.weighting = match self.run["weighting"].as_str().unwrap() {
                "1_minus_sigma" | "1-sigma" => Weighting::OneMinusT,
                "1_minus_sigma2" | "1_minus_sigma_squared" => Weighting::OneMinusTSquared,
                "1_over_sigma" => Weighting::InverseT,
                "1_over_sigma2" | "1_over_sigma_squared" => Weighting::InverseTSquared,
                "sid" => Weighting::ScoreIdentity,
                "snr" => Weighting::Snr,
                "sqrt_snr" => Weighting::SqrtSnr,
                other => panic!("{}: weighting {other}", self.name),
            };
        } else if self.is_latent() {
            d.timesteps = [self.count("tmin") as u32, self.count("tmax") as u32 - 1];
        } else {
            d.fake_score_noise.mean = self.number("P_mean");
            d.fake_score_noise.std = self.number("P_std");
            d.generator_noise.sigma_min = self.number("sigma_min");
            d.generator_noise.sigma_max = self.number("sigma_max");
            d.generator_noise.rho = self.number("rho");
            d.generator_noise.u_max = self.number("tmax") / 1000.0;
            spec.generator.sigmas = vec![self.number("init_sigma")];
        }
        if self.is_flow() || self.is_latent() {
            spec.teacher.model = Some("recorded".to_owned());
            spec.prompts = Some(PromptsSpec { data: Some("recorded".to_owned()), ..PromptsSpec::default() });
            spec.generator.initial_timestep = Some(self.count("init_timestep") as u32);
            spec.generator.steps = self.count("num_steps") as u32;
            spec.guidance.preset = GuidancePreset::Custom;
            spec.guidance.fake_score_training = self.number("kappa1");
            spec.guidance.fake_score = self.number("kappa23");
            spec.guidance.teacher = self.number("kappa4");
        } else {
            spec.teacher.weights = Some("recorded".into());
        }
        if self.is_latent() {
            spec.generator.matching = Matching::FinalStep;
        }
        let o = &mut spec.optimizer;
        o.fake_score_learning_rate = self.number("lr");
        o.generator_learning_rate = self.number("glr");
        o.betas = self.pair("betas");
        o.generator_betas = self.run.get("g_betas").map(|_| self.pair("g_betas"));
        o.epsilon = self.number("eps");
        o.fake_score_clip_value = self.run["clip_gradient_value_fake"].as_f64();
        if let Some(half_life) = self.run["ema_halflife_nimg"].as_f64() {
            o.ema_half_life_images = half_life;
            assert_eq!(self.number("ema_rampup_ratio"), 0.05);
        }
        if self.run.get("lsd").is_some() {
            spec.adversarial = Some(AdversarialSpec {
                data: "recorded".to_owned(),
                scaling: if self.is_flow() { Scaling::SidDit } else { Scaling::Sida },
                generator_weight: self.number("lsg_gan"),
                discriminator_weight: self.number("lsd"),
                join_images: self.run["gan_start_nimg"].as_u64(),
                ..AdversarialSpec::default()
            });
        }
        spec.validate().unwrap();
        spec
    }
}

/// The draws of a recording.
struct Recorded<'a> {
    recording: &'a Recording,
    classes: i64,
    laws: [NoiseDistribution; 2],
}

impl Recorded<'_> {
    fn condition(&self, what: &str, iteration: u64, micro_batch: u32) -> Condition {
        let recording = self.recording;
        if recording.has("text.table") {
            let table = recording.tensor("text.table");
            let rows = recording.at(&format!("{what}.prompts"), iteration, micro_batch);
            let embedded = |states| Embedded { states, pooled: None };
            let null = Rc::new(embedded(table.narrow(0, 0, 1)));
            return Condition::Text(TextCondition::new(embedded(table.index_select(0, &rows)), null, None));
        }
        match self.classes {
            0 => Condition::None,
            classes => {
                let labels = recording.at(&format!("{what}.labels"), iteration, micro_batch);
                Condition::Class(labels.one_hot(classes).to_kind(Kind::Float))
            }
        }
    }

    fn time(&self, phase: &str, law: NoiseDistribution, iteration: u64, micro_batch: u32) -> Tensor {
        let recording = self.recording;
        let at = |name: &str| recording.at(&format!("{phase}.{name}"), iteration, micro_batch);
        if recording.has(&format!("{phase}.timesteps")) {
            return at("timesteps").to_kind(Kind::Float);
        }
        let numbers = match law {
            NoiseDistribution::Karras { .. } => at("uniform"),
            _ => at("normal"),
        };
        let numbers: Vec<f64> = Vec::try_from(numbers.to_kind(Kind::Double)).unwrap();
        let (ours, theirs) = (law.times(&numbers), at(if recording.is_flow() { "t" } else { "sigma" }));
        let apart = ((&ours - &theirs) / &theirs).abs().max().double_value(&[]);
        assert!(apart < 2e-6, "{}: {phase} times of iteration {iteration}: {apart}", recording.name);
        theirs
    }

    fn draw(&self, phase: &str, law: NoiseDistribution, iteration: u64, micro_batch: u32) -> Draw {
        let recording = self.recording;
        let z = recording.at(&format!("{phase}.z"), iteration, micro_batch);
        let steps = if z.dim() == 5 { z.size()[0] } else { 1 };
        let z = if z.dim() == 5 { z } else { z.unsqueeze(0) };
        let unroll = match recording.has("k") {
            true => {
                let k = recording.tensor("k").int64_value(&[iteration as i64]) as usize;
                Unroll { steps: k, trained_from: k - 1 }
            }
            false => Unroll { steps: steps as usize, trained_from: 0 },
        };
        let mut condition = self.condition(phase, iteration, micro_batch);
        if phase == "fake" && recording.has("fake.dropped") {
            let dropped = recording.at("fake.dropped", iteration, micro_batch).to_kind(Kind::Float);
            let kept: Tensor = 1.0 - dropped;
            condition = condition.kept(&kept.unsqueeze(1));
        }
        Draw {
            unroll,
            condition,
            latents: (0..unroll.steps as i64).map(|step| z.get(step)).collect(),
            time: self.time(phase, law, iteration, micro_batch),
            noise: recording.at(&format!("{phase}.noise"), iteration, micro_batch),
            augmentation: None,
            real: None,
            dropout_seed: 0,
        }
    }
}

impl Draws for Recorded<'_> {
    fn fake_score(&self, iteration: u64, micro_batch: u32) -> Draw {
        let real = ["real.images", "real.latents"].into_iter().find(|name| self.recording.has(name));
        // Real images of an EDM recording have the labels of the generated ones.
        let of = if self.recording.has("real.prompts") { "real" } else { "fake" };
        let real = real.map(|name| RealDraw {
            samples: self.recording.at(name, iteration, micro_batch),
            condition: self.condition(of, iteration, micro_batch),
            augmentation: None,
            perturbation: None,
        });
        Draw { real, ..self.draw("fake", self.laws[0], iteration, micro_batch) }
    }

    fn generator(&self, iteration: u64, micro_batch: u32) -> Draw {
        self.draw("generator", self.laws[1], iteration, micro_batch)
    }
}

/// The results of one phase of a replay, for each iteration.
#[derive(Default)]
struct Course {
    losses: Vec<f64>,
    score_losses: Vec<f64>,
    norms: Vec<f64>,
    tensor_norms: Vec<f64>,
    stepped: Vec<u64>,
    steps: Vec<u64>,
}

/// Values in the order of the recording, without the elements that are only rounding errors.
struct Order {
    parameters: Vec<(i64, i64)>,
    kept: Option<Tensor>,
}

impl Order {
    fn new(recording: &Recording, network: &dyn Denoiser) -> Self {
        let names: Vec<String> = serde_json::from_str(&recording.archive.metadata["param_order"]).unwrap();
        let entries = network.parameters().entries();
        assert_eq!(names.len(), entries.len(), "{}: parameters", recording.name);
        let parameters = names.iter().map(|name| {
            let entry = entries.iter().find(|entry| entry.name == *name);
            let entry = entry.unwrap_or_else(|| panic!("{}: no parameter {name}", recording.name));
            (entry.offset, entry.numel())
        });
        let parameters: Vec<(i64, i64)> = parameters.collect();
        let kept = recording.has("noise_elements").then(|| {
            let numel = parameters.iter().map(|(_, numel)| numel).sum::<i64>();
            let kept = Tensor::ones([numel], (Kind::Bool, Device::Cpu));
            let _ = kept.shallow_clone().index_fill_(0, &recording.tensor("noise_elements"), 0);
            kept
        });
        Self { parameters, kept }
    }

    fn tensors(&self, flat: &Tensor) -> Vec<Tensor> {
        self.parameters.iter().map(|(offset, numel)| flat.narrow(0, *offset, *numel)).collect()
    }

    fn counted(&self, flat: &Tensor) -> Tensor {
        match &self.kept {
            Some(kept) => flat.masked_select(kept),
            None => flat.shallow_clone(),
        }
        .to_kind(Kind::Double)
    }

    /// The distance of our values from recorded ones, relative to their norm.
    fn apart(&self, ours: &Tensor, recorded: &Tensor) -> f64 {
        let ours = self.counted(&Tensor::cat(&self.tensors(ours), 0));
        let recorded = self.counted(recorded);
        ((ours - &recorded).norm() / recorded.norm()).double_value(&[])
    }
}

fn apart(ours: &[f64], recorded: &[f64]) -> f64 {
    assert_eq!(ours.len(), recorded.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut ours.iter().zip(recorded).map(|(a, b)| a - b)) / norm(&mut recorded.iter().copied())
}

/// Replays a recording and returns the values beyond their tolerances.
fn replay(recording: &Recording) -> Vec<String> {
    let spec = recording.spec();
    let teacher = recording.network("teacher.").frozen();
    let starts = recording.archive.tensors.keys().any(|name| name.starts_with("generator_start."));
    let start = starts.then(|| recording.network("generator_start."));
    let process = teacher.process().clone();
    let recipe = Recipe::new(&spec, settings(&spec, &process, Device::Cpu));
    if recording.is_latent() {
        let times: Vec<f64> = serde_json::from_value(recording.run["generator_timesteps"].clone()).unwrap();
        assert_eq!(recipe.settings.times, times, "{}", recording.name);
    }
    let laws = [recipe.settings.fake_score_times, recipe.settings.generator_times];
    let draws = Recorded { recording, classes: teacher.classes(), laws };
    let mut state = State::starting_from(
        Start::of(teacher.as_ref()),
        Start::of(start.as_deref().unwrap_or(teacher.as_ref())),
        Counters::new(false),
        Layout::PLAIN,
    );
    let patience = Duration::from_secs(60);
    let store = Store::alone(patience).unwrap();
    let backend = Backend::Gloo { host: "127.0.0.1".to_owned() };
    let group = ProcessGroup::new(&backend, &store, 0, 1, patience).unwrap();
    let (progress, micro_batches) = (Arc::new(Progress::default()), 0..spec.micro_batches());
    let networks = Networks::new(&state, teacher.as_ref(), None, &group, &progress);
    let trainer =
        Trainer::new(&recipe, networks, &draws, group.into(), micro_batches, &progress, &state, None)
            .unwrap();
    let order = Order::new(recording, teacher.as_ref());
    let schedule = &recipe.settings.schedule;
    let images = recording.counts("images_seen").unwrap();
    let betas = recording.has("ema.beta").then(|| recording.vector("ema.beta"));
    let batch = f64::from(spec.distillation.global_batch);
    let mut problems = Vec::new();
    let mut courses = [Course::default(), Course::default()];
    for iteration in 0..spec.distillation.iterations {
        assert_eq!(schedule.images_seen(iteration), images[iteration as usize]);
        for network in [Network::FakeScore, Network::Generator] {
            let mut seconds = StepSeconds::default();
            let reduced = trainer.gradient(&mut state, network, iteration, &mut seconds, || Ok(()));
            let reduced = reduced.unwrap_or_else(|_| panic!("{}: a collective failed", recording.name));
            let course = &mut courses[network as usize];
            course.losses.push(reduced.totals.loss / batch);
            course.score_losses.push(reduced.totals.score_loss / batch);
            course.norms.push(reduced.gradient.sums().norm());
            let norms = order.tensors(&reduced.gradient.slices[0]);
            course.tensor_norms.extend(norms.iter().map(|x| x.norm().double_value(&[])));
            let steps = network == Network::FakeScore || schedule.trains_generator(iteration);
            // The recorded loop also computes the gradient of a frozen generator.
            match steps {
                true => {
                    let prepared = Prepared::new(&recipe, network, iteration, reduced.gradient);
                    let whole = trainer.agree(&prepared, &mut seconds).ok().unwrap();
                    let stepped = trainer.step(&mut state, prepared, whole, &mut seconds);
                    assert!(!stepped.sick, "{}", recording.name);
                }
                false => assert_eq!(network, Network::Generator, "{}", recording.name),
            }
            trainer.clear(network).unwrap();
            let course = &mut courses[network as usize];
            course.stepped.push(steps.into());
            course.steps.push(state.counters.steps(network));
        }
        if let Some(betas) = &betas {
            let half_life = spec.optimizer.ema_half_life_images;
            let ours = ema::beta(half_life, schedule.images_seen(iteration) as f64, batch);
            let error = (ours - betas[iteration as usize]).abs();
            if error > 1e-12 {
                problems.push(format!("β of the average in iteration {iteration}: {error:e}"));
            }
        }
        for part in state.parts() {
            let net = match part.name {
                "fake_score" => "fake",
                "generator_ema" => "ema",
                other => other,
            };
            let name = format!("weights.{net}.after_{}", iteration + 1);
            if recording.has(&name) {
                let error = order.apart(part.values, &recording.tensor(&name));
                println!("{}: {name}: {error:.1e}", recording.name);
                if error.is_nan() || error > CLOSE {
                    problems.push(format!("{name}: {error:e}"));
                }
            }
        }
    }
    let mut far = Vec::new();
    let mut check = |what: String, ours: &[f64], recorded: &[f64]| {
        let error = apart(ours, recorded);
        println!("{}: {what}: {error:.1e}", recording.name);
        if error.is_nan() || error > CLOSE {
            far.push(format!("{what}: {error:e}\n  ours     {ours:?}\n  recorded {recorded:?}"));
        }
    };
    for (network, phase) in [(Network::FakeScore, "fake"), (Network::Generator, "generator")] {
        let course = &courses[network as usize];
        check(format!("{phase}.loss"), &course.losses, &recording.per_iteration(&format!("{phase}.loss")));
        let weight = match network {
            Network::FakeScore => 1.0,
            Network::Generator => spec.distillation.score_identity_weight,
        };
        for part in ["loss_denoise", "loss_flow", "loss_sid"].map(|part| format!("{phase}.{part}")) {
            if recording.has(&part) {
                let ours: Vec<f64> = course.score_losses.iter().map(|loss| loss * weight).collect();
                check(part.clone(), &ours, &recording.per_iteration(&part));
            }
        }
        if recording.has(&format!("{phase}.loss_d")) {
            let ours: Vec<f64> =
                course.losses.iter().zip(&course.score_losses).map(|(whole, score)| whole - score).collect();
            check(format!("{phase}.loss_d"), &ours, &recording.per_iteration(&format!("{phase}.loss_d")));
        }
        check(format!("{phase}.grad_norm"), &course.norms, &recording.vector(&format!("{phase}.grad_norm")));
        let name = format!("{phase}.grad_norms");
        if recording.has(&name) {
            let recorded: Vec<f64> =
                Vec::try_from(recording.tensor(&name).reshape([-1]).to_kind(Kind::Double)).unwrap();
            check(name, &course.tensor_norms, &recorded);
        }
        for (what, ours) in [("stepped", &course.stepped), ("adam_step", &course.steps)] {
            let name = format!("{phase}.{what}");
            if let Some(recorded) = recording.counts(&name)
                && *ours != recorded
            {
                problems.push(format!("{name}: {ours:?}, recorded {recorded:?}"));
            }
        }
    }
    problems.extend(far);
    for (part, net) in [("generator_adam", "generator"), ("fake_score_adam", "fake")] {
        let name = format!("adam_v.{net}.after_{}", spec.distillation.iterations);
        if recording.has(&name) {
            let parts = state.parts();
            let part = parts.iter().find(|p| p.name == format!("{part}.exp_avg_sq")).unwrap();
            let error = no_grad(|| order.apart(part.values, &recording.tensor(&name)));
            println!("{}: {name}: {error:.1e}", recording.name);
            if error.is_nan() || error > CLOSE {
                problems.push(format!("{name}: {error:e}"));
            }
        }
    }
    problems
}

#[test]
fn replays_the_official_loop_of_every_recording() {
    let mut problems = Vec::new();
    for path in files() {
        let recording = Recording::open(&path);
        problems.extend(replay(&recording).into_iter().map(|p| format!("{}: {p}", recording.name)));
    }
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}
