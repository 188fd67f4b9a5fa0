//! Problems of a specification, collected so that all are reported at once.

use crate::layers::LayerError;

/// One line for each problem, naming the key.
#[derive(Debug, Default)]
pub struct Problems(Vec<String>);

impl Problems {
    /// Records a problem if `holds` is false.
    pub fn require(&mut self, holds: bool, problem: impl FnOnce() -> String) {
        if !holds {
            self.0.push(problem());
        }
    }

    /// # Errors
    /// [`LayerError::OutOfRange`] if there are any.
    pub fn into_result(self) -> Result<(), LayerError> {
        if self.0.is_empty() { Ok(()) } else { Err(LayerError::OutOfRange { problems: self.0 }) }
    }
}

/// Whether a number is finite and above 0.
pub(crate) fn positive(x: f64) -> bool {
    x.is_finite() && x > 0.0
}
