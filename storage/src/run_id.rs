//! Names of runs.

use std::{fmt, str::FromStr};

/// The name of a run, valid as a part of an object key in every store: 1 to 64 of the characters a–z, 0–9, `.`, `_` and
/// `-`, the first a letter or a digit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunId(String);

/// Not a [`RunId`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} cannot name a run: use 1 to 64 of the characters a–z, 0–9, '.', '_' and '-', beginning with a letter or a digit"
)]
pub struct BadRunId(pub String);

impl FromStr for RunId {
    type Err = BadRunId;

    fn from_str(text: &str) -> Result<Self, BadRunId> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let fits = (1..=64).contains(&text.len())
            && text.starts_with(plain)
            && text.chars().all(|c| plain(c) || matches!(c, '.' | '_' | '-'));
        if fits { Ok(Self(text.to_owned())) } else { Err(BadRunId(text.to_owned())) }
    }
}

impl TryFrom<&str> for RunId {
    type Error = BadRunId;

    fn try_from(text: &str) -> Result<Self, BadRunId> {
        text.parse()
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_not_do_as_keys_are_refused() {
        for good in ["a", "one-step-20250101-120000", "0.x_y", &"a".repeat(64)] {
            assert_eq!(good.parse::<RunId>().unwrap().to_string(), good);
        }
        for bad in ["", ".hidden", "-x", "a/b", "..", "A", "ä", "a b", &"a".repeat(65)] {
            assert!(bad.parse::<RunId>().is_err(), "{bad}");
        }
    }
}
