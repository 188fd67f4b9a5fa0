//! The report as Markdown.

use std::fmt::Write;

use super::{facts::Facts, gather::Gathered, thresholds::Judged, verdict::verdict};

/// The Markdown. Its pictures are files of the run's folder, so they are shown only when the report lies beside them.
pub fn page(gathered: &Gathered, facts: &Facts, judged: &[Judged], beside_pictures: bool) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write(&mut text, gathered, facts, judged, beside_pictures);
    text
}

fn write(
    text: &mut String,
    gathered: &Gathered,
    facts: &Facts,
    judged: &[Judged],
    beside_pictures: bool,
) -> std::fmt::Result {
    let (_, verdict) = verdict(gathered, judged);
    writeln!(text, "# Teacher and student: {}\n\n**{}**\n", cell(&gathered.summary.run), cell(&verdict))?;
    if !judged.is_empty() {
        writeln!(text, "| threshold | | measured |\n|---|---|---|")?;
        for j in judged {
            let holds = if j.holds { "met" } else { "failed" };
            writeln!(text, "| {} | {holds} | {} |", cell(&j.text), cell(&j.explanation))?;
        }
        writeln!(text)?;
    }
    if beside_pictures && gathered.samples.is_some() {
        writeln!(text, "![Above: the teacher. Below: the student, same noise, same classes](samples.png)\n")?;
    }
    writeln!(text, "| | teacher | student | student ÷ teacher |\n|---|---:|---:|---:|")?;
    for group in &facts.groups {
        writeln!(text, "| **{}** | | | |", group.title)?;
        for row in &group.rows {
            let label = format!("{} ({})", row.label, row.meaning);
            writeln!(text, "| {label} | {} | {} | {} |", row.teacher, row.student, row.ratio)?;
        }
    }
    writeln!(text, "\n{}\n\n## What training cost\n\n| | |\n|---|---:|", cell(&facts.formula))?;
    for (label, value) in &facts.training {
        writeln!(text, "| {label} | {} |", cell(value))?;
    }
    writeln!(text, "\n## How the student came about\n")?;
    if beside_pictures && gathered.curves.is_some() {
        writeln!(text, "![FID and losses over images seen](curves.png)\n")?;
    }
    let titles = &facts.course.titles;
    writeln!(text, "| {} |\n|{}", titles.join(" | "), "---:|".repeat(titles.len()))?;
    for row in &facts.course.rows {
        writeln!(text, "| {} |", row.join(" | "))?;
    }
    writeln!(
        text,
        "\n## Settings\n\n```toml\n{}\n```",
        gathered.specification.trim_end().replace("```", "'''")
    )
}

/// Escapes text from a file or the command line, so that it neither ends a table's cell nor starts markup.
fn cell(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '\n' | '\r' => escaped.push(' '),
            '|' | '*' | '_' | '`' | '<' | '[' | '\\' => escaped.extend(['\\', c]),
            c => escaped.push(c),
        }
    }
    escaped
}
