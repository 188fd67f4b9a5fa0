//! Quantities with units: durations as "30s", byte sizes as "80GiB".

/// Durations in run files: a number and a unit, as in "500ms", "30s" or "1h 30m". For serde's `with`.
pub mod duration {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// # Errors
    /// The serializer's own.
    pub fn serialize<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_duration(*value))
    }

    /// # Errors
    /// Not a duration with a unit.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let advice = "expected a duration with a unit, such as \"500ms\", \"30s\" or \"5m\"";
        let text = String::deserialize(deserializer).map_err(|_| D::Error::custom(advice))?;
        humantime::parse_duration(&text).map_err(|e| D::Error::custom(format!("{text:?}: {e}; {advice}")))
    }
}

/// Reads a size in bytes, as in "80GiB" or "24 GB".
///
/// # Errors
/// No number, no unit, or a unit that is unknown.
///
/// ```
/// assert_eq!(potstill_spec::units::bytes("1.5GiB"), Ok(3 << 29));
/// assert!(potstill_spec::units::bytes("80").is_err());
/// ```
pub fn bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let (number, unit) = text.split_at(text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len()));
    let unit = match unit {
        "GiB" => 1u64 << 30,
        "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "MB" => 1_000_000,
        _ => return Err(format!("{text:?}: expected a number with GiB, MiB, GB or MB behind it")),
    };
    let number: f64 = number.trim().parse().map_err(|_| format!("{text:?}: {number:?} is no number"))?;
    if !(number.is_finite() && number >= 0.0) {
        return Err(format!("{text:?}: a size is at least 0"));
    }
    Ok((number * unit as f64) as u64)
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn sizes_need_a_unit() {
        assert_eq!(bytes("80GiB"), Ok(80 << 30));
        assert_eq!(bytes("0.5 GB"), Ok(500_000_000));
        for wrong in ["80", "GiB", "80 pounds", "", "-1GiB"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }
}
