//! `potstill report`: a report from which to decide whether a student is used.
//!
//! All its numbers come from the files of the run: `run.toml`, `summary.json`, `metrics.jsonl` and the pictures. A
//! value that was not measured shows as a dash.

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

/// The arguments of a report.
pub struct Request {
    /// The run.
    pub run: RunId,
    /// The storage that holds it.
    pub storage: Root,
    /// The folder for the report's files; if none, the run's folder.
    pub out: Option<PathBuf>,
    /// The price of one device for one hour.
    pub price: Option<Price>,
    /// The thresholds for the student.
    pub thresholds: Vec<Threshold>,
}

/// The result.
pub struct Reported {
    /// Where the report's files are.
    pub places: Vec<String>,
    /// Each threshold, and whether it holds.
    pub judged: Vec<Judged>,
}

/// Writes the report and checks the thresholds.
///
/// # Errors
/// There is no such run, its files cannot be read, or the report cannot be written.
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
