//! The report's numbers as text, the same for HTML and Markdown.

use super::gather::Gathered;
use potstill_proto::scores::Scores;

/// The price of one device for one hour.
#[derive(Clone, Debug, PartialEq)]
pub struct Price {
    /// For one device and one hour.
    pub per_device_hour: f64,
    /// The currency, as it is to be printed.
    pub currency: String,
}

/// Stands for a value that was not measured.
pub const DASH: &str = "–";

/// One row that compares teacher and student.
pub struct Comparison {
    /// What is compared.
    pub label: &'static str,
    /// A short explanation.
    pub meaning: &'static str,
    /// The teacher's value.
    pub teacher: String,
    /// The student's value.
    pub student: String,
    /// The student's value divided by the teacher's.
    pub ratio: String,
}

/// A group of comparisons.
pub struct Group {
    /// The heading: Quality, Alignment, …
    pub title: &'static str,
    /// Its rows.
    pub rows: Vec<Comparison>,
}

/// All numbers of the report.
pub struct Facts {
    /// The comparisons of teacher and student.
    pub groups: Vec<Group>,
    /// The cost of training: label and value.
    pub training: Vec<(&'static str, String)>,
    /// How the cost of sampling was computed.
    pub formula: String,
    /// The student's evaluations over the run.
    pub course: Course,
}

/// Evaluations over a run.
pub struct Course {
    /// Headings of the columns.
    pub titles: Vec<&'static str>,
    /// One row for each evaluation.
    pub rows: Vec<Vec<String>>,
}

impl Facts {
    pub fn new(gathered: &Gathered, price: Option<&Price>) -> Self {
        let summary = &gathered.summary;
        let devices = f64::from(summary.world_size.unwrap_or(1));
        let (t, s) = (&summary.teacher, &summary.student);
        let row = |label, meaning, of: &dyn Fn(&Scores) -> Option<f64>, show: &dyn Fn(f64) -> String| {
            let [teacher, student] = [of(t), of(s)].map(|x| x.filter(|x| x.is_finite()));
            let ratio = teacher.zip(student).filter(|(t, _)| *t != 0.0).map(|(t, s)| s / t);
            let text = |x: Option<f64>| x.map_or_else(|| DASH.to_owned(), show);
            Comparison {
                label,
                meaning,
                teacher: text(teacher),
                student: text(student),
                ratio: ratio.map_or_else(|| DASH.to_owned(), |r| format!("{}×", significant(r))),
            }
        };
        let three = |x: f64| format!("{x:.3}");
        let percent = |x: f64| format!("{:.1} %", x * 100.0);
        let seconds_per_thousand = |s: &Scores| s.images_per_second.map(|speed| 1000.0 / speed);
        let mut cost = vec![
            row(
                "Evaluations per image",
                "network calls behind one image",
                &|s| s.evaluations_per_image,
                &|x| format!("{x:.0}"),
            ),
            row(
                "Images per second",
                "all devices of the run together",
                &|s| s.images_per_second,
                &significant,
            ),
            row("Seconds per 1,000 images", "all devices together", &seconds_per_thousand, &significant),
        ];
        if let Some(price) = price {
            let money = |s: &Scores| {
                seconds_per_thousand(s).map(|seconds| seconds / 3600.0 * devices * price.per_device_hour)
            };
            let show = |x: f64| format!("{} {}", significant(x), price.currency);
            cost.push(row("Price of 1,000 images", "at the price given", &money, &show));
        }
        let mut alignment = vec![row(
            "Class agreement",
            "share whose classifier agrees with the condition",
            &|s| s.agreement,
            &percent,
        )];
        if t.clip_score.or(s.clip_score).is_some() {
            let meaning = "100 × cosine of image and prompt in CLIP's space, at least 0";
            alignment.push(row("CLIP score", meaning, &|s| s.clip_score, &|x| format!("{x:.2}")));
        }
        let mut groups = vec![
            Group {
                title: "Quality",
                rows: vec![
                    row("FID", "distance to real images; lower is better", &|s| s.fid, &three),
                    row("Precision", "share of images that look real", &|s| s.precision, &three),
                    row("Recall", "share of real images that are covered", &|s| s.recall, &three),
                ],
            },
            Group { title: "Alignment", rows: alignment },
            Group {
                title: "Diversity",
                rows: vec![row(
                    "Diversity",
                    "mean feature distance between two images of one condition",
                    &|s| s.diversity,
                    &three,
                )],
            },
        ];
        groups.push(Group { title: "Cost", rows: cost });
        Self {
            groups,
            training: training(gathered, price),
            formula: formula(price, devices),
            course: course(gathered),
        }
    }
}

fn formula(price: Option<&Price>, devices: f64) -> String {
    match price {
        Some(price) => format!(
            "Price of 1,000 images = seconds ÷ 3,600 × {devices:.0} device(s) × {} {} per device and hour.",
            price.per_device_hour, price.currency
        ),
        None => "No price per device-hour was given, so there is no price of images.".to_owned(),
    }
}

fn training(gathered: &Gathered, price: Option<&Price>) -> Vec<(&'static str, String)> {
    let summary = &gathered.summary;
    let hours = gathered.device_seconds / 3600.0;
    let mut rows = vec![
        ("Iterations", grouped(summary.iterations)),
        ("Images generated per phase", grouped(summary.images)),
        ("Wall time", duration(summary.wall_seconds)),
        ("Device-hours", significant(hours)),
    ];
    if let Some(price) = price {
        rows.push(("Price", format!("{} {}", significant(hours * price.per_device_hour), price.currency)));
    }
    rows
}

fn course(gathered: &Gathered) -> Course {
    let number =
        |x: Option<f64>, digits: usize| x.map_or_else(|| DASH.to_owned(), |x| format!("{x:.digits$}"));
    let clip = gathered.evaluations.iter().any(|e| e.scores.clip_score.is_some());
    let row = |e: &crate::monitor::metrics::Evaluation| {
        let s = &e.scores;
        let clip_score = clip.then(|| number(s.clip_score, 2));
        let known = [
            grouped(e.iteration),
            grouped(e.images),
            number(s.fid, 3),
            number(s.agreement, 3),
            number(s.recall, 3),
            number(s.diversity, 3),
        ];
        known.into_iter().chain(clip_score).collect()
    };
    let titles = ["Iteration", "Images", "FID", "Agreement", "Recall", "Diversity"];
    Course {
        titles: titles.into_iter().chain(clip.then_some("CLIP score")).collect(),
        rows: gathered.evaluations.iter().map(row).collect(),
    }
}

/// Three significant digits, without trailing zeros.
fn significant(x: f64) -> String {
    if x == 0.0 || !x.is_finite() {
        return format!("{x}");
    }
    let digits = (2 - x.abs().log10().floor() as i32).max(0) as usize;
    if digits == 0 { grouped(x.round() as u64) } else { format!("{x:.digits$}") }
}

/// With separators between thousands.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(
            [significant(0.012_345), significant(1.234_5), significant(35.0)],
            ["0.0123", "1.23", "35.0"]
        );
        assert_eq!([significant(11_327.4), significant(0.0)], ["11,327", "0"]);
        assert_eq!([grouped(7), grouped(1234), grouped(1_234_567)], ["7", "1,234", "1,234,567"]);
        assert_eq!([duration(9.4), duration(194.0), duration(7384.0)], ["9 s", "3 min 14 s", "2 h 3 min"]);
    }
}
