//! `potstill report`: one page for the person who decides whether a student is rolled out.
//!
//! Everything on it is taken from what the run left behind: `run.toml`, `summary.json`, `metrics.jsonl` and the pictures. What
//! was not measured shows as a dash and is never made up.

mod facts;
mod gather;
mod html;
mod markdown;
pub mod thresholds;
mod verdict;

use std::path::PathBuf;

use anyhow::Context;
use potstill_storage::{Root, RunId};

use self::{facts::Facts, gather::Gathered, thresholds::Judged};
pub use self::{facts::Price, thresholds::Threshold};

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
