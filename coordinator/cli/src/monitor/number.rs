//! Numbers in few characters.

/// A number with at most three significant digits: 0.25, 12.5, 3200, 12.8k, 1.5M.
#[must_use]
pub fn short(number: f64) -> String {
    if !number.is_finite() {
        return number.to_string();
    }
    let (scaled, unit) = match number.abs() {
        n if n >= 999_500_000.0 => (number / 1e9, "G"),
        n if n >= 999_500.0 => (number / 1e6, "M"),
        n if n >= 9_995.0 => (number / 1e3, "k"),
        _ => (number, ""),
    };
    // No trailing zeros.
    let digits = if scaled == 0.0 { 0 } else { (2 - scaled.abs().log10().floor() as i32).max(0) };
    let rounded = format!("{scaled:.0$}", digits as usize);
    let trimmed =
        if rounded.contains('.') { rounded.trim_end_matches('0').trim_end_matches('.') } else { &rounded };
    format!("{trimmed}{unit}").replace('-', "−")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let cases = [
            (0.0, "0"),
            (0.25, "0.25"),
            (0.001234, "0.00123"),
            (12.5, "12.5"),
            (1500.0, "1500"),
            (12_800.0, "12.8k"),
            (2e6, "2M"),
            (-100.0, "−100"),
            (f64::NAN, "NaN"),
            (f64::INFINITY, "inf"),
        ];
        for (number, text) in cases {
            assert_eq!(short(number), text);
        }
    }
}
