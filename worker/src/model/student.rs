//! A finished student: the averaged generator and the times of its steps, from a run's checkpoint or from an exported file.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, bail, ensure};
use potstill_models::{Denoiser, EdmNetwork, Lora, weights::Archive};
use potstill_spec::RunSpec;
use potstill_storage::{Root, RunId, layout};
use serde_json::Value;
use tch::{Device, Kind};

use super::{Model, adapters, steps::times};
use crate::checkpoint;

/// Header key of an exported file that holds the times of the generator's steps, as JSON.
const TIMES_KEY: &str = "times";
/// Key of the scheduler's configuration in an exported folder that holds them.
pub const FOLDER_TIMES_KEY: &str = "few_step_timesteps";
/// The file of the scheduler's configuration in a folder.
pub const SCHEDULER: &str = "scheduler/scheduler_config.json";

/// A generator that is ready to sample.
pub struct Student {
    /// G_ema, with the other parts of its model.
    pub model: Model,
    /// Its adapters by themselves, if it was trained with some; they are part of the model's network as well.
    pub adapters: Option<Adapters>,
    /// Time of each step.
    pub times: Vec<f64>,
    /// Its source, for messages.
    pub origin: String,
}

/// Low-rank adapters of a student.
pub struct Adapters {
    /// Their description.
    pub lora: Lora,
    /// The teacher with them.
    pub network: Box<dyn Denoiser>,
}

/// The location of a checkpoint.
#[derive(Debug, PartialEq)]
struct Place {
    storage: String,
    run: RunId,
    /// If none, the newest.
    iteration: Option<u64>,
}

impl Place {
    /// Parses `<storage>/runs/<run>[/checkpoints/<iteration>[/manifest.json]]`.
    fn parse(location: &str) -> anyhow::Result<Self> {
        let expected = "expected an exported .safetensors file, <storage>/runs/<run> or \
                        <storage>/runs/<run>/checkpoints/<iteration>";
        let (storage, rest) = match location.rsplit_once("/runs/") {
            Some((storage, rest)) => (if storage.is_empty() { "/" } else { storage }, rest),
            None => (".", location.strip_prefix("runs/").with_context(|| format!("{location}: {expected}"))?),
        };
        let parts: Vec<&str> = rest.split('/').filter(|part| !part.is_empty()).collect();
        let (run, iteration) = match parts[..] {
            [run] => (run, None),
            [run, "checkpoints", iteration] | [run, "checkpoints", iteration, "manifest.json"] => {
                (run, Some(iteration.parse().with_context(|| format!("{location}: {expected}"))?))
            }
            _ => bail!("{location}: {expected}"),
        };
        Ok(Self { storage: storage.to_owned(), run: run.parse()?, iteration })
    }
}

impl Student {
    /// Loads an exported file or folder, or a run's checkpoint, with all of its steps.
    ///
    /// # Errors
    /// There is no such file or checkpoint, or it is damaged.
    pub fn load(location: &str, device: Device) -> anyhow::Result<Self> {
        let path = Path::new(location);
        if location.ends_with(".safetensors") {
            Self::from_file(path, device)
        } else if path.join("model_index.json").is_file() {
            Self::from_folder(path, device)
        } else {
            let place = Place::parse(location)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(Self::from_run(place, device))
        }
    }

    /// Loads an exported EDM generator.
    ///
    /// # Errors
    /// The file is missing, damaged, or not an exported generator.
    pub fn from_file(path: &Path, device: Device) -> anyhow::Result<Self> {
        let archive = Archive::read(path)?;
        let times = archive.metadata.get(TIMES_KEY).with_context(|| {
            format!("{} is not an exported generator: its header has no `{TIMES_KEY}`", path.display())
        })?;
        let times: Vec<f64> = serde_json::from_str(times)
            .with_context(|| format!("{}: `{TIMES_KEY}` in the header", path.display()))?;
        ensure!(!times.is_empty(), "{}: a generator has at least one step", path.display());
        Ok(Self {
            model: Model::plain(EdmNetwork::load(path, device)?),
            adapters: None,
            times,
            origin: path.display().to_string(),
        })
    }

    /// Loads an exported text-to-image model.
    ///
    /// # Errors
    /// The folder is not one that `potstill export` wrote, or is damaged.
    fn from_folder(path: &Path, device: Device) -> anyhow::Result<Self> {
        let times = few_step_times(path)?;
        Ok(Self {
            model: Model::from_folder(path, None, false, device)?,
            adapters: None,
            times,
            origin: path.display().to_string(),
        })
    }

    async fn from_run(place: Place, device: Device) -> anyhow::Result<Self> {
        let Place { storage, run: id, iteration } = place;
        // Opening the storage would create a missing local folder.
        let local = storage.strip_prefix("file://").unwrap_or(&storage);
        ensure!(
            local.contains("://") || Path::new(local).is_dir(),
            "there is no run {id} in {storage}: there is no such folder"
        );
        let run = Root::open(&storage)?.run(&id);
        let specification = run.specification().await?.with_context(|| {
            format!("there is no run {id} in {storage}: {} is missing", run.describe("run.toml"))
        })?;
        let mut spec = RunSpec::of_finished_run(&specification)?;
        if spec.teacher.sha256.is_none() {
            spec.teacher.sha256 = run.teacher().await?;
        }
        let committed = run.checkpoints().await?;
        let iteration = match iteration {
            Some(iteration) => {
                ensure!(
                    committed.contains(&iteration),
                    "run {id} has no checkpoint of iteration {iteration}; it has {committed:?}"
                );
                iteration
            }
            None => *committed.last().with_context(|| format!("run {id} has no checkpoint yet"))?,
        };
        // fp32, as the checkpoint has it, whatever the run's weights.
        let mut model = Model::load(&spec, Kind::Float, device)?;
        let key = layout::manifest_key(iteration);
        let mut adapters = None;
        if let Some(lora) = &spec.lora {
            let network = adapters::empty(model.network.as_ref(), lora)?;
            checkpoint::restore_generator(&run, &key, network.as_ref()).await?;
            model.network = network.merged();
            adapters = Some(Adapters { lora: adapters::described(lora), network });
        } else {
            checkpoint::restore_generator(&run, &key, model.network.as_ref()).await?;
        }
        let times = times(&spec, model.network.process());
        Ok(Self { model, adapters, times, origin: run.describe(&key) })
    }

    /// The generator with the times of its steps, as one safetensors file.
    ///
    /// # Errors
    /// The serializer's error.
    pub fn to_safetensors(&self) -> anyhow::Result<Vec<u8>> {
        let metadata = BTreeMap::from([
            (TIMES_KEY.to_owned(), serde_json::to_string(&self.times)?),
            ("exported_by".to_owned(), "potstill export".to_owned()),
        ]);
        Ok(self.model.network.to_safetensors(&metadata)?)
    }
}

/// The times of an exported generator's steps.
///
/// # Errors
/// The folder was not exported by Potstill.
fn few_step_times(folder: &Path) -> anyhow::Result<Vec<f64>> {
    let path = folder.join(SCHEDULER);
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let config: Value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    let times: Option<Vec<f64>> =
        config[FOLDER_TIMES_KEY].as_array().map(|times| times.iter().filter_map(Value::as_f64).collect());
    let times = times.filter(|times| !times.is_empty()).with_context(|| {
        format!(
            "{} is not a few-step generator: {SCHEDULER} has no `{FOLDER_TIMES_KEY}`, which `potstill export` writes",
            folder.display()
        )
    })?;
    Ok(times)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_taken_apart() {
        let place =
            |location: &str| Place::parse(location).map(|p| (p.storage, p.run.to_string(), p.iteration)).ok();
        let expected = |s: &str, r: &str, i| Some((s.to_owned(), r.to_owned(), i));
        assert_eq!(place("s3://b/x/runs/demo"), expected("s3://b/x", "demo", None));
        assert_eq!(place("runs/demo/"), expected(".", "demo", None));
        assert_eq!(place("/runs/demo"), expected("/", "demo", None));
        assert_eq!(
            place("/data/runs/runs/demo/checkpoints/000000000400/manifest.json"),
            expected("/data/runs", "demo", Some(400))
        );
        for wrong in ["demo", "runs/demo/checkpoints/last", "runs/demo/samples", "file:///tmp", "runs/"] {
            assert_eq!(place(wrong), None, "{wrong}");
        }
    }
}
