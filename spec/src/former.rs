//! Keys of earlier versions, and their replacements.
//!
//! A run file that has one is rejected with the new key's name. The frozen `run.toml` of a run that is over is
//! translated, so that the run can still be exported and reported on.

use toml::{Table, Value};

/// A key that an earlier version had.
#[derive(Clone, Copy, Debug)]
pub struct FormerKey {
    /// The key, dotted; the name of a section stands for all keys in it.
    pub key: &'static str,
    /// A sentence about its replacement.
    pub now: &'static str,
    /// How it is read in a run that is over.
    fate: Fate,
}

/// How a former key is read where a run is over.
#[derive(Clone, Copy, Debug)]
enum Fate {
    /// It is dropped: it has no effect on a run that is over.
    Gone,
    /// The same value under another key.
    Renamed(&'static str),
    /// A switch that has become one of several values of another key.
    Chosen(&'static str, &'static str),
    /// Seconds, under another key as text with a unit.
    Seconds(&'static str),
}

/// All of them.
pub const FORMER_KEYS: &[FormerKey] = &[
    FormerKey {
        key: "optimiser.clip_value",
        now: "it is `optimizer.generator_clip_value` and `optimizer.fake_score_clip_value` now",
        fate: Fate::Gone,
    },
    FormerKey {
        key: "optimiser",
        now: "the section is `[optimizer]` now, with the same keys",
        fate: Fate::Renamed("optimizer"),
    },
    FormerKey {
        key: "adversarial.score_identity_weight",
        now: "it is `distillation.score_identity_weight` now, and holds in every run, from the first image",
        fate: Fate::Gone,
    },
    FormerKey {
        key: "adversarial.start_images",
        now: "it is `adversarial.join_images` now: the discriminator learns from the first image, and only the generator's \
              term waits, until more images than this have been seen",
        fate: Fate::Gone,
    },
    FormerKey {
        key: "memory.activation_checkpointing",
        now: "it is `memory.recompute` now",
        fate: Fate::Renamed("memory.recompute"),
    },
    FormerKey {
        key: "memory.shard_optimiser",
        now: "it is `memory.shard = \"optimizer\"` now",
        fate: Fate::Chosen("memory.shard", "optimizer"),
    },
    FormerKey {
        key: "memory.shard_optimizer",
        now: "it is `memory.shard = \"optimizer\"` now",
        fate: Fate::Chosen("memory.shard", "optimizer"),
    },
    FormerKey {
        key: "cluster.failure_timeout_seconds",
        now: "it is `cluster.failure_timeout` now, with a unit: \"10s\"",
        fate: Fate::Seconds("cluster.failure_timeout"),
    },
    FormerKey {
        key: "cluster.wait_timeout_seconds",
        now: "it is `cluster.wait_timeout` now, with a unit: \"5m\"",
        fate: Fate::Seconds("cluster.wait_timeout"),
    },
];

/// Optional keys whose absence earlier versions wrote as a value.
const ABSENT: &[&str] = &[
    "checkpoint.keep_every",
    "checkpoint.stop_after_failures",
    "evaluation.every",
    "teacher.weights",
    "generator.step_weights",
    "prompts.data",
];

/// The entry of a key, or of its section.
#[must_use]
pub fn find(key: &str) -> Option<&'static FormerKey> {
    let is = |former: &&FormerKey| {
        key.strip_prefix(former.key).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    FORMER_KEYS.iter().find(is)
}

/// Rewrites the specification of a finished run as this version would have frozen it.
pub(crate) fn translate(table: &mut Table) {
    for former in FORMER_KEYS {
        let Some(value) = take(table, former.key) else { continue };
        match former.fate {
            Fate::Gone => {}
            Fate::Renamed(key) => put(table, key, value),
            Fate::Chosen(key, chosen) if value.as_bool() == Some(true) => {
                put(table, key, Value::String(chosen.to_owned()));
            }
            Fate::Chosen(..) => {}
            Fate::Seconds(key) => {
                let seconds = value.as_float().or_else(|| value.as_integer().map(|s| s as f64));
                if let Some(seconds) = seconds.filter(|s| (0.0..=1e9).contains(s)) {
                    put(table, key, Value::String(format!("{}ms", (seconds * 1000.0) as u64)));
                }
            }
        }
    }
    for key in ABSENT {
        let absent = |value: &Value| match value {
            Value::Integer(0) => true,
            Value::String(text) => text.is_empty(),
            Value::Array(items) => items.is_empty(),
            _ => false,
        };
        if let Some(value) = take(table, key).filter(|value| !absent(value)) {
            put(table, key, value);
        }
    }
    if let Some(value) = take(table, "checkpoint.keep_last") {
        let all = value == Value::Integer(0);
        put(table, "checkpoint.keep_last", if all { Value::String("all".to_owned()) } else { value });
    }
}

fn take(table: &mut Table, key: &str) -> Option<Value> {
    match key.split_once('.') {
        Some((section, rest)) => take(table.get_mut(section)?.as_table_mut()?, rest),
        None => table.remove(key),
    }
}

fn put(table: &mut Table, key: &str, value: Value) {
    match key.split_once('.') {
        Some((section, rest)) => {
            let section = table.entry(section).or_insert_with(|| Value::Table(Table::new()));
            if let Some(section) = section.as_table_mut() {
                put(section, rest, value);
            }
        }
        None => {
            table.insert(key.to_owned(), value);
        }
    }
}
