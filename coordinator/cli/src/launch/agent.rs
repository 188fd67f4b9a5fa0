//! The worker agent as a child of the launcher.
//!
//! However the launcher ends, the agent does not outlive it. Its stdin is a pipe whose other end only the launcher
//! holds, through which it gets the invitation: when that closes, the agent ends itself. On Linux it also asks the kernel for a signal on its parent's death;
//! the kernel takes the *thread* that spawned it for its parent, so that thread runs until the agent has ended.
//!
//! It has a process group of its own, so the terminal's Ctrl-C reaches only the launcher, which asks the run to stop.

use std::{
    io::{self, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    path::PathBuf,
    process::{ChildStdin, Command, ExitStatus, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::unix::pipe,
    sync::oneshot,
    task::JoinHandle,
    time::timeout,
};

use potstill_access::Invitation;
use potstill_logging::LogFormat;

use crate::monitor::screen::Screen;

/// The arguments of an agent.
#[derive(Clone, Debug)]
pub struct AgentPlan {
    /// The worker program.
    pub program: PathBuf,
    /// Ranks on this machine.
    pub ranks: u32,
    /// Spare processes beyond these.
    pub spares: u32,
    /// Their device: `auto`, `cpu` or `cuda`.
    pub device: String,
    /// Threads of each rank; if none, the agent chooses.
    pub threads: Option<u32>,
    /// Folder for a state that cannot be saved otherwise.
    pub rescue_dir: Option<PathBuf>,
}

impl AgentPlan {
    fn command(&self, run_id: &str, format: LogFormat) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("agent")
            .args(["--join", "-", "--run-id", run_id])
            .args(["--ranks", &self.ranks.to_string(), "--spares", &self.spares.to_string()])
            .args(["--device", &self.device, "--log-format", format.name()])
            .arg("--lifeline");
        if let Some(folder) = &self.rescue_dir {
            command.arg("--rescue-dir").arg(folder);
        }
        if let Some(threads) = self.threads {
            command.args(["--threads", &threads.to_string()]);
        }
        command
    }
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    group: Pid,
    /// Held after the invitation was written to it: the agent ends when this closes.
    _lifeline: Option<ChildStdin>,
    exit: oneshot::Receiver<io::Result<ExitStatus>>,
    exited: Option<String>,
    output: Option<JoinHandle<()>>,
}

impl Agent {
    /// Starts an agent. Its messages go to standard error; where `screen` shows a bar, above the bar.
    ///
    /// # Errors
    /// When the system refuses to start it.
    pub async fn start(
        plan: &AgentPlan,
        invitation: &Invitation,
        format: LogFormat,
        screen: &Screen,
    ) -> io::Result<Self> {
        let mut command = plan.command(&invitation.run_id, format);
        command.stdin(Stdio::piped()).process_group(0);
        let output = if screen.has_bar() {
            let (reader, writer) = io::pipe()?;
            command.stdout(writer.try_clone()?).stderr(writer);
            let reader = pipe::Receiver::from_owned_fd(reader.into())?;
            Some(tokio::spawn(copy_lines(reader, screen.clone())))
        } else {
            // Standard output is reserved for the run's results.
            command.stdout(Stdio::from(io::stderr().as_fd().try_clone_to_owned()?));
            None
        };

        let (started, start) = oneshot::channel();
        let (ended, exit) = oneshot::channel();
        std::thread::Builder::new().name("agent".into()).spawn(move || {
            let child = command.spawn();
            // It holds the write end of the output pipe.
            drop(command);
            match child {
                Ok(mut child) => {
                    // Taken, because waiting would close it.
                    let lifeline = child.stdin.take();
                    // The receiver is dropped only when the launcher itself is ending.
                    let _ = started.send(Ok((child.id(), lifeline)));
                    let _ = ended.send(child.wait());
                }
                Err(error) => {
                    let _ = started.send(Err(error));
                }
            }
        })?;
        let (pid, mut lifeline) = start.await.map_err(io::Error::other)??;
        if let Some(lifeline) = &mut lifeline {
            // Where the agent has ended already, its exit is what is reported.
            let _ = writeln!(lifeline, "{}", invitation.to_text());
        }
        let group = Pid::from_raw(i32::try_from(pid).map_err(io::Error::other)?);
        Ok(Self { group, _lifeline: lifeline, exit, exited: None, output })
    }

    /// Whether [`Agent::exited`] has returned.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.exited.is_some()
    }

    /// Waits until the agent has exited, and returns how, as text. May be cancelled and called again.
    pub async fn exited(&mut self) -> &str {
        if self.exited.is_none() {
            self.exited = Some(match (&mut self.exit).await {
                Ok(Ok(status)) => status.to_string(),
                Ok(Err(error)) => format!("cannot wait for it: {error}"),
                Err(_) => "the thread that waits for it has ended".into(),
            });
        }
        self.exited.as_deref().unwrap_or_default()
    }

    /// Kills the agent and its ranks, unless it has ended.
    pub fn kill(&self) {
        if !self.is_gone() {
            // The only possible error is that the group has ended already.
            let _ = killpg(self.group, Signal::SIGKILL);
        }
    }

    /// Waits until the agent ends by itself, kills it after `grace`, and prints the rest of its output.
    pub async fn leave(&mut self, grace: Duration) {
        if timeout(grace, self.exited()).await.is_err() {
            tracing::warn!(
                "the worker agent has not ended {} s after the run's end: killing it",
                grace.as_secs()
            );
            self.kill();
            self.exited().await;
        }
        if let Some(output) = self.output.take() {
            // A process that left the group may hold the pipe open: its output is not waited for.
            let _ = timeout(Duration::from_secs(1), output).await;
        }
    }
}

async fn copy_lines(reader: pipe::Receiver, mut screen: Screen) {
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line).await.is_ok_and(|bytes| bytes > 0) {
        // Never fails.
        let _ = screen.write_all(&line);
        line.clear();
    }
}
