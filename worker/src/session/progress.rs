//! The rank's progress: written by the training thread, read for heartbeats and for the hello of a new stream.

use std::{
    future::Future,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use potstill_proto::{
    cursor::{Cursor, Generation, Phase},
    message::FromWorker,
};

use crate::process::work;

/// How often work with a timeout of its own counts as progress.
const BUSY: Duration = Duration::from_secs(1);

/// See the module's documentation.
#[derive(Default)]
pub struct Progress {
    generation: AtomicU64,
    /// Twice the iteration, plus one in the generator phase: both in one atomic, so that they are never torn.
    cursor: AtomicU64,
    /// Whether the state at the cursor is complete.
    whole: AtomicBool,
    /// The newest generation whose state it was.
    loaded: AtomicU64,
    /// Since when the rank has waited for its peers.
    waiting: Mutex<Option<Instant>>,
    activity: Mutex<&'static str>,
}

impl Progress {
    /// Counts a completed unit of work.
    pub fn tick(&self) {
        work::complete();
    }

    /// The rank holds a complete state at this cursor.
    pub fn set_cursor(&self, cursor: Cursor) {
        let phase = u64::from(cursor.phase == Phase::Generator);
        self.cursor.store(cursor.iteration * 2 + phase, Ordering::Relaxed);
        self.whole.store(true, Ordering::Release);
        self.tick();
    }

    /// The rank holds the state of this generation at this cursor.
    pub fn set_loaded(&self, generation: Generation, cursor: Cursor) {
        self.set_cursor(cursor);
        self.loaded.store(generation.0, Ordering::Release);
    }

    /// The newest generation whose state the rank held.
    pub fn loaded(&self) -> Generation {
        Generation(self.loaded.load(Ordering::Acquire))
    }

    /// The state is about to be overwritten, or is torn.
    pub fn state_is_torn(&self) {
        self.whole.store(false, Ordering::Release);
    }

    /// The cursor of the state, if there is a complete one.
    pub fn held(&self) -> Option<Cursor> {
        self.whole.load(Ordering::Acquire).then(|| self.cursor())
    }

    fn cursor(&self) -> Cursor {
        let cursor = self.cursor.load(Ordering::Relaxed);
        let phase = if cursor.is_multiple_of(2) { Phase::FakeScore } else { Phase::Generator };
        Cursor { iteration: cursor / 2, phase }
    }

    pub fn set_generation(&self, generation: Generation) {
        self.generation.store(generation.0, Ordering::Relaxed);
    }

    /// Sets what the rank is doing, as text for heartbeats.
    pub fn set_activity(&self, activity: &'static str) {
        if let Ok(mut now) = self.activity.lock() {
            *now = activity;
        }
        self.tick();
    }

    /// Whether the rank now waits for its peers.
    pub fn set_waiting(&self, waiting: bool) {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = waiting.then(Instant::now);
        self.tick();
    }

    /// For how long the rank has waited for its peers; `None`: it does not.
    pub fn waited(&self) -> Option<Duration> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).map(|since| since.elapsed())
    }

    /// Runs `wait`, which waits for the rank's peers: if there is no progress meanwhile, another rank hangs.
    pub fn while_waiting<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.set_waiting(true);
        let result = wait();
        self.set_waiting(false);
        result
    }

    /// Counts progress while `work` runs, which must have a timeout of its own, as every storage operation has.
    pub async fn while_busy<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        let mut interval = tokio::time::interval(BUSY);
        loop {
            tokio::select! {
                result = &mut work => return result,
                _ = interval.tick() => self.tick(),
            }
        }
    }

    /// A heartbeat. It names the start of the run while there is no complete state.
    pub fn heartbeat(&self) -> FromWorker {
        FromWorker::Heartbeat {
            generation: Generation(self.generation.load(Ordering::Relaxed)),
            cursor: self.held().unwrap_or_default(),
            progress: work::completed(),
            activity: self.activity.lock().map(|a| a.to_string()).unwrap_or_default(),
            waiting: self.waited().is_some(),
        }
    }
}
