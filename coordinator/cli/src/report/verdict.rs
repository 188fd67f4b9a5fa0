//! The one line at the top of the page.

use super::{gather::Gathered, thresholds::Judged};

/// How the thresholds turned out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// There were none.
    Open,
    /// All hold.
    Met,
    /// Some do not hold.
    Missed,
}

/// One line that says it all.
pub fn verdict(gathered: &Gathered, judged: &[Judged]) -> (Standing, String) {
    let failed: Vec<&str> = judged.iter().filter(|j| !j.holds).map(|j| j.text.as_str()).collect();
    let (standing, mut text) = match (judged.len(), failed.len()) {
        (0, _) => (Standing::Open, "No thresholds were given: judge for yourself.".to_owned()),
        (1, 0) => (Standing::Met, "The threshold is met.".to_owned()),
        (n, 0) => (Standing::Met, format!("All {n} thresholds are met.")),
        (n, _) => {
            (Standing::Missed, format!("{} of {n} thresholds failed: {}.", failed.len(), failed.join("; ")))
        }
    };
    if !gathered.finished {
        text = format!("This run is not finished: what follows is how far it has come. {text}");
    }
    (standing, text)
}
