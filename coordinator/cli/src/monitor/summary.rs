//! `summary.json`, and the table of teacher and student that ends a run.

use comfy_table::{CellAlignment, Table, presets};
use serde::{Deserialize, Serialize};

use potstill_proto::scores::{Scores, Subject};

use super::metrics::Metrics;

/// The result of a run. A value that was not measured is `null`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The run's name.
    pub run: String,
    /// Ranks at the end.
    pub world_size: Option<u32>,
    /// Completed iterations of the final state, over all attempts.
    pub iterations: u64,
    /// Iterations that were computed more than once, because every worker that held their result was lost.
    #[serde(default)]
    pub repeated_iterations: u64,
    /// Images of the final state: `iterations` times the global batch. Work that was lost and repeated counts once.
    pub images: u64,
    /// Images over the time of the iterations that `metrics.jsonl` holds, of all attempts: no evaluations, no waiting.
    pub images_per_second: Option<f64>,
    /// Wall time in seconds of all attempts: of this one from its start to the run's end, of each earlier one from its
    /// start to its last line in `metrics.jsonl`. Evaluations, waiting and repeated work count; the pauses between
    /// attempts do not.
    pub wall_seconds: f64,
    /// The pretrained network.
    pub teacher: Scores,
    /// The generator after the last iteration.
    pub student: Scores,
    /// The generator before the first.
    pub initial: Initial,
}

/// The initial student.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Initial {
    /// See [`Scores::fid`].
    pub fid: Option<f64>,
    /// See [`Scores::agreement`].
    pub agreement: Option<f64>,
    /// See [`Scores::clip_score`].
    pub clip_score: Option<f64>,
}

impl Summary {
    /// The summary of a run with `iterations` completed iterations.
    #[must_use]
    pub fn new(
        run: &str,
        metrics: &Metrics,
        iterations: u64,
        world_size: Option<u32>,
        wall_seconds: f64,
    ) -> Self {
        let student_at = |iteration| {
            metrics.evaluations(Subject::Student).rfind(|e| e.iteration == iteration).map(|e| e.scores)
        };
        let teacher = metrics.evaluations(Subject::Teacher).next_back().map(|e| e.scores);
        let trained: u64 = metrics.training().map(|t| t.iterations).sum();
        let seconds: f64 = metrics.training().map(|t| t.iterations as f64 * t.seconds.total).sum();
        Self {
            run: run.to_owned(),
            world_size: world_size.or_else(|| metrics.training().last().map(|t| t.world_size)),
            iterations,
            repeated_iterations: 0,
            images: iterations * metrics.global_batch(),
            images_per_second: (seconds > 0.0).then(|| (trained * metrics.global_batch()) as f64 / seconds),
            wall_seconds,
            teacher: teacher.unwrap_or_default(),
            student: student_at(iterations).unwrap_or_default(),
            initial: student_at(0)
                .map(|s| Initial { fid: s.fid, agreement: s.agreement, clip_score: s.clip_score })
                .unwrap_or_default(),
        }
    }

    /// The table of teacher and student; `None` when neither was evaluated.
    #[must_use]
    pub fn table(&self) -> Option<Table> {
        if self.teacher == Scores::default() && self.student == Scores::default() {
            return None;
        }
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED).set_header(["", "teacher", "student"]);
        let number = |digits: usize| {
            move |x: Option<f64>| match x.filter(|x| x.is_finite()) {
                Some(x) => format!("{x:.digits$}"),
                None => "–".to_owned(),
            }
        };
        let percent = |x: Option<f64>| match x.filter(|x| x.is_finite()) {
            Some(x) => format!("{:.1} %", x * 100.0),
            None => "–".to_owned(),
        };
        let (t, s) = (&self.teacher, &self.student);
        let clip_score = [t.clip_score, s.clip_score];
        let clip_score = clip_score.iter().any(Option::is_some).then(|| {
            let [teacher, student] = clip_score.map(number(2));
            ("CLIP score", teacher, student)
        });
        let quality = [
            ("FID (lower is better)", number(3)(t.fid), number(3)(s.fid)),
            ("class agreement", percent(t.agreement), percent(s.agreement)),
        ];
        let others = [
            ("recall", number(3)(t.recall), number(3)(s.recall)),
            ("diversity", number(3)(t.diversity), number(3)(s.diversity)),
            (
                "network evaluations per image",
                number(0)(t.evaluations_per_image),
                number(0)(s.evaluations_per_image),
            ),
            ("images/s", number(1)(t.images_per_second), number(1)(s.images_per_second)),
        ];
        for (name, teacher, student) in quality.into_iter().chain(clip_score).chain(others) {
            table.add_row([name.to_owned(), teacher, student]);
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        Some(table)
    }
}

#[cfg(test)]
mod tests {
    use potstill_proto::scores::Subject::{Student, Teacher};

    use super::*;
    use crate::monitor::fixtures::{evaluation, spec, totals};

    fn scored() -> Metrics {
        let mut metrics = Metrics::new(&spec(20));
        metrics.evaluation(&evaluation(Teacher, 0, 3.0), 0.0);
        metrics.evaluation(&evaluation(Student, 0, 300.0), 0.0);
        for i in 0..20 {
            metrics.iteration(totals(i), 0.0);
        }
        metrics.evaluation(&evaluation(Student, 20, 5.0), 0.0);
        metrics
    }

    #[test]
    fn the_summary_has_exactly_its_keys() {
        let summary = Summary::new("r", &scored(), 20, Some(2), 12.5);
        let json = serde_json::to_value(&summary).unwrap();
        let keys = |v: &serde_json::Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        let mut expected = [
            "run",
            "world_size",
            "iterations",
            "repeated_iterations",
            "images",
            "images_per_second",
            "wall_seconds",
            "teacher",
            "student",
            "initial",
        ];
        expected.sort_unstable();
        let mut found = keys(&json);
        found.sort_unstable();
        assert_eq!(found, expected);
        assert_eq!(json["teacher"]["fid"], 3.0);
        assert_eq!(json["student"]["fid"], 5.0);
        assert_eq!(json["student"]["evaluations_per_image"], 1.0);
        assert_eq!(json["initial"]["fid"], 300.0);
        assert_eq!(json["images"], 2560);
        let speed = json["images_per_second"].as_f64().unwrap();
        assert!((speed - 128.0 / 0.31).abs() < 1e-6, "{speed}");
    }

    #[test]
    fn what_was_not_measured_is_null() {
        let summary = Summary::new("r", &Metrics::new(&spec(20)), 0, None, 1.0);
        assert!(summary.table().is_none());
        let json = serde_json::to_value(&summary).unwrap();
        assert!(json["world_size"].is_null());
        assert!(json["images_per_second"].is_null());
        assert!(json["student"]["fid"].is_null());
        assert!(json["initial"]["agreement"].is_null());
    }

    #[test]
    fn the_student_is_the_one_after_the_last_iteration() {
        let summary = Summary::new("r", &scored(), 15, None, 1.0);
        assert_eq!(summary.student, Scores::default());
        assert_eq!(summary.world_size, Some(2));
    }

    #[test]
    fn the_table_sets_teacher_against_student() {
        let text = Summary::new("r", &scored(), 20, Some(2), 1.0).table().unwrap().to_string();
        for part in ["teacher", "student", "3.000", "5.000", "93.1 %", "35", "1310.0"] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert!(!text.contains("CLIP"), "what nothing measures has no row:\n{text}");
    }

    #[test]
    fn a_clip_score_is_shown_where_there_is_one() {
        let mut metrics = scored();
        let mut report = evaluation(Student, 20, 5.0);
        report.scores.clip_score = Some(31.416);
        metrics.evaluation(&report, 0.0);
        let summary = Summary::new("r", &metrics, 20, Some(2), 1.0);
        let json = serde_json::to_value(&summary).unwrap();
        assert_eq!(json["student"]["clip_score"], 31.416);
        assert!(json["teacher"]["clip_score"].is_null());
        let text = summary.table().unwrap().to_string();
        assert!(text.contains("CLIP score") && text.contains("31.42"), "{text}");
    }
}
