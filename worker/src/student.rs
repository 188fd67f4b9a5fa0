//! A finished student: the averaged generator and the times of its steps, from a run's checkpoint or from an exported file.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, bail, ensure};
use clap::Args;
use potstill_models::{EdmNetwork, weights::Archive};
use potstill_spec::RunSpec;
use potstill_storage::{Root, RunId, layout};
use tch::Device;

use crate::{checkpoint, export, model::Model, training::times};

/// Header key of an exported file under which the times of the generator's steps lie, as JSON.
const TIMES_KEY: &str = "times";

/// Where the student comes from.
#[derive(Args)]
pub struct Source {
    /// An exported generator (a .safetensors file, or a folder in the layout of diffusers), or a run (STORAGE/runs/RUN, whose newest checkpoint it takes), or one
    /// checkpoint of it (STORAGE/runs/RUN/checkpoints/ITERATION)
    #[arg(long, value_name = "URL")]
    checkpoint: String,
    /// Run only the first so many steps of the generator; by default all
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    steps: Option<u32>,
}

/// A generator that is ready to sample from.
pub struct Student {
    /// G_ema, and what surrounds it.
    pub model: Model,
    /// Time of each step.
    pub times: Vec<f64>,
    /// Where it comes from, for people.
    pub origin: String,
}

/// A checkpoint's place in a storage.
#[derive(Debug, PartialEq)]
struct Place {
    storage: String,
    run: RunId,
    /// The newest, if there is none.
    iteration: Option<u64>,
}

impl Place {
    /// Takes `<storage>/runs/<run>[/checkpoints/<iteration>[/manifest.json]]` apart.
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

impl Source {
    /// Loads it.
    ///
    /// # Errors
    /// There is no such file or checkpoint, it is damaged, or it has fewer steps than asked for.
    pub fn load(&self, device: Device) -> anyhow::Result<Student> {
        let path = Path::new(&self.checkpoint);
        let mut student = if self.checkpoint.ends_with(".safetensors") {
            Student::from_file(path, device)?
        } else if path.join("model_index.json").is_file() {
            Student::from_folder(path, device)?
        } else {
            let place = Place::parse(&self.checkpoint)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(Student::from_run(place, device))?
        };
        if let Some(steps) = self.steps {
            ensure!(
                steps as usize <= student.times.len(),
                "{}: has {} step(s), at {:?}; --steps {steps} is more than it was trained for",
                student.origin,
                student.times.len(),
                student.times
            );
            student.times.truncate(steps as usize);
        }
        Ok(student)
    }
}

impl Student {
    /// An exported one.
    ///
    /// # Errors
    /// The file is missing, damaged, or no exported generator.
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
            times,
            origin: path.display().to_string(),
        })
    }

    /// An exported text-to-image model.
    ///
    /// # Errors
    /// The folder is not one that `potstill export` wrote, or is damaged.
    fn from_folder(path: &Path, device: Device) -> anyhow::Result<Self> {
        let times = export::few_step_times(path)?;
        Ok(Self {
            model: Model::from_folder(path, None, false, device)?,
            times,
            origin: path.display().to_string(),
        })
    }

    async fn from_run(place: Place, device: Device) -> anyhow::Result<Self> {
        let Place { storage, run: id, iteration } = place;
        // Opening a storage on this machine would create its folder.
        let local = storage.strip_prefix("file://").unwrap_or(&storage);
        ensure!(
            local.contains("://") || Path::new(local).is_dir(),
            "there is no run {id} in {storage}: there is no such folder"
        );
        let run = Root::open(&storage)?.run(&id);
        let specification = run.specification().await?.with_context(|| {
            format!("there is no run {id} in {storage}: {} is missing", run.describe("run.toml"))
        })?;
        let spec = RunSpec::of_finished_run(&specification)?;
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
        let model = Model::load(&spec, device)?;
        let key = layout::manifest_key(iteration);
        checkpoint::restore_generator(&run, &key, model.network.as_ref()).await?;
        let times = times(&spec, model.network.process());
        Ok(Self { model, times, origin: run.describe(&key) })
    }

    /// The generator alone, with everything needed to sample from it, as one safetensors file.
    ///
    /// # Errors
    /// The serialiser's.
    pub fn to_safetensors(&self) -> anyhow::Result<Vec<u8>> {
        let metadata = BTreeMap::from([
            (TIMES_KEY.to_owned(), serde_json::to_string(&self.times)?),
            ("exported_by".to_owned(), "potstill export".to_owned()),
        ]);
        Ok(self.model.network.to_safetensors(&metadata)?)
    }
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
