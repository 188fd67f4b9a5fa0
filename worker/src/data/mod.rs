//! Training and evaluation data: images with classes ([`Dataset`]), images with captions ([`pairs`]), prompts
//! ([`prompt_file`]), and the treatment of images before they are compared ([`protocol`]).

mod compressed;
mod dataset;
mod formats;
#[cfg(test)]
mod fuzz;
mod images;
pub mod pairs;
pub mod prompt_file;
pub mod protocol;
mod read;
mod tally;
mod tars;
mod tensors;
mod text;

pub use self::dataset::{Dataset, Shape};
