//! The time of day.

/// Seconds since 1970.
#[must_use]
pub fn now() -> f64 {
    chrono::Utc::now().timestamp_micros() as f64 * 1e-6
}
