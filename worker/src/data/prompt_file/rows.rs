//! The rows of a file of prompts: a few broken ones are left out, as broken images are.

use anyhow::{bail, ensure};
use serde_json::Value;

use crate::{
    data::{tally::Tally, text},
    process::work,
};

/// The content of a file of prompts.
#[derive(Debug, Default)]
pub struct Read {
    pub texts: Vec<String>,
    /// From a column `label` of whole numbers beside the prompts, where every row has one.
    pub labels: Option<Vec<i64>>,
}

/// The column of labels.
pub const LABEL: &str = "label";
/// Names the keys that set the prompts' column.
pub const COLUMN: &str =
    "the prompts' column (prompts.column, evaluation.prompts_column or --prompts-column)";

/// What a row may have instead of a prompt.
pub const NULL: &str = "null";
pub const LIST: &str = "a list, and not one text,";
pub const NO_TEXT: &str = "no text";

/// A row's prompt, and its label as far as there is one.
pub struct Row {
    pub text: String,
    pub label: Option<Value>,
}

/// The good rows so far, and a count of the others.
#[derive(Default)]
pub struct Rows {
    texts: Vec<String>,
    labels: Vec<Option<i64>>,
    /// The first label that is no whole number.
    strange: Option<String>,
    tally: Tally,
}

impl Rows {
    /// Takes one row. One whose prompt is empty is passed over.
    pub fn add(&mut self, place: &str, row: anyhow::Result<Row>) {
        work::complete();
        match row {
            Ok(row) if row.text.trim().is_empty() => {}
            Ok(row) => {
                let label = row.label.filter(|label| !label.is_null());
                let number = label.as_ref().and_then(text::whole);
                if let (Some(label), None) = (&label, number) {
                    self.strange.get_or_insert_with(|| format!("{place}: {label}"));
                }
                self.texts.push(row.text);
                self.labels.push(number);
            }
            Err(error) => self.tally.broken(format!("{place}: {error:#}")),
        }
    }

    /// All of them. What is wrong with labels is said: without them there is no score of agreement.
    ///
    /// # Errors
    /// There are none, or too many are broken.
    pub fn finish(self) -> anyhow::Result<Read> {
        self.tally.judge(self.texts.len(), "rows")?;
        ensure!(!self.texts.is_empty(), "holds no prompts");
        let (rows, labelled) = (self.texts.len(), self.labels.iter().flatten().count());
        if let Some(strange) = self.strange {
            tracing::warn!("a label is no whole number, so agreement is not measured: {strange}");
        } else if labelled > 0 && labelled < rows {
            tracing::warn!("{labelled} of {rows} prompts have a label, so agreement is not measured");
        }
        let labels: Option<Vec<i64>> = self.labels.into_iter().collect();
        Ok(Read { texts: self.texts, labels })
    }
}

/// The prompt of a row that is a JSON object.
///
/// # Errors
/// It has none under this key; those that it has are named.
pub fn from_object(value: &Value, column: &str) -> anyhow::Result<Row> {
    let Value::Object(object) = value else { bail!("is not an object") };
    let text = match object.get(column) {
        Some(Value::String(text)) => text.clone(),
        found => {
            let what = match found {
                None => "nothing",
                Some(Value::Null) => NULL,
                Some(Value::Array(_)) => LIST,
                Some(_) => NO_TEXT,
            };
            let keys: Vec<&String> = object.keys().collect();
            bail!("has {what} under {column:?}, {COLUMN}; its keys are {keys:?}");
        }
    };
    Ok(Row { text, label: object.get(LABEL).cloned() })
}
