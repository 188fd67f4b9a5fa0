//! `potstill report`: one page for the person who decides whether a student is rolled out.
//!
//! Everything on it is taken from what the run left behind: `run.toml`, `summary.json`, `metrics.jsonl` and the pictures. What
//! was not measured shows as a dash and is never made up.

mod facts;
mod gather;
mod html;
mod markdown;
pub mod thresholds;

use std::path::PathBuf;

use anyhow::Context;
use potstill_storage::{Root, RunId};

use self::{facts::Facts, gather::Gathered, thresholds::Judged};
pub use thresholds::Threshold;

const HTML: &str = "report.html";
const MARKDOWN: &str = "report.md";

/// What is asked for.
pub struct Request {
    /// Which run.
    pub run: RunId,
    /// Where it is kept.
    pub storage: Root,
    /// A folder for the pages; without one they go into the run's own.
    pub out: Option<PathBuf>,
    /// What an hour of one device costs.
    pub price: Option<Price>,
    /// What the student must fulfil.
    pub thresholds: Vec<Threshold>,
}

/// What an hour of one device costs.
#[derive(Clone, Debug, PartialEq)]
pub struct Price {
    /// For one device and one hour.
    pub per_device_hour: f64,
    /// In which currency, as it is to be printed.
    pub currency: String,
}

/// What came of it.
pub struct Reported {
    /// Where the pages lie.
    pub places: Vec<String>,
    /// Each threshold, and whether it holds.
    pub judged: Vec<Judged>,
}

/// Writes the pages and judges the thresholds.
///
/// # Errors
/// There is no such run, what it left cannot be read, or the pages cannot be written.
pub async fn report(request: Request) -> anyhow::Result<Reported> {
    let run = request.storage.run(&request.run);
    let gathered = Gathered::load(&run).await?;
    let judged: Vec<Judged> = request.thresholds.iter().map(|t| t.judge(&gathered.summary)).collect();
    let facts = Facts::new(&gathered, request.price.as_ref());
    let pages = [
        (HTML, html::page(&gathered, &facts, &judged)),
        (MARKDOWN, markdown::page(&gathered, &facts, &judged, request.out.is_none())),
    ];
    let mut places = Vec::new();
    for (name, text) in pages {
        match &request.out {
            None => {
                run.put(name, text.into()).await?;
                places.push(run.describe(name));
            }
            Some(folder) => {
                let path = folder.join(name);
                std::fs::create_dir_all(folder)
                    .and_then(|()| std::fs::write(&path, text))
                    .with_context(|| format!("cannot write {}", path.display()))?;
                places.push(path.display().to_string());
            }
        }
    }
    Ok(Reported { places, judged })
}

/// One line that says it all.
fn verdict(gathered: &Gathered, judged: &[Judged]) -> (Standing, String) {
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

/// How the thresholds turned out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Open,
    Met,
    Missed,
}
