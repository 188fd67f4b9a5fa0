//! `potstill status`: what a run is doing, from its coordinator, or from its journal where there is no coordinator.

use comfy_table::{Table, presets};
use potstill_access::Locator;
use potstill_core::{observation::Outcome, record::Record};
use potstill_proto::{
    cursor::Cursor,
    status::{liveness_name, state_name},
    wire,
};
use potstill_storage::{Run, layout};
use serde::Serialize;

use potstill_server::client::{self, Client};

/// The status of a run.
#[derive(Debug, Serialize)]
pub struct RunStatus {
    /// The run's name.
    pub run: String,
    /// `waiting`, `training`, `finishing`, `succeeded`, `stopped`, `failed`; `unreachable` where the coordinator does not
    /// answer.
    pub state: String,
    /// What it waits for, or why it ended.
    pub reason: String,
    /// Its newest generation.
    pub generation: u64,
    /// Finished iterations, as far as known.
    pub iteration: u64,
    /// The iterations that the run is to reach; none without a coordinator.
    pub iterations: Option<u64>,
    /// Iterations that were computed more than once.
    pub repeated_iterations: u64,
    /// The newest checkpoint.
    pub committed_iteration: Option<u64>,
    /// The address of the run's page; none without a coordinator.
    pub page: Option<String>,
    /// The attached workers.
    pub members: Vec<MemberStatus>,
}

/// An attached worker.
#[derive(Debug, Serialize)]
pub struct MemberStatus {
    /// Its id.
    pub worker: String,
    /// Its host.
    pub host: String,
    /// Its process id there.
    pub pid: u32,
    /// Its device.
    pub device: String,
    /// Its rank; none for a standby.
    pub rank: Option<u32>,
    /// The cursor of its state, as text.
    pub cursor: String,
    /// What it is doing.
    pub activity: String,
    /// `alive` or `unknown`.
    pub liveness: String,
    /// Seconds that it computed for a micro-batch in the last finished iteration.
    pub compute_seconds: Option<f64>,
    /// Whether it computes much more slowly than the others.
    pub straggles: bool,
}

/// Asks a run's coordinator; where it does not answer, reads the journal, if the storage is known.
///
/// # Errors
/// The run cannot be read.
pub async fn of(locator: &Locator) -> anyhow::Result<RunStatus> {
    let asked = async { Client::of(locator).await?.status().await }.await;
    let (error, run) = match (asked, locator) {
        (Ok(reply), _) => return Ok(reply.into()),
        (Err(error), Locator::Storage { run, .. }) => (error, run),
        (Err(error), _) => return Err(error),
    };
    let history = client::history(run).await?;
    anyhow::ensure!(
        !history.is_empty(),
        "there is no run {}: {} is empty",
        run.id(),
        run.describe(layout::JOURNAL)
    );
    if let Some(Record::Ended { outcome }) = history.last() {
        let (state, reason) = match outcome {
            Outcome::Succeeded { .. } => ("succeeded", String::new()),
            Outcome::Stopped { reason, .. } => ("stopped", reason.clone()),
            Outcome::Failed { reason } => ("failed", reason.clone()),
        };
        return Ok(from_journal(run, &history, state, reason));
    }
    let reason = format!("{error:#}; --resume continues the run");
    Ok(from_journal(run, &history, "unreachable", reason))
}

fn from_journal(run: &Run, history: &[Record], state: &str, reason: String) -> RunStatus {
    let mut status = RunStatus {
        run: run.id().to_string(),
        state: state.to_owned(),
        reason,
        generation: 0,
        iteration: 0,
        iterations: None,
        repeated_iterations: 0,
        committed_iteration: None,
        page: None,
        members: Vec::new(),
    };
    for record in history {
        match record {
            Record::GenerationOpened { generation, start, repeats, .. } => {
                status.generation = generation.0;
                status.iteration = *start;
                status.repeated_iterations += repeats;
            }
            Record::Committed { iteration, .. } => {
                status.committed_iteration = Some(*iteration);
                status.iteration = status.iteration.max(*iteration);
            }
            Record::Ended {
                outcome: Outcome::Succeeded { iteration } | Outcome::Stopped { iteration, .. },
            } => status.iteration = *iteration,
            _ => {}
        }
    }
    status
}

impl From<wire::StatusReply> for RunStatus {
    fn from(reply: wire::StatusReply) -> Self {
        let member = |m: wire::Member| MemberStatus {
            liveness: liveness_name(m.liveness()).to_owned(),
            cursor: Cursor::try_from(m.cursor.unwrap_or_default())
                .map_or_else(|e| e.to_string(), |c| c.to_string()),
            worker: m.worker_id,
            host: m.host,
            pid: m.pid,
            device: m.device,
            rank: m.rank,
            activity: m.activity,
            compute_seconds: m.compute_seconds,
            straggles: m.straggles,
        };
        Self {
            state: state_name(reply.state()).to_owned(),
            run: reply.run_id,
            reason: reply.reason,
            generation: reply.generation,
            iteration: reply.iteration,
            iterations: Some(reply.iterations),
            repeated_iterations: reply.repeated_iterations,
            committed_iteration: reply.committed_iteration,
            page: Some(reply.page).filter(|page| !page.is_empty()),
            members: reply.members.into_iter().map(member).collect(),
        }
    }
}

impl RunStatus {
    /// Whether the run has ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        ["succeeded", "stopped", "failed"].contains(&self.state.as_str())
    }

    /// As text.
    #[must_use]
    pub fn text(&self) -> String {
        let of = self.iterations.map(|n| format!(" of {n}")).unwrap_or_default();
        let saved = match self.committed_iteration {
            Some(iteration) => format!("the newest checkpoint is {}", layout::manifest_key(iteration)),
            None => "there is no checkpoint".to_owned(),
        };
        let mut text = format!("{}: {}", self.run, self.state);
        if !self.reason.is_empty() {
            text += &format!(": {}", self.reason);
        }
        text += &format!("\ngeneration {}, iteration {}{of}; {saved}", self.generation, self.iteration);
        if self.repeated_iterations > 0 {
            text += &format!("\n{} iterations were computed again", self.repeated_iterations);
        }
        if let Some(page) = &self.page {
            text += &format!(
                "\nlive page: {page} (`potstill page {}` prints the address that opens it)",
                self.run
            );
        }
        if !self.members.is_empty() {
            let mut table = Table::new();
            table.load_style(presets::UTF8_FULL_CONDENSED);
            table.set_header([
                "rank",
                "worker",
                "host",
                "process",
                "device",
                "at",
                "doing",
                "micro-batch",
                "liveness",
            ]);
            for m in &self.members {
                let rank = m.rank.map_or_else(|| "standby".to_owned(), |rank| rank.to_string());
                let (worker, host, pid) = (m.worker.clone(), m.host.clone(), m.pid.to_string());
                let (device, at) = (m.device.clone(), m.cursor.clone());
                let (doing, liveness) = (m.activity.clone(), m.liveness.clone());
                let pace = m.compute_seconds.map_or_else(String::new, |seconds| format!("{seconds:.3} s"));
                let pace = if m.straggles { format!("{pace}, slow") } else { pace };
                table.add_row([rank, worker, host, pid, device, at, doing, pace, liveness]);
            }
            text += &format!("\n{table}");
        }
        text
    }
}
