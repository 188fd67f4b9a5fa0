//! The progress of a run: a bar on a terminal, otherwise a log line from time to time.

use std::time::{Duration, Instant};

use indicatif::{FormattedDuration, ProgressBar, ProgressStyle};
use potstill_core::observation::{IterationTotals, Observation};
use tracing::info;

use super::{number::short, screen::Screen};

/// Shows the progress of a run.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    /// Only where there is no bar.
    lines: Option<Cadence>,
    iterations: u64,
    /// Whether the bar shows iterations rather than what the run waits for.
    training: bool,
    /// Seconds of an iteration, a moving average.
    pace: Option<f64>,
}

impl Progress {
    /// A bar on `screen`, or log lines if it has none. It appears with the first observation.
    #[must_use]
    pub fn new(screen: &Screen, iterations: u64) -> Self {
        let bar = screen.add(ProgressBar::new(iterations));
        Self {
            bar,
            lines: (!screen.has_bar()).then(Cadence::default),
            iterations,
            training: false,
            pace: None,
        }
    }

    /// Processes an observation made at `now`.
    pub fn observe(&mut self, observation: &Observation, now: Instant) {
        match observation {
            Observation::Waiting { have, need, .. } => {
                self.show_state(format!("waiting for workers: {have} of {need}"));
            }
            Observation::GenerationOpened { world_size, .. } => {
                self.show_state(format!("{world_size} workers load the state"));
            }
            Observation::Iteration(totals) => self.iteration(totals, now),
            Observation::Ended(_) => self.clear(),
            _ => {}
        }
    }

    /// Seconds until the last iteration, at the pace of the last ones; none before the first.
    #[must_use]
    pub fn seconds_left(&self, done: u64) -> Option<f64> {
        self.pace.map(|pace| self.iterations.saturating_sub(done) as f64 * pace)
    }

    /// Removes the bar from the screen.
    pub fn clear(&self) {
        self.bar.finish_and_clear();
    }

    fn show_state(&mut self, state: String) {
        self.training = false;
        self.bar.set_style(style("{spinner} {msg}"));
        self.bar.set_message(state);
        self.bar.enable_steady_tick(Duration::from_millis(200));
    }

    fn iteration(&mut self, totals: &IterationTotals, now: Instant) {
        let done = totals.iteration + 1;
        let seconds = totals.seconds.total;
        let pace = self.pace.map_or(seconds, |pace| 0.9 * pace + 0.1 * seconds);
        self.pace = Some(pace);
        let images_per_second = f64::from(totals.samples) / pace;
        let left = time_left(self.iterations.saturating_sub(done), pace);

        let (fake_score, generator) = (short(totals.fake_score_loss), short(totals.generator_loss));

        if !self.training {
            self.training = true;
            self.bar.set_style(style("{wide_bar} {pos}/{len}  {msg}"));
        }
        self.bar.set_position(done);
        // Fits 80 columns with room for a bar.
        self.bar.set_message(format!(
            "{images_per_second:.0} images/s  fake score {fake_score}  generator {generator}  {left} left"
        ));
        if let Some(lines) = &mut self.lines
            && lines.due(now, done as f64 / self.iterations as f64)
        {
            info!(
                "iteration {done}/{}: {images_per_second:.0} images/s, loss: fake score {fake_score}, generator \
                 {generator}, {left} left",
                self.iterations
            );
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates are constants of this file; an error in one only leads to a default bar.
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("━╸─")
}

fn time_left(iterations: u64, pace: f64) -> FormattedDuration {
    FormattedDuration(
        Duration::try_from_secs_f64((iterations as f64 * pace).round()).unwrap_or(Duration::MAX),
    )
}

/// When the next log line is due: at the first observation and at the end; between them after 5 % of the run, but not
/// within 5 s of the last line and not later than a minute after it.
#[derive(Debug, Default)]
struct Cadence {
    last: Option<(Instant, f64)>,
}

impl Cadence {
    fn due(&mut self, now: Instant, done: f64) -> bool {
        let due = self.last.is_none_or(|(at, done_then)| {
            let since = now.duration_since(at);
            let far = done - done_then >= 0.05 && since >= Duration::from_secs(5);
            far || since >= Duration::from_secs(60) || done >= 1.0
        });
        if due {
            self.last = Some((now, done));
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_first_last_and_in_between() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut cadence = Cadence::default();
        assert!(cadence.due(at(0), 0.001), "the first iteration shows that it moves");
        assert!(!cadence.due(at(4), 0.5), "too soon");
        assert!(cadence.due(at(5), 0.5), "far and late enough");
        assert!(!cadence.due(at(30), 0.52), "neither far nor late");
        assert!(cadence.due(at(65), 0.521), "a minute of silence");
        assert!(cadence.due(at(66), 1.0), "the end");
    }

    #[test]
    fn time_left_survives_nonsense() {
        assert_eq!(time_left(200, 0.31).to_string(), "00:01:02");
        time_left(10, f64::NAN);
        time_left(u64::MAX, f64::INFINITY);
    }
}
