//! A run file as a whole: reading, freezing, checking, comparing.
//!
//! Read through [`layers`], validated, frozen as `run.toml` in the run's folder. On resume the given specification is
//! compared with the frozen one: [`RunSpec::differences`].

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use url::Url;

use crate::{
    AdversarialSpec, CheckpointSpec, ClusterSpec, DistillationSpec, EvaluationSpec, GeneratorSpec,
    GuidanceSpec, LoraSpec, MemorySpec, OptimizerSpec, PromptsSpec, Shard, TeacherSpec, former,
    layers::{self, LayerError, Layered, Names},
    problems::Problems,
};

/// The specification of a run. All keys but the teacher's have defaults.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RunSpec {
    /// The pretrained network.
    pub teacher: TeacherSpec,
    /// The prompts of a text-to-image model; only for those.
    pub prompts: Option<PromptsSpec>,
    /// Low-rank adapters; without this section whole networks are trained.
    pub lora: Option<LoraSpec>,
    /// The few-step generator.
    pub generator: GeneratorSpec,
    /// Score identity distillation.
    pub distillation: DistillationSpec,
    /// The trade-off between alignment and diversity.
    pub guidance: GuidanceSpec,
    /// The adversarial loss with real samples; without this section the run is data-free.
    pub adversarial: Option<AdversarialSpec>,
    /// Adam and the generator's average.
    pub optimizer: OptimizerSpec,
    /// Options that save memory on the devices.
    pub memory: MemorySpec,
    /// When checkpoints are saved, and how many are kept.
    pub checkpoint: CheckpointSpec,
    /// When the student is evaluated, and on which data.
    pub evaluation: EvaluationSpec,
    /// The number of workers, and timeouts.
    pub cluster: ClusterSpec,
}

impl Layered for RunSpec {
    const PATHS: &'static [(&'static str, Names)] = &[
        ("teacher.weights", Names::Path),
        // A name that is neither a folder nor a file here is that of a repository on the hub.
        ("teacher.model", Names::PathIfThere),
        ("teacher.config", Names::Path),
        ("teacher.loras.path", Names::Path),
        ("prompts.data", Names::Location),
        ("prompts.cache", Names::Path),
        ("generator.start_from", Names::Path),
        ("adversarial.data", Names::Location),
        ("adversarial.cache", Names::Path),
        ("evaluation.prompts", Names::Location),
        ("evaluation.features", Names::Path),
        ("evaluation.reference", Names::Path),
        ("evaluation.clip", Names::Path),
    ];
}

impl RunSpec {
    /// Reads the layers, resolves relative paths against the folders of the files that have them, and validates.
    ///
    /// # Errors
    /// See [`LayerError`].
    pub fn load(file: &Path, sets: &[String]) -> Result<Self, LayerError> {
        let spec: Self = layers::load(file, sets)?;
        spec.validate()?;
        Ok(spec)
    }

    /// Reads a frozen specification.
    ///
    /// # Errors
    /// See [`LayerError`].
    pub fn from_toml(text: &str) -> Result<Self, LayerError> {
        let spec: Self = layers::from_str(text, FROZEN)?;
        spec.validate()?;
        Ok(spec)
    }

    /// Reads the frozen specification of a run that is only inspected or exported, of this version or an earlier one:
    /// keys of earlier versions are translated. A run that is resumed is read by [`from_toml`](Self::from_toml), which
    /// rejects them.
    ///
    /// # Errors
    /// See [`LayerError`].
    pub fn of_finished_run(text: &str) -> Result<Self, LayerError> {
        let invalid = |problem: String| LayerError::Invalid { origin: FROZEN.to_owned(), problem };
        let mut table: toml::Table = text.parse().map_err(|e: toml::de::Error| invalid(e.to_string()))?;
        former::translate(&mut table);
        Self::from_toml(&table.to_string())
    }

    /// The frozen form.
    ///
    /// # Errors
    /// A value that TOML cannot hold, such as a path that is not UTF-8.
    pub fn to_toml(&self) -> Result<String, LayerError> {
        toml::to_string_pretty(self)
            .map_err(|e| LayerError::Invalid { origin: FROZEN.to_owned(), problem: e.to_string() })
    }

    /// Number of micro-batches in one iteration.
    #[must_use]
    pub fn micro_batches(&self) -> u32 {
        self.distillation.global_batch / self.distillation.micro_batch
    }

    /// Checks every value and their agreement.
    ///
    /// # Errors
    /// [`LayerError::OutOfRange`] with one line for each problem.
    pub fn validate(&self) -> Result<(), LayerError> {
        let mut problems = Problems::default();
        let distillation = &self.distillation;
        let reads = self.teacher.model.is_some();
        self.teacher.validate(&mut problems);
        problems.require(reads == self.prompts.is_some(), || {
            "prompts and teacher.model go together: text-to-image models need prompts, other models have none"
                .into()
        });
        if let Some(prompts) = &self.prompts {
            let given = prompts.data.as_ref().is_some_and(|data| !data.is_empty());
            problems.require(given || (prompts.data.is_none() && self.adversarial.is_some()), || {
                "prompts.data is missing: name the file with the prompts".into()
            });
        }
        if let Some(lora) = &self.lora {
            lora.validate(&mut problems);
        }
        self.generator.validate(reads, &mut problems);
        distillation.validate(reads, &mut problems);
        self.guidance.validate(&mut problems);
        if let Some(adversarial) = &self.adversarial {
            adversarial.validate(&mut problems);
        }
        let images = distillation.iterations.saturating_mul(distillation.global_batch.into());
        self.optimizer.validate(images, &mut problems);
        self.memory.validate(reads, distillation.precision, &mut problems);
        self.validate_graphs(&mut problems);
        self.checkpoint.validate(&mut problems);
        self.evaluation.validate(reads, &mut problems);
        let micro_batches = distillation.global_batch.checked_div(distillation.micro_batch);
        self.cluster.validate(micro_batches, &mut problems);
        if let Ok(value) = toml::Value::try_from(self) {
            refuse_secrets(&value, "", &mut problems);
        }
        problems.into_result()
    }

    /// What a CUDA graph cannot repeat: collectives, and random numbers that the host draws within a micro-batch.
    fn validate_graphs(&self, problems: &mut Problems) {
        if !self.distillation.cuda_graphs {
            return;
        }
        problems.require(matches!(self.memory.shard, Shard::None | Shard::Optimizer), || {
            "distillation.cuda_graphs needs gradients and weights that are not divided: set memory.shard = \"optimizer\" or \"none\""
                .into()
        });
        problems.require(self.distillation.augmentation.is_none(), || {
            "distillation.cuda_graphs and distillation.augmentation do not go together: leave one out".into()
        });
        problems.require(self.lora.as_ref().is_none_or(|lora| lora.dropout == 0.0), || {
            "distillation.cuda_graphs and lora.dropout do not go together: set one of them to false or 0"
                .into()
        });
    }

    /// The keys that decide the trajectory and in which `other` differs, with both values. A run may be resumed with more
    /// iterations, other evaluations, checkpoints or workers, but not with these changed.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let trajectory = |spec: &Self| {
            let mut spec = spec.clone();
            spec.distillation.iterations = 0;
            spec.distillation.non_finite_limit = 0;
            // Like the number of workers, it changes rounding.
            spec.distillation.cuda_graphs = false;
            // The file may have moved; its content may not have changed.
            spec.teacher.weights = None;
            spec.teacher.model = spec.teacher.model.map(|_| String::new());
            spec.teacher.config = spec.teacher.config.map(|_| PathBuf::new());
            spec.teacher.loras.iter_mut().for_each(|lora| lora.path = PathBuf::new());
            if let Some(prompts) = &mut spec.prompts {
                // Only whether there is a file counts: without one, captions of real images are used.
                prompts.data = prompts.data.take().map(|_| "a file".to_owned());
                prompts.cache = None;
            }
            spec.generator.start_from = spec.generator.start_from.map(|_| PathBuf::new());
            if let Some(adversarial) = &mut spec.adversarial {
                adversarial.data.clear();
                adversarial.cache = None;
            }
            serde_json::json!({
                "teacher": spec.teacher,
                "prompts": spec.prompts,
                "lora": spec.lora,
                "generator": spec.generator,
                "distillation": spec.distillation,
                "guidance": spec.guidance,
                "adversarial": spec.adversarial,
                "optimizer": spec.optimizer,
                "bf16_weights": spec.memory.bf16_weights,
            })
        };
        let mut found = Vec::new();
        compare(&trajectory(self), &trajectory(other), "", &mut found);
        found
    }
}

/// Name of the frozen form.
const FROZEN: &str = "run.toml";

fn compare(a: &serde_json::Value, b: &serde_json::Value, path: &str, found: &mut Vec<String>) {
    match (a, b) {
        (serde_json::Value::Object(a), serde_json::Value::Object(b)) => {
            for (key, value) in a {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                compare(value, b.get(key).unwrap_or(&serde_json::Value::Null), &path, found);
            }
        }
        _ if a != b => found.push(format!("{path}: {a} there, {b} here")),
        _ => {}
    }
}

/// Refuses URLs that hold credentials: the specification is stored with the run and sent to every worker. The URL itself is
/// not part of the message.
fn refuse_secrets(value: &toml::Value, key: &str, problems: &mut Problems) {
    match value {
        toml::Value::String(text) => problems.require(!holds_secret(text), || {
            format!(
                "{key} is a URL with a password, or with a query, which may hold a key or a signature: it would be stored with \
                 the run. Leave it out, and give credentials in the environment"
            )
        }),
        toml::Value::Array(values) => values.iter().for_each(|value| refuse_secrets(value, key, problems)),
        toml::Value::Table(table) => {
            for (name, value) in table {
                let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                refuse_secrets(value, &key, problems);
            }
        }
        _ => {}
    }
}

/// Whether a text is a URL with a password or a query.
fn holds_secret(text: &str) -> bool {
    let url = Some(text).filter(|text| text.contains("://")).and_then(|text| Url::parse(text).ok());
    url.is_some_and(|url| url.password().is_some() || url.query().is_some())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::Keep;

    fn valid() -> RunSpec {
        let mut spec = RunSpec::default();
        spec.teacher.weights = Some("teacher.safetensors".into());
        spec
    }

    #[test]
    fn the_frozen_form_reads_back_the_same() {
        let mut spec = valid();
        spec.teacher.sha256 = Some("ab".into());
        spec.distillation.seed = 42;
        assert_eq!(RunSpec::from_toml(&spec.to_toml().unwrap()).unwrap(), spec);
    }

    #[test]
    fn a_finished_run_of_an_earlier_version_can_be_looked_at_but_not_gone_on_with() {
        let mut spec = valid();
        spec.adversarial = Some(AdversarialSpec { data: "real.tar".into(), ..AdversarialSpec::default() });
        spec.optimizer.epsilon = 1e-6;
        spec.memory.shard = Shard::Optimizer;
        spec.checkpoint.keep_last = Keep::ALL;
        spec.cluster.failure_timeout = Duration::from_millis(2500);
        let now = spec.to_toml().unwrap();
        let mut earlier = now.clone();
        for (new, old) in [
            ("[adversarial]", "[adversarial]\nstart_images = 5\nscore_identity_weight = 100.0"),
            ("[optimizer]", "[optimiser]\nclip_value = 1.0"),
            ("shard = \"optimizer\"", "shard_optimiser = true"),
            ("keep_last = \"all\"", "keep_last = 0\nkeep_every = 0\nstop_after_failures = 0"),
            ("failure_timeout = \"2s 500ms\"", "failure_timeout_seconds = 2.5"),
            ("wait_timeout = \"5m\"", "wait_timeout_seconds = 300.0"),
            ("[evaluation]", "[evaluation]\nevery = 0"),
            ("[generator]", "[generator]\nstep_weights = []"),
        ] {
            assert!(now.contains(new), "{new}: {now}");
            earlier = earlier.replace(new, old);
        }
        assert!(matches!(RunSpec::from_toml(&earlier), Err(LayerError::FormerKey { .. })));
        assert_eq!(RunSpec::of_finished_run(&earlier).unwrap(), spec);
        assert_eq!(RunSpec::of_finished_run(&now).unwrap(), spec);
        assert!(RunSpec::of_finished_run(&now.replace("seed", "sead")).is_err());
    }

    #[test]
    fn a_count_that_may_be_absent_is_not_0() {
        let error = |text: &str| {
            RunSpec::from_toml(&format!("{text}\n[teacher]\nweights = 't'")).unwrap_err().to_string()
        };
        let message = error("[evaluation]\nevery = 0");
        assert!(message.contains("`evaluation.every`") && message.contains("remove the key"), "{message}");
        let message = error("[checkpoint]\nkeep_last = 0");
        assert!(message.contains("\"all\""), "{message}");
        let message = error("[cluster]\nfailure_timeout = 10");
        assert!(message.contains("cluster.failure_timeout") && message.contains("\"30s\""), "{message}");
    }

    #[test]
    fn every_problem_is_listed_with_its_key() {
        let mut spec = valid();
        spec.distillation.global_batch = 100;
        spec.distillation.micro_batch = 64;
        spec.optimizer.generator_learning_rate = -1.0;
        spec.cluster.min_workers = 3;
        let error = spec.validate().unwrap_err().to_string();
        for key in ["global_batch (100)", "generator_learning_rate is -1", "min_workers"] {
            assert!(error.contains(key), "{error}");
        }
        assert!(RunSpec::default().validate().unwrap_err().to_string().contains("teacher.weights"));
    }

    #[test]
    fn what_the_adversarial_loss_is_shown_counts_but_not_where_it_lies() {
        let mut here = valid();
        here.adversarial =
            Some(AdversarialSpec { data: "/here/real.tar".into(), ..AdversarialSpec::default() });
        let mut there = here.clone();
        there.adversarial.as_mut().unwrap().data = "s3://there/real.tar".into();
        assert!(here.differences(&there).is_empty());
        there.adversarial.as_mut().unwrap().limit = Some(100);
        assert_eq!(here.differences(&there), ["adversarial.limit: null there, 100 here"]);
        there.adversarial = None;
        assert_eq!(there.differences(&here).len(), 1);
        assert_eq!(RunSpec::from_toml(&here.to_toml().unwrap()).unwrap(), here);
    }

    #[test]
    fn only_what_decides_the_trajectory_counts_as_a_difference() {
        let here = valid();
        let mut there = here.clone();
        there.distillation.iterations += 1;
        there.cluster.max_workers = 2;
        there.teacher.weights = Some("elsewhere".into());
        assert!(here.differences(&there).is_empty());
        there.distillation.seed = 9;
        there.teacher.sha256 = Some("other".into());
        let found = there.differences(&here);
        assert_eq!(
            found,
            ["teacher.sha256: \"other\" there, null here", "distillation.seed: 9 there, 0 here"]
        );
    }

    #[test]
    fn relative_paths_are_relative_to_their_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("run.toml");
        std::fs::write(&file, "[teacher]\nweights = 'a/t.safetensors'").unwrap();
        let spec = RunSpec::load(&file, &[]).unwrap();
        assert_eq!(spec.teacher.weights, Some(folder.path().join("a/t.safetensors")));

        let text =
            "[teacher]\nmodel = 'model'\n[prompts]\ndata = 'p.txt'\n[evaluation]\nprompts = 'coco/val.txt'";
        std::fs::write(&file, text).unwrap();
        let prompts = |sets: &[String]| RunSpec::load(&file, sets).unwrap().evaluation.prompts.unwrap();
        assert_eq!(prompts(&[]), folder.path().join("coco/val.txt").display().to_string());
        assert_eq!(prompts(&["evaluation.prompts=s3://b/val.txt".into()]), "s3://b/val.txt");
    }

    #[test]
    fn prompts_of_an_evaluation_are_for_models_that_read() {
        let mut spec = valid();
        spec.evaluation.prompts = Some("coco.txt".into());
        spec.evaluation.prompts_column = Some("caption".into());
        spec.evaluation.samples_per_prompt = 0;
        spec.evaluation.image_size = Some(256);
        let error = spec.validate().unwrap_err().to_string();
        for key in ["evaluation.prompts is for text-to-image", "samples_per_prompt is 0", "image_size is 256"]
        {
            assert!(error.contains(key), "{error}");
        }
        spec.evaluation = EvaluationSpec { prompts_column: Some("x".into()), ..EvaluationSpec::default() };
        assert!(spec.validate().unwrap_err().to_string().contains("prompts_column"));
    }

    #[test]
    fn urls_with_credentials_are_refused_and_not_repeated() {
        for url in
            ["s3://key:secret@bucket/x", "az://container/x?sv=2024&sig=secret", "https://h/x?token=secret"]
        {
            let mut spec = RunSpec::default();
            spec.evaluation.reference = Some(url.into());
            let error = spec.validate().unwrap_err().to_string();
            assert!(error.contains("evaluation.reference is a URL with a password"), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
        for harmless in ["az://container@account/x", "s3://bucket/a:b@c", "/folder/what?/x", "s3://bucket/x"]
        {
            assert!(!holds_secret(harmless), "{harmless}");
        }
    }

    #[test]
    fn cuda_graphs_are_refused_where_they_would_repeat_what_differs() {
        type Change<'a> = &'a dyn Fn(&mut RunSpec);
        let cases: [(Change, Option<&str>); 6] = [
            (&|_| {}, None),
            (&|spec| spec.memory.shard = Shard::Optimizer, None),
            (&|spec| spec.memory.shard = Shard::Gradients, Some("not divided")),
            (&|spec| spec.distillation.augmentation = Some(0.1), Some("distillation.augmentation")),
            (
                &|spec| spec.lora = Some(LoraSpec { dropout: 0.1, ..LoraSpec::default() }),
                Some("lora.dropout"),
            ),
            (&|spec| spec.lora = Some(LoraSpec::default()), None),
        ];
        for (change, expected) in cases {
            let mut spec = valid();
            change(&mut spec);
            assert!(!spec.validate().is_err_and(|error| error.to_string().contains("cuda_graphs")));
            let before = spec.clone();
            spec.distillation.cuda_graphs = true;
            let text = spec.validate().err().map(|error| error.to_string()).unwrap_or_default();
            match expected {
                Some(words) => assert!(text.contains("cuda_graphs") && text.contains(words), "{text}"),
                None => assert!(!text.contains("cuda_graphs"), "{text}"),
            }
            assert!(before.differences(&spec).is_empty(), "it may change on a resume");
        }
    }
}
