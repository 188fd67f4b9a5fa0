//! `[evaluation]`: when the student is evaluated, and on which data.

use std::{num::NonZeroU64, path::PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problems::Problems;

/// Evaluations while training and at the end (docs/algorithm.md §8).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EvaluationSpec {
    /// Iterations between two evaluations of the student, which is also evaluated at the end; without it only at the
    /// end.
    pub every: Option<NonZeroU64>,
    /// Iterations between two pictures of the student, `pictures/<iteration>.png` in the run's folder: always the same noise and
    /// classes or prompts. One is drawn at the end, too. By default `every`.
    pub pictures_every: Option<NonZeroU64>,
    /// Number of samples.
    pub samples: u32,
    /// Seed of the evaluation's noise and conditions.
    pub seed: u64,
    /// Prompts for the evaluation of a text-to-image model, such as COCO's captions: a file in one of the forms of
    /// `prompts.data`, as a path relative to the file that names it, or a URL. By default those of `prompts.data`.
    pub prompts: Option<String>,
    /// Column of these prompts in tables, JSON, JSONL and Parquet; by default `prompts.column`.
    pub prompts_column: Option<String>,
    /// Least number of samples of each prompt, where there are enough prompts: `samples` divided by this many prompts
    /// are used. COCO's protocol has 1; diversity, which is measured among samples of one prompt, needs 2.
    pub samples_per_prompt: u32,
    /// Treatment of samples and real images before they are compared.
    pub images: ImageTreatment,
    /// Height and width for `images`, in pixels: `resized` needs it (256 for FID on COCO); `patch` has 299, the size of
    /// Inception's input, by default; `as-made` does not take it.
    pub image_size: Option<u32>,
    /// TorchScript extractor: images in [−1, 1] → (features [N, D], logits [N, classes]). Without it nothing is
    /// evaluated.
    pub features: Option<PathBuf>,
    /// Real images to compare with: safetensors with `images` (u8, [N, C, H, W]), `labels` (u8, `[N]`) and the pixel
    /// range in its metadata, a folder, or a tar; features that `potstill evaluate --save-statistics` wrote; or an
    /// `.npz` file with the moments `mu` and `sigma`, which give FID but neither precision nor recall.
    pub reference: Option<PathBuf>,
    /// TorchScript CLIP, for text-to-image models: images in [−1, 1] and the prompts' tokens, int64 [N, tokens], of the
    /// model's first tokenizer → (image embeddings [N, D], text embeddings [N, D]). With it the CLIP score is measured.
    pub clip: Option<PathBuf>,
    /// Steps of the teacher's sampler: Heun's for EDM, where 18 steps are 35 evaluations; guided DDIM for text-to-image
    /// models, where each step is two evaluations, and 50 steps are usual.
    pub teacher_steps: u32,
    /// Guidance scale of a text-to-image teacher's samples: 7.5 is diffusers' default for SD 1.5.
    pub teacher_guidance: f64,
    /// k of the k-nearest-neighbor manifolds of precision and recall.
    pub neighbours: u32,
    /// The run stops when the student's diversity falls below this share of the teacher's, which is called collapse. 0:
    /// never.
    pub collapse_share: f64,
}

impl Default for EvaluationSpec {
    fn default() -> Self {
        Self {
            every: None,
            pictures_every: None,
            samples: 2000,
            seed: 1_000_000_007,
            prompts: None,
            prompts_column: None,
            samples_per_prompt: 10,
            images: ImageTreatment::AsMade,
            image_size: None,
            features: None,
            reference: None,
            clip: None,
            teacher_steps: 18,
            teacher_guidance: 7.5,
            neighbours: 3,
            collapse_share: 0.25,
        }
    }
}

/// Treatment of images before they are compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ImageTreatment {
    /// None: the extractor gets the images unchanged.
    #[default]
    AsMade,
    /// The largest centered square is resized to `image_size` with an antialiased Lanczos filter on 8 bits, as Pillow
    /// does: FID on COCO (GigaGAN, 2303.05511, and after it SiD-LSG, 2406.01561).
    Resized,
    /// A centered square of `image_size` is cut out at full resolution: patch FID (SDXL-Lightning, 2402.13929).
    Patch,
}

/// An [`ImageTreatment`] with its size in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// See [`ImageTreatment::AsMade`].
    AsMade,
    /// See [`ImageTreatment::Resized`].
    Resized(u32),
    /// See [`ImageTreatment::Patch`].
    Patch(u32),
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AsMade => f.write_str("as-made"),
            Self::Resized(size) => write!(f, "resized to {size}"),
            Self::Patch(size) => write!(f, "patch of {size}"),
        }
    }
}

/// Side of the patches for patch FID, in pixels: the size of Inception's input.
const PATCH: u32 = 299;

impl EvaluationSpec {
    /// The treatment of images, with its size.
    ///
    /// # Errors
    /// The size is missing, not allowed, or 0.
    pub fn protocol(&self) -> Result<Protocol, String> {
        match (self.images, self.image_size) {
            (_, Some(0)) => Err("evaluation.image_size is 0; it must be at least 1".into()),
            (ImageTreatment::AsMade, None) => Ok(Protocol::AsMade),
            (ImageTreatment::AsMade, Some(size)) => Err(format!(
                "evaluation.image_size is {size}, but evaluation.images is \"as-made\", which changes no size: set it to \
                 \"resized\" or \"patch\", or remove the size"
            )),
            (ImageTreatment::Resized, Some(size)) => Ok(Protocol::Resized(size)),
            (ImageTreatment::Resized, None) => {
                Err("evaluation.images is \"resized\": set evaluation.image_size to the height and width"
                    .into())
            }
            (ImageTreatment::Patch, size) => Ok(Protocol::Patch(size.unwrap_or(PATCH))),
        }
    }

    /// `reads`: whether the teacher is a text-to-image model.
    pub(crate) fn validate(&self, reads: bool, problems: &mut Problems) {
        problems.require(self.features.is_some() == self.reference.is_some(), || {
            "evaluation.features and evaluation.reference go together: give both or neither".into()
        });
        problems.require(self.clip.is_none() || self.features.is_some(), || {
            "evaluation.clip needs evaluation.features and evaluation.reference: without them nothing is evaluated".into()
        });
        problems.require(self.clip.is_none() || reads, || {
            "evaluation.clip is for text-to-image models: it compares images with their prompts".into()
        });
        problems.require(self.prompts.is_none() || reads, || {
            "evaluation.prompts is for text-to-image models: other models have no prompts".into()
        });
        problems.require(self.prompts.as_ref().is_none_or(|prompts| !prompts.is_empty()), || {
            "evaluation.prompts is empty: name a file with prompts, or remove the key".into()
        });
        problems.require(self.prompts_column.is_none() || self.prompts.is_some(), || {
            "evaluation.prompts_column is the column of evaluation.prompts, which is not given; that of prompts.data is \
             prompts.column"
                .into()
        });
        problems.require(self.samples_per_prompt >= 1, || {
            "evaluation.samples_per_prompt is 0; it must be at least 1".into()
        });
        if let Err(problem) = self.protocol() {
            problems.require(false, || problem);
        }
        problems.require(self.teacher_steps >= 2, || "evaluation.teacher_steps must be at least 2".into());
        problems.require(
            self.teacher_guidance.is_finite() && (0.0..=100.0).contains(&self.teacher_guidance),
            || format!("evaluation.teacher_guidance is {}; it must lie in [0, 100]", self.teacher_guidance),
        );
        problems.require((0.0..1.0).contains(&self.collapse_share), || {
            format!("evaluation.collapse_share is {}; it must lie in [0, 1)", self.collapse_share)
        });
        problems.require(self.neighbours >= 1, || "evaluation.neighbours must be at least 1".into());
        problems.require(self.samples > self.neighbours, || {
            format!("evaluation.samples is {}; it must exceed evaluation.neighbours", self.samples)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_protocol_of_images_has_the_size_that_it_needs() {
        let protocol = |images, image_size| {
            EvaluationSpec { images, image_size, ..EvaluationSpec::default() }.protocol()
        };
        use ImageTreatment::{AsMade, Patch, Resized};
        assert_eq!(protocol(AsMade, None), Ok(Protocol::AsMade));
        assert_eq!(protocol(Resized, Some(256)), Ok(Protocol::Resized(256)));
        assert_eq!(protocol(Patch, None), Ok(Protocol::Patch(299)));
        assert_eq!(protocol(Patch, Some(64)), Ok(Protocol::Patch(64)));
        for (images, size, says) in [
            (AsMade, Some(256), "\"as-made\", which changes no size"),
            (Resized, None, "evaluation.image_size"),
            (Resized, Some(0), "is 0"),
        ] {
            let error = protocol(images, size).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
