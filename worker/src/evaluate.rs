//! `evaluate`: scores a finished student, or a teacher, beside real images, with as many processes as wanted.
//!
//! The scores are those of a run's own evaluations: the same samples, the same code, spread over the processes in the same
//! way. The first process is rank 0; it starts the others and prints.

use std::{
    path::PathBuf,
    process::{Child, Command, ExitCode, Stdio},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use potstill_c10d::{Backend, ProcessGroup, TcpStore};
use potstill_models::Denoiser;
use potstill_proto::{
    spec::{EvaluationSpec, PromptsSpec},
    wire::Scores,
};
use serde::Serialize;
use tch::Device;

use crate::{
    device::Choice,
    evaluation::{Evaluator, Scoring},
    lifeline,
    model::{Model, Space, Wanted, load_network},
    samples::{CHUNK, Sampler},
    student::{Source, Student},
};

/// Everything happens on this machine.
const HOST: &str = "127.0.0.1";
/// For one collective: the slowest process may still be sampling.
const PATIENCE: Duration = Duration::from_secs(3600);

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    student: Option<Source>,
    /// Score this network (a .safetensors file, or a folder in the layout of diffusers) with its own sampler instead of a student
    #[arg(long, value_name = "PATH", conflicts_with = "Source")]
    teacher: Option<PathBuf>,
    /// TorchScript extractor: images in [−1, 1] → features [N, D], or (features, logits [N, classes])
    #[arg(long, value_name = "FILE")]
    features: PathBuf,
    /// Real images (see adversarial.data in a run file for the forms), or statistics of them that --save-statistics wrote
    #[arg(long, value_name = "FILE")]
    reference: PathBuf,
    /// TorchScript CLIP, for text-to-image models: images in [−1, 1], tokens int64 [N, tokens] → (image embeddings, text embeddings)
    #[arg(long, value_name = "FILE")]
    clip: Option<PathBuf>,
    /// Images to score
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(2..))]
    samples: u32,
    /// Decides the noise: a run scores with 1000000007
    #[arg(long, value_name = "N", default_value_t = EvaluationSpec::default().seed)]
    seed: u64,
    /// k of the k-nearest-neighbour manifolds behind precision and recall
    #[arg(long, value_name = "K", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    neighbours: u32,
    /// What a text-to-image model is asked for: .txt with a prompt a line, .jsonl or .parquet with a column "prompt", and with
    /// "label" for class agreement
    #[arg(long, value_name = "FILE")]
    prompts: Option<String>,
    /// Guidance scale of a text-to-image teacher
    #[arg(long, value_name = "SCALE", default_value_t = EvaluationSpec::default().teacher_guidance)]
    teacher_guidance: f64,
    /// Steps of the teacher's sampler
    #[arg(long, value_name = "N", default_value_t = 18, value_parser = clap::value_parser!(u32).range(2..))]
    teacher_steps: u32,
    /// Where to compute
    #[arg(long, value_enum, default_value_t)]
    device: Choice,
    /// Processes to spread the sampling over
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    workers: u32,
    /// Threads of each process [default: the machine's cores divided by the processes]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// Write the reference's features to this file, which can be given as --reference from then on
    #[arg(long, value_name = "FILE")]
    save_statistics: Option<PathBuf>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Set for the processes that the first one starts: rank, and port of its store
    #[arg(long, hide = true, num_args = 2, value_names = ["RANK", "PORT"])]
    join: Option<Vec<u16>>,
}

/// The scores as JSON. What was not measured is null.
#[derive(Serialize)]
struct Record {
    subject: String,
    fid: Option<f64>,
    precision: Option<f64>,
    recall: Option<f64>,
    agreement: Option<f64>,
    diversity: Option<f64>,
    clip_score: Option<f64>,
    evaluations_per_image: f64,
    images_per_second: f64,
    samples: u64,
    seed: u64,
    workers: u32,
}

impl Record {
    fn new(subject: String, scores: &Scores, arguments: &Arguments) -> Self {
        let measured = |x: f64| Some(x).filter(|x| x.is_finite());
        Self {
            subject,
            fid: measured(scores.fid),
            precision: measured(scores.precision),
            recall: measured(scores.recall),
            agreement: measured(scores.agreement),
            diversity: measured(scores.diversity),
            clip_score: scores.clip_score,
            evaluations_per_image: scores.evaluations_per_image,
            images_per_second: scores.images_per_second,
            samples: scores.samples,
            seed: arguments.seed,
            workers: arguments.workers,
        }
    }

    fn print(&self) {
        let number = |x: Option<f64>| x.map_or("–".to_owned(), |x| format!("{x:.4}"));
        println!("{}", self.subject);
        let clip_score = self.clip_score.map(|x| ("CLIP score", number(Some(x))));
        let quality = [
            ("FID", number(self.fid)),
            ("precision", number(self.precision)),
            ("recall", number(self.recall)),
            ("class agreement", number(self.agreement)),
            ("diversity", number(self.diversity)),
        ];
        let others = [
            ("evaluations per image", self.evaluations_per_image.to_string()),
            ("images/s", format!("{:.1}", self.images_per_second)),
            ("samples", self.samples.to_string()),
        ];
        for (name, value) in quality.into_iter().chain(clip_score).chain(others) {
            println!("  {name:<22}{value:>10}");
        }
    }
}

/// What is scored, loaded.
struct Subject {
    network: Box<dyn Denoiser>,
    space: Space,
    /// Times of a student's steps; a teacher has none.
    times: Option<Vec<f64>>,
    name: String,
}

impl Subject {
    fn load(arguments: &Arguments, device: Device) -> anyhow::Result<Self> {
        let (model, times, name) = match (&arguments.student, &arguments.teacher) {
            (Some(source), None) => {
                let Student { model, times, origin } = source.load(device)?;
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
        let prompts = arguments
            .prompts
            .as_ref()
            .map(|file| PromptsSpec { data: file.clone(), ..PromptsSpec::default() });
        ensure!(
            model.latent.is_some() == prompts.is_some(),
            "--prompts and text-to-image models go together: {name} {}",
            if prompts.is_some() { "knows no texts" } else { "needs some" }
        );
        let (network, space) = model.into_space(prompts.as_ref().map(Wanted::File), vec![])?;
        Ok(Self { network, space, times, name })
    }

    fn sampler(&self) -> Sampler<'_> {
        match &self.times {
            Some(times) => Sampler::Student { generator: self.network.as_ref(), times },
            None => Sampler::Teacher(self.network.as_ref()),
        }
    }
}

pub fn main(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let threads = arguments.threads.unwrap_or((cores / arguments.workers).max(1));
    let (rank, port) = match arguments.join.as_deref() {
        Some([rank, port]) => {
            lifeline::hold();
            (*rank, Some(*port))
        }
        _ => (0, None),
    };
    let device = arguments.device.device(rank.into())?;
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
        ..EvaluationSpec::default()
    };
    ensure!(
        spec.samples > spec.neighbours,
        "--samples {} must exceed --neighbours {}",
        spec.samples,
        spec.neighbours
    );
    let evaluator = Evaluator::load(&spec, &subject.space, device)?
        .context("an evaluation needs --features and --reference")?;
    if let (0, Some(path)) = (rank, &arguments.save_statistics) {
        std::fs::write(path, evaluator.reference().to_safetensors()?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }

    // Only now, when everything has been found good: the others load the same.
    let store = match port {
        Some(port) => TcpStore::connect(HOST, port, PATIENCE)?,
        None => TcpStore::serve(HOST, 0, PATIENCE)?,
    };
    if port.is_none() {
        for rank in 1..arguments.workers {
            supervise(start(rank, store.port(), threads)?);
        }
    }
    let backend = match device {
        Device::Cuda(device) => Backend::Nccl { device },
        _ => Backend::Gloo { host: HOST.to_owned() },
    };
    let world = arguments.workers as usize;
    let group = ProcessGroup::new(&backend, &store.prefix("evaluate")?, rank.into(), world, PATIENCE)?;
    let bar = progress(&spec, rank);
    let scores = evaluator.score(subject.sampler(), &group, |what| {
        if what == Scoring::Sample {
            bar.inc(u64::from(arguments.workers));
        }
    })??;
    bar.finish_and_clear();
    if rank == 0 {
        let record = Record::new(subject.name.clone(), &scores, &arguments);
        if arguments.json {
            println!("{}", serde_json::to_string_pretty(&record)?);
        } else {
            record.print();
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A bar over chunks of samples, on the screen of the first process.
fn progress(spec: &EvaluationSpec, rank: u16) -> ProgressBar {
    if rank != 0 {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} chunks, {eta} left")
        .expect("the template is valid");
    ProgressBar::new(u64::from(spec.samples).div_ceil(CHUNK as u64)).with_style(style)
}

/// Starts another process like this one; it ends when this one does.
fn start(rank: u32, port: u16, threads: u32) -> anyhow::Result<Child> {
    let program = std::env::current_exe().context("cannot find this program")?;
    Command::new(program)
        .args(std::env::args_os().skip(1))
        .args(["--join", &rank.to_string(), &port.to_string()])
        .env("OMP_NUM_THREADS", threads.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .context("cannot start a process")
}

/// Ends this process when another one fails: a collective would wait for it for long.
fn supervise(mut child: Child) {
    // Waiting closes the child's stdin, its lifeline, unless somebody else holds it.
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
