//! `evaluate`: computes the metrics of a finished student, or a teacher, against real images, with any number of
//! processes.
//!
//! The metrics are those of a run's own evaluations: the same samples and the same code, spread over the processes in
//! the same way. The first process is rank 0; it starts the others and prints.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use potstill_c10d::{Backend, ProcessGroup, Store};
use potstill_logging::print;
use potstill_models::Denoiser;
use potstill_proto::scores::Scores;
use potstill_spec::{EvaluationSpec, ImageTreatment, PromptsSpec};
use potstill_storage::digest::{hexadecimal, sha256_of};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tch::{Device, Tensor};

use super::source::Source;
use crate::{
    evaluation::kept::Kept,
    evaluation::samples::Sampler,
    evaluation::{Evaluator, Scoring},
    model::student::Student,
    model::{Model, Prompts, Space, Wanted, load_network},
    process::lifeline,
    process::{device::Choice, environment},
};

/// All processes are on this machine.
const HOST: &str = "127.0.0.1";
/// How long the processes may take to meet: each loads the model before.
const MEETING: Duration = Duration::from_secs(3600);

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    student: Option<Source>,
    /// Evaluate this network (a .safetensors file, or a folder in the layout of diffusers) with its own sampler instead
    /// of a student
    #[arg(long, value_name = "PATH", conflicts_with = "Source")]
    teacher: Option<PathBuf>,
    /// TorchScript extractor: images in [−1, 1] → features [N, D], or (features, logits [N, classes])
    #[arg(long, value_name = "FILE")]
    features: PathBuf,
    /// Real images (see adversarial.data in a run file for the forms), or their features that --save-statistics
    /// wrote, or an .npz file with their moments `mu` and `sigma`, which give FID but neither precision nor recall
    #[arg(long, value_name = "FILE")]
    reference: PathBuf,
    /// TorchScript CLIP, for text-to-image models: images in [−1, 1], tokens int64 [N, tokens] → (image embeddings,
    /// text embeddings)
    #[arg(long, value_name = "FILE")]
    clip: Option<PathBuf>,
    /// Number of samples
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(2..))]
    samples: u32,
    /// Seed of the noise: a run's own evaluations use 1000000007
    #[arg(long, value_name = "N", default_value_t = EvaluationSpec::default().seed)]
    seed: u64,
    /// k of the k-nearest-neighbor manifolds of precision and recall
    #[arg(long, value_name = "K", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    neighbours: u32,
    /// Prompts for a text-to-image model: .txt with a prompt a line, .jsonl or .parquet with a column of prompts, and
    /// with "label" for class agreement
    #[arg(long, value_name = "FILE")]
    prompts: Option<String>,
    /// Column of the prompts in JSONL and Parquet
    #[arg(long, value_name = "NAME", default_value_t = PromptsSpec::default().column)]
    prompts_column: String,
    /// Least number of samples of each prompt, where there are enough prompts: COCO's protocol has 1. Diversity needs 2
    #[arg(long, value_name = "N", default_value_t = EvaluationSpec::default().samples_per_prompt,
          value_parser = clap::value_parser!(u32).range(1..))]
    samples_per_prompt: u32,
    /// Treatment of samples and real images before they are compared
    #[arg(long, value_enum, default_value_t)]
    images: Treatment,
    /// Height and width for --images, in pixels: 256 for FID on COCO; a patch has 299 by default
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(1..))]
    image_size: Option<u32>,
    /// Guidance scale of a text-to-image teacher
    #[arg(long, value_name = "SCALE", default_value_t = EvaluationSpec::default().teacher_guidance)]
    teacher_guidance: f64,
    /// Steps of the teacher's sampler
    #[arg(long, value_name = "N", default_value_t = 18, value_parser = clap::value_parser!(u32).range(2..))]
    teacher_steps: u32,
    /// Device of the processes
    #[arg(long, value_enum, default_value_t)]
    device: Choice,
    /// Number of processes
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    workers: u32,
    /// Threads of each process [default: the machine's cores divided by the processes]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// Folder in which finished chunks of 100 samples are kept. The same command, killed and started again, continues
    /// where it was, with any number of --workers. Each evaluation has a sub-folder of its own, named by a digest of
    /// model, extractors, prompts, seed, samplers, size and device, so that another evaluation cannot use its chunks.
    /// Delete the folder when the evaluation is complete
    #[arg(long, value_name = "FOLDER")]
    resume_dir: Option<PathBuf>,
    /// Write the reference's features to this file, for later use as --reference
    #[arg(long, value_name = "FILE")]
    save_statistics: Option<PathBuf>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Set for the processes that the first one starts: their rank
    #[arg(long, hide = true, requires = "store", value_name = "RANK")]
    join: Option<u32>,
    /// Set for these processes: the file through which they find each other
    #[arg(long, hide = true, value_name = "FILE")]
    store: Option<PathBuf>,
    /// Set for these processes: the sub-folder of --resume-dir
    #[arg(long, hide = true, value_name = "FOLDER")]
    kept: Option<PathBuf>,
}

/// [`ImageTreatment`] on a command line.
#[derive(Clone, Copy, Default, ValueEnum)]
enum Treatment {
    /// None: the extractor gets the images unchanged
    #[default]
    AsMade,
    /// The largest centered square, resized to --image-size with Pillow's Lanczos filter
    Resized,
    /// A centered square of --image-size, at full resolution: patch FID
    Patch,
}

impl From<Treatment> for ImageTreatment {
    fn from(treatment: Treatment) -> Self {
        match treatment {
            Treatment::AsMade => Self::AsMade,
            Treatment::Resized => Self::Resized,
            Treatment::Patch => Self::Patch,
        }
    }
}

/// Everything that decides samples and their features: chunks in --resume-dir are of one such identity.
#[derive(Serialize)]
struct Identity<'a> {
    potstill: &'static str,
    /// SHA-256 of weights, configuration, text encoders and autoencoder.
    network: String,
    student_times: &'a Option<Vec<f64>>,
    /// Steps and guidance of a teacher's sampler.
    teacher_sampler: Option<(u32, f64)>,
    extractor: &'a str,
    clip: Option<&'a str>,
    prompts: Option<&'a str>,
    samples: u32,
    samples_per_prompt: u32,
    seed: u64,
    images: String,
    /// The kind of device: results of a GPU and of a CPU differ in their last bits.
    device: &'static str,
}

/// The metrics as JSON, and what they were measured with. `images_per_second` is the rate at which all processes
/// together made the samples of this run of the command; null when all samples were kept from an earlier one.
#[derive(Serialize)]
struct Record {
    subject: String,
    #[serde(flatten)]
    scores: Scores,
    seed: u64,
    workers: u32,
}

impl Record {
    fn print(&self) {
        let s = &self.scores;
        let number = |x: Option<f64>| x.map_or("–".to_owned(), |x| format!("{x:.4}"));
        print(format_args!("{}", self.subject));
        let clip_score = s.clip_score.map(|x| ("CLIP score", number(Some(x))));
        let quality = [
            ("FID", number(s.fid)),
            ("precision", number(s.precision)),
            ("recall", number(s.recall)),
            ("class agreement", number(s.agreement)),
            ("diversity", number(s.diversity)),
        ];
        let others = [
            ("evaluations per image", s.evaluations_per_image.map_or("–".to_owned(), |x| x.to_string())),
            ("images/s", s.images_per_second.map_or("–".to_owned(), |x| format!("{x:.1}"))),
            ("samples", s.samples.to_string()),
        ];
        for (name, value) in quality.into_iter().chain(clip_score).chain(others) {
            print(format_args!("  {name:<22}{value:>10}"));
        }
    }
}

/// The model to evaluate, loaded.
struct Subject {
    network: Box<dyn Denoiser>,
    space: Space,
    /// Times of a student's steps; a teacher has none.
    times: Option<Vec<f64>>,
    name: String,
    /// SHA-256 that names it in --resume-dir; only where that is given.
    digest: Option<String>,
}

impl Subject {
    fn load(arguments: &Arguments, device: Device) -> anyhow::Result<Self> {
        let (model, times, name) = match (&arguments.student, &arguments.teacher) {
            (Some(source), None) => {
                let Student { model, times, origin, .. } = source.load(device)?;
                let name = format!("{origin}, {} step(s)", times.len());
                (model, Some(times), name)
            }
            (None, Some(path)) => {
                let model = match path.is_dir() {
                    true => Model::from_folder(path, None, false, device)?,
                    false => Model::plain(load_network(path, None, device)?),
                };
                (model, None, path.display().to_string())
            }
            _ => bail!("name a student with --checkpoint, or a network with --teacher"),
        };
        let prompts = arguments.prompts.as_ref().map(|file| PromptsSpec {
            data: Some(file.clone()),
            column: arguments.prompts_column.clone(),
            ..PromptsSpec::default()
        });
        ensure!(
            model.latent.is_some() == prompts.is_some(),
            "--prompts are for text-to-image models: {name} {}",
            if prompts.is_some() { "takes no prompts" } else { "needs prompts" }
        );
        let digest = match arguments.resume_dir.is_some() && arguments.join.is_none() {
            true => Some(digest(&model)?),
            false => None,
        };
        let (network, space) = model.into_space(prompts.as_ref().map(Wanted::File), vec![], None)?;
        Ok(Self { network, space, times, name, digest })
    }

    fn sampler(&self) -> Sampler<'_> {
        match &self.times {
            Some(times) => Sampler::Student { generator: self.network.as_ref(), times },
            None => Sampler::Teacher(self.network.as_ref()),
        }
    }
}

/// SHA-256 of a model: of a network its configuration, weights and buffers; with text encoders and autoencoder also
/// their files.
fn digest(model: &Model) -> anyhow::Result<String> {
    /// Elements that are copied to the host at a time.
    const PIECE: i64 = 1 << 24;
    let mut hasher = Sha256::new();
    match &model.latent {
        None => hasher.update(model.network.to_safetensors(&BTreeMap::new())?),
        Some(latent) => {
            let folder = latent.folder.path();
            let digest = sha256_of(folder).with_context(|| format!("cannot read {}", folder.display()))?;
            hasher.update(digest);
            hasher.update(model.network.config_json());
            // The folder's weights are not those of the checkpoint.
            for piece in model.parameters().flat().split(PIECE, 0) {
                let piece: Tensor = piece.to_device(Device::Cpu).contiguous();
                let mut bytes = vec![0; piece.numel() * piece.kind().elt_size_in_bytes()];
                piece.f_copy_data_u8(&mut bytes, piece.numel())?;
                hasher.update(&bytes);
            }
        }
    }
    Ok(hexadecimal(&hasher.finalize()))
}

pub fn main(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let threads = arguments.threads.unwrap_or((cores / arguments.workers).max(1));
    let rank = arguments.join.unwrap_or_default();
    if arguments.join.is_some() {
        lifeline::hold();
    }
    let device = arguments.device.device(rank as usize)?;
    tch::set_num_threads(threads as i32);

    let subject = Subject::load(&arguments, device)?;
    let spec = EvaluationSpec {
        samples: arguments.samples,
        seed: arguments.seed,
        features: Some(arguments.features.clone()),
        reference: Some(arguments.reference.clone()),
        clip: arguments.clip.clone(),
        teacher_steps: arguments.teacher_steps,
        teacher_guidance: arguments.teacher_guidance,
        neighbours: arguments.neighbours,
        samples_per_prompt: arguments.samples_per_prompt,
        images: arguments.images.into(),
        image_size: arguments.image_size,
        ..EvaluationSpec::default()
    };
    let protocol = spec.protocol().map_err(anyhow::Error::msg)?;
    ensure!(
        spec.samples > spec.neighbours,
        "--samples {} must exceed --neighbours {}",
        spec.samples,
        spec.neighbours
    );
    let mut evaluator = Evaluator::load(&spec, &subject.space, device)?
        .context("an evaluation needs --features and --reference")?;
    if let (0, Some(path)) = (rank, &arguments.save_statistics) {
        std::fs::write(path, evaluator.reference().to_safetensors()?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }

    let mut kept = arguments.kept.clone();
    if let (0, Some(folder), Some(network)) = (rank, &arguments.resume_dir, &subject.digest) {
        let (extractor, clip) = evaluator.digests();
        let identity = Identity {
            potstill: env!("CARGO_PKG_VERSION"),
            network: network.clone(),
            student_times: &subject.times,
            teacher_sampler: match subject.times {
                Some(_) => None,
                None => Some((spec.teacher_steps, spec.teacher_guidance)),
            },
            extractor,
            clip,
            prompts: subject.space.evaluation_prompts().map(Prompts::digest),
            samples: spec.samples,
            samples_per_prompt: spec.samples_per_prompt,
            seed: spec.seed,
            images: protocol.to_string(),
            device: if device.is_cuda() { "cuda" } else { "cpu" },
        };
        let opened =
            Kept::open(folder, &identity).with_context(|| format!("--resume-dir {}", folder.display()))?;
        kept = Some(opened.folder().to_owned());
        evaluator.keep(opened);
        let there = evaluator.kept_samples();
        if there > 0 {
            eprintln!("resuming: {there} of {} images are evaluated already", spec.samples);
        }
    } else if let Some(folder) = &kept {
        evaluator.keep(Kept::join(folder.clone()));
    }

    // Only now, when all arguments have been checked: the other processes load the same files.
    let meeting = tempfile::tempdir().context("cannot make a temporary folder")?;
    let file = arguments.store.clone().unwrap_or_else(|| meeting.path().join("store"));
    let store = Store::in_file(&file, MEETING)?;
    if arguments.join.is_none() {
        for rank in 1..arguments.workers {
            supervise(start(rank, &file, threads, kept.as_deref())?);
        }
    }
    let backend = match device {
        Device::Cuda(device) => Backend::Nccl { device },
        _ => Backend::Gloo { host: HOST.to_owned() },
    };
    let world = arguments.workers as usize;
    let group = ProcessGroup::new(&backend, &store, rank as usize, world, MEETING)?;
    // The slowest process may still be sampling; one that ends early is noticed.
    group.set_timeout(Duration::MAX)?;
    let bar = progress(&spec, evaluator.kept_samples(), rank)?;
    let tell = |what| match what {
        Scoring::Sampled(images) => bar.inc(images),
        Scoring::Gather => bar.set_message("waiting for the other processes"),
        Scoring::Compare => bar.set_message("comparing"),
    };
    let gathered = evaluator.gather(subject.sampler(), &group, false, tell)??;
    // One process computes the metrics: for many samples that takes a while on all cores.
    if rank != 0 {
        return Ok(ExitCode::SUCCESS);
    }
    let scores = evaluator.compare(&gathered, tell)?;
    bar.finish_and_clear();
    let record =
        Record { subject: subject.name.clone(), scores, seed: arguments.seed, workers: arguments.workers };
    if arguments.json {
        print(format_args!("{}", serde_json::to_string_pretty(&record)?));
    } else {
        record.print();
    }
    Ok(ExitCode::SUCCESS)
}

/// A progress bar over samples, on the first process's terminal, with the time for those that are still to be made.
fn progress(spec: &EvaluationSpec, there: u64, rank: u32) -> anyhow::Result<ProgressBar> {
    if rank != 0 {
        return Ok(ProgressBar::hidden());
    }
    let style = ProgressStyle::with_template("{bar:30} {human_pos}/{human_len} images, {eta} left {msg}")?;
    let bar = ProgressBar::new(spec.samples.into()).with_style(style);
    bar.set_position(there);
    bar.reset_eta();
    bar.enable_steady_tick(Duration::from_secs(1));
    Ok(bar)
}

/// Starts another process with the same arguments; it ends when this one does.
fn start(rank: u32, store: &Path, threads: u32, kept: Option<&Path>) -> anyhow::Result<Child> {
    let program = std::env::current_exe().context("cannot find this program")?;
    Command::new(program)
        .args(std::env::args_os().skip(1))
        .args(["--join", &rank.to_string()])
        .args([OsStr::new("--store"), store.as_os_str()])
        .args(kept.into_iter().flat_map(|folder| [OsStr::new("--kept"), folder.as_os_str()]))
        .env("OMP_NUM_THREADS", threads.to_string())
        .envs(environment::of_children())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .context("cannot start a process")
}

/// Ends this process when another one fails: otherwise the others would wait for it.
fn supervise(mut child: Child) {
    // Waiting for the child closes its stdin, which is its lifeline, unless that is held elsewhere.
    let held = child.stdin.take();
    std::thread::spawn(move || {
        let how = match child.wait() {
            Ok(status) if status.success() => return,
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        eprintln!("error: process {} of this evaluation ended early: {how}", child.id());
        drop(held);
        std::process::exit(1);
    });
}
