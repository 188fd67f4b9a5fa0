//! Checkpoints, the rank's side: its share of the replicated state as safetensors, and a whole state back from all shares.
//!
//! The state's vectors are cut at parameter boundaries into named tensors, `<part>/<parameter>`; each tensor is written
//! by exactly one rank, and any number of ranks can read them back. No collective takes part.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use potstill_distill::state::{GENERATOR_EMA, Part, State};
use potstill_models::Denoiser;
use potstill_proto::{
    cursor::Generation,
    message::FromWorker,
    wire::{ShardFailed, ShardReceipt},
};
use potstill_storage::{Run, checkpoint::Shard, layout};
use safetensors::{
    Dtype, SafeTensors,
    tensor::{Metadata, TensorInfo},
};
use tch::{Device, Kind, Tensor};
use tokio::{runtime::Handle, sync::oneshot, task::JoinHandle};

use crate::{chain::chain, faults, session::Outbox};

/// A tensor of the state, in the memory that training works in.
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

/// Memory that shares are copied into before they are written. It is kept from one save to the next: touching so much new
/// memory each time would take longer than the copy.
#[derive(Clone, Default)]
pub struct Staging(Arc<Mutex<Vec<u8>>>);

/// The staging memory while somebody reads it; given back at the end.
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

/// A save under way, in the background.
pub struct Save {
    copied: Option<oneshot::Receiver<()>>,
    task: JoinHandle<()>,
}

impl Save {
    /// Whether the share is durable, or was given up.
    pub fn is_over(&self) -> bool {
        self.task.is_finished()
    }

    /// Waits until the state has been copied, and may change.
    pub fn wait_for_copy(&mut self) {
        if let Some(copied) = self.copied.take() {
            // An error means that the copying ended otherwise: the state is not looked at any more.
            let _ = copied.blocking_recv();
        }
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// The task panicked.
    pub async fn finish(self) -> anyhow::Result<()> {
        self.task.await.context("the checkpoint's task ended")
    }
}

impl Share {
    /// The share of `rank`. Shares are contiguous runs of tensors with as equal numbers of bytes as tensor boundaries allow.
    pub fn of(state: &State, iteration: u64, rank: u32, world_size: u32, staging: Staging) -> Self {
        let parts = state.parts();
        let total: i64 = parts.iter().map(|p| p.flat.numel() as i64).sum();
        let (mut before, mut pieces) = (0i64, Vec::new());
        for part in &parts {
            for entry in part.entries {
                let count: i64 = entry.shape.iter().product();
                // The rank in whose stretch of the whole state this tensor begins.
                let owner = before * i64::from(world_size) / total;
                before += count;
                if owner == i64::from(rank) {
                    pieces.push(Piece {
                        name: format!("{}/{}", part.name, entry.name),
                        shape: entry.shape.iter().map(|d| *d as usize).collect(),
                        values: part.flat.narrow(0, entry.offset, count),
                    });
                }
            }
        }
        Self { iteration, pieces, staging }
    }

    /// Copies the share, writes the copy, and reports the receipt or the failure to the coordinator, all in the background:
    /// training may go on, but must not change the state before [`Save::wait_for_copy`] returns.
    pub fn save(
        self,
        runtime: &Handle,
        run: Run,
        generation: Generation,
        rank: u32,
        world_size: u32,
        outbox: Outbox,
    ) -> Save {
        let (tell, copied) = oneshot::channel();
        let iteration = self.iteration;
        let task = async move {
            let key = shard_key(iteration, generation, rank, world_size);
            let written = self.write(&run, &key, rank, tell).await;
            faults::point("uploaded", iteration, rank);
            outbox.send(match written {
                Ok(shard) => FromWorker::ShardReceipt(ShardReceipt {
                    generation: generation.0,
                    iteration,
                    rank,
                    key: shard.key,
                    bytes: shard.bytes,
                    sha256: shard.sha256,
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
    ) -> anyhow::Result<Shard> {
        let bytes = tokio::task::spawn_blocking(move || {
            let bytes = self.serialise();
            // Nobody waits where the rank is on its way out.
            let _ = copied.send(());
            bytes
        })
        .await??;
        Ok(run.write_shard(key, rank, bytes).await?)
    }

    /// The share as a safetensors file: a header, and the one copy of the state's values.
    fn serialise(self) -> anyhow::Result<Bytes> {
        let metadata = HashMap::from([("iteration".to_owned(), self.iteration.to_string())]);
        let mut end = 0;
        let tensors = self.pieces.iter().map(|piece| {
            let start = std::mem::replace(&mut end, end + piece.bytes());
            let (dtype, shape, data_offsets) =
                (Dtype::F32, piece.shape.clone(), (start, start + piece.bytes()));
            (piece.name.clone(), TensorInfo { dtype, shape, data_offsets })
        });
        let mut header = serde_json::to_vec(&Metadata::new(Some(metadata), tensors.collect())?)?;
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

/// Where a rank's share lies below the run's folder.
pub fn shard_key(iteration: u64, generation: Generation, rank: u32, world_size: u32) -> String {
    layout::shard_key(iteration, &generation.store_prefix(), rank, world_size)
}

/// Fills `state` from the checkpoint whose manifest lies under `manifest_key`; returns its iteration.
///
/// # Errors
/// A shard that is missing or damaged, by name; a tensor that is missing or of another shape, by name.
pub async fn restore(run: &Run, manifest_key: &str, state: &mut State) -> anyhow::Result<u64> {
    fill(run, manifest_key, &state.parts(), Others::Refused).await
}

/// Fills `network` with the averaged generator of the checkpoint whose manifest lies under `manifest_key`; returns the
/// checkpoint's iteration.
///
/// # Errors
/// As [`restore`].
pub async fn restore_generator(
    run: &Run,
    manifest_key: &str,
    network: &mut dyn Denoiser,
) -> anyhow::Result<u64> {
    let parameters = network.parameters();
    let part = Part { name: GENERATOR_EMA, entries: parameters.entries(), flat: parameters.flat() };
    fill(run, manifest_key, &[part], Others::PassedOver).await
}

/// Tensors of a checkpoint that nobody asked for.
#[derive(PartialEq)]
enum Others {
    Refused,
    PassedOver,
}

async fn fill(run: &Run, manifest_key: &str, parts: &[Part<'_>], others: Others) -> anyhow::Result<u64> {
    let manifest = run.manifest(manifest_key).await?;
    let mut missing: HashMap<String, (usize, usize)> = HashMap::new();
    for (p, part) in parts.iter().enumerate() {
        for (e, entry) in part.entries.iter().enumerate() {
            missing.insert(format!("{}/{}", part.name, entry.name), (p, e));
        }
    }
    for shard in &manifest.shards {
        let place = run.describe(&shard.key);
        let bytes = run.read_shard(shard).await?;
        let file = SafeTensors::deserialize(&bytes).with_context(|| format!("shard {place}"))?;
        for (name, view) in file.iter() {
            let Some((p, e)) = missing.remove(name) else {
                if others == Others::PassedOver {
                    continue;
                }
                bail!(
                    "shard {place} holds {name}, which this model does not have or another shard holds too"
                );
            };
            let entry = &parts[p].entries[e];
            let shape: Vec<i64> = view.shape().iter().map(|d| *d as i64).collect();
            ensure!(
                shape == entry.shape && view.dtype() == Dtype::F32,
                "shard {place}: {name} is {:?} {shape:?}; this model has F32 {:?}",
                view.dtype(),
                entry.shape
            );
            let count = entry.shape.iter().product();
            let values = Tensor::from_data_size(view.data(), &[count], Kind::Float);
            tch::no_grad(|| parts[p].flat.narrow(0, entry.offset, count).copy_(&values));
        }
    }
    if let Some(name) = missing.keys().min() {
        bail!("checkpoint {} lacks {} tensors, {name} among them", run.describe(manifest_key), missing.len());
    }
    Ok(manifest.iteration)
}
