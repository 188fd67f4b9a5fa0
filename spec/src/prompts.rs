//! `[prompts]`: the prompts of a text-to-image model.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The prompts with which a text-to-image model is distilled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PromptsSpec {
    /// A text file with one prompt a line, JSON lines, CSV, Parquet or a folder of that (docs/FORMATS.md): a path relative to
    /// the file that names it, or a URL. In an adversarial run it may be absent: then generated samples share the captions of
    /// the real images.
    pub data: Option<String>,
    /// Column of the prompts in all but text files.
    pub column: String,
    /// Folder on this machine that keeps the prompts' embeddings: they are computed once, and the text encoders are
    /// released. Without it they are computed when they are needed.
    pub cache: Option<PathBuf>,
    /// SDXL's micro-conditioning: height and width of the original image; by default those of the model's images.
    pub original_size: Option<[u32; 2]>,
    /// SDXL's micro-conditioning: top and left of the crop.
    pub crop: [u32; 2],
}

impl Default for PromptsSpec {
    fn default() -> Self {
        Self { data: None, column: "prompt".to_owned(), cache: None, original_size: None, crop: [0, 0] }
    }
}
