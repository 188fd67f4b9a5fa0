//! Opens a run's folder and journal, and reads what they hold, before the coordinator serves.

use std::{path::PathBuf, time::Duration};

use potstill_access::{AccessError, Fingerprint, JoinKey, Locator, Role};
use potstill_core::{
    Setup,
    ledger::CommittedCheckpoint,
    observation::Outcome,
    record::Record,
    terms::{Division, Terms, Timeouts},
};
use potstill_proto::wire::RunState;
use potstill_spec::RunSpec;
use potstill_storage::{
    Run, checkpoint::Manifest, digest::sha256_with, journal::Journal, layout, retention::Policy,
};
use tonic::Code;
use uuid::Uuid;

use crate::{
    client::Client,
    error::StartError,
    options::{Options, Resume},
};

/// How long a connection to another coordinator of the run may take, and its answer.
const OTHERS: Duration = Duration::from_secs(2);
const ANSWER: Duration = Duration::from_secs(10);

/// A run that is ready to be served.
pub struct Opened {
    /// The initial input of the state machine.
    pub setup: Setup,
    /// Its rule for the checkpoints to keep.
    pub retention: Policy,
    /// Its specification, where it is resumed with other values than those in its folder, of those that do not decide its
    /// result.
    pub changed_specification: Option<String>,
    /// What lets callers in; none where everybody is let in.
    pub join_key: Option<JoinKey>,
    /// The run's folder.
    pub run: Run,
    /// Its journal, positioned after the newest record.
    pub journal: Journal,
}

/// Opens a new run, or one to be resumed.
pub async fn open(
    options: Options,
    address: &str,
    certificate: Option<Fingerprint>,
) -> Result<Opened, StartError> {
    let Options { mut spec, run_id, storage, resume, from_teacher, ranks_may_live, .. } = options;
    storage.probe().await?;
    let digest = teacher_digest(&spec).await?;
    spec.teacher.sha256 = digest;
    let run = storage.run(&run_id);
    let name = run_id.to_string();
    let specification = spec.to_toml()?;

    let mut changed = false;
    match (resume, run.specification().await?) {
        (Resume::Never, Some(_)) => return Err(StartError::RunExists { run: name }),
        (Resume::Never | Resume::Auto, None) => {
            run.freeze(&specification).await.map_err(|error| match error {
                potstill_storage::Error::AlreadyExists { .. } => StartError::RunExists { run: name.clone() },
                other => other.into(),
            })?
        }
        (Resume::Always, None) => {
            let problem = format!("there is no run {name} in {}", storage.url());
            return Err(StartError::NothingToResume { problem });
        }
        (Resume::Always | Resume::Auto, Some(frozen)) => {
            let differences = RunSpec::from_toml(&frozen)?.differences(&spec);
            if !differences.is_empty() {
                return Err(StartError::Differs { run: name, differences });
            }
            changed = frozen != specification;
        }
    }
    let join_key = match certificate {
        Some(_) => Some(join_key(&run).await?),
        None => None,
    };
    let (whole, damaged) = run.survey().await?;
    for error in &damaged {
        tracing::error!(%error, "checkpoint is damaged: it is not used");
    }
    let checkpoint = |manifest: Manifest| CommittedCheckpoint {
        iteration: manifest.iteration,
        manifest_key: layout::manifest_key(manifest.iteration),
    };
    let checkpoints: Vec<_> = whole.into_iter().map(checkpoint).collect();
    let whole_checkpoints = checkpoints.len();

    let (journal, records) = Journal::open(&run).await?;
    let mut history = Vec::with_capacity(records.len());
    for (index, bytes) in records.iter().enumerate() {
        history.push(Record::decode(bytes).map_err(|source| StartError::Record { index, source })?);
    }
    if let Some(served) = served_at(&run, &history).await {
        return Err(StartError::Served { run: name, address: served });
    }
    let may_live = ranks_may_live && !matches!(history.last(), Some(Record::Ended { .. }));
    let committed = history.iter().filter(|record| matches!(record, Record::Committed { .. })).count();
    if whole_checkpoints == 0 && (!damaged.is_empty() || committed > 0) && !from_teacher && !may_live {
        let problem = format!(
            "none of the checkpoints of run {name} can be read ({} are damaged, {committed} were committed): restore the files, \
             start another run with another --run-id, or give --from-teacher to begin this one again from the teacher",
            damaged.len()
        );
        return Err(StartError::NothingToResume { problem });
    }
    if let Some(Record::Ended { outcome: Outcome::Succeeded { iteration } }) = history.last()
        && *iteration >= spec.distillation.iterations
    {
        return Err(StartError::Complete { run: name, iteration: *iteration });
    }
    if resume != Resume::Never && checkpoints.is_empty() {
        tracing::warn!("no checkpoint yet: the run starts from the teacher unless a worker brings a state");
    }
    let retention =
        Policy { keep_last: spec.checkpoint.keep_last.bound(), keep_every: spec.checkpoint.keep_every };
    let storage_url = storage.url().to_owned();
    let coordinator = Uuid::new_v4().to_string();
    let changed_specification = changed.then(|| specification.clone());
    Ok(Opened {
        setup: Setup {
            coordinator,
            address: address.to_owned(),
            certificate: certificate.map(|certificate| certificate.to_string()),
            run_id: name,
            terms: terms(&spec),
            specification,
            storage_url,
            history,
            checkpoints,
            ranks_may_live,
            from_teacher,
        },
        retention,
        changed_specification,
        join_key,
        run,
        journal,
    })
}

/// The run's join key, which its first coordinator makes.
async fn join_key(run: &Run) -> Result<JoinKey, StartError> {
    if run.join_key().await?.is_none() {
        run.keep_join_key(&JoinKey::generate()?.to_text()).await?;
    }
    let unusable = |problem: &str| AccessError::Unusable {
        place: run.describe(layout::JOIN_KEY),
        problem: problem.to_owned(),
    };
    let text = run.join_key().await?.ok_or_else(|| unusable("it was removed"))?;
    let key = JoinKey::parse(&text)
        .ok_or_else(|| unusable("it is no join key; remove it, and the coordinator makes another"))?;
    Ok(key)
}

/// The part of the specification that the coordinator needs.
pub fn terms(spec: &RunSpec) -> Terms {
    Terms {
        iterations: spec.distillation.iterations,
        micro_batches: spec.micro_batches(),
        micro_batch: spec.distillation.micro_batch,
        min_workers: spec.cluster.min_workers,
        max_workers: spec.cluster.max_workers,
        timeouts: Timeouts::new(spec.cluster.failure_timeout, spec.cluster.wait_timeout),
        scored: spec.evaluation.features.is_some(),
        collapse_share: spec.evaluation.collapse_share,
        division: match (spec.memory.is_sharded(), spec.memory.shard_group) {
            (false, _) => Division::Whole,
            (true, None) => Division::Slices,
            (true, Some(smallest)) => Division::SlicesInGroups(smallest),
        },
        stop_after_failures: spec.checkpoint.stop_after_failures,
        straggler_factor: spec.cluster.straggler_factor,
        replace_stragglers: spec.cluster.replace_stragglers,
    }
}

/// SHA-256 of the teacher's file or folder, hexadecimal; compared with the specification's, where that has one. For a
/// model that is not on this machine, the specification's value.
async fn teacher_digest(spec: &RunSpec) -> Result<Option<String>, StartError> {
    let path = match &spec.teacher.model {
        None => spec.teacher.weights.clone().unwrap_or_default(),
        Some(model) if PathBuf::from(model).exists() => PathBuf::from(model),
        Some(_) => return Ok(spec.teacher.sha256.clone()),
    };
    let (hashing, additions) = (path.clone(), spec.teacher.additions());
    let unreadable = |source| StartError::Teacher { path: path.clone(), source };
    let hashed = tokio::task::spawn_blocking(move || sha256_with(&hashing, &additions)).await;
    let actual = hashed.map_err(std::io::Error::other).and_then(|digest| digest).map_err(unreadable)?;
    match &spec.teacher.sha256 {
        Some(given) if !given.eq_ignore_ascii_case(&actual) => {
            Err(StartError::OtherTeacher { path, actual, given: given.clone() })
        }
        _ => Ok(Some(actual)),
    }
}

/// The address of another coordinator that serves this run, if there is one: whatever answers there, even with an error, may
/// be one. If one is missed here, the journal still stops the second of two writers.
async fn served_at(run: &Run, history: &[Record]) -> Option<String> {
    if matches!(history.last(), None | Some(Record::Ended { .. })) {
        return None;
    }
    let locator = Locator::Storage { run: run.clone(), role: Role::Viewer, address: None, insecure: true };
    let invitation = locator.find().await.ok()?;
    let address = invitation.address.clone();
    // Where another program listens, this fails: it has another certificate.
    let mut client = Client::connect(&invitation, OTHERS).await.ok()?;
    let serves = match tokio::time::timeout(ANSWER, client.summary()).await {
        Ok(Ok(reply)) => {
            let over = matches!(reply.state(), RunState::Succeeded | RunState::Stopped | RunState::Failed);
            reply.run_id == run.id().to_string() && !over
        }
        // Another program listens there.
        Ok(Err(status)) => !matches!(status.code(), Code::Unimplemented | Code::Unavailable | Code::Unknown),
        // Not even an error: it is stopped, or no coordinator.
        Err(_) => false,
    };
    serves.then_some(address)
}
