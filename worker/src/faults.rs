//! Faults on purpose, for tests of recovery: a rank that dies or hangs at a chosen point of a chosen iteration.
//!
//! `POTSTILL_FAULT=die:<point>:<iteration>:<rank>:<file>`, or `hang:…`. It happens to the first process that gets there as
//! that rank: the one that can create the file. Release builds know nothing of it.

use std::{fs::OpenOptions, sync::OnceLock, thread};

use crate::lifeline;

/// Environment variable with the fault.
const VARIABLE: &str = "POTSTILL_FAULT";

struct Fault {
    hangs: bool,
    point: String,
    iteration: u64,
    rank: u32,
    once: String,
}

/// A point in the training loop at which a fault may be wanted.
pub fn point(name: &str, iteration: u64, rank: u32) {
    static FAULT: OnceLock<Option<Fault>> = OnceLock::new();
    if !cfg!(debug_assertions) {
        return;
    }
    let Some(fault) = FAULT.get_or_init(wanted) else { return };
    let here = fault.point == name && fault.iteration == iteration && fault.rank == rank;
    if !here || OpenOptions::new().write(true).create_new(true).open(&fault.once).is_err() {
        return;
    }
    if fault.hangs {
        tracing::warn!(name, iteration, "hanging, as {VARIABLE} wants");
        loop {
            thread::park();
        }
    }
    tracing::warn!(name, iteration, "dying, as {VARIABLE} wants");
    lifeline::end_now();
}

fn wanted() -> Option<Fault> {
    let text = std::env::var(VARIABLE).ok()?;
    let mut parts = text.splitn(5, ':');
    let mut next = || parts.next().map(str::to_owned);
    let fault = (|| {
        Some(Fault {
            hangs: match next()?.as_str() {
                "die" => false,
                "hang" => true,
                _ => return None,
            },
            point: next()?,
            iteration: next()?.parse().ok()?,
            rank: next()?.parse().ok()?,
            once: next()?,
        })
    })();
    if fault.is_none() {
        tracing::error!("{VARIABLE}={text:?} is not die|hang:point:iteration:rank:file; ignored");
    }
    fault
}
