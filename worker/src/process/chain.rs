//! An error with its causes on one line.

/// The error and its causes, each once: many errors repeat their cause in their own text.
pub fn chain(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if !line.contains(&text) {
            let separator = if line.is_empty() { "" } else { ": " };
            line = line + separator + &text;
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::chain;

    #[test]
    fn a_cause_is_said_once() {
        let error = anyhow!("not found").context("cannot read x: not found").context("loading");
        assert_eq!(chain(&error), "loading: cannot read x: not found");
    }
}
