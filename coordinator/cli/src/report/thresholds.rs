//! Thresholds such as `student.fid<=2*teacher.fid`, which a student must meet, checked against a run's summary.

use std::{fmt, str::FromStr};

use serde_json::Value;

use crate::monitor::summary::Summary;

/// A comparison of one of the summary's numbers with a number, or with a multiple of another.
#[derive(Clone, Debug, PartialEq)]
pub struct Threshold {
    left: String,
    relation: Relation,
    factor: f64,
    /// The name that `factor` multiplies; without one, `factor` is the bound itself.
    right: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Relation {
    AtMost,
    AtLeast,
    Below,
    Above,
}

/// A threshold that cannot be parsed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not a threshold: {problem}; expected one like student.fid<=0.3 or student.recall>=0.9*teacher.recall"
)]
pub struct BadThreshold {
    text: String,
    problem: String,
}

/// A threshold and whether it is met.
#[derive(Clone, Debug, PartialEq)]
pub struct Judged {
    /// Its text, with spaces.
    pub text: String,
    /// Whether it is met. A threshold on a value that was not measured is not.
    pub holds: bool,
    /// The values that were compared.
    pub explanation: String,
}

/// The longer ones first: `<=` begins with `<`.
const RELATIONS: [(&str, Relation); 4] =
    [("<=", Relation::AtMost), (">=", Relation::AtLeast), ("<", Relation::Below), (">", Relation::Above)];

impl Relation {
    fn holds(self, left: f64, right: f64) -> bool {
        match self {
            Self::AtMost => left <= right,
            Self::AtLeast => left >= right,
            Self::Below => left < right,
            Self::Above => left > right,
        }
    }

    fn sign(self) -> &'static str {
        RELATIONS.iter().find(|(_, relation)| *relation == self).map_or("", |(sign, _)| sign)
    }
}

impl FromStr for Threshold {
    type Err = BadThreshold;

    fn from_str(text: &str) -> Result<Self, BadThreshold> {
        let bad = |problem: String| BadThreshold { text: text.to_owned(), problem };
        let (at, sign, relation) = RELATIONS
            .iter()
            .filter_map(|(sign, relation)| text.find(sign).map(|at| (at, *sign, *relation)))
            .min_by_key(|(at, sign, _)| (*at, usize::MAX - sign.len()))
            .ok_or_else(|| bad("it has none of <=, >=, < and >".to_owned()))?;
        let (left, right) = (text[..at].trim(), text[at + sign.len()..].trim());
        let known = names();
        let name = |text: &str| match known.iter().any(|known| known == text) {
            true => Ok(text.to_owned()),
            false => Err(bad(format!("{text:?} is none of {}", known.join(", ")))),
        };
        let left = name(left)?;
        let number = |text: &str| text.trim().parse::<f64>().ok().filter(|x| x.is_finite());
        let (factor, right) = match right.split_once('*') {
            Some((factor, right)) => {
                let factor = number(factor).ok_or_else(|| bad(format!("{factor:?} is not a number")))?;
                (factor, Some(name(right.trim())?))
            }
            None => match number(right) {
                Some(bound) => (bound, None),
                None => (1.0, Some(name(right)?)),
            },
        };
        Ok(Self { left, relation, factor, right })
    }
}

impl fmt::Display for Threshold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { left, relation, factor, right } = self;
        write!(f, "{left} {} ", relation.sign())?;
        match right {
            None => write!(f, "{factor}"),
            Some(name) if *factor == 1.0 => write!(f, "{name}"),
            Some(name) => write!(f, "{factor} × {name}"),
        }
    }
}

impl Threshold {
    /// Looks up the numbers and compares them.
    #[must_use]
    pub fn judge(&self, summary: &Summary) -> Judged {
        let text = self.to_string();
        let value = |name: &str| number(&serde_json::to_value(summary).unwrap_or_default(), name);
        let unknown = |name: &str| Judged {
            text: text.clone(),
            holds: false,
            explanation: format!("{name} was not measured"),
        };
        let Some(left) = value(&self.left) else { return unknown(&self.left) };
        let right = match &self.right {
            None => self.factor,
            Some(name) => match value(name) {
                Some(right) => self.factor * right,
                None => return unknown(name),
            },
        };
        let holds = self.relation.holds(left, right);
        let explanation = format!("{} is {}, the bound is {}", self.left, short(left), short(right));
        Judged { text, holds, explanation }
    }
}

/// Rounded to four significant digits for display; the comparison is exact.
fn short(x: f64) -> String {
    let digits = if x == 0.0 { 0 } else { (3 - x.abs().log10().floor() as i32).clamp(0, 12) as usize };
    format!("{x:.digits$}")
}

fn number(summary: &Value, name: &str) -> Option<f64> {
    name.split('.').try_fold(summary, |value, key| value.get(key))?.as_f64()
}

/// Every number of a summary, by its dotted name.
fn names() -> Vec<String> {
    let mut names = Vec::new();
    if let Ok(Value::Object(summary)) = serde_json::to_value(Summary::default()) {
        for (key, value) in summary {
            match value {
                Value::Object(part) => names.extend(part.keys().map(|inner| format!("{key}.{inner}"))),
                Value::String(_) => {}
                _ => names.push(key),
            }
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use potstill_proto::scores::Scores;

    fn summary(student: f64, teacher: Option<f64>) -> Summary {
        Summary {
            teacher: Scores { fid: teacher, ..Scores::default() },
            student: Scores { fid: Some(student), ..Scores::default() },
            ..Summary::default()
        }
    }

    proptest! {
        #[test]
        fn bounds_and_multiples_are_compared_as_numbers(student in 0.0f64..10.0, teacher in 0.01f64..10.0, k in 0.1f64..5.0) {
            let summary = summary(student, Some(teacher));
            let judge = |text: String| text.parse::<Threshold>().unwrap().judge(&summary).holds;
            prop_assert_eq!(judge(format!("student.fid<={k}")), student <= k);
            prop_assert_eq!(judge(format!("student.fid > {k}")), student > k);
            prop_assert_eq!(judge(format!("student.fid<={k}*teacher.fid")), student <= k * teacher);
            prop_assert_eq!(judge(format!("student.fid >= {k} * teacher.fid")), student >= k * teacher);
            prop_assert_eq!(judge("student.fid<teacher.fid".to_owned()), student < teacher);
        }

        #[test]
        fn what_is_printed_can_be_read_again(k in 0.001f64..1000.0) {
            for text in [format!("student.recall>={k}"), format!("student.fid<{k}*teacher.fid")] {
                let threshold: Threshold = text.parse().unwrap();
                let again = threshold.to_string().replace('×', "*");
                prop_assert_eq!(again.parse::<Threshold>().unwrap(), threshold);
            }
        }
    }

    #[test]
    fn what_was_not_measured_does_not_pass() {
        let judged = "student.fid<=2*teacher.fid".parse::<Threshold>().unwrap().judge(&summary(0.1, None));
        assert_eq!((judged.holds, judged.explanation.as_str()), (false, "teacher.fid was not measured"));
        let judged = "student.recall>=0".parse::<Threshold>().unwrap().judge(&summary(0.1, None));
        assert!(!judged.holds);
    }

    #[test]
    fn nonsense_is_refused_with_what_is_known() {
        for text in [
            "",
            "student.fid",
            "student.fud<1",
            "student.fid<=x*teacher.fid",
            "student.fid<=1*2",
            "1<2",
            "run<1",
        ] {
            let error = text.parse::<Threshold>().unwrap_err().to_string();
            assert!(error.contains("student.fid<=0.3"), "{error}");
        }
        let error = "student.fud<1".parse::<Threshold>().unwrap_err().to_string();
        assert!(error.contains("student.diversity") && error.contains("wall_seconds"), "{error}");
    }
}
