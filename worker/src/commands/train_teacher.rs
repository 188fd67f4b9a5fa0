//! `train-teacher`: trains a small EDM teacher on an image file (2206.00364, "Training").
//!
//! Potstill distills teachers that others have trained; with this command the example's teacher can be trained again.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use potstill_c10d::{Backend, ProcessGroup, Store};
use potstill_distill::{
    adam::{Adam, AdamSettings},
    ema,
    gradient::Gradient,
    loss,
    noise_distribution::NoiseDistribution,
    random::{Purpose, Stream},
};
use potstill_models::{Condition, Denoiser, EdmConfig, EdmNetwork, Mode};
use potstill_proto::scores::Scores;
use potstill_spec::{
    EvaluationSpec, LogNormalSpec,
    layers::{self, LayerError, Layered, Names},
};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::{
    data::{Dataset, Shape},
    evaluation::Evaluator,
    evaluation::pictures,
    evaluation::samples::{SampleSet, Sampler},
    model::Space,
};
use potstill_logging::{LogFormat, print};

#[derive(Args)]
pub struct Arguments {
    /// Training file, as in configs/digits/teacher.toml.
    config: PathBuf,
    /// Changes one key, as in --set training.iterations=100.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Threads for libtorch; by default all cores.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// Format of log lines.
    #[arg(long, value_enum, default_value_t)]
    log_format: LogFormat,
}

/// A teacher's training file. Its paths are relative to it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TeacherTraining {
    /// Architecture, with the keys of EDM's checkpoints.
    pub network: EdmConfig,
    /// Data, length, optimizer.
    pub training: Training,
    /// How the result is evaluated.
    pub evaluation: EvaluationSpec,
    /// File for the weights; metrics and a picture are written beside it, with other extensions.
    pub output: PathBuf,
}

/// The training of a teacher.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Training {
    /// Image file; see [`Dataset`].
    pub images: PathBuf,
    /// Seed of the initial weights and of all random numbers.
    pub seed: u64,
    /// Optimizer steps.
    pub iterations: u64,
    /// Images per step.
    pub batch: u32,
    /// Adam's learning rate, reached after `warmup_iterations` and then lowered to 0 along a cosine.
    pub learning_rate: f64,
    /// Iterations of linear warm-up.
    pub warmup_iterations: u64,
    /// β₁, β₂.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Half-life of the average that is saved, in images.
    pub ema_half_life_images: f64,
    /// Share of images that are trained without their label, so that the teacher can be guided.
    pub label_dropout: f64,
    /// Noise distribution: ln σ ~ N(mean, std²).
    pub noise: LogNormalSpec,
}

impl Default for Training {
    fn default() -> Self {
        Self {
            images: PathBuf::new(),
            seed: 0,
            iterations: 1000,
            batch: 256,
            learning_rate: 1e-3,
            warmup_iterations: 100,
            betas: [0.9, 0.999],
            epsilon: 1e-8,
            ema_half_life_images: 500_000.0,
            label_dropout: 0.1,
            noise: LogNormalSpec::default(),
        }
    }
}

impl Layered for TeacherTraining {
    const PATHS: &'static [(&'static str, Names)] = &[
        ("training.images", Names::Path),
        ("output", Names::Path),
        ("evaluation.features", Names::Path),
        ("evaluation.reference", Names::Path),
    ];
}

impl TeacherTraining {
    /// Reads the layers, resolves paths, validates.
    ///
    /// # Errors
    /// See [`LayerError`].
    pub fn load(file: &Path, sets: &[String]) -> anyhow::Result<Self> {
        let read: Self = layers::load(file, sets)?;
        let problems = read.problems();
        if !problems.is_empty() {
            return Err(LayerError::OutOfRange { problems }.into());
        }
        read.network.validate().context("[network]")?;
        Ok(read)
    }

    fn problems(&self) -> Vec<String> {
        let t = &self.training;
        let positive = |x: f64| x.is_finite() && x > 0.0;
        [
            (!t.images.as_os_str().is_empty(), "training.images is missing: name the image file".to_owned()),
            (
                !self.output.as_os_str().is_empty(),
                "output is missing: name the file for the weights".to_owned(),
            ),
            (t.iterations > 0, "training.iterations is 0; it must be at least 1".to_owned()),
            (t.batch > 0, "training.batch is 0; it must be at least 1".to_owned()),
            (
                positive(t.learning_rate),
                format!("training.learning_rate is {}; it must be > 0", t.learning_rate),
            ),
            (positive(t.epsilon), format!("training.epsilon is {}; it must be > 0", t.epsilon)),
            (
                positive(t.ema_half_life_images),
                format!("training.ema_half_life_images is {}; it must be > 0", t.ema_half_life_images),
            ),
            (
                t.betas.iter().all(|b| (0.0..1.0).contains(b)),
                format!("training.betas are {:?}; each must lie in [0, 1)", t.betas),
            ),
            (
                (0.0..1.0).contains(&t.label_dropout),
                format!("training.label_dropout is {}; it must lie in [0, 1)", t.label_dropout),
            ),
            (
                t.noise.mean.is_finite() && positive(t.noise.std),
                "training.noise needs a finite mean and a std > 0".to_owned(),
            ),
        ]
        .into_iter()
        .filter(|(holds, _)| !holds)
        .map(|(_, problem)| problem)
        .collect()
    }
}

pub fn main(arguments: Arguments) -> anyhow::Result<ExitCode> {
    arguments.log_format.start();
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    tch::set_num_threads(arguments.threads.unwrap_or(cores) as i32);
    let config = TeacherTraining::load(&arguments.config, &arguments.sets)?;
    let folder = config.output.parent().unwrap_or(Path::new(""));
    ensure!(
        folder.as_os_str().is_empty() || folder.is_dir(),
        "output folder {} does not exist",
        folder.display()
    );

    let device = Device::Cpu;
    let network = EdmNetwork::initialise(config.network.clone(), config.training.seed, device)?;
    let data = Dataset::load(
        &config.training.images.to_string_lossy(),
        Shape { sample: network.sample_shape(), classes: network.classes() },
    )?;
    let space = Space::of(&network);
    let evaluator = Evaluator::load(&config.evaluation, &space, device)?;
    tracing::info!(
        parameters = network.parameters().flat().numel(),
        images = data.len(),
        "training a teacher"
    );

    let started = Instant::now();
    let average = train(&config, &network, &data)?;
    let seconds = started.elapsed().as_secs_f64();

    let scores = evaluator.as_ref().map(|e| score(e, average.as_ref())).transpose()?;
    save(&config, average.as_ref(), seconds, scores.as_ref())?;
    let images = SampleSet::new(&config.evaluation, space, device)
        .picture(Sampler::Teacher(average.as_ref()), 80, (0, 1), false)
        .to_device(Device::Cpu);
    let picture = config.output.with_extension("png");
    std::fs::write(&picture, pictures::grid(&[&images], 10)?)
        .with_context(|| format!("cannot write {}", picture.display()))?;
    print(format_args!("{}", config.output.display()));
    Ok(ExitCode::SUCCESS)
}

/// Trains and returns the average.
fn train(
    config: &TeacherTraining,
    network: &EdmNetwork,
    data: &Dataset,
) -> anyhow::Result<Box<dyn Denoiser>> {
    let t = &config.training;
    let law = NoiseDistribution::LogNormal { mean: t.noise.mean, std: t.noise.std };
    let batch = i64::from(t.batch);
    let flat = network.parameters().flat();
    let average = network.duplicate().frozen();
    let mut adam = Adam::new(flat, true);
    let one_hot = match network.classes() {
        0 => None,
        classes => Some(data.labels.one_hot(classes).to_kind(Kind::Float)),
    };
    let bar = ProgressBar::new(t.iterations).with_style(
        ProgressStyle::with_template("{bar:30} {pos}/{len} loss {msg}, {eta} left")
            .expect("the template is valid"),
    );
    let images = data.images();
    let mut shown = 0.0;
    for iteration in 0..t.iterations {
        let mut stream = Stream::new(t.seed, iteration, Purpose::TeacherTraining, 0, Device::Cpu);
        let picks = Tensor::from_slice(&stream.integers(batch, data.len()));
        let clean = images.index_select(0, &picks);
        let condition = one_hot.as_ref().map_or(Condition::None, |labels| {
            let kept: Vec<f32> =
                stream.uniform(batch).iter().map(|u| f32::from(*u >= t.label_dropout)).collect();
            Condition::Class(labels.index_select(0, &picks) * Tensor::from_slice(&kept).unsqueeze(1))
        });
        let sigma = law.draw(&mut stream, batch, Device::Cpu);
        let noisy = network.process().add_noise(&clean, &stream.normal(&clean.size()), &sigma);
        tch::manual_seed(stream.dropout_seed());

        let denoised = network.denoise(&noisy, &sigma, &condition, Mode::Train);
        let weight = network.process().loss_weight(&sigma);
        let loss = loss::denoising(&denoised, &clean, &weight).mean(Kind::Float);
        loss.backward();
        let gradient = Gradient::repaired(vec![network.parameters().flat_grad()]);
        ensure!(
            gradient.sums().non_finite == 0.0,
            "iteration {iteration}: the gradient is not finite; lower training.learning_rate"
        );
        let settings =
            AdamSettings { learning_rate: learning_rate(t, iteration), betas: t.betas, epsilon: t.epsilon };
        adam.step(flat, &gradient.slices[0], iteration + 1, &settings);
        network.parameters().zero_grad();
        let beta = ema::beta(t.ema_half_life_images, (iteration * u64::from(t.batch)) as f64, t.batch.into());
        ema::update(average.parameters().flat(), flat, beta);

        if iteration % 50 == 0 {
            let now = loss.double_value(&[]);
            shown = if iteration == 0 { now } else { 0.9 * shown + 0.1 * now };
            bar.set_message(format!("{shown:.2}"));
            if bar.is_hidden() && iteration % 500 == 0 {
                tracing::info!(iteration, loss = shown, "training");
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(average)
}

/// Linear warm-up, then a cosine down to 0.
fn learning_rate(t: &Training, iteration: u64) -> f64 {
    let warm = ((iteration + 1) as f64 / t.warmup_iterations.max(1) as f64).min(1.0);
    let done = iteration as f64 / t.iterations as f64;
    t.learning_rate * warm * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
}

fn score(evaluator: &Evaluator, teacher: &dyn Denoiser) -> anyhow::Result<Scores> {
    let host = "127.0.0.1";
    let patience = Duration::from_secs(30);
    let store = Store::alone(patience)?;
    let backend = Backend::Gloo { host: host.to_owned() };
    let group = ProcessGroup::new(&backend, &store, 0, 1, patience)?;
    Ok(evaluator.score(Sampler::Teacher(teacher), &group, false, |_| {})??)
}

/// Writes the weights and, beside them, the metrics.
fn save(
    config: &TeacherTraining,
    average: &dyn Denoiser,
    seconds: f64,
    scores: Option<&Scores>,
) -> anyhow::Result<()> {
    let write = |path: &Path, bytes: &[u8]| {
        std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
    };
    let metadata = BTreeMap::from([("trained_by".to_owned(), "potstill train-teacher".to_owned())]);
    write(&config.output, &average.to_safetensors(&metadata)?)?;
    let record = serde_json::json!({
        "parameters": average.parameters().flat().numel(),
        "iterations": config.training.iterations,
        "batch": config.training.batch,
        "seed": config.training.seed,
        "seconds": seconds.round(),
        "scores": scores,
    });
    if let Some(s) = scores {
        let number = |x: Option<f64>| x.map_or("–".to_owned(), |x| format!("{x:.3}"));
        print(format_args!(
            "FID {}, agreement {}, precision {}, recall {} on {} samples",
            number(s.fid),
            number(s.agreement),
            number(s.precision),
            number(s.recall),
            s.samples
        ));
    }
    let text = serde_json::to_string_pretty(&record)? + "\n";
    write(&config.output.with_extension("json"), text.as_bytes())
}

#[cfg(test)]
mod tests {
    use potstill_spec::RunSpec;

    use super::*;

    fn configurations(folder: &Path) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
        let here = files.into_iter().filter(|path| path.extension().is_some_and(|e| e == "toml"));
        here.chain(folders.iter().flat_map(|folder| configurations(folder))).collect()
    }

    #[test]
    fn every_shipped_configuration_is_valid() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
        let files = configurations(&folder);
        assert!(!files.is_empty(), "no configurations in {}", folder.display());
        for file in files {
            let trains_a_teacher = std::fs::read_to_string(&file).unwrap().contains("[network]");
            let problem = match trains_a_teacher {
                true => TeacherTraining::load(&file, &[]).err().map(|e| e.to_string()),
                false => RunSpec::load(&file, &[]).err().map(|e| e.to_string()),
            };
            assert_eq!(problem, None, "{}", file.display());
        }
    }

    #[test]
    fn bad_training_files_are_refused_by_key() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/digits/teacher.toml");
        let refused =
            |set: &str| format!("{:#}", TeacherTraining::load(&folder, &[set.to_owned()]).unwrap_err());
        assert!(refused("training.label_dropout=1.5").contains("training.label_dropout"));
        assert!(refused("training.itterations=5").contains("training.iterations"));
        assert!(refused("network.num_blocks=0").contains("num_blocks"));
        assert!(refused("network.embedding_type='cosine'").contains("embedding_type"));
    }

    #[test]
    fn the_learning_rate_rises_and_falls() {
        let t =
            Training { iterations: 100, warmup_iterations: 10, learning_rate: 1.0, ..Training::default() };
        let rates: Vec<f64> = (0..100).map(|i| learning_rate(&t, i)).collect();
        assert!(rates[0] < 0.2 && rates[9] > 0.9 && rates[99] < 0.01);
        assert!(rates[10..].windows(2).all(|pair| pair[0] > pair[1]));
    }
}
