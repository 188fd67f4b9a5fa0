//! `potstill launch` and `potstill serve`: a run on this machine, or its coordinator alone.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use chrono::{DateTime, Utc};
use clap::{Args, ValueEnum};
use potstill_access::address::listening;
use potstill_logging::{LogFormat, chain};
use potstill_server::{Resume, Security};
use potstill_spec::RunSpec;
use potstill_storage::Root;

use super::exit::complain;
use crate::{
    launch::{self, Exit, Job, LaunchError, agent::AgentPlan, worker},
    monitor::screen::Screen,
};

/// Text below the options in `--help` of both commands.
pub const AFTER_HELP: &str = "\
Exit codes:
  0    the run succeeded
  1    it failed, or was stopped before it had a checkpoint
  2    the command line or the configuration is not acceptable; nothing was started
  75   it was asked to stop and there is a checkpoint: --resume continues from there
  130  it was interrupted a second time, or while it started, and ended at once

The first Ctrl-C, SIGTERM or SIGUSR1 makes the workers save and the run stop; the second ends it at once. At the end of
the grace period the log says what was not saved, and the exit code is 75 if there is a checkpoint to resume from, else 1.
RUST_LOG sets the log level, as in RUST_LOG=debug.";

#[derive(Debug, Args)]
pub struct Launch {
    #[command(flatten)]
    run: RunArguments,
    /// Threads of each worker [default: the machine's cores divided by the workers]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// Spare workers beyond these, with everything loaded, each of which takes the place of a worker that dies. On GPUs each spare
    /// holds a device of its own
    #[arg(long, value_name = "N", default_value_t = 0)]
    spares: u32,
    /// Device of the workers: auto gives each worker a GPU of its own if there is one, otherwise the CPU
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = ["auto", "cpu", "cuda"])]
    device: String,
    /// Address on which the coordinator listens; port 0 takes a free port
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0", value_parser = listening)]
    listen: SocketAddr,
    /// Folder for a state that cannot be saved otherwise: when the run fails while a worker holds a state that is newer than the
    /// newest checkpoint, the worker writes it there, as a run that --resume continues
    #[arg(long, value_name = "FOLDER")]
    rescue_dir: Option<PathBuf>,
}

impl Launch {
    /// Runs it until it has ended.
    pub fn main(self) -> ExitCode {
        let Self { run, threads, spares, device, listen, rescue_dir } = self;
        run.run(listen, Security::Own, &Workers::Local { threads, spares, device, rescue_dir })
    }
}

#[derive(Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    run: RunArguments,
    /// Address on which the coordinator listens for workers
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:7070", value_parser = listening)]
    listen: SocketAddr,
    /// The site's certificate for the coordinator, with those that follow it, PEM [default: one that is made at the start]
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_certificate: Option<PathBuf>,
    /// The private key of --tls-certificate, PEM
    #[arg(long, value_name = "FILE", requires = "tls_certificate")]
    tls_key: Option<PathBuf>,
    /// Serve without TLS and without a key: whoever reaches the port can read, cancel and falsify the run
    #[arg(long, conflicts_with = "tls_certificate")]
    insecure: bool,
}

impl Serve {
    /// Serves until the run has ended.
    pub fn main(self) -> ExitCode {
        let security = match (self.tls_certificate, self.tls_key) {
            (Some(certificate), Some(key)) => Security::Site { certificate, key },
            _ if self.insecure => Security::Insecure,
            _ => Security::Own,
        };
        self.run.run(self.listen, security, &Workers::Elsewhere)
    }
}

#[derive(Debug, Args)]
struct RunArguments {
    /// The run file (TOML); see configs/
    config: PathBuf,
    /// Number of workers: sets cluster.min_workers and cluster.max_workers, unless --set sets them
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    workers: u32,
    /// Storage of runs: a folder, or file://, s3://, gs://, az://. The run is in `runs/<run id>/` below it. By default launch
    /// uses the current folder; serve has no default, since every worker's machine must see the same storage
    #[arg(long, value_name = "URL")]
    storage: Option<String>,
    /// Name of the run [default: the run file's name and the time, as in digits-20260131-120000]
    #[arg(long, value_name = "NAME")]
    run_id: Option<String>,
    /// Change a value of the run file, as in --set distillation.iterations=200
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Continue the run of this name, from its newest checkpoint or with the workers that still hold its state; auto:
    /// if it exists, and start it otherwise
    #[arg(long, requires = "run_id", value_enum, value_name = "WHEN", num_args = 0..=1, require_equals = true,
        default_missing_value = "always", hide_possible_values = true)]
    resume: Option<ResumeWhen>,
    /// With --resume: begin again from the teacher if none of the checkpoints that the run had can be read
    #[arg(long, requires = "resume")]
    from_teacher: bool,
    /// Seconds in which the workers must save after the first Ctrl-C, SIGTERM or SIGUSR1
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    grace: u64,
    /// Address of the run's live page and of /metrics for Prometheus; port 0 takes a free port. On an address that is not this
    /// machine's loopback it is served with the coordinator's certificate. `potstill page` prints the address that opens it
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0", value_parser = listening)]
    page: SocketAddr,
    /// Format of log lines
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t)]
    log_format: LogFormat,
}

/// See [`RunArguments::resume`].
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ResumeWhen {
    Always,
    Auto,
}

fn run(job: Job) -> Result<Exit, LaunchError> {
    let runtime = tokio::runtime::Runtime::new().context("cannot start threads")?;
    let exit = runtime.block_on(launch::run(job));
    // Work that is still under way, such as an upload after a second Ctrl-C, is not waited for.
    runtime.shutdown_background();
    exit
}

/// The source of a run's workers.
enum Workers {
    /// An agent on this machine.
    Local { threads: Option<u32>, spares: u32, device: String, rescue_dir: Option<PathBuf> },
    /// Agents on other machines.
    Elsewhere,
}

impl RunArguments {
    /// Coordinates the run until it has ended.
    fn run(self, listen: SocketAddr, security: Security, from: &Workers) -> ExitCode {
        let format = self.log_format;
        let ended = match self.job(listen, security, from) {
            Ok(job) => run(job).map_err(|error| (error.exit(), error.into())),
            Err(error) => Err((Exit::Usage, error)),
        };
        match (ended, format) {
            (Ok(exit), _) => exit.into(),
            (Err((exit, error)), LogFormat::Human) => complain(&error, exit),
            (Err((exit, error)), LogFormat::Json) => {
                // A log that has been started already stays.
                let _screen = Screen::new(format);
                tracing::error!("{}", chain(&error));
                exit.into()
            }
        }
    }

    /// Checks everything that can be checked before anything is written.
    fn job(self, listen: SocketAddr, security: Security, from: &Workers) -> anyhow::Result<Job> {
        let workers = self.workers;
        let mut sets =
            vec![format!("cluster.min_workers={workers}"), format!("cluster.max_workers={workers}")];
        sets.extend(self.set);
        let spec = RunSpec::load(&self.config, &sets)?;
        let run_id = self.run_id.unwrap_or_else(|| default_run_id(&self.config, Utc::now()));
        let run_id = run_id.parse().context("--run-id")?;
        let storage = match (self.storage, from) {
            (Some(storage), _) => storage,
            (None, Workers::Local { .. }) => ".".to_owned(),
            (None, Workers::Elsewhere) => {
                anyhow::bail!("--storage is missing: name a storage that the machines of all workers see")
            }
        };
        let agent = match from {
            Workers::Local { threads, spares, device, rescue_dir } => Some(AgentPlan {
                program: worker::find()?,
                ranks: workers,
                spares: *spares,
                device: device.clone(),
                threads: *threads,
                rescue_dir: rescue_dir
                    .as_ref()
                    .map(std::path::absolute)
                    .transpose()
                    .context("--rescue-dir")?,
            }),
            Workers::Elsewhere => None,
        };
        Ok(Job {
            spec,
            run_id,
            // Last: it creates the folder.
            storage: Root::open(&storage).context("--storage")?,
            resume: match self.resume {
                None => Resume::Never,
                Some(ResumeWhen::Always) => Resume::Always,
                Some(ResumeWhen::Auto) => Resume::Auto,
            },
            from_teacher: self.from_teacher,
            listen,
            page: self.page,
            security,
            grace: Duration::from_secs(self.grace),
            log_format: self.log_format,
            agent,
        })
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
    use super::*;

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
