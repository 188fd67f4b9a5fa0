//! Reduces the ranks' gradients of one network to one gradient, or to one slice of it on each rank.

use std::time::{Duration, Instant};

use anyhow::Context;
use potstill_c10d::{Error, ProcessGroup, ReduceOp, Reducer, ReducerOptions};
use potstill_distill::state::Slice;
use potstill_models::{Denoiser, Parameters};
use potstill_torch_ext::clear_gradients;
use tch::{Kind, Tensor, no_grad};

use super::interruption::Interruption;

/// See the module's documentation.
pub enum Reduction {
    /// By c10d's Reducer, bucket by bucket during the backward pass: where weights are fp32 and every rank steps all of
    /// them.
    Overlapped(Reducer),
    /// Summed in one fp32 vector, whatever the weights' data type, and reduced at the end of the phase.
    Buffered(Buffer),
}

/// The vector, which the networks use in turn.
pub struct Buffer {
    /// As long as the slices of all ranks, which have equal lengths.
    sum: Tensor,
    slice: Slice,
}

impl Buffer {
    /// A buffer for gradients of `parameters`, of which this rank needs a slice.
    pub fn new(parameters: &Parameters, slice: Slice) -> Self {
        let flat = parameters.flat();
        let room = slice.width(flat.numel() as i64) * slice.world as i64;
        Self { sum: Tensor::zeros([room], (Kind::Float, flat.device())), slice }
    }

    /// Another handle to the same memory.
    fn share(&self) -> Self {
        Self { sum: self.sum.shallow_clone(), slice: self.slice }
    }
}

impl Reduction {
    /// The reductions of two networks with the same parameters.
    ///
    /// # Errors
    /// The collectives' errors.
    pub fn of(networks: [&dyn Denoiser; 2], slice: Slice, group: &ProcessGroup) -> Result<[Self; 2], Error> {
        let plain = slice.world == 1 && networks[0].parameters().flat().kind() == Kind::Float;
        for network in networks {
            // An interrupted phase may have left gradients.
            clear_gradients(network.parameters().leaves())?;
        }
        if plain {
            let reducer = |network: &dyn Denoiser| {
                Reducer::new(network.parameters().leaves(), group, ReducerOptions::default())
            };
            return Ok([Self::Overlapped(reducer(networks[0])?), Self::Overlapped(reducer(networks[1])?)]);
        }
        let buffer = Buffer::new(networks[0].parameters(), slice);
        Ok([Self::Buffered(buffer.share()), Self::Buffered(buffer)])
    }

    /// The factor of a sum over samples that makes the reduced gradient that of the mean over `batch` samples.
    pub fn scale(&self, world: usize, batch: f64) -> f64 {
        match self {
            // The reducer takes the mean over ranks.
            Self::Overlapped(_) => world as f64 / batch,
            Self::Buffered(_) => batch.recip(),
        }
    }

    /// Backward pass of one micro-batch; `last` is the phase's last one on this rank. Returns how long it waited for peers.
    ///
    /// # Errors
    /// The collectives' errors; the loss cannot be differentiated.
    pub fn backward(
        &self,
        network: &dyn Denoiser,
        loss: &Tensor,
        last: bool,
    ) -> Result<Duration, Interruption> {
        match self {
            Self::Overlapped(reducer) if last => return Ok(reducer.backward(loss)?),
            Self::Overlapped(_) => loss.f_backward().context("backward pass")?,
            Self::Buffered(buffer) => {
                loss.f_backward().context("backward pass")?;
                network.parameters().add_gradients_to(&buffer.sum);
                clear_gradients(network.parameters().leaves())?;
            }
        }
        Ok(Duration::ZERO)
    }

    /// The gradient of all ranks together, or this rank's slice of it, and how long it waited for peers. It may be in
    /// this value's own memory, until that is [cleared](Self::clear).
    ///
    /// # Errors
    /// The collectives' errors.
    pub fn finish(&self, network: &dyn Denoiser, group: &ProcessGroup) -> Result<(Tensor, Duration), Error> {
        let started = Instant::now();
        let Self::Buffered(Buffer { sum, slice }) = self else {
            return Ok((network.parameters().flat_grad(), Duration::ZERO));
        };
        let numel = network.parameters().flat().numel() as i64;
        let gradient = if slice.world == 1 {
            group.all_reduce(sum, ReduceOp::Sum)?.wait(None)?;
            sum.narrow(0, 0, numel)
        } else {
            let (width, range) = (slice.width(numel), slice.range(numel));
            let own = Tensor::empty([width], (Kind::Float, sum.device()));
            match group.member().world {
                // One rank is measured alone, as if it were one of several.
                1 => no_grad(|| own.shallow_clone().copy_(&sum.narrow(0, slice.rank as i64 * width, width))),
                _ => group.reduce_scatter(&own, sum)?.wait(None)?,
            }
            own.narrow(0, 0, range.end - range.start)
        };
        Ok((gradient, started.elapsed()))
    }

    /// Clears the gradients of a phase that is over.
    ///
    /// # Errors
    /// libtorch's error.
    pub fn clear(&self) -> Result<(), Error> {
        match self {
            Self::Overlapped(reducer) => reducer.zero_grad(),
            Self::Buffered(buffer) => {
                let _ = no_grad(|| buffer.sum.shallow_clone().zero_());
                Ok(())
            }
        }
    }
}
