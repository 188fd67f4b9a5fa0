//! The rank's side of the `Attach` stream.
//!
//! The stream runs on a small runtime of its own, so heartbeats are sent while the training thread computes or waits in
//! a collective. The coordinator's messages are collected in [`Orders`], which the training thread checks between
//! micro-batches. An order to leave also aborts the rank's group, so that a rank that waits for a stuck peer leaves at
//! once.
//!
//! A lost stream does not affect the training thread: the link reconnects to the coordinator or to its successor and
//! sends again what that may not have received.

mod flight;
mod link;
mod orders;
mod outbox;
mod progress;
mod rendezvous;
mod retained;

use std::sync::{Arc, mpsc};

use anyhow::{Context, bail};
use potstill_access::{Locator, WorkerSecret};
use potstill_c10d::ProcessGroup;
use potstill_proto::{
    cursor::Generation,
    message::{FromWorker, Hello},
};
use potstill_storage::coordinators::Ended;
use tokio::signal::unix::{SignalKind, signal};

pub use self::{
    link::Terms, orders::Orders, outbox::Outbox, progress::Progress, rendezvous::GenerationStore,
};
use self::{
    link::{Entered, Found, Inbound, Link},
    rendezvous::Calls,
};

/// A worker's session with the coordinators of its run.
pub struct Session {
    inbox: mpsc::Receiver<Inbound>,
    outbox: Outbox,
    orders: Orders,
    entered: Entered,
    calls: Calls,
    pub progress: Arc<Progress>,
}

/// What comes of an attempt to take part in a run.
#[allow(clippy::large_enum_variant, reason = "there is one")]
pub enum Attached {
    /// A session, and what the coordinator's welcome says.
    Session(Session, Terms),
    /// The run has ended since the process died that this one replaces.
    TooLate(Ended),
}

impl Session {
    /// Attaches: connects with bounded retries, sends the hello, waits for the welcome. From then on SIGTERM and
    /// SIGUSR1 are forwarded as a request to leave. `restarted`: whether this process takes the place of one that has died after it had worked.
    ///
    /// # Errors
    /// Where it tried and why it failed, or why the coordinator refused.
    pub async fn attach(
        locator: Locator,
        hello: Hello,
        secret: WorkerSecret,
        restarted: bool,
    ) -> anyhow::Result<Attached> {
        let (outbox, progress, entered) = (Outbox::default(), Arc::<Progress>::default(), Entered::default());
        let calls = Calls::default();
        let link = Link {
            locator,
            hello,
            secret,
            outbox: outbox.clone(),
            progress: Arc::clone(&progress),
            entered: Arc::clone(&entered),
            calls: calls.clone(),
            restarted,
        };
        let (incoming, terms) = match link.attach().await? {
            Found::Coordinator(incoming, terms) => (incoming, terms),
            Found::End(ended) => return Ok(Attached::TooLate(ended)),
        };
        let (inbound, inbox) = mpsc::channel();
        tokio::spawn(link.keep(incoming, terms.clone(), inbound));
        let (beats, beating, heartbeat) = (outbox.clone(), Arc::clone(&progress), terms.heartbeat);
        tokio::spawn(async move {
            let mut interval = tokio::time::interval(heartbeat);
            interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                interval.tick().await;
                beats.send(beating.heartbeat());
            }
        });
        let leaving = outbox.clone();
        let (mut terminate, mut user) =
            (signal(SignalKind::terminate())?, signal(SignalKind::user_defined1())?);
        tokio::spawn(async move {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = user.recv() => "SIGUSR1",
            };
            tracing::info!("{name}: leaving at the next boundary");
            leaving.send(FromWorker::Leaving { reason: name.to_owned() });
        });
        let session = Self { inbox, outbox, orders: Orders::default(), entered, calls, progress };
        Ok(Attached::Session(session, terms))
    }

    /// The keys and values through which the ranks of a generation find each other.
    pub fn store(&self, generation: Generation) -> GenerationStore {
        let (outbox, calls) = (self.outbox.clone(), self.calls.clone());
        GenerationStore { outbox, calls, generation, prefix: String::new() }
    }

    /// The rank has joined groups, that of all ranks first: from now on an order to leave their generation aborts them.
    pub fn enter_groups(&self, generation: Generation, groups: Vec<ProcessGroup>) {
        if let Ok(mut entered) = self.entered.lock() {
            *entered = Some((generation, groups));
        }
    }

    /// Ends the operations of the rank's groups, if it is in any.
    pub fn abort_groups(&self) {
        link::abort(&self.entered, |_| true);
    }

    /// The rank has left its groups.
    pub fn leave_groups(&self) {
        if let Ok(mut entered) = self.entered.lock() {
            *entered = None;
        }
    }

    /// A sender for other threads.
    pub fn outbox(&self) -> Outbox {
        self.outbox.clone()
    }

    /// Sends a message.
    pub fn send(&self, message: FromWorker) {
        self.outbox.send(message);
    }

    /// The current orders, without waiting.
    ///
    /// # Errors
    /// No coordinator can be reached any more.
    pub fn orders(&mut self) -> anyhow::Result<&mut Orders> {
        loop {
            match self.inbox.try_recv() {
                Ok(inbound) => self.accept(inbound)?,
                Err(mpsc::TryRecvError::Empty) => return Ok(&mut self.orders),
                // After the run's end the link sends nothing more.
                Err(mpsc::TryRecvError::Disconnected) if self.orders.stop.is_some() => {
                    return Ok(&mut self.orders);
                }
                Err(mpsc::TryRecvError::Disconnected) => bail!("the session's task ended"),
            }
        }
    }

    /// Waits for the next message and adds it to the orders.
    ///
    /// # Errors
    /// No coordinator can be reached any more.
    pub fn wait(&mut self) -> anyhow::Result<&mut Orders> {
        let inbound = self.inbox.recv().context("the session's task ended")?;
        self.accept(inbound)?;
        Ok(&mut self.orders)
    }

    fn accept(&mut self, inbound: Inbound) -> anyhow::Result<()> {
        match inbound {
            Inbound::Message(message) => {
                self.orders.take(message);
                Ok(())
            }
            Inbound::Lost(reason) => bail!(reason),
        }
    }
}
