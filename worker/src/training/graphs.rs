//! Micro-batches as CUDA graphs. At small micro-batches a GPU waits for the host, which queues thousands of operations one by one.
//! A graph has them all, with the backward pass, and is queued by one call.
//!
//! The first micro-batch of a kind is computed as ever, so that libraries choose their algorithms and take memory. The second is
//! recorded; from then on the numbers of each are copied to where the recorded ones lay.

use std::cell::{Cell, RefCell};

use potstill_distill::{counters::Network, draws::Draw, generator::Unroll, phase::MicroBatchLoss};
use potstill_torch_ext::{Error, Graph, GraphStream};
use tch::{Device, Kind, Tensor, no_grad};

use super::interruption::Interruption;

const WITHOUT: &str = "micro-batches cannot be recorded as CUDA graphs: they are computed without";

/// Everything besides numbers that decides what a micro-batch computes.
#[derive(PartialEq)]
struct Key {
    network: Network,
    /// Whether the generator's adversarial term has joined.
    joined: bool,
    /// The factor of the loss in its backward pass.
    scale: f64,
    unroll: Unroll,
    tensors: Vec<(Vec<i64>, Kind)>,
}

struct Recorded {
    /// Where a micro-batch's numbers are put.
    inputs: Draw,
    /// On the CPU there is none: a replay computes again.
    made: Option<(Graph, MicroBatchLoss)>,
}

/// See the module's documentation. All graphs use the same memory, which they keep.
pub struct Graphs {
    stream: Option<GraphStream>,
    /// The kinds of micro-batches that have been computed; the first of a kind is not recorded.
    known: RefCell<Vec<(Key, Option<Recorded>)>>,
    /// Whether recording has failed.
    off: Cell<bool>,
}

impl Graphs {
    /// For a device.
    pub fn new(device: Device) -> Self {
        let (stream, off) = match GraphStream::new(device) {
            Ok(stream) => (stream, false),
            Err(error) => {
                tracing::warn!(%error, "{WITHOUT}");
                (None, true)
            }
        };
        Self { stream, known: RefCell::default(), off: Cell::new(off) }
    }

    /// Runs `body` in the stream in which graphs are recorded.
    ///
    /// # Errors
    /// libtorch's error.
    pub fn within<T>(&self, body: impl FnOnce() -> T) -> Result<T, Error> {
        match &self.stream {
            Some(stream) => stream.within(body),
            None => Ok(body()),
        }
    }

    /// A micro-batch's losses, by `compute`, which also adds to the gradients. `discard` clears what a micro-batch that could not be
    /// recorded has left of gradients. To be called [within](Self::within) the stream.
    ///
    /// # Errors
    /// Those of `compute`, and libtorch's.
    pub fn compute(
        &self,
        network: Network,
        joined: bool,
        scale: f64,
        draw: Draw,
        compute: impl Fn(&Draw) -> Result<MicroBatchLoss, Interruption>,
        discard: impl Fn() -> Result<(), potstill_c10d::Error>,
    ) -> Result<MicroBatchLoss, Interruption> {
        let mut tensors = vec![];
        let listed = draw.map(&mut |tensor| {
            tensors.push(tensor.shallow_clone());
            tensor.shallow_clone()
        });
        if self.off.get() || listed.is_none() {
            return self.without(&draw, &compute);
        }
        let kinds = tensors.iter().map(|tensor| (tensor.size(), tensor.kind())).collect();
        let key = Key { network, joined, scale, unroll: draw.unroll, tensors: kinds };
        let mut known = self.known.borrow_mut();
        let Some(place) = known.iter().position(|(other, _)| *other == key) else {
            // Those of another loss scale do not come back soon.
            known.retain(|(other, _)| other.network != network || other.scale.total_cmp(&scale).is_eq());
            known.push((key, None));
            return self.without(&draw, &compute);
        };
        let recorded = &mut known[place].1;
        let recorded = match recorded {
            Some(recorded) => {
                let mut numbers = tensors.iter();
                let _ = recorded.inputs.map(&mut |place| {
                    let mut place = place.shallow_clone();
                    if let Some(tensor) = numbers.next() {
                        no_grad(|| place.copy_(tensor));
                    }
                    place
                });
                recorded.inputs.dropout_seed = draw.dropout_seed;
                recorded
            }
            None => match self.record(&draw, &compute) {
                Ok(made) => recorded.insert(made),
                Err(error) => {
                    tracing::warn!(%error, "{WITHOUT}");
                    self.off.set(true);
                    known.clear();
                    discard()?;
                    return self.without(&draw, &compute);
                }
            },
        };
        match &recorded.made {
            Some((graph, losses)) => {
                tch::manual_seed(draw.dropout_seed);
                graph.replay()?;
                Ok(losses.map(Tensor::copy))
            }
            None => compute(&recorded.inputs),
        }
    }

    /// Computes a micro-batch without a graph, in the memory of the graphs, so that activations do not exist twice.
    fn without(
        &self,
        draw: &Draw,
        compute: &impl Fn(&Draw) -> Result<MicroBatchLoss, Interruption>,
    ) -> Result<MicroBatchLoss, Interruption> {
        let Some(stream) = &self.stream else { return compute(draw) };
        Ok(stream.in_its_memory(|| compute(draw))??.map(Tensor::copy))
    }

    /// Records a micro-batch. The error says why that cannot be done.
    fn record(
        &self,
        draw: &Draw,
        compute: &impl Fn(&Draw) -> Result<MicroBatchLoss, Interruption>,
    ) -> Result<Recorded, Error> {
        let failed = |cause: String| Error { operation: "capture a CUDA graph", cause };
        let inputs = draw
            .map(&mut Tensor::copy)
            .ok_or_else(|| failed("augmentations are not of tensors alone".to_owned()))?;
        let Some(stream) = &self.stream else { return Ok(Recorded { inputs, made: None }) };
        // In a capture a generator takes no other seed than the one that it has.
        tch::manual_seed(draw.dropout_seed);
        let made = Graph::capture(stream, || compute(&inputs))?;
        let made = made.map_err(|interruption| failed(interruption.reason()))?;
        Ok(Recorded { made: Some(made), inputs })
    }
}
