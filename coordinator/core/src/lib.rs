//! Pure.
pub mod observation;
