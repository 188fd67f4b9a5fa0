//! A finished student: the averaged generator and its noise levels, from a run's checkpoint or from an exported file.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::{Context, ensure};
use clap::Args;
use potstill_distill::state::State;
use potstill_models::{Denoiser, EdmNetwork, weights::Archive};
use potstill_proto::spec::RunSpec;
use potstill_storage::{Root, RunId, layout};
use tch::Device;

use crate::{checkpoint, training::load_teacher};

/// Header key of an exported file under which the generator's noise levels lie, as JSON.
const SIGMAS_KEY: &str = "sigmas";

/// Where the student comes from.
#[derive(Args)]
#[group(required = true, multiple = true)]
pub struct Source {
    /// An exported generator
    #[arg(conflicts_with_all = ["run_id", "iteration"])]
    file: Option<PathBuf>,
    /// Take it from a checkpoint of this run
    #[arg(long, value_name = "NAME")]
    run_id: Option<String>,
    /// Where the run is kept
    #[arg(long, value_name = "URL", default_value = ".")]
    storage: String,
    /// Which checkpoint; by default the newest
    #[arg(long, value_name = "N", requires = "run_id")]
    iteration: Option<u64>,
}

/// A generator that is ready to sample from.
pub struct Student {
    /// G_ema.
    pub network: Box<dyn Denoiser>,
    /// Noise level of each step.
    pub sigmas: Vec<f64>,
    /// Where it comes from, for people.
    pub origin: String,
}

impl Student {
    /// Loads it.
    ///
    /// # Errors
    /// There is no such file or checkpoint, or it is damaged.
    pub fn load(source: &Source, device: Device) -> anyhow::Result<Self> {
        match (&source.file, &source.run_id) {
            (Some(file), _) => Self::from_file(file, device),
            (None, Some(run_id)) => {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(Self::from_run(&source.storage, run_id, source.iteration, device))
            }
            (None, None) => anyhow::bail!("name an exported file, or a run with --run-id"),
        }
    }

    fn from_file(path: &PathBuf, device: Device) -> anyhow::Result<Self> {
        let archive = Archive::read(path)?;
        let sigmas = archive.metadata.get(SIGMAS_KEY).with_context(|| {
            format!("{} is not an exported generator: its header has no `{SIGMAS_KEY}`", path.display())
        })?;
        let sigmas: Vec<f64> = serde_json::from_str(sigmas)
            .with_context(|| format!("{}: `{SIGMAS_KEY}` in the header", path.display()))?;
        ensure!(!sigmas.is_empty(), "{}: a generator has at least one step", path.display());
        let network = EdmNetwork::load(path, device)?.frozen();
        Ok(Self { network, sigmas, origin: path.display().to_string() })
    }

    async fn from_run(
        storage: &str,
        run_id: &str,
        iteration: Option<u64>,
        device: Device,
    ) -> anyhow::Result<Self> {
        let run = Root::open(storage)?.run(&run_id.parse::<RunId>()?);
        let specification = run.specification().await?.with_context(|| {
            format!("there is no run {run_id} in {storage}: {} is missing", run.describe("run.toml"))
        })?;
        let spec = RunSpec::from_toml(&specification)?;
        let committed = run.checkpoints().await?;
        let iteration = match iteration {
            Some(iteration) => {
                ensure!(
                    committed.contains(&iteration),
                    "run {run_id} has no checkpoint of iteration {iteration}; it has {committed:?}"
                );
                iteration
            }
            None => *committed.last().with_context(|| format!("run {run_id} has no checkpoint yet"))?,
        };
        let teacher = load_teacher(&spec.teacher.weights, spec.teacher.sha256.as_deref(), device)?;
        let mut state = State::from_teacher(&teacher);
        let key = layout::manifest_key(iteration);
        checkpoint::restore(&run, &key, &mut state).await?;
        Ok(Self { network: state.generator_ema, sigmas: spec.generator.sigmas, origin: run.describe(&key) })
    }

    /// The generator alone, with everything needed to sample from it, as one safetensors file.
    ///
    /// # Errors
    /// The serialiser's.
    pub fn to_safetensors(&self) -> anyhow::Result<Vec<u8>> {
        let metadata = BTreeMap::from([
            (SIGMAS_KEY.to_owned(), serde_json::to_string(&self.sigmas)?),
            ("exported_by".to_owned(), "potstill export".to_owned()),
        ]);
        Ok(self.network.to_safetensors(&metadata)?)
    }
}
