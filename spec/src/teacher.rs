//! `[teacher]`: the pretrained network.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problems::Problems;

/// The pretrained score network f_φ.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TeacherSpec {
    /// An EDM network: safetensors file with the network's configuration in its metadata; a relative path is relative to the
    /// file that names it.
    pub weights: Option<PathBuf>,
    /// A text-to-image model instead: a folder in the layout of diffusers (Stable Diffusion 1.x, 2.x, SDXL), as a path, a
    /// URL of an object store, or the name of a repository on the Hugging Face hub.
    pub model: Option<String>,
    /// Height and width of that model's images, in pixels; by default those it was trained on.
    pub image_size: Option<[u32; 2]>,
    /// SHA-256 of that file, or of the folder's files one after the other. Filled in when the run is frozen; given by hand, it
    /// is checked.
    pub sha256: Option<String>,
}

impl std::fmt::Display for TeacherSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.model, &self.weights) {
            (Some(model), _) => f.write_str(model),
            (None, Some(weights)) => weights.display().fmt(f),
            (None, None) => f.write_str("no teacher"),
        }
    }
}

impl TeacherSpec {
    pub(crate) fn validate(&self, problems: &mut Problems) {
        problems.require(self.weights.is_some() != self.model.is_some(), || {
            "teacher.weights is missing: name the teacher's safetensors file, or a text-to-image model's folder as \
             teacher.model, but not both"
                .into()
        });
        problems.require(
            self.image_size.is_none_or(|sides| self.model.is_some() && sides.iter().all(|side| *side > 0)),
            || "teacher.image_size is height and width of a text-to-image model's images".into(),
        );
    }
}
