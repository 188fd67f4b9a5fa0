//! The report as HTML: one file without scripts, which loads nothing else.

use base64::{Engine, engine::general_purpose::STANDARD};
use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::{
    facts::Facts,
    gather::Gathered,
    thresholds::Judged,
    verdict::{Standing, verdict},
};

const STYLE: &str = include_str!("report.css");

/// The HTML. All text from files is escaped.
pub fn page(gathered: &Gathered, facts: &Facts, judged: &[Judged]) -> String {
    let name = &gathered.summary.run;
    let (standing, verdict) = verdict(gathered, judged);
    let class = match standing {
        Standing::Open => "verdict open",
        Standing::Met => "verdict met",
        Standing::Missed => "verdict missed",
    };
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { "Teacher and student: " (name) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                main {
                    header {
                        p.eyebrow { "Potstill · distillation report" }
                        h1 { (name) }
                        p class=(class) role="status" { (verdict) }
                    }
                    (thresholds(judged))
                    @if let Some(png) = &gathered.samples {
                        figure {
                            img src=(data_uri(png)) alt="Samples: rows of the teacher's images above, the student's below";
                            figcaption { "Above: the teacher. Below: the student, from the same noise and for the same classes." }
                        }
                    }
                    section {
                        h2 { "Teacher beside student" }
                        (comparison(facts))
                        p.note { (facts.formula) }
                    }
                    section {
                        h2 { "What training cost" }
                        table.narrow {
                            tbody {
                                @for (label, value) in &facts.training {
                                    tr { th scope="row" { (label) } td { (value) } }
                                }
                            }
                        }
                    }
                    section {
                        h2 { "How the student came about" }
                        @if let Some(png) = &gathered.curves {
                            figure {
                                img src=(data_uri(png)) alt="Curves: FID above and losses below, over images seen";
                            }
                        }
                        (course(facts))
                    }
                    section {
                        h2 { "Settings" }
                        pre { code { (gathered.specification.trim_end()) } }
                    }
                }
            }
        }
    }
    .into_string()
}

fn thresholds(judged: &[Judged]) -> Markup {
    html! {
        @if !judged.is_empty() {
            section {
                h2 { "Thresholds" }
                div.scroll {
                    table.judged {
                        thead { tr { th scope="col" { "Threshold" } th scope="col" { "" } th scope="col" { "Measured" } } }
                        tbody {
                            @for j in judged {
                                tr {
                                    th scope="row" { code { (j.text) } }
                                    td.text {
                                        @if j.holds { span.met { "✓ met" } } @else { span.missed { "✗ failed" } }
                                    }
                                    td.text { (j.explanation) }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn comparison(facts: &Facts) -> Markup {
    html! {
        div.scroll {
            table {
                thead {
                    tr {
                        th scope="col" { "" }
                        th scope="col" { "Teacher" }
                        th scope="col" { "Student" }
                        th scope="col" { "Student ÷ teacher" }
                    }
                }
                @for group in &facts.groups {
                    tbody {
                        tr.group { th scope="rowgroup" colspan="4" { (group.title) } }
                        @for row in &group.rows {
                            tr {
                                th scope="row" { (row.label) span.meaning { (row.meaning) } }
                                td { (row.teacher) }
                                td.student { (row.student) }
                                td { (row.ratio) }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn course(facts: &Facts) -> Markup {
    html! {
        div.scroll {
            table {
                thead {
                    tr {
                        @for title in &facts.course.titles {
                            th scope="col" { (title) }
                        }
                    }
                }
                tbody {
                    @for row in &facts.course.rows {
                        tr { @for value in row { td { (value) } } }
                    }
                }
            }
        }
    }
}

fn data_uri(png: &[u8]) -> String {
    format!("data:image/png;base64,{}", STANDARD.encode(png))
}
