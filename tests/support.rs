//! What the tests of this folder share: running `potstill launch` for real, and reading what it leaves behind.
//!
//! The binaries are those beside the tests in the target folder: `cargo build --workspace` makes them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use safetensors::SafeTensors;
use tempfile::TempDir;

/// The root of the repository.
#[must_use]
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests have a parent folder").to_owned()
}

/// A built binary of the workspace.
///
/// # Panics
/// It has not been built.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own file");
    let folder = test.ancestors().nth(2).expect("tests lie in target/<profile>/deps");
    let path = folder.join(name);
    assert!(path.exists(), "{} is missing: run cargo build --workspace first", path.display());
    path
}

/// A folder of its own for one cluster's storage.
pub struct Cluster {
    folder: TempDir,
}

impl Default for Cluster {
    fn default() -> Self {
        Self { folder: tempfile::tempdir().expect("a temporary folder") }
    }
}

impl Cluster {
    /// Root of the storage.
    #[must_use]
    pub fn storage(&self) -> &Path {
        self.folder.path()
    }

    /// The folder of a run.
    #[must_use]
    pub fn run(&self, run: &str) -> PathBuf {
        self.folder.path().join("runs").join(run)
    }

    /// `potstill launch` on the digits with two micro-batches of 16 per iteration and no scoring, unless `sets` say
    /// otherwise.
    #[must_use]
    pub fn launch(&self, run: &str, workers: u32, sets: &[&str], flags: &[&str]) -> Command {
        let mut command = Self::launch_anywhere(run, workers, sets, flags);
        command.arg("--storage").arg(self.storage());
        command
    }

    /// [`launch`](Self::launch) without a word on storage.
    #[must_use]
    pub fn launch_anywhere(run: &str, workers: u32, sets: &[&str], flags: &[&str]) -> Command {
        let mut command = Command::new(binary("potstill"));
        command
            .arg("launch")
            .arg(repository().join("configs/digits/one-step.toml"))
            .args(["--workers", &workers.to_string(), "--run-id", run, "--threads", "1"])
            .args(["--set", "distillation.global_batch=32", "--set", "distillation.micro_batch=16"])
            .args(["--set", "evaluation.every=0", "--set", "evaluation.samples=100"])
            // Two steps give no images, whose diversity says nothing of the student's.
            .args(["--set", "evaluation.teacher_steps=2", "--set", "evaluation.collapse_share=0.0"])
            .args(sets.iter().flat_map(|set| ["--set", set]))
            .args(flags)
            .stdin(Stdio::null());
        command
    }

    /// Runs [`launch`](Self::launch) to its end with a run file that names no extractor.
    ///
    /// # Panics
    /// The run file cannot be written.
    #[must_use]
    pub fn unscored(&self, run: &str, workers: u32, sets: &[&str]) -> Output {
        let digits = repository().join("configs/digits");
        let config = self.folder.path().join("unscored.toml");
        let text = format!(
            "[teacher]\nweights = {:?}\n[distillation]\nglobal_batch = 32\nmicro_batch = 16",
            digits.join("teacher.safetensors").display().to_string()
        );
        std::fs::write(&config, text).expect("the run file can be written");
        Command::new(binary("potstill"))
            .arg("launch")
            .arg(config)
            .args(["--workers", &workers.to_string(), "--run-id", run, "--threads", "1", "--storage"])
            .arg(self.storage())
            .args(sets.iter().flat_map(|set| ["--set", set]))
            .stdin(Stdio::null())
            .output()
            .expect("potstill starts")
    }

    /// Runs [`launch`](Self::launch) to its end.
    #[must_use]
    pub fn run_to_end(&self, run: &str, workers: u32, sets: &[&str], flags: &[&str]) -> Output {
        self.launch(run, workers, sets, flags).output().expect("potstill starts")
    }

    /// [`run_to_end`](Self::run_to_end) of a run that must succeed.
    ///
    /// # Panics
    /// It did not.
    pub fn succeed(&self, run: &str, workers: u32, sets: &[&str], flags: &[&str]) {
        let output = self.run_to_end(run, workers, sets, flags);
        assert!(output.status.success(), "{}: {}", output.status, text(&output.stderr));
    }

    /// The lines of `metrics.jsonl`.
    ///
    /// # Panics
    /// The run has none.
    #[must_use]
    pub fn metrics(&self, run: &str) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(self.run(run).join("metrics.jsonl")).expect("the run has metrics");
        text.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
    }

    /// Every tensor of a committed checkpoint, by name, whoever wrote it.
    ///
    /// # Panics
    /// There is no such checkpoint, or two shards hold the same tensor.
    #[must_use]
    pub fn checkpoint(&self, run: &str, iteration: u64) -> BTreeMap<String, Vec<f32>> {
        let run = self.run(run);
        let manifest = run.join(format!("checkpoints/{iteration:012}/manifest.json"));
        let manifest = std::fs::read(&manifest).unwrap_or_else(|e| panic!("{}: {e}", manifest.display()));
        let manifest: serde_json::Value = serde_json::from_slice(&manifest).expect("a manifest is JSON");
        let mut tensors = BTreeMap::new();
        for shard in manifest["shards"].as_array().expect("a manifest lists shards") {
            let bytes =
                std::fs::read(run.join(shard["key"].as_str().expect("a key"))).expect("a shard can be read");
            for (name, view) in SafeTensors::deserialize(&bytes).expect("a shard is safetensors").iter() {
                let (values, _) = view.data().as_chunks::<4>();
                let values = values.iter().map(|b| f32::from_le_bytes(*b)).collect();
                assert!(tensors.insert(name.to_owned(), values).is_none(), "{name} was written twice");
            }
        }
        tensors
    }
}

/// Output as text.
#[must_use]
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// |a − b| / |b| over all tensors whose names begin with `prefix`.
///
/// # Panics
/// The two have different tensors, or none.
#[must_use]
pub fn relative_difference(
    a: &BTreeMap<String, Vec<f32>>,
    b: &BTreeMap<String, Vec<f32>>,
    prefix: &str,
) -> f64 {
    let values = |tensors: &BTreeMap<String, Vec<f32>>| -> Vec<f64> {
        let chosen = tensors.iter().filter(|(name, _)| name.starts_with(prefix));
        chosen.flat_map(|(_, values)| values.iter().map(|v| f64::from(*v))).collect()
    };
    let (a, b) = (values(a), values(b));
    assert!(!a.is_empty() && a.len() == b.len(), "{prefix}: {} and {} values", a.len(), b.len());
    let squares: f64 = a.iter().zip(&b).map(|(x, y)| (x - y).powi(2)).sum();
    (squares / b.iter().map(|y| y * y).sum::<f64>()).sqrt()
}
