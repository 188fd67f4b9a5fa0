//! Reduces the ranks' gradients of one network to one gradient, or to slices of it on each rank.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use potstill_c10d::{Error, Reducer, ReducerOptions};
use potstill_models::Denoiser;
use tch::{Kind, Tensor};

use super::{
    buckets::{self, Bucketed, Shares},
    groups::Groups,
    interruption::Interruption,
};
use crate::session::Progress;

/// See the module's documentation. Either way the reduction of a bucket goes on beside the backward pass.
pub enum Reduction {
    /// By c10d's Reducer, in the gradients' own memory: where weights are fp32 and every rank steps all of them.
    Whole(Reducer),
    /// Summed in fp32, whatever the weights' data type.
    Bucketed(Bucketed),
}

impl Reduction {
    /// The reductions of two networks with the same parameters. `plain`: the networks hold their weights, and the gradient is reduced
    /// beside the last micro-batch's backward pass.
    ///
    /// # Errors
    /// The collectives' errors.
    pub fn of(
        networks: [&dyn Denoiser; 2],
        plain: bool,
        shares: Shares,
        groups: &Groups,
        progress: &Arc<Progress>,
    ) -> Result<[Self; 2], Error> {
        if plain && shares.slice.world == 1 && networks[0].parameters().flat().kind() == Kind::Float {
            let reducer = |network: &dyn Denoiser| {
                Reducer::new(network.parameters().leaves(), &groups.all, ReducerOptions::default())
            };
            return Ok([Self::Whole(reducer(networks[0])?), Self::Whole(reducer(networks[1])?)]);
        }
        let sum = buckets::memory(networks[0].parameters(), shares);
        let bucketed = |network: &dyn Denoiser| {
            Bucketed::new(network.parameters(), sum.shallow_clone(), shares, groups, progress)
                .map(Self::Bucketed)
        };
        Ok([bucketed(networks[0])?, bucketed(networks[1])?])
    }

    /// The factor of a sum over samples that makes the reduced gradient that of the mean over `batch` samples.
    pub fn scale(&self, world: usize, batch: f64) -> f64 {
        match self {
            // The reducer takes the mean over ranks.
            Self::Whole(_) => world as f64 / batch,
            Self::Bucketed(_) => batch.recip(),
        }
    }

    /// Backward pass of one micro-batch; `last` is the phase's last one on this rank, and one that does not count is computed only
    /// because others compute one. Returns how long it waited for peers.
    ///
    /// # Errors
    /// The collectives' errors; the loss cannot be differentiated.
    pub fn backward(
        &self,
        loss: &Tensor,
        last: bool,
        counts: bool,
        progress: &Progress,
    ) -> Result<Duration, Interruption> {
        match self {
            // The backward pass of the last micro-batch ends when the gradients of all ranks are reduced.
            Self::Whole(reducer) if last => {
                return Ok(progress.while_waiting(|| reducer.backward(loss))?);
            }
            Self::Whole(_) => loss.f_backward().context("backward pass")?,
            Self::Bucketed(bucketed) => {
                bucketed.begin(last, counts);
                loss.f_backward().context("backward pass")?;
                return Ok(bucketed.end()?);
            }
        }
        Ok(Duration::ZERO)
    }

    /// Starts to reduce what this rank's micro-batches have added up, none of which was the last one. Returns how long it waited for
    /// peers.
    ///
    /// # Errors
    /// A collective failed.
    pub fn start(&self) -> Result<Duration, Error> {
        match self {
            Self::Whole(_) => Ok(Duration::ZERO),
            Self::Bucketed(bucketed) => {
                bucketed.begin(true, false);
                bucketed.end()
            }
        }
    }

    /// The gradient of all ranks together, or the slices of it that this rank needs, and how long it waited for peers. It may
    /// be in this value's own memory, until that is [cleared](Self::clear). `computed`: this rank's micro-batches, with those that
    /// do not count.
    ///
    /// # Errors
    /// The collectives' errors.
    pub fn finish(&self, network: &dyn Denoiser, computed: usize) -> Result<(Vec<Tensor>, Duration), Error> {
        let started = Instant::now();
        match self {
            Self::Whole(_) => Ok((vec![network.parameters().flat_grad()], Duration::ZERO)),
            Self::Bucketed(bucketed) => Ok((bucketed.finish(computed)?, started.elapsed())),
        }
    }

    /// Clears what a backward pass that was not completed has left.
    ///
    /// # Errors
    /// libtorch's error.
    pub fn discard(&self) -> Result<(), Error> {
        match self {
            // What it adds to is its own memory.
            Self::Whole(_) => Ok(()),
            Self::Bucketed(bucketed) => bucketed.discard(),
        }
    }

    /// Clears the gradients of a phase that is over.
    ///
    /// # Errors
    /// libtorch's error.
    pub fn clear(&self) -> Result<(), Error> {
        match self {
            Self::Whole(reducer) => reducer.zero_grad(),
            Self::Bucketed(bucketed) => {
                bucketed.clear();
                Ok(())
            }
        }
    }
}
