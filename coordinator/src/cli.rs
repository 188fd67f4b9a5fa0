//! The command line.

use std::{
    convert::Infallible,
    ffi::OsString,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use chrono::{DateTime, Utc};
use clap::{Args, Parser, Subcommand, ValueEnum};
use potstill_coordinator::{
    checkpoints,
    client::Client,
    decision::{self, Price, Threshold},
    launch::{self, Exit, Job, agent::AgentPlan, worker},
    report::screen::{LogFormat, Screen},
    server::Resume,
    status,
};
use potstill_spec::RunSpec;
use potstill_storage::{Root, Run, layout};

const AFTER_HELP: &str = "\
Exit codes:
  0    the run succeeded
  1    it failed, or was stopped before it had a checkpoint
  2    the command line or the configuration is not acceptable; nothing was started
  75   it was asked to stop and there is a checkpoint: --resume goes on from there
  130  it was interrupted a second time, and ended at once

The first Ctrl-C, SIGTERM or SIGUSR1 makes the workers save and the run stop; the second, or the end of the grace period,
ends it at once: what was not saved is said, and the exit code is 75 if there is a checkpoint to go on from.
RUST_LOG chooses what is logged, as in RUST_LOG=debug.";

const AFTER_REPORT_HELP: &str = "\
Thresholds compare a number of summary.json with a number or with a multiple of another:
  --require 'student.fid<=0.3' --require 'student.recall>=0.9*teacher.recall'

Exit codes:
  0  the page is written, and every threshold is met
  1  the run cannot be read, or the page cannot be written
  2  the command line is not acceptable
  3  the page is written, and a threshold is not met or was not measured";

const AFTER_CHECKPOINTS_HELP: &str = "\
Exit codes:
  0  every checkpoint is whole, as far as was looked
  1  the run cannot be read
  2  the command line is not acceptable
  3  a checkpoint is damaged";

/// Distills a diffusion model into a one-step generator, on one machine or on a cluster.
#[derive(Debug, Parser)]
#[command(name = "potstill", version, after_help = AFTER_HELP)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run on this machine: the coordinator and its workers, with one command
    #[command(after_help = AFTER_HELP)]
    Launch(Launch),
    /// Run the coordinator alone; workers attach from other machines
    #[command(after_help = AFTER_HELP)]
    Serve(Serve),
    /// Write a page that sets teacher and student side by side, and judge the student by thresholds
    #[command(after_help = AFTER_REPORT_HELP)]
    Report(ReportArguments),
    /// List a run's checkpoints, and look whether they are whole
    #[command(after_help = AFTER_CHECKPOINTS_HELP)]
    Checkpoints(CheckpointsArguments),
    /// Say what a run is doing: its workers, its progress, what it waits for
    Status(StatusArguments),
    /// Have a run save a checkpoint now, and wait until it exists
    Checkpoint(RunName),
    /// Make a new run that goes on from a checkpoint of another, verified and copied
    Restore(RestoreArguments),
    /// Have a run save a checkpoint and stop; --resume goes on from there
    Cancel(RunName),
    /// Keep the workers of one machine alive (potstill-worker)
    Agent(HandedOn),
    /// Run one worker (potstill-worker)
    Rank(HandedOn),
    /// Train a small teacher on an image file (potstill-worker)
    TrainTeacher(HandedOn),
    /// Score a student, or a teacher, beside real images (potstill-worker)
    Evaluate(HandedOn),
    /// Say whether a text-to-image run fits its devices, before anything is loaded (potstill-worker)
    Plan(HandedOn),
    /// Write the averaged generator of a checkpoint: a file, or a folder in diffusers' layout (potstill-worker)
    Export(HandedOn),
    /// Make images with a student (potstill-worker)
    Sample(HandedOn),
}

#[derive(Debug, Args)]
struct Launch {
    #[command(flatten)]
    run: RunArguments,
    /// Threads of each worker [default: the machine's cores divided by the workers]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// Workers beyond these that stand by with everything loaded, to take the place of one that dies
    #[arg(long, value_name = "N", default_value_t = 0)]
    spares: u32,
    /// Where the workers compute: auto takes a GPU of its own for each where there are some
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = ["auto", "cpu", "cuda"])]
    device: String,
    /// Address of the coordinator; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
}

#[derive(Debug, Args)]
struct Serve {
    #[command(flatten)]
    run: RunArguments,
    /// Address at which workers attach
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:7070")]
    listen: SocketAddr,
}

#[derive(Debug, Args)]
struct RunName {
    /// The run's name
    run: String,
    /// Where runs are kept
    #[arg(long, value_name = "URL", default_value = ".")]
    storage: String,
}

#[derive(Debug, Args)]
struct StatusArguments {
    #[command(flatten)]
    run: RunName,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct RestoreArguments {
    #[command(flatten)]
    run: RunName,
    /// Name of the new run
    #[arg(long, value_name = "NAME")]
    to: String,
    /// The checkpoint's iteration [default: the newest that is whole]
    #[arg(long, value_name = "N")]
    iteration: Option<u64>,
}

#[derive(Debug, Args)]
struct CheckpointsArguments {
    #[command(flatten)]
    run: RunName,
    /// Read every shard and compare its checksum
    #[arg(long)]
    verify: bool,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct ReportArguments {
    #[command(flatten)]
    run: RunName,
    /// Folder for report.html and report.md [default: the run's own]
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// What an hour of one device costs
    #[arg(long, value_name = "PRICE", value_parser = price)]
    price_per_device_hour: Option<f64>,
    /// Its currency
    #[arg(long, value_name = "NAME", default_value = "EUR")]
    currency: String,
    /// What the student must fulfil; can be repeated
    #[arg(long, value_name = "THRESHOLD")]
    require: Vec<Threshold>,
}

fn price(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(price) if price.is_finite() && price >= 0.0 => Ok(price),
        _ => Err("expected a number that is not negative".to_owned()),
    }
}

#[derive(Debug, Args)]
struct RunArguments {
    /// The run file (TOML); see configs/
    config: PathBuf,
    /// Workers to train with: sets cluster.min_workers and cluster.max_workers, unless --set says otherwise
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    workers: u32,
    /// Where runs are kept: a folder, or file://, s3://, gs://, az://. The run lies in `runs/<run id>/` below it
    #[arg(long, value_name = "URL", default_value = ".")]
    storage: String,
    /// Name of the run [default: the run file's name and the time, as in digits-20260131-120000]
    #[arg(long, value_name = "NAME")]
    run_id: Option<String>,
    /// Change a value of the run file, as in --set distillation.iterations=200
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Go on with the run of this name, from its newest checkpoint or with the workers that still hold its state; auto:
    /// if it exists, and start it otherwise
    #[arg(long, requires = "run_id", value_enum, value_name = "WHEN", num_args = 0..=1, require_equals = true,
        default_missing_value = "always", hide_possible_values = true)]
    resume: Option<ResumeWhen>,
    /// Seconds that the workers have to save after the first Ctrl-C, SIGTERM or SIGUSR1
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    grace: u64,
    /// How log lines look
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t)]
    log_format: LogFormat,
}

/// See [`RunArguments::resume`].
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ResumeWhen {
    Always,
    Auto,
}

/// A subcommand that needs libtorch: `potstill-worker` reads its arguments, `--help` among them.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
struct HandedOn {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    arguments: Vec<OsString>,
}

/// Does what the command line asks for.
pub fn main(cli: Cli) -> ExitCode {
    let handed_on = match cli.command {
        Command::Launch(a) => {
            let (threads, spares, device) = (a.threads, a.spares, a.device);
            return a.run.run(a.listen, &Workers::Local { threads, spares, device });
        }
        Command::Serve(a) => return a.run.run(a.listen, &Workers::Elsewhere),
        Command::Report(arguments) => return ended(arguments.write()),
        Command::Checkpoints(arguments) => return ended(arguments.list()),
        Command::Status(arguments) => return ended(arguments.show()),
        Command::Checkpoint(run) => return ended(run.checkpoint()),
        Command::Restore(arguments) => return ended(arguments.restore()),
        Command::Cancel(run) => return ended(run.cancel()),
        Command::Agent(handed) => handed.on("agent"),
        Command::Rank(handed) => handed.on("rank"),
        Command::TrainTeacher(handed) => handed.on("train-teacher"),
        Command::Evaluate(handed) => handed.on("evaluate"),
        Command::Plan(handed) => handed.on("plan"),
        Command::Export(handed) => handed.on("export"),
        Command::Sample(handed) => handed.on("sample"),
    };
    handed_on.unwrap_or_else(|error| complain(&error, Exit::Usage))
}

fn complain(error: &anyhow::Error, exit: Exit) -> ExitCode {
    eprintln!("error: {}", explain(error));
    exit.into()
}

/// The error and its causes, without those that the one before already tells.
fn explain(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text += ": ";
            text += &cause;
        }
    }
    text
}

fn run(job: Job) -> anyhow::Result<Exit> {
    let runtime = tokio::runtime::Runtime::new().context("cannot start threads")?;
    let exit = runtime.block_on(launch::run(job));
    // What is still under way, such as an upload after a second Ctrl-C, is not waited for.
    runtime.shutdown_background();
    exit
}

/// Where a run's workers come from.
enum Workers {
    /// An agent on this machine.
    Local { threads: Option<u32>, spares: u32, device: String },
    /// Agents that somebody else starts.
    Elsewhere,
}

impl RunArguments {
    /// Coordinates the run until it has ended.
    fn run(self, listen: SocketAddr, from: &Workers) -> ExitCode {
        let format = self.log_format;
        let ended = match self.job(listen, from) {
            Ok(job) => run(job).map_err(|error| (launch::exit_for(&error), error)),
            Err(error) => Err((Exit::Usage, error)),
        };
        match (ended, format) {
            (Ok(exit), _) => exit.into(),
            (Err((exit, error)), LogFormat::Human) => complain(&error, exit),
            (Err((exit, error)), LogFormat::Json) => {
                // Where the log has started already it stays.
                let _screen = Screen::new(format);
                tracing::error!("{}", explain(&error));
                exit.into()
            }
        }
    }

    /// Checks everything that can be checked before anything is written.
    fn job(self, listen: SocketAddr, from: &Workers) -> anyhow::Result<Job> {
        let workers = self.workers;
        let mut sets =
            vec![format!("cluster.min_workers={workers}"), format!("cluster.max_workers={workers}")];
        sets.extend(self.set);
        let spec = RunSpec::load(&self.config, &sets)?;
        let run_id = self.run_id.unwrap_or_else(|| default_run_id(&self.config, Utc::now()));
        let run_id = run_id.parse().context("--run-id")?;
        let agent = match from {
            Workers::Local { threads, spares, device } => Some(AgentPlan {
                program: worker::find()?,
                ranks: workers,
                spares: *spares,
                device: device.clone(),
                threads: *threads,
            }),
            Workers::Elsewhere => None,
        };
        Ok(Job {
            spec,
            run_id,
            // Last: it creates the folder.
            storage: Root::open(&self.storage).context("--storage")?,
            resume: match self.resume {
                None => Resume::Never,
                Some(ResumeWhen::Always) => Resume::Always,
                Some(ResumeWhen::Auto) => Resume::Auto,
            },
            listen,
            grace: Duration::from_secs(self.grace),
            log_format: self.log_format,
            agent,
        })
    }
}

/// What was looked at is not good enough: a threshold is not met, a checkpoint is damaged.
const NOT_GOOD: u8 = 3;

/// The exit code of a command that does not run anything.
fn ended(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| complain(&error, Exit::Failed))
}

impl RunName {
    fn open(&self) -> anyhow::Result<Run> {
        Ok(Root::open(&self.storage).context("--storage")?.run(&self.run.parse()?))
    }

    fn checkpoint(self) -> anyhow::Result<ExitCode> {
        let run = self.open()?;
        let iteration = runtime()?.block_on(async { Client::of(&run).await?.checkpoint().await })?;
        println!("{}", run.describe(&layout::manifest_key(iteration)));
        Ok(ExitCode::SUCCESS)
    }

    fn cancel(self) -> anyhow::Result<ExitCode> {
        let run = self.open()?;
        let reason = "potstill cancel".to_owned();
        runtime()?.block_on(async { Client::of(&run).await?.cancel(reason).await })?;
        println!("run {} saves and stops; to go on, start it with --run-id {} --resume", run.id(), run.id());
        Ok(ExitCode::SUCCESS)
    }
}

/// For commands that only ask and read.
fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

impl StatusArguments {
    fn show(self) -> anyhow::Result<ExitCode> {
        let run = self.run.open()?;
        let status = runtime()?.block_on(status::of(&run))?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&status)?);
        } else {
            println!("{}", status.text());
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl RestoreArguments {
    fn restore(self) -> anyhow::Result<ExitCode> {
        let storage = Root::open(&self.run.storage).context("--storage")?;
        let (from, to) =
            (storage.run(&self.run.run.parse()?), storage.run(&self.to.parse().context("--to")?));
        let restored = runtime()?.block_on(checkpoints::restore(&from, &to, self.iteration))?;
        println!("{}", to.describe(&layout::manifest_key(restored)));
        println!(
            "To go on, repeat the command that started {} with --run-id {} --resume",
            from.id(),
            to.id()
        );
        Ok(ExitCode::SUCCESS)
    }
}

impl CheckpointsArguments {
    fn list(self) -> anyhow::Result<ExitCode> {
        let run = self.run.open()?;
        let entries = runtime()?.block_on(checkpoints::list(&run, self.verify))?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&entries)?);
        } else {
            println!("{}", checkpoints::table(&entries));
        }
        let damaged = entries.iter().any(|entry| entry.problem.is_some());
        Ok(if damaged { ExitCode::from(NOT_GOOD) } else { ExitCode::SUCCESS })
    }
}

impl ReportArguments {
    fn write(self) -> anyhow::Result<ExitCode> {
        let RunName { run, storage } = self.run;
        let run = run.parse()?;
        let currency = self.currency;
        let price = self.price_per_device_hour.map(|per_device_hour| Price { per_device_hour, currency });
        let storage = Root::open(&storage).context("--storage")?;
        let request = decision::Request { run, storage, out: self.out, price, thresholds: self.require };
        let reported = runtime()?.block_on(decision::report(request))?;
        for place in reported.places {
            println!("{place}");
        }
        let missed: Vec<_> = reported.judged.iter().filter(|judged| !judged.holds).collect();
        for judged in &missed {
            eprintln!("not met: {}: {}", judged.text, judged.explanation);
        }
        Ok(if missed.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(NOT_GOOD) })
    }
}

impl HandedOn {
    fn on(self, subcommand: &str) -> anyhow::Result<ExitCode> {
        let never: Infallible = worker::become_worker(subcommand, &self.arguments)?;
        match never {}
    }
}

/// The run file's name, in the characters that a run id may have, and the time.
fn default_run_id(config: &Path, now: DateTime<Utc>) -> String {
    let stem = config.file_stem().unwrap_or_default().to_string_lossy().to_lowercase();
    let stem = stem.replace(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '_', "-");
    let stem: String = stem.trim_start_matches(['-', '_']).chars().take(48).collect();
    let stem = if stem.is_empty() { "run" } else { &stem };
    format!("{stem}-{}", now.format("%Y%m%d-%H%M%S"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn causes_are_told_once() {
        let cause = std::io::Error::other("disk on fire");
        let error = anyhow::Error::new(cause).context("cannot read x: disk on fire").context("--storage");
        assert_eq!(explain(&error), "--storage: cannot read x: disk on fire");
    }

    #[test]
    fn runs_are_named_after_their_file_and_the_time() {
        let now = DateTime::from_timestamp(1_767_268_800, 0).unwrap();
        assert_eq!(default_run_id(Path::new("configs/digits.toml"), now), "digits-20260101-120000");
        assert_eq!(default_run_id(Path::new("_A b.c.toml"), now), "a-b-c-20260101-120000");
        assert_eq!(default_run_id(Path::new("ä.toml"), now), "run-20260101-120000");
        let long = default_run_id(Path::new(&"x".repeat(99)), now);
        assert!(long.parse::<potstill_storage::RunId>().is_ok(), "{long}");
    }
}
