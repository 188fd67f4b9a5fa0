//! Sends requests to a run's coordinator, and reads its journal.

use std::time::Duration;

use anyhow::{Context, ensure};
use potstill_access::{Authorized, Invitation, Locator, Patience};
use potstill_core::record::Record;
use potstill_proto::{wire, wire::coordinator_client::CoordinatorClient};
use potstill_storage::{Run, journal::Journal};

/// Timeout of a connection to a coordinator.
const CONNECT: Duration = Duration::from_secs(5);
/// Timeout of a request for the status.
const STATUS: Duration = Duration::from_secs(10);

/// The journal of a run.
///
/// # Errors
/// The store's, or a record that cannot be read.
pub async fn history(run: &Run) -> anyhow::Result<Vec<Record>> {
    let (_, records) = Journal::open(run).await?;
    let decode = |(index, bytes): (usize, &bytes::Bytes)| {
        Record::decode(bytes).with_context(|| format!("record {index} of the journal"))
    };
    records.iter().enumerate().map(decode).collect()
}

/// A connection to a run's coordinator.
pub struct Client {
    coordinator: CoordinatorClient<Authorized>,
    address: String,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// No coordinator with the invitation's certificate listens there.
    pub async fn connect(invitation: &Invitation, patience: Duration) -> anyhow::Result<Self> {
        let address = invitation.address.clone();
        let patience = Patience { connect: patience, keep_alive: None };
        let coordinator = invitation.connect(patience).await;
        let coordinator = coordinator.with_context(|| format!("no coordinator answers at {address}"))?;
        Ok(Self { coordinator, address })
    }

    /// Connects to the coordinator of a run.
    ///
    /// # Errors
    /// The run cannot be read or has no coordinator, or its coordinator does not answer.
    pub async fn of(locator: &Locator) -> anyhow::Result<Self> {
        let invitation = locator.find().await?;
        let mut client = Self::connect(&invitation, CONNECT).await?;
        if invitation.certificate.is_none() {
            // No certificate shows that it is this run's coordinator.
            let served = client.summary().await.map_err(|status| client.refused(&status))?.run_id;
            let (address, run) = (&invitation.address, &invitation.run_id);
            ensure!(served == *run, "the coordinator at {address} serves run {served}, not {run}");
        }
        Ok(client)
    }

    /// The run's status, with all members.
    ///
    /// # Errors
    /// The coordinator does not answer in time.
    pub async fn status(&mut self) -> anyhow::Result<wire::StatusReply> {
        let mut whole: Option<wire::StatusReply> = None;
        loop {
            let known = whole.as_ref().map_or(0, |status| status.members.len());
            let request = wire::StatusRequest { first_member: u32::try_from(known)? };
            let asked = tokio::time::timeout(STATUS, self.coordinator.status(request)).await;
            let reply =
                asked.with_context(|| format!("the coordinator at {} does not answer", self.address))?;
            let mut page = reply.map_err(|status| self.refused(&status))?.into_inner();
            let ends = page.members.is_empty();
            if let Some(before) = whole {
                page.members.splice(0..0, before.members);
            }
            // Workers may come and go between two pages: the list is then not exact.
            if ends || page.members.len() >= page.member_count as usize {
                return Ok(page);
            }
            whole = Some(page);
        }
    }

    /// The run's status, with some of its members.
    ///
    /// # Errors
    /// What the coordinator answers instead.
    pub async fn summary(&mut self) -> Result<wire::StatusReply, tonic::Status> {
        Ok(self.coordinator.status(wire::StatusRequest { first_member: 0 }).await?.into_inner())
    }

    /// Asks for a checkpoint, and waits until it is committed. Returns its iteration.
    ///
    /// # Errors
    /// Why there is no checkpoint.
    pub async fn checkpoint(&mut self) -> anyhow::Result<u64> {
        let reply = self.coordinator.checkpoint(wire::CheckpointRequest {}).await;
        Ok(reply.map_err(|status| self.refused(&status))?.into_inner().iteration)
    }

    /// Asks the run to save and end.
    ///
    /// # Errors
    /// The coordinator does not accept the request.
    pub async fn cancel(&mut self, reason: String) -> anyhow::Result<()> {
        let reply = self.coordinator.cancel(wire::CancelRequest { reason }).await;
        reply.map(|_| ()).map_err(|status| self.refused(&status))
    }

    fn refused(&self, status: &tonic::Status) -> anyhow::Error {
        anyhow::anyhow!("the coordinator at {}: {}", self.address, status.message())
    }
}
