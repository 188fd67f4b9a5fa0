//! Checkpoints on a rank: writes its share of the state as safetensors, and restores a complete state from all shards.
//!
//! The state's vectors are cut at parameter boundaries into named tensors, `<part>/<parameter>`; each tensor is written
//! by exactly one rank, and any number of ranks can read them. Where each rank holds a slice of the vectors, a slice
//! may end inside a tensor: its pieces are `<part>/<parameter>@<first element>`. No collective is needed.

mod reading;

use std::{
    collections::{BTreeSet, HashMap},
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use potstill_distill::state::{FIRST_MOMENTS, GENERATOR_EMA, Part, Slice, State};
use potstill_models::{Denoiser, Entry};
use potstill_proto::{
    cursor::{Cursor, Generation, Phase},
    message::FromWorker,
    wire::{ShardFailed, ShardReceipt},
};
use potstill_storage::{
    Run,
    checkpoint::{Manifest, Written},
    layout,
};
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use tch::{Device, Tensor};
use tokio::{runtime::Handle, sync::oneshot, task::JoinHandle};

use self::reading::{Reading, Wanted};
use crate::{process::faults, session::Outbox};
use potstill_logging::chain;

/// The pause between two attempts to write the last checkpoint.
const PAUSE: Duration = Duration::from_secs(2);

/// A tensor of the state, in the memory that training uses.
struct Piece {
    name: String,
    shape: Vec<usize>,
    values: Tensor,
}

impl Piece {
    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * size_of::<f32>()
    }
}

/// Memory into which shares are copied before they are written. It is kept from one save to the next: to touch so much
/// new memory each time would take longer than the copy.
#[derive(Clone, Default)]
pub struct Staging(Arc<Mutex<Vec<u8>>>);

/// The staging memory while a reader uses it; returned at the end.
struct Staged {
    bytes: Vec<u8>,
    home: Staging,
}

impl Staging {
    fn take(&self) -> Vec<u8> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl AsRef<[u8]> for Staged {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        *self.home.0.lock().unwrap_or_else(PoisonError::into_inner) = std::mem::take(&mut self.bytes);
    }
}

/// One rank's share of a state that is about to be copied.
pub struct Share {
    iteration: u64,
    pieces: Vec<Piece>,
    staging: Staging,
}

/// A save that runs in the background.
pub struct Save {
    copied: Option<oneshot::Receiver<()>>,
    task: JoinHandle<()>,
}

impl Save {
    /// Whether the share is durable, or has failed.
    pub fn is_over(&self) -> bool {
        self.task.is_finished()
    }

    /// Waits until the state has been copied, and may change.
    pub fn wait_for_copy(&mut self) {
        if let Some(copied) = self.copied.take() {
            let waiting = Instant::now();
            // An error means that the copying ended in another way: the state is no longer read.
            let _ = copied.blocking_recv();
            tracing::debug!(
                seconds = waiting.elapsed().as_secs_f64(),
                "training waited until the state was copied for the checkpoint"
            );
        }
    }

    /// Waits until the save has ended.
    ///
    /// # Errors
    /// The task panicked.
    pub async fn finish(self) -> anyhow::Result<()> {
        self.task.await.context("the checkpoint's task ended")
    }
}

impl Share {
    /// The share of `rank`: the tensors that only it holds, and of those that every rank holds a contiguous run, so
    /// that the shares are as equal in bytes as tensor boundaries allow. Of a slice that several `replicas` of the state have,
    /// each rank has a part.
    pub fn of(
        state: &State,
        iteration: u64,
        (rank, world_size): (u32, u32),
        replica: Slice,
        staging: Staging,
    ) -> Self {
        let parts = state.parts();
        let replicated = || parts.iter().filter(|part| part.replicated);
        let total: i64 = replicated().flat_map(|part| part.entries).map(Entry::numel).sum();
        let (mut before, mut pieces) = (0i64, Vec::new());
        let own = |part: &Part<'_>| {
            let held = part.held();
            let range = if part.replicated { Slice::WHOLE } else { replica }.range(held.end - held.start);
            held.start + range.start..held.start + range.end
        };
        for part in &parts {
            for entry in part.entries {
                let whole = entry.offset..entry.offset + entry.numel();
                let held = overlap(&whole, &own(part));
                let mine = if part.replicated {
                    // The rank in whose range of the bytes this tensor begins.
                    let owner = before * i64::from(world_size) / total;
                    before += entry.numel();
                    owner == i64::from(rank)
                } else {
                    !held.is_empty()
                };
                if mine {
                    let name = format!("{}/{}", part.name, entry.name);
                    let (name, shape) = match held == whole {
                        true => (name, entry.shape.iter().map(|d| *d as usize).collect()),
                        false => (
                            format!("{name}{PIECE}{}", held.start - whole.start),
                            vec![(held.end - held.start) as usize],
                        ),
                    };
                    let values = part.values.narrow(0, held.start - part.first, held.end - held.start);
                    pieces.push(Piece { name, shape, values });
                }
            }
        }
        Self { iteration, pieces, staging }
    }

    /// Copies the share, writes the copy, and reports the receipt or the failure to the coordinator, all in the
    /// background: training may continue, but must not change the state before [`Save::wait_for_copy`] returns. While the
    /// storage fails, it tries again for `patience`.
    #[allow(clippy::too_many_arguments, reason = "each names a part of the shard's key or where it goes")]
    pub fn save(
        self,
        runtime: &Handle,
        run: Run,
        generation: Generation,
        rank: u32,
        world_size: u32,
        outbox: Outbox,
        patience: Duration,
    ) -> Save {
        let (tell, copied) = oneshot::channel();
        let iteration = self.iteration;
        let task = async move {
            let key = shard_key(iteration, generation, rank, world_size);
            let written = self.write(&run, &key, rank, tell, patience).await;
            faults::point("uploaded", iteration, rank);
            outbox.send(match written {
                Ok(Written { shard, e_tag }) => FromWorker::ShardReceipt(ShardReceipt {
                    generation: generation.0,
                    iteration,
                    rank,
                    key: shard.key,
                    bytes: shard.bytes,
                    sha256: shard.sha256,
                    e_tag,
                }),
                Err(error) => FromWorker::ShardFailed(ShardFailed {
                    generation: generation.0,
                    iteration,
                    rank,
                    key,
                    error: chain(&error),
                }),
            });
        };
        Save { copied: Some(copied), task: runtime.spawn(task) }
    }

    async fn write(
        self,
        run: &Run,
        key: &str,
        rank: u32,
        copied: oneshot::Sender<()>,
        patience: Duration,
    ) -> anyhow::Result<Written> {
        let iteration = self.iteration;
        let bytes = tokio::task::spawn_blocking(move || {
            let bytes = self.serialise();
            // When the rank is ending, no thread waits for this.
            let _ = copied.send(());
            faults::point("copied", iteration, rank);
            bytes
        })
        .await??;
        let deadline = Instant::now() + patience;
        loop {
            match run.write_shard(key, rank, bytes.clone()).await {
                Err(error) if Instant::now() + PAUSE < deadline => {
                    tracing::error!(
                        %error,
                        "the last checkpoint cannot be written: the state is held, trying again for {:.0} s",
                        (deadline - Instant::now()).as_secs_f64()
                    );
                    tokio::time::sleep(PAUSE).await;
                }
                answer => return Ok(answer?),
            }
        }
    }

    /// The share as a safetensors file: a header, and a copy of the state's values.
    fn serialise(self) -> anyhow::Result<Bytes> {
        let metadata = HashMap::from([("iteration".to_owned(), self.iteration.to_string())]);
        let mut end = 0;
        let mut tensors = Vec::with_capacity(self.pieces.len());
        for piece in &self.pieces {
            let start = end;
            end += piece.bytes();
            let (dtype, shape, data_offsets) = (Dtype::F32, piece.shape.clone(), (start, end));
            tensors.push((piece.name.clone(), TensorInfo { dtype, shape, data_offsets }));
        }
        let mut header = serde_json::to_vec(&Metadata::new(Some(metadata), tensors)?)?;
        // The values begin at a multiple of eight.
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut bytes = self.staging.take();
        bytes.resize(8 + header.len() + end, 0);
        let (length, rest) = bytes.split_at_mut(8);
        length.copy_from_slice(&(header.len() as u64).to_le_bytes());
        let (head, mut rest) = rest.split_at_mut(header.len());
        head.copy_from_slice(&header);
        for piece in &self.pieces {
            let (place, others) = rest.split_at_mut(piece.bytes());
            let values = piece.values.to_device(Device::Cpu);
            values.f_copy_data_u8(place, values.numel())?;
            rest = others;
        }
        Ok(Bytes::from_owner(Staged { bytes, home: self.staging }))
    }
}

/// Writes a state that every rank holds whole, as it is, with its specification, as a run of its own, unless another rank has
/// done so. Returns the manifest's place.
///
/// # Errors
/// The storage's error.
pub async fn rescue(
    run: &Run,
    specification: &str,
    state: &State,
    cursor: Cursor,
    generation: Generation,
    writer: &str,
) -> anyhow::Result<Option<String>> {
    run.freeze(specification).await?;
    let claim = format!("rescue/{:012}-{:?}", cursor.iteration, cursor.phase);
    match run.create(&claim, writer.to_owned().into()).await {
        Err(potstill_storage::Error::AlreadyExists { .. }) => return Ok(None),
        other => other?,
    }
    let bytes = Share::of(state, cursor.iteration, (0, 1), Slice::WHOLE, Staging::default()).serialise()?;
    let attempt = format!("rescue-{}", generation.store_prefix());
    let key = layout::shard_key(cursor.iteration, &attempt, 0, 1);
    let Written { shard, .. } = run.write_shard(&key, 0, bytes).await?;
    let fake_score_done = cursor.phase == Phase::Generator;
    let mut manifest = Manifest::new(cursor.iteration, generation.0, vec![shard]);
    manifest.fake_score_done = fake_score_done;
    let key = run.commit(&manifest).await?;
    Ok(Some(run.describe(&key)))
}

/// The key of a rank's shard below the run's folder.
pub fn shard_key(iteration: u64, generation: Generation, rank: u32, world_size: u32) -> String {
    layout::shard_key(iteration, &generation.store_prefix(), rank, world_size)
}

/// Separates a tensor's name from the first element of a piece of it.
const PIECE: char = '@';

fn overlap(a: &Range<i64>, b: &Range<i64>) -> Range<i64> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

/// Fills `state`, or all slices that it holds, from the checkpoint with this manifest; returns its cursor.
///
/// # Errors
/// A shard that is missing or damaged, by name; a tensor that is missing or of another shape, by name.
pub async fn restore(run: &Run, manifest_key: &str, state: &mut State) -> anyhow::Result<Cursor> {
    let manifest = run.resumable_manifest(manifest_key).await?;
    let iteration = fill(run, manifest_key, &manifest, &state.all_parts(), Others::Refused).await?;
    let phase = if manifest.fake_score_done { Phase::Generator } else { Phase::FakeScore };
    Ok(Cursor { iteration, phase })
}

/// Fills `network` with the averaged generator of the checkpoint with this manifest; returns the checkpoint's
/// iteration.
///
/// # Errors
/// As [`restore`].
pub async fn restore_generator(run: &Run, manifest_key: &str, network: &dyn Denoiser) -> anyhow::Result<u64> {
    let parameters = network.parameters();
    let part = Part {
        name: GENERATOR_EMA,
        entries: parameters.entries(),
        values: parameters.flat(),
        first: 0,
        replicated: true,
    };
    let manifest = run.manifest(manifest_key).await?;
    fill(run, manifest_key, &manifest, &[part], Others::PassedOver).await
}

/// Collects the tensors of a checkpoint that were not asked for.
#[derive(PartialEq)]
enum Others {
    Refused,
    PassedOver,
}

async fn fill(
    run: &Run,
    manifest_key: &str,
    manifest: &Manifest,
    parts: &[Part<'_>],
    others: Others,
) -> anyhow::Result<u64> {
    /// A tensor of which elements are still missing.
    struct Missing<'a> {
        entry: &'a Entry,
        elements: i64,
        /// What it fills: the parts of slices that are held.
        targets: Vec<&'a Part<'a>>,
    }
    let mut missing: HashMap<String, Missing> = HashMap::new();
    for part in parts {
        for entry in part.entries {
            let name = format!("{}/{}", part.name, entry.name);
            let unread = || Missing { entry, elements: entry.numel(), targets: vec![] };
            missing.entry(name).or_insert_with(unread).targets.push(part);
        }
    }
    for shard in &manifest.shards {
        let place = run.describe(&shard.key);
        let plan = |name: &str, info: &TensorInfo| -> anyhow::Result<Vec<Wanted>> {
            let piece = name.rsplit_once(PIECE).and_then(|(name, first)| Some((name, first.parse().ok()?)));
            let (tensor, first): (&str, i64) = piece.unwrap_or((name, 0));
            let Some(wanted) = missing.get_mut(tensor).filter(|wanted| wanted.elements > 0) else {
                // Earlier versions also saved a first moment that is the last gradient.
                let first_moment = FIRST_MOMENTS
                    .iter()
                    .any(|part| tensor.strip_prefix(part).is_some_and(|rest| rest.starts_with('/')));
                ensure!(
                    others == Others::PassedOver || (first_moment && !missing.contains_key(tensor)),
                    "it holds {name}, which this model does not have or another shard holds too"
                );
                return Ok(vec![]);
            };
            let entry = wanted.entry;
            let shape: Vec<i64> = info.shape.iter().map(|d| *d as i64).collect();
            let count = shape.iter().product::<i64>();
            let fits = match piece {
                None => shape == entry.shape,
                Some(_) => shape.len() == 1 && first >= 0 && first <= entry.numel() - count,
            };
            ensure!(
                fits && count <= wanted.elements && info.dtype == Dtype::F32,
                "{name} is {:?} {shape:?}; this model has F32 {:?}",
                info.dtype,
                entry.shape
            );
            wanted.elements -= count;
            let start = entry.offset + first;
            let place_in = |part: &&Part<'_>| {
                let held = overlap(&(start..start + count), &part.held());
                (!held.is_empty()).then(|| Wanted {
                    first: info.data_offsets.0 + (held.start - start) as usize * size_of::<f32>(),
                    place: part.values.narrow(0, held.start - part.first, held.end - held.start),
                })
            };
            Ok(wanted.targets.iter().filter_map(place_in).collect())
        };
        let mut reading = Reading::new(shard.bytes, plan)?;
        let mut taken = Ok(());
        // What is damaged may fail to be understood too: the store's verdict comes first.
        run.read_shard_in_pieces(shard, |piece| {
            if taken.is_ok() {
                taken = reading.take(piece);
            }
        })
        .await?;
        taken.and_then(|()| reading.finish()).with_context(|| format!("shard {place}"))?;
    }
    let missing: BTreeSet<&String> =
        missing.iter().filter(|(_, wanted)| wanted.elements > 0).map(|(name, _)| name).collect();
    if let Some(name) = missing.first() {
        bail!("checkpoint {} lacks {} tensors, {name} among them", run.describe(manifest_key), missing.len());
    }
    Ok(manifest.iteration)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use potstill_distill::{
        counters::Counters,
        state::{Layout, Start},
    };
    use potstill_models::EdmNetwork;
    use potstill_storage::Root;
    use safetensors::SafeTensors;

    use super::*;

    /// Earlier versions saved a first moment whatever its decay.
    #[tokio::test]
    async fn a_first_moment_that_is_not_held_is_passed_over_and_one_that_is_missing_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let root = Root::open(folder.path().to_str().unwrap()).unwrap();
        let teacher = repository_teacher();
        let state = |first_moments| {
            let layout = Layout { first_moments, ..Layout::PLAIN };
            let start = Start::of(&teacher);
            State::starting_from(start, start, Counters::new(false), layout)
        };
        let (with, without) = (state([true; 2]), state([false; 2]));
        for (name, of, mut into) in
            [("with", &with, state([false; 2])), ("without", &without, state([true; 2]))]
        {
            let run = root.run(&name.parse().unwrap());
            rescue(&run, "", of, Cursor::boundary(3), Generation(1), "w").await.unwrap();
            let restored = restore(&run, &layout::manifest_key(3), &mut into).await;
            match name {
                "with" => assert_eq!(restored.unwrap(), Cursor::boundary(3)),
                _ => assert!(restored.unwrap_err().to_string().contains("_adam.exp_avg/"), "{name}"),
            }
        }
    }

    fn repository_teacher() -> EdmNetwork {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/digits/teacher.safetensors");
        EdmNetwork::load(&path, Device::Cpu).unwrap()
    }

    #[test]
    fn one_save_after_another_uses_the_same_memory() {
        let staging = Staging::default();
        let file = |value: f32| {
            let values = Tensor::from_slice(&[value; 1000]);
            let piece = Piece { name: "part/parameter".to_owned(), shape: vec![1000], values };
            let share = Share { iteration: 1, pieces: vec![piece], staging: staging.clone() };
            share.serialise().unwrap()
        };
        let first = file(1.0);
        let place = first.as_ptr();
        // Returned when the last reader has dropped it.
        drop((first.clone(), first));
        let second = file(2.0);
        assert_eq!(second.as_ptr(), place);
        let read = SafeTensors::deserialize(&second).unwrap();
        assert_eq!(read.tensor("part/parameter").unwrap().data()[..4], 2_f32.to_le_bytes());
    }
}
