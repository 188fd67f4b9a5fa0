//! How far the rank is: written by the training thread, read by heartbeats and by the hello of a stream that comes back.

use std::{
    future::Future,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use potstill_proto::{
    cursor::{Cursor, Generation, Phase},
    message::FromWorker,
};

/// How often work that has patience of its own is reported as progress.
const BUSY: Duration = Duration::from_secs(1);

/// See the module's documentation.
#[derive(Default)]
pub struct Progress {
    generation: AtomicU64,
    /// Twice the iteration, plus one in the generator phase: both in one atomic, so that they are never torn.
    cursor: AtomicU64,
    /// Whether the state at the cursor is whole.
    whole: AtomicBool,
    /// The newest generation whose state it is.
    loaded: AtomicU64,
    units: AtomicU64,
    waiting: AtomicBool,
    activity: Mutex<&'static str>,
}

impl Progress {
    /// A unit of work is done.
    pub fn tick(&self) {
        self.units.fetch_add(1, Ordering::Relaxed);
    }

    /// A whole state is held, this far.
    pub fn set_cursor(&self, cursor: Cursor) {
        let phase = u64::from(cursor.phase == Phase::Generator);
        self.cursor.store(cursor.iteration * 2 + phase, Ordering::Relaxed);
        self.whole.store(true, Ordering::Release);
        self.tick();
    }

    /// The state of this generation is held, this far.
    pub fn set_loaded(&self, generation: Generation, cursor: Cursor) {
        self.set_cursor(cursor);
        self.loaded.store(generation.0, Ordering::Release);
    }

    /// The newest generation whose state was held.
    pub fn loaded(&self) -> Generation {
        Generation(self.loaded.load(Ordering::Acquire))
    }

    /// The state is about to be overwritten, or is torn.
    pub fn state_is_torn(&self) {
        self.whole.store(false, Ordering::Release);
    }

    /// How far the state is, if there is a whole one.
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

    /// For people: what the rank is doing.
    pub fn set_activity(&self, activity: &'static str) {
        if let Ok(mut now) = self.activity.lock() {
            *now = activity;
        }
        self.tick();
    }

    /// From now on the rank waits for its peers, or does not any more.
    pub fn set_waiting(&self, waiting: bool) {
        self.waiting.store(waiting, Ordering::Relaxed);
        self.tick();
    }

    /// Waits for the rank's peers: when nothing moves meanwhile, another one is at fault.
    pub fn while_waiting<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.set_waiting(true);
        let result = wait();
        self.set_waiting(false);
        result
    }

    /// Counts as progress while `work` goes on, which bounds its own time, as every operation on storage does.
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

    /// What the coordinator is told regularly.
    pub fn heartbeat(&self) -> FromWorker {
        FromWorker::Heartbeat {
            generation: Generation(self.generation.load(Ordering::Relaxed)),
            cursor: self.cursor(),
            progress: self.units.load(Ordering::Relaxed),
            activity: self.activity.lock().map(|a| a.to_string()).unwrap_or_default(),
            waiting: self.waiting.load(Ordering::Relaxed),
        }
    }
}
