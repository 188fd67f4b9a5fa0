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
    /// A text-to-image model instead (Stable Diffusion 1.x, 2.x, SDXL): a folder in the layout of diffusers, as a path, a
    /// URL of an object store, or a repository on the Hugging Face hub at a commit, as owner/name@commit with the commit's 40
    /// digits; or one .safetensors file in the original layout, as a path or a URL of an object store.
    pub model: Option<String>,
    /// For a model in one file: a folder in the layout of diffusers whose configurations and tokenizers are taken. By default
    /// they are those of Stable Diffusion 1.5, 2.1 or SDXL, whichever the tensors' names belong to.
    pub config: Option<PathBuf>,
    /// Low-rank adapters that are added to that model's weights, U-Net and text encoders, before it is used: files with the names
    /// of PEFT or of kohya's scripts.
    pub loras: Vec<TeacherLora>,
    /// Height and width of that model's images, in pixels; by default those it was trained on.
    pub image_size: Option<[u32; 2]>,
    /// SHA-256 of that file, or of the folder's files one after the other; with `config` or `loras` that of lines with the
    /// SHA-256 of each. Filled in when the run is frozen; given by hand, it is checked.
    pub sha256: Option<String>,
}

/// Low-rank adapters of a teacher.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TeacherLora {
    /// The file; a relative path is relative to the file that names it.
    pub path: PathBuf,
    /// What the adapters are multiplied by, beside their own α/r.
    #[serde(default = "unscaled")]
    pub scale: f64,
}

fn unscaled() -> f64 {
    1.0
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
    /// What is added to the model, with a word on each: files and folders that belong to the teacher, too.
    #[must_use]
    pub fn additions(&self) -> Vec<(PathBuf, String)> {
        let config = self.config.iter().map(|path| (path.clone(), "config".to_owned()));
        config.chain(self.loras.iter().map(|lora| (lora.path.clone(), lora.scale.to_string()))).collect()
    }

    pub(crate) fn validate(&self, problems: &mut Problems) {
        problems.require(self.weights.is_some() != self.model.is_some(), || {
            "teacher.weights is missing: name the teacher's safetensors file, or a text-to-image model's folder as \
             teacher.model, but not both"
                .into()
        });
        let model = self.model.as_deref().unwrap_or_default();
        problems.require(!is_on_the_hub(model) || is_pinned(model), || {
            format!(
                "teacher.model is {model:?}: a repository on the hub can change, so name a commit of it, as owner/name@ and the \
                 commit's 40 digits"
            )
        });
        problems.require(self.model.is_some() || (self.config.is_none() && self.loras.is_empty()), || {
            "teacher.config and teacher.loras are for a text-to-image model: name it as teacher.model".into()
        });
        for lora in &self.loras {
            problems.require(lora.scale.is_finite(), || {
                format!("the scale of {} in teacher.loras must be finite", lora.path.display())
            });
        }
        problems.require(
            self.image_size.is_none_or(|sides| self.model.is_some() && sides.iter().all(|side| *side > 0)),
            || "teacher.image_size is height and width of a text-to-image model's images".into(),
        );
    }
}

/// Whether it is written as a repository's name; folders that exist are absolute paths here.
fn is_on_the_hub(model: &str) -> bool {
    let part = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains(['/', '\\', ':']);
    model.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name))
}

fn is_pinned(model: &str) -> bool {
    let commit = model.rsplit_once('@').map_or("", |(_, commit)| commit);
    commit.len() == 40 && commit.bytes().all(|digit| digit.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_on_the_hub_is_named_with_a_commit() {
        let problems = |model: &str| {
            let mut problems = Problems::default();
            TeacherSpec { model: Some(model.into()), ..TeacherSpec::default() }.validate(&mut problems);
            problems.into_result().err().map(|error| error.to_string())
        };
        let commit = "0123456789abcdef0123456789abcdef01234567";
        for pinned in
            [&format!("owner/name@{commit}"), "/models/sd15", "s3://bucket/model", "./model", "model"]
        {
            assert_eq!(problems(pinned), None, "{pinned}");
        }
        for open in ["owner/name", "owner/name@main", "owner/name@0123456"] {
            assert!(problems(open).is_some_and(|said| said.contains("40 digits")), "{open}");
        }
    }
}
