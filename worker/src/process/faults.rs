//! Faults on purpose, for tests of recovery: a rank that dies, hangs or is held up at a chosen point of a chosen iteration.
//!
//! `POTSTILL_FAULT=die:<point>:<iteration>:<rank>:<file>`, or `hang:…`. It happens to the first process that gets there as
//! that rank: the one that can create the file. `hold:…` lasts until somebody has written to the file, a named pipe.
//! Release builds know nothing of it.

use std::{fs::OpenOptions, sync::OnceLock, thread};

use crate::process::lifeline;

/// Environment variable with the fault.
const VARIABLE: &str = "POTSTILL_FAULT";

enum Kind {
    Die,
    Hang,
    Hold,
}

struct Fault {
    kind: Kind,
    point: String,
    iteration: u64,
    rank: u32,
    file: String,
}

/// A point in the training loop at which a fault may be wanted.
pub fn point(name: &str, iteration: u64, rank: u32) {
    static FAULT: OnceLock<Option<Fault>> = OnceLock::new();
    if !cfg!(debug_assertions) {
        return;
    }
    let Some(fault) = FAULT.get_or_init(wanted) else { return };
    if fault.point != name || fault.iteration != iteration || fault.rank != rank {
        return;
    }
    let first = || OpenOptions::new().write(true).create_new(true).open(&fault.file).is_ok();
    match fault.kind {
        Kind::Die if first() => {
            tracing::warn!(name, iteration, "dying, as {VARIABLE} wants");
            lifeline::end_now();
        }
        Kind::Hang if first() => {
            tracing::warn!(name, iteration, "hanging, as {VARIABLE} wants");
            loop {
                thread::park();
            }
        }
        Kind::Hold => {
            tracing::warn!(name, iteration, "held, as {VARIABLE} wants");
            if let Err(error) = std::fs::read(&fault.file) {
                tracing::error!(%error, "{VARIABLE}: {} cannot be read", fault.file);
            }
        }
        Kind::Die | Kind::Hang => {}
    }
}

fn wanted() -> Option<Fault> {
    let text = std::env::var(VARIABLE).ok()?;
    let mut parts = text.splitn(5, ':');
    let mut next = || parts.next().map(str::to_owned);
    let fault = (|| {
        Some(Fault {
            kind: match next()?.as_str() {
                "die" => Kind::Die,
                "hang" => Kind::Hang,
                "hold" => Kind::Hold,
                _ => return None,
            },
            point: next()?,
            iteration: next()?.parse().ok()?,
            rank: next()?.parse().ok()?,
            file: next()?,
        })
    })();
    if fault.is_none() {
        tracing::error!("{VARIABLE}={text:?} is not die|hang|hold:point:iteration:rank:file; ignored");
    }
    fault
}
