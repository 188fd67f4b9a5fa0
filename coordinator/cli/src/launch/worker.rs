//! Finds and runs `potstill-worker`. It links libtorch, so it is a program of its own.

use std::{
    convert::Infallible,
    ffi::OsString,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use tokio::io::AsyncWriteExt;

/// The program's file name.
pub const PROGRAM: &str = "potstill-worker";
/// Environment variable that names the program's file, before any search.
pub const OVERRIDE: &str = "POTSTILL_WORKER";

/// OpenMP's threads give up the processor soon where they wait for each other: it reads this when the program is loaded.
const SPINNING: (&str, &str) = ("GOMP_SPINCOUNT", "1000");

/// The worker program cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// A file that the run reads is rejected; the worker program's message.
    #[error("{0}")]
    Unfit(String),
    /// It was not found.
    #[error(
        "{PROGRAM} was not found beside this program or on PATH; build it with `cargo build -p potstill-worker`, or \
         name its file in {OVERRIDE}"
    )]
    NotFound,
    /// [`OVERRIDE`] names a file that is not a program.
    #[error("{OVERRIDE} names {0}, which is not a program")]
    NotAProgram(PathBuf),
    /// The system cannot start it.
    #[error("cannot run {program}: {source}")]
    Refused {
        /// Its file.
        program: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
}

/// Finds the worker program: named by [`OVERRIDE`], beside this program, or on `PATH`.
///
/// # Errors
/// It was not found.
pub fn find() -> Result<PathBuf, WorkerError> {
    if let Some(named) = std::env::var_os(OVERRIDE).filter(|name| !name.is_empty()) {
        let named = PathBuf::from(named);
        return if is_program(&named) { Ok(named) } else { Err(WorkerError::NotAProgram(named)) };
    }
    let beside = std::env::current_exe().ok().and_then(|own| own.parent().map(Path::to_owned));
    let path = std::env::var_os("PATH").unwrap_or_default();
    beside
        .into_iter()
        .chain(std::env::split_paths(&path))
        .map(|folder| folder.join(PROGRAM))
        .find(|file| is_program(file))
        .ok_or(WorkerError::NotFound)
}

/// Runs the worker program to load the files that a run reads, so that invalid ones are found before anything is
/// written.
///
/// # Errors
/// The worker program's message about an invalid file.
pub async fn check(program: &Path, specification: String) -> Result<(), WorkerError> {
    let refused = |source| WorkerError::Refused { program: program.to_owned(), source };
    let mut child = tokio::process::Command::from(command(program, "check"))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(refused)?;
    if let Some(mut input) = child.stdin.take() {
        // A program that does not read its input has exited, and its exit is reported.
        let _ = input.write_all(specification.as_bytes()).await;
    }
    let output = child.wait_with_output().await.map_err(refused)?;
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim();
    match output.status.success() {
        true => Ok(()),
        false => Err(WorkerError::Unfit(said.strip_prefix("error: ").unwrap_or(said).to_owned())),
    }
}

/// What the worker program says of its version, if it can be run.
pub fn version() -> Option<String> {
    let output = command(&find().ok()?, "--version").stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// Replaces this process by the worker program, with these arguments. Returns only if that fails.
///
/// # Errors
/// See [`WorkerError`].
pub fn become_worker(subcommand: &str, arguments: &[OsString]) -> Result<Infallible, WorkerError> {
    let program = find()?;
    let source = command(&program, subcommand).args(arguments).exec();
    Err(WorkerError::Refused { program, source })
}

fn command(program: &Path, subcommand: &str) -> Command {
    let mut command = Command::new(program);
    command.arg(subcommand);
    if std::env::var_os(SPINNING.0).is_none() {
        command.env(SPINNING.0, SPINNING.1);
    }
    command
}

fn is_program(file: &Path) -> bool {
    file.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}
