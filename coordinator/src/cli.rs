//! The command line.

use std::{
    convert::Infallible,
    ffi::OsString,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use chrono::{DateTime, Utc};
use clap::{Args, Parser, Subcommand};
use potstill_coordinator::{
    checkpoints,
    decision::{self, Price, Threshold},
    launch::{self, Exit, Job, agent::AgentPlan, worker},
    report::screen::LogFormat,
};
use potstill_proto::spec::RunSpec;
use potstill_storage::Root;

const AFTER_HELP: &str = "\
Exit codes:
  0    the run succeeded
  1    it failed, or was stopped before it had a checkpoint
  2    the command line or the configuration is not acceptable; nothing was started
  75   it was asked to stop and has saved a checkpoint: --resume goes on from there
  130  it was interrupted a second time, and ended at once

The first Ctrl-C or SIGTERM makes the workers save and the run stop; the second ends it at once.
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
    /// Keep the workers of one machine alive (potstill-worker)
    Agent(HandedOn),
    /// Run one worker (potstill-worker)
    Rank(HandedOn),
    /// Train a small teacher on an image file (potstill-worker)
    TrainTeacher(HandedOn),
    /// Score a student, or a teacher, beside real images (potstill-worker)
    Evaluate(HandedOn),
    /// Write the averaged generator of a checkpoint as one file (potstill-worker)
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
struct CheckpointsArguments {
    /// The run's name
    run: String,
    /// Where runs are kept
    #[arg(long, value_name = "URL", default_value = ".")]
    storage: String,
    /// Read every shard and compare its checksum
    #[arg(long)]
    verify: bool,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct ReportArguments {
    /// The run's name
    run: String,
    /// Where runs are kept
    #[arg(long, value_name = "URL", default_value = ".")]
    storage: String,
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
    /// Go on with the run of this name from its newest checkpoint
    #[arg(long, requires = "run_id")]
    resume: bool,
    /// How log lines look
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t)]
    log_format: LogFormat,
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
    let job = match cli.command {
        Command::Launch(a) => a.run.job(a.listen, &Workers::Local { threads: a.threads }),
        Command::Serve(a) => a.run.job(a.listen, &Workers::Elsewhere),
        Command::Report(arguments) => return ended(arguments.write()),
        Command::Checkpoints(arguments) => return ended(arguments.list()),
        Command::Agent(handed) => handed.on("agent"),
        Command::Rank(handed) => handed.on("rank"),
        Command::TrainTeacher(handed) => handed.on("train-teacher"),
        Command::Evaluate(handed) => handed.on("evaluate"),
        Command::Export(handed) => handed.on("export"),
        Command::Sample(handed) => handed.on("sample"),
    };
    let job = match job {
        Ok(job) => job,
        Err(error) => return complain(&error, Exit::Usage),
    };
    match run(job) {
        Ok(exit) => exit.into(),
        Err(error) => complain(&error, launch::exit_for(&error)),
    }
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
    Local { threads: Option<u32> },
    /// Agents that somebody else starts.
    Elsewhere,
}

impl RunArguments {
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
            Workers::Local { threads } => {
                Some(AgentPlan { program: worker::find()?, ranks: workers, threads: *threads })
            }
            Workers::Elsewhere => None,
        };
        Ok(Job {
            spec,
            run_id,
            // Last: it creates the folder.
            storage: Root::open(&self.storage).context("--storage")?,
            resume: self.resume,
            listen,
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

impl CheckpointsArguments {
    fn list(self) -> anyhow::Result<ExitCode> {
        let run = Root::open(&self.storage).context("--storage")?.run(&self.run.parse()?);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let entries = runtime.block_on(checkpoints::list(&run, self.verify))?;
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
        let run = self.run.parse()?;
        let currency = self.currency;
        let price = self.price_per_device_hour.map(|per_device_hour| Price { per_device_hour, currency });
        let storage = Root::open(&self.storage).context("--storage")?;
        let request = decision::Request { run, storage, out: self.out, price, thresholds: self.require };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let reported = runtime.block_on(decision::report(request))?;
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
    fn on<T>(self, subcommand: &str) -> anyhow::Result<T> {
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
