//! The coordinator's clock. It counts the time in which the coordinator was listening: a process that was stopped, or that got no
//! CPU, has heard nothing meanwhile, and the silence of its workers says nothing about them.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use potstill_core::Tick;
use tokio::time::Instant;

/// See the module's documentation. Clones show the same time.
#[derive(Clone)]
pub struct Clock(Arc<Mutex<State>>);

struct State {
    start: Instant,
    /// When it was last read: something ran then.
    read: Instant,
    /// Without a reading for so long, nothing ran in this process.
    gap: Duration,
    /// What does not count since the start.
    deaf: Duration,
    /// What of it has not been reported.
    unreported: Duration,
}

impl Clock {
    /// A clock that shows 0 now. [`keep`](Self::keep) reads it often enough; between two readings that are more than `gap` apart it
    /// stands still.
    pub fn start(gap: Duration) -> Self {
        let now = Instant::now();
        let (deaf, unreported) = (Duration::ZERO, Duration::ZERO);
        Self(Arc::new(Mutex::new(State { start: now, read: now, gap, deaf, unreported })))
    }

    /// Reads the clock for as long as the process runs.
    pub async fn keep(self) {
        let gap = self.with(|state| state.gap);
        let mut interval = tokio::time::interval(gap / 4);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            self.now();
        }
    }

    /// The time.
    pub fn now(&self) -> Tick {
        self.with(State::read)
    }

    /// When it will show `tick`, unless it stands still before.
    pub fn instant(&self, tick: Tick) -> Instant {
        self.with(|state| state.start + state.deaf + Duration::from_millis(tick.0))
    }

    /// For how long it has stood still since this was last asked, if it has.
    pub fn deafness(&self) -> Option<Duration> {
        self.with(|state| {
            state.read();
            Some(std::mem::take(&mut state.unreported)).filter(|time| !time.is_zero())
        })
    }

    fn with<T>(&self, function: impl FnOnce(&mut State) -> T) -> T {
        function(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl State {
    fn read(&mut self) -> Tick {
        let now = Instant::now();
        let since = now - self.read;
        if since > self.gap {
            self.deaf += since;
            self.unreported += since;
        }
        self.read = now;
        let listened = now - self.start - self.deaf;
        Tick(u64::try_from(listened.as_millis()).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn time_stands_still_while_nothing_runs() {
        let clock = Clock::start(Duration::from_millis(100));
        tokio::time::advance(Duration::from_millis(80)).await;
        assert_eq!((clock.now(), clock.deafness()), (Tick(80), None));
        // As after SIGSTOP and SIGCONT: the first reading is late.
        tokio::time::advance(Duration::from_secs(15)).await;
        assert_eq!(clock.now(), Tick(80));
        assert_eq!((clock.deafness(), clock.deafness()), (Some(Duration::from_secs(15)), None));
        tokio::time::advance(Duration::from_millis(20)).await;
        assert_eq!(clock.now(), Tick(100));
        let left = clock.instant(Tick(150)) - Instant::now();
        assert_eq!(left, Duration::from_millis(50), "deadlines move with it");
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_is_kept_does_not_stand_still() {
        let clock = Clock::start(Duration::from_millis(100));
        let keeping = tokio::spawn(clock.clone().keep());
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!((clock.now(), clock.deafness()), (Tick(5000), None));
        keeping.abort();
    }
}
