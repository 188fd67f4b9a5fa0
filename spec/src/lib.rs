//! The run specification: everything that decides the result of a run and how it is executed.
//!
//! - [`RunSpec`]: a run file (`run.toml`), one module for each of its sections. Each section checks its own values; what sections
//!   must agree on is checked in [`run`].
//! - [`layers`]: how a file is read: defaults, the files that it extends, itself, the environment, `--set`.
//! - [`former`]: keys of earlier versions, and their replacements.
//! - [`mod@reference`]: the JSON schema and `docs/configuration.md`, both made from these types.
//!
//! ```
//! use potstill_spec::RunSpec;
//!
//! let spec = RunSpec::from_toml("[teacher]\nweights = '/models/teacher.safetensors'")?;
//! assert_eq!(spec.distillation.score_identity_weight, 100.0);
//! let error = RunSpec::from_toml("[generator]\nstep = 4").unwrap_err();
//! assert_eq!(error.to_string(), "unknown key `generator.step`; the nearest valid key is `generator.steps`");
//! # Ok::<(), potstill_spec::layers::LayerError>(())
//! ```

pub mod adversarial;
pub mod checkpoint;
pub mod cluster;
pub mod distillation;
pub mod evaluation;
pub mod former;
pub mod generator;
pub mod guidance;
pub mod layers;
pub mod lora;
pub mod memory;
pub mod optimizer;
pub mod problems;
pub mod prompts;
pub mod reference;
pub mod run;
pub mod teacher;
pub mod units;

pub use adversarial::{AdversarialSpec, Scaling};
pub use checkpoint::{CheckpointSpec, Keep};
pub use cluster::ClusterSpec;
pub use distillation::{DistillationSpec, KarrasSpec, LogNormalSpec, Precision, Weighting};
pub use evaluation::{EvaluationSpec, ImageTreatment, Protocol};
pub use generator::{GeneratorSpec, Matching};
pub use guidance::{GuidancePreset, GuidanceSpec};
pub use lora::LoraSpec;
pub use memory::{MemorySpec, Shard};
pub use optimizer::{DecaySpec, OptimizerSpec};
pub use prompts::PromptsSpec;
pub use run::RunSpec;
pub use teacher::{TeacherLora, TeacherSpec};
