//! The networks with which a rank computes in one generation, to train and to make samples: views of the state's weights and of
//! the teacher's, or networks whose weights are gathered while they compute.

use std::{sync::Arc, time::Duration};

use potstill_c10d::{Error, ProcessGroup};
use potstill_distill::{
    counters::Network,
    state::{Slice, State},
};
use potstill_models::Denoiser;
use tch::{Kind, Tensor};

use super::{
    gathered::{Gathered, Sliced},
    transfer,
};
use crate::session::Progress;

/// See the module's documentation.
pub struct Networks {
    /// G_θ.
    pub generator: Box<dyn Denoiser>,
    /// f_ψ.
    pub fake_score: Box<dyn Denoiser>,
    /// f_ψ without gradients of its weights, for the generator's phase.
    pub frozen_fake_score: Box<dyn Denoiser>,
    /// f_φ.
    pub teacher: Box<dyn Denoiser>,
    gates: Option<Gates>,
}

struct Gates {
    generator: Arc<Gathered>,
    fake_score: Arc<Gathered>,
    frozen_fake_score: Arc<Gathered>,
    teacher: Arc<Gathered>,
}

impl Networks {
    /// For a state and a teacher. `slice_of_teacher`: this rank's slice of the teacher's weights, where these are gathered from
    /// the ranks of `shards`.
    pub fn new(
        state: &State,
        teacher: &dyn Denoiser,
        slice_of_teacher: Option<&Tensor>,
        shards: &ProcessGroup,
        progress: &Arc<Progress>,
    ) -> Self {
        let [generator, fake_score] = [&state.generator, &state.fake_score].map(|trained| {
            let network = trained.network();
            network.over(network.parameters().flat().shallow_clone(), true)
        });
        let (frozen_fake_score, teacher) = (fake_score.frozen(), teacher.frozen());
        let layout = state.layout();
        let gates = slice_of_teacher.map(|own| {
            let base = teacher.base().flat();
            let (slice, numel, kind) = (layout.slice, base.numel() as i64, base.kind());
            let sliced = |own: &Tensor| Sliced { own: own.shallow_clone(), slice, numel, kind };
            // Adapters are held whole; the network beneath them is the teacher's.
            let trained = |network| sliced(if layout.gathered { state.master(network) } else { own });
            let gate = |network: &dyn Denoiser, weights| Gathered::new(network, weights, shards, progress);
            Gates {
                generator: gate(generator.as_ref(), trained(Network::Generator)),
                fake_score: gate(fake_score.as_ref(), trained(Network::FakeScore)),
                frozen_fake_score: gate(frozen_fake_score.as_ref(), trained(Network::FakeScore)),
                teacher: gate(teacher.as_ref(), sliced(own)),
            }
        });
        Self { generator, fake_score, frozen_fake_score, teacher, gates }
    }

    /// The network that a phase trains.
    pub fn trained(&self, network: Network) -> &dyn Denoiser {
        match network {
            Network::FakeScore => self.fake_score.as_ref(),
            Network::Generator => self.generator.as_ref(),
        }
    }

    /// Whether weights are gathered, so that all ranks must compute the same networks as often.
    pub fn are_gathered(&self) -> bool {
        self.gates.is_some()
    }

    /// Before the micro-batches of the phase that trains `network`.
    ///
    /// # Errors
    /// A collective failed.
    pub fn enter(&self, network: Network) -> Result<(), Error> {
        self.gates_of(network).into_iter().try_for_each(|gate| gate.enter_rest())
    }

    /// After them. Returns how long weights were waited for since [`enter`](Self::enter).
    ///
    /// # Errors
    /// A collective failed, also in the micro-batches: their results must not be used.
    pub fn leave(&self, network: Network) -> Result<Duration, Error> {
        self.gates_of(network).into_iter().map(|gate| gate.leave_rest()).sum()
    }

    /// The gates of the networks that compute in a phase.
    fn gates_of(&self, network: Network) -> Vec<&Gathered> {
        let Some(gates) = &self.gates else { return vec![] };
        match network {
            Network::FakeScore => vec![&gates.generator, &gates.fake_score],
            Network::Generator => vec![&gates.generator, &gates.frozen_fake_score, &gates.teacher],
        }
    }
}

/// A network that makes samples for evaluations and pictures.
pub struct Sampled {
    /// The network.
    pub network: Box<dyn Denoiser>,
    gate: Option<Arc<Gathered>>,
}

impl Sampled {
    /// G_ema. `slice_of_teacher`: as for [`Networks::new`].
    ///
    /// # Errors
    /// A collective failed.
    pub fn average(
        state: &State,
        slice_of_teacher: Option<&Tensor>,
        shards: &ProcessGroup,
        progress: &Arc<Progress>,
    ) -> Result<Self, Error> {
        let layout = state.layout();
        if layout.gathered {
            return Self::gathered(
                state.generator_ema(None),
                state.average(),
                layout.slice,
                shards,
                progress,
            );
        }
        let average = progress.while_waiting(|| transfer::gather_average(shards, state))?;
        let network = state.generator_ema(Some(average));
        match slice_of_teacher {
            // The network beneath adapters is the teacher's.
            Some(own) => Self::gathered(network, own, layout.slice, shards, progress),
            None => Ok(Self { network, gate: None }),
        }
    }

    /// The teacher.
    ///
    /// # Errors
    /// A collective failed.
    pub fn teacher(
        teacher: &dyn Denoiser,
        state: &State,
        slice_of_teacher: Option<&Tensor>,
        shards: &ProcessGroup,
        progress: &Arc<Progress>,
    ) -> Result<Self, Error> {
        let network = teacher.frozen();
        match slice_of_teacher {
            Some(own) => Self::gathered(network, own, state.layout().slice, shards, progress),
            None => Ok(Self { network, gate: None }),
        }
    }

    fn gathered(
        network: Box<dyn Denoiser>,
        own: &Tensor,
        slice: Slice,
        shards: &ProcessGroup,
        progress: &Arc<Progress>,
    ) -> Result<Self, Error> {
        let base = network.base().flat();
        let (numel, kind): (i64, Kind) = (base.numel() as i64, base.kind());
        let weights = Sliced { own: own.shallow_clone(), slice, numel, kind };
        let gate = Gathered::new(network.as_ref(), weights, shards, progress);
        gate.enter_rest()?;
        Ok(Self { network, gate: Some(gate) })
    }

    /// Whether its weights are gathered, so that all ranks must evaluate it equally often.
    pub fn is_gathered(&self) -> bool {
        self.gate.is_some()
    }

    /// To be called before anything is done with the samples.
    ///
    /// # Errors
    /// Weights did not arrive: the samples must not be used.
    pub fn finish(&self) -> Result<(), Error> {
        self.gate.as_ref().map_or(Ok(()), |gate| gate.leave_rest().map(drop))
    }
}
