//! The verdict at the top of the report.

use super::{gather::Gathered, thresholds::Judged};

/// The result of all thresholds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// No thresholds were given.
    Open,
    /// All are met.
    Met,
    /// Some are not met.
    Missed,
}

/// One line with the result.
pub fn verdict(gathered: &Gathered, judged: &[Judged]) -> (Standing, String) {
    let failed: Vec<&str> = judged.iter().filter(|j| !j.holds).map(|j| j.text.as_str()).collect();
    let (standing, mut text) = match (judged.len(), failed.len()) {
        (0, _) => (Standing::Open, "No thresholds were given.".to_owned()),
        (1, 0) => (Standing::Met, "The threshold is met.".to_owned()),
        (n, 0) => (Standing::Met, format!("All {n} thresholds are met.")),
        (n, _) => {
            (Standing::Missed, format!("{} of {n} thresholds failed: {}.", failed.len(), failed.join("; ")))
        }
    };
    if !gathered.finished {
        text = format!("This run is not finished: the values are those of its last evaluation. {text}");
    }
    (standing, text)
}
