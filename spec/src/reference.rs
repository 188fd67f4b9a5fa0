//! The reference of a run file's keys, for users and for editors: `docs/configuration.md` and `docs/run.schema.json`.
//! Both are made from the types, and a test fails when a file is stale.

use std::fmt::Write;

use serde_json::Value;

use crate::RunSpec;

/// The JSON schema of a run file.
#[must_use]
pub fn schema() -> Value {
    let mut schema = schemars::schema_for!(RunSpec).to_value();
    // `extends` is not part of the specification: it is resolved when the file is read.
    if let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) {
        properties.insert(
            "extends".to_owned(),
            serde_json::json!({ "type": "string", "description": "A run file whose values hold where this one has none." }),
        );
    }
    schema
}

/// Every section and key, with type, default and meaning, as Markdown.
#[must_use]
pub fn markdown() -> String {
    let schema = schemars::schema_for!(RunSpec).to_value();
    let mut page = String::from(HEAD);
    for (section, entry) in properties(&schema) {
        let definition = resolve(&schema, entry);
        let _ = write!(page, "\n## `[{section}]`\n\n{}\n", text(definition));
        if optional(entry) {
            let _ = writeln!(page, "\nThe section may be absent: {}", text(entry));
        }
        let _ = write!(page, "\n| key | type | default | meaning |\n|---|---|---|---|\n");
        rows(&schema, definition, "", &mut page);
    }
    page
}

const HEAD: &str = "\
# Configuration

Every key of a run file. This page is made from the source (`POTSTILL_BLESS=1 cargo test -p potstill-spec`); a test fails when it is
stale. Editors check and complete run files by [`run.schema.json`](run.schema.json).

- Values come in layers, and later ones win: defaults, the files that the file extends (`extends = \"base.toml\"`), the file, the
  environment (`POTSTILL__SECTION__KEY`), `--set section.key=value`.
- Relative paths are relative to the file that has them; those of the environment and of `--set` to the run file.
- `none` unsets a key whose default is –, as in `--set evaluation.every=none`.
- Durations have a unit: `\"500ms\"`, `\"30s\"`, `\"5m\"`.
- The four digits, a dot and the five digits in a meaning are a paper's number on arXiv.
";

/// The properties of an object's schema, in their order.
fn properties(definition: &Value) -> impl Iterator<Item = (&String, &Value)> {
    definition["properties"].as_object().into_iter().flatten()
}

/// The definition behind a reference, also behind an optional one.
fn resolve<'a>(schema: &'a Value, entry: &'a Value) -> &'a Value {
    let reference =
        |entry: &Value| entry["$ref"].as_str().and_then(|r| r.rsplit('/').next()).map(str::to_owned);
    let alternatives = entry["anyOf"].as_array().into_iter().flatten();
    let name = reference(entry).or_else(|| alternatives.filter_map(reference).next());
    name.map_or(entry, |name| &schema["$defs"][name])
}

/// Whether it may be absent.
fn optional(entry: &Value) -> bool {
    let null = |entry: &Value| entry["type"] == "null";
    entry["type"].as_array().is_some_and(|types| types.iter().any(|t| t == "null"))
        || entry["anyOf"].as_array().is_some_and(|any| any.iter().any(null))
}

/// A description on one line.
fn text(entry: &Value) -> String {
    let text = entry["description"].as_str().unwrap_or_default().replace('\n', " ");
    text.replace("[`", "`").replace("`]", "`").replace('|', "\\|")
}

/// A line for each key, and for each key of the tables in it.
fn rows(schema: &Value, definition: &Value, prefix: &str, page: &mut String) {
    for (key, entry) in properties(definition) {
        let inner = resolve(schema, entry);
        let required = definition["required"].as_array().into_iter().flatten().any(|name| name == key);
        let default = match &entry["default"] {
            _ if required => "required".to_owned(),
            Value::Null => "–".to_owned(),
            Value::Object(_) => "as below".to_owned(),
            Value::Array(items) => {
                let items: Vec<String> = items.iter().map(ToString::to_string).collect();
                format!("`[{}]`", items.join(", "))
            }
            value => format!("`{value}`"),
        };
        let table = inner.get("properties").is_some();
        let kind = if table { "table".to_owned() } else { kind(schema, entry) };
        let _ =
            writeln!(page, "| `{prefix}{key}` | {kind} | {default} | {}{} |", text(entry), choices(inner));
        if table {
            rows(schema, inner, &format!("{prefix}{key}."), page);
        }
    }
}

/// The type as text, in TOML's terms.
fn kind(schema: &Value, entry: &Value) -> String {
    let definition = resolve(schema, entry);
    let of = |entry: &Value| -> String {
        let name = match &entry["type"] {
            Value::Array(names) => names.iter().find(|name| *name != "null").and_then(Value::as_str),
            name => name.as_str(),
        };
        match name {
            Some("array") => match (entry["minItems"].as_u64(), entry["maxItems"].as_u64()) {
                (Some(least), Some(most)) if least == most => {
                    format!("{least} of {}", kind(schema, &entry["items"]))
                }
                _ => format!("list of {}", kind(schema, &entry["items"])),
            },
            Some("string") => "text".to_owned(),
            Some("boolean") => "true or false".to_owned(),
            Some(name) => name.to_owned(),
            None => String::new(),
        }
    };
    if definition.get("oneOf").is_some() || definition.get("enum").is_some() {
        return "choice".to_owned();
    }
    let alternatives: Vec<String> = definition["anyOf"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|alternative| alternative["type"] != "null")
        .map(|alternative| kind(schema, alternative))
        .collect();
    if alternatives.is_empty() { of(definition) } else { alternatives.join(" or ") }
}

/// The values of a choice, each with its meaning.
fn choices(definition: &Value) -> String {
    let mut text_of_all = String::new();
    for choice in definition["oneOf"].as_array().into_iter().flatten() {
        if let Some(name) = choice["const"].as_str() {
            let _ = write!(text_of_all, "<br>`\"{name}\"`: {}", text(choice));
        }
    }
    text_of_all
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    /// `POTSTILL_BLESS=1` writes the files again.
    #[test]
    fn what_is_written_in_docs_is_what_the_types_say() {
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
        let schema = serde_json::to_string_pretty(&super::schema()).unwrap() + "\n";
        for (name, now) in [("configuration.md", super::markdown()), ("run.schema.json", schema)] {
            let path = docs.join(name);
            if std::env::var_os("POTSTILL_BLESS").is_some() {
                std::fs::write(&path, &now).unwrap();
            }
            let there = std::fs::read_to_string(&path).unwrap_or_default();
            assert!(
                there == now,
                "{} is stale: POTSTILL_BLESS=1 cargo test -p potstill-spec",
                path.display()
            );
        }
    }
}
