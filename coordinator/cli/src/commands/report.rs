//! `potstill report`: compares teacher and student, and checks thresholds.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::Args;
use potstill_logging::print;
use potstill_storage::Root;

use super::{
    exit::NOT_GOOD,
    run_name::{RunName, runtime},
};
use crate::report::{self, Price, Threshold};

/// Text below the options in `--help`.
pub const AFTER_REPORT_HELP: &str = "\
Thresholds compare a number of summary.json with a number or with a multiple of another:
  --require 'student.fid<=0.3' --require 'student.recall>=0.9*teacher.recall'

Exit codes:
  0  the page is written, and every threshold is met
  1  the run cannot be read, or the page cannot be written
  2  the command line is not acceptable
  3  the page is written, and a threshold is not met or was not measured";

/// Arguments of `potstill report`.
#[derive(Debug, Args)]
pub struct ReportArguments {
    #[command(flatten)]
    run: RunName,
    /// Folder for report.html and report.md [default: the run's folder]
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Price of one device for one hour
    #[arg(long, value_name = "PRICE", value_parser = price)]
    price_per_device_hour: Option<f64>,
    /// Currency of the price
    #[arg(long, value_name = "NAME", default_value = "EUR")]
    currency: String,
    /// A condition on the student's metrics, as in student.fid<=0.3; can be repeated
    #[arg(long, value_name = "THRESHOLD")]
    require: Vec<Threshold>,
}

fn price(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(price) if price.is_finite() && price >= 0.0 => Ok(price),
        _ => Err("expected a number that is not negative".to_owned()),
    }
}

impl ReportArguments {
    /// Writes the pages.
    pub fn write(self) -> anyhow::Result<ExitCode> {
        let RunName { run, storage } = self.run;
        let run = run.parse()?;
        let currency = self.currency;
        let price = self.price_per_device_hour.map(|per_device_hour| Price { per_device_hour, currency });
        let storage = Root::open_existing(&storage).context("--storage")?;
        let request = report::Request { run, storage, out: self.out, price, thresholds: self.require };
        let reported = runtime()?.block_on(report::report(request))?;
        for place in reported.places {
            print(format_args!("{place}"));
        }
        let missed: Vec<_> = reported.judged.iter().filter(|judged| !judged.holds).collect();
        for judged in &missed {
            eprintln!("not met: {}: {}", judged.text, judged.explanation);
        }
        Ok(if missed.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(NOT_GOOD) })
    }
}
