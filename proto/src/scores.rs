//! Metrics of the samples of a teacher or of a student, and their cost.

use serde::{Deserialize, Serialize};

use crate::{cursor::Generation, wire};

/// Whose samples were evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// The pretrained network with its sampler.
    Teacher,
    /// The averaged generator.
    Student,
}

impl std::fmt::Display for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The metrics of one set of samples. What was not measured, or is not finite, is `None`, and `null` in JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Scores {
    /// Fréchet distance to the reference images in feature space (FID, 1706.08500); lower is better.
    pub fid: Option<f64>,
    /// Share of samples whose classifier agrees with the condition.
    pub agreement: Option<f64>,
    /// Share of samples that lie in the manifold of the reference (1904.06991).
    pub precision: Option<f64>,
    /// Share of the reference that lies in the manifold of the samples (1904.06991).
    pub recall: Option<f64>,
    /// Mean distance in feature space between two samples of one condition.
    pub diversity: Option<f64>,
    /// Mean over samples of 100·max(cos(image, text), 0), in [0, 100] (2104.08718).
    pub clip_score: Option<f64>,
    /// Network evaluations per image.
    pub evaluations_per_image: Option<f64>,
    /// Images per second of all processes together.
    pub images_per_second: Option<f64>,
    /// Number of samples evaluated.
    pub samples: u64,
}

impl Scores {
    /// The metrics with their names, as in JSON.
    #[must_use]
    pub fn named(&self) -> [(&'static str, Option<f64>); 6] {
        [
            ("fid", self.fid),
            ("agreement", self.agreement),
            ("precision", self.precision),
            ("recall", self.recall),
            ("diversity", self.diversity),
            ("clip_score", self.clip_score),
        ]
    }
}

impl Subject {
    /// Its name, as in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Teacher => "teacher",
            Self::Student => "student",
        }
    }
}

/// A metric that was measured and is finite.
#[must_use]
pub fn measured(number: f64) -> Option<f64> {
    Some(number).filter(|number| number.is_finite())
}

/// One evaluation, as rank 0 reports it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// The generation that evaluated.
    pub generation: Generation,
    /// Completed iterations.
    pub iteration: u64,
    /// Whose samples were evaluated.
    pub subject: Subject,
    /// The result.
    pub scores: Scores,
}

impl From<Subject> for wire::Subject {
    fn from(subject: Subject) -> Self {
        match subject {
            Subject::Teacher => Self::Teacher,
            Subject::Student => Self::Student,
        }
    }
}

impl From<Evaluation> for wire::EvaluationReport {
    fn from(evaluation: Evaluation) -> Self {
        let s = evaluation.scores;
        Self {
            generation: evaluation.generation.0,
            iteration: evaluation.iteration,
            subject: wire::Subject::from(evaluation.subject).into(),
            scores: Some(wire::Scores {
                fid: s.fid,
                agreement: s.agreement,
                precision: s.precision,
                recall: s.recall,
                evaluations_per_image: s.evaluations_per_image,
                images_per_second: s.images_per_second,
                samples: s.samples,
                diversity: s.diversity,
                clip_score: s.clip_score,
            }),
        }
    }
}

impl TryFrom<wire::EvaluationReport> for Evaluation {
    type Error = String;

    fn try_from(report: wire::EvaluationReport) -> Result<Self, String> {
        let subject = match wire::Subject::try_from(report.subject) {
            Ok(wire::Subject::Teacher) => Subject::Teacher,
            Ok(wire::Subject::Student) => Subject::Student,
            Ok(wire::Subject::Unspecified) | Err(_) => {
                return Err(format!("unknown subject {}", report.subject));
            }
        };
        let s = report.scores.ok_or("no scores")?;
        let finite = |number: Option<f64>| number.and_then(measured);
        Ok(Self {
            generation: Generation(report.generation),
            iteration: report.iteration,
            subject,
            scores: Scores {
                fid: finite(s.fid),
                agreement: finite(s.agreement),
                precision: finite(s.precision),
                recall: finite(s.recall),
                diversity: finite(s.diversity),
                clip_score: finite(s.clip_score),
                evaluations_per_image: finite(s.evaluations_per_image),
                images_per_second: finite(s.images_per_second),
                samples: s.samples,
            },
        })
    }
}
