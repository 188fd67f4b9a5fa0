//! Fault injection, for tests of recovery: a rank dies, hangs or is delayed at a chosen point of a chosen iteration.
//!
//! `POTSTILL_FAULT=die:<point>:<iteration>:<rank>:<file>`, or `hang:…`, or several, separated by `;`. The fault happens in the first
//! process that reaches the point as that rank: the one that can create the file, or each, where no file is named. `hold:…` waits until
//! the file, a named pipe, is written to. `tear:reduced:…` cuts a reduction short. `drag:forward:…` makes a process slow from that
//! iteration on, whichever rank it is later. Release builds do not support it.

use std::{
    fs::OpenOptions,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use crate::process::lifeline;

/// Environment variable with the fault.
const VARIABLE: &str = "POTSTILL_FAULT";
/// How many times as long a process that drags takes for its passes.
const SLOWER: u32 = 10;

enum Kind {
    Die,
    Hang,
    Hold,
    Tear,
    Drag,
}

struct Fault {
    kind: Kind,
    point: String,
    iteration: u64,
    rank: u32,
    file: String,
}

/// A point in the training loop at which a fault can be injected.
pub fn point(name: &str, iteration: u64, rank: u32) {
    let Some(fault) = at(name, iteration, rank) else { return };
    match fault.kind {
        Kind::Die if fault.is_first() => {
            tracing::warn!(name, iteration, "dying because of {VARIABLE}");
            lifeline::end_now();
        }
        Kind::Hang if fault.is_first() => {
            tracing::warn!(name, iteration, "hanging because of {VARIABLE}");
            loop {
                thread::park();
            }
        }
        Kind::Hold => {
            tracing::warn!(name, iteration, "waiting because of {VARIABLE}");
            if let Err(error) = std::fs::read(&fault.file) {
                tracing::error!(%error, "{VARIABLE}: {} cannot be read", fault.file);
            }
        }
        Kind::Die | Kind::Hang | Kind::Tear | Kind::Drag => {}
    }
}

/// Whether the reduction that has just ended is to be cut short: its result is then to be another, and the group aborted.
pub fn tears(name: &str, iteration: u64, rank: u32) -> bool {
    let tears =
        at(name, iteration, rank).is_some_and(|fault| matches!(fault.kind, Kind::Tear) && fault.is_first());
    if tears {
        tracing::warn!(name, iteration, "cutting a reduction short because of {VARIABLE}");
    }
    tears
}

/// Makes a process that drags take longer for what it has computed in the time `took`.
#[expect(clippy::disallowed_methods, reason = "it is the training thread that is slow")]
pub fn drag(name: &str, iteration: u64, rank: u32, took: Duration) {
    static DRAGS: AtomicBool = AtomicBool::new(false);
    if at(name, iteration, rank).is_some_and(|fault| matches!(fault.kind, Kind::Drag) && fault.is_first()) {
        tracing::warn!(name, iteration, "slow from now on because of {VARIABLE}");
        DRAGS.store(true, Ordering::Relaxed);
    }
    if DRAGS.load(Ordering::Relaxed) {
        thread::sleep(took * (SLOWER - 1));
    }
}

/// The fault at this point, if there is one.
fn at(name: &str, iteration: u64, rank: u32) -> Option<&'static Fault> {
    static FAULTS: OnceLock<Vec<Fault>> = OnceLock::new();
    if !cfg!(debug_assertions) {
        return None;
    }
    let mut faults = FAULTS.get_or_init(wanted).iter();
    faults.find(|fault| fault.point == name && fault.iteration == iteration && fault.rank == rank)
}

impl Fault {
    fn is_first(&self) -> bool {
        self.file.is_empty() || OpenOptions::new().write(true).create_new(true).open(&self.file).is_ok()
    }
}

fn wanted() -> Vec<Fault> {
    let text = std::env::var(VARIABLE).unwrap_or_default();
    let parse = |text: &str| {
        let fault = fault(text);
        if fault.is_none() {
            tracing::error!(
                "{VARIABLE}={text:?} is not die|hang|hold|tear|drag:point:iteration:rank:file; ignored"
            );
        }
        fault
    };
    text.split(';').filter(|text| !text.is_empty()).filter_map(parse).collect()
}

fn fault(text: &str) -> Option<Fault> {
    let mut parts = text.splitn(5, ':');
    let mut next = || parts.next().map(str::to_owned);
    Some(Fault {
        kind: match next()?.as_str() {
            "die" => Kind::Die,
            "hang" => Kind::Hang,
            "hold" => Kind::Hold,
            "tear" => Kind::Tear,
            "drag" => Kind::Drag,
            _ => return None,
        },
        point: next()?,
        iteration: next()?.parse().ok()?,
        rank: next()?.parse().ok()?,
        file: next()?,
    })
}
