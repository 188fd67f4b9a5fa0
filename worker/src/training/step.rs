//! One rank's share of one phase: its micro-batches, the gradient reduced over all ranks, and the optimizer's step.
//!
//! This module does not depend on a coordinator: random numbers come in as [`Draws`], so that a recorded loop can be
//! replayed.

use std::{
    cell::RefCell,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use potstill_c10d::{Error, ReduceOp, Work};
use potstill_distill::{
    adam::AdamSettings,
    counters::Network,
    draws::{Draw, Draws},
    gradient::{Clip, Gradient, Sums},
    phase::{self, MicroBatchLoss},
    settings::Settings,
    state::{Layout, State},
};
use potstill_proto::{
    cursor::{Cursor, Phase},
    wire::StepSeconds,
};
use potstill_spec::{DecaySpec, OptimizerSpec, Precision, RunSpec, Shard};
use potstill_torch_ext::{Autocast, LowerPrecision, upload};
use tch::{Device, Kind, Tensor};

use super::{
    buckets::Shares, graphs::Graphs, groups::Groups, interruption::Interruption, networks::Networks,
    reduction::Reduction,
};
use crate::{model::Watched, process::faults, session::Progress, training::transfer};

/// Everything that decides an optimizer step besides the gradient.
#[derive(Clone, Debug, PartialEq)]
pub struct Optimizer {
    // Pairs of the generator's value and the fake score's.
    learning_rates: [f64; 2],
    betas: [[f64; 2]; 2],
    epsilon: f64,
    clip_values: [Option<f64>; 2],
    clip_norm: Option<f64>,
    decay: Option<DecaySpec>,
    ema_half_life_images: f64,
}

impl Optimizer {
    /// The settings of a specification.
    pub fn new(spec: &OptimizerSpec) -> Self {
        Self {
            learning_rates: [spec.generator_learning_rate, spec.fake_score_learning_rate],
            betas: [spec.generator_betas.unwrap_or(spec.betas), spec.betas],
            epsilon: spec.epsilon,
            clip_values: [spec.generator_clip_value, spec.fake_score_clip_value],
            clip_norm: spec.clip_norm,
            decay: spec.decay.clone(),
            ema_half_life_images: spec.ema_half_life_images,
        }
    }

    /// Whether Adam has a first moment, of generator and fake score.
    pub fn first_moments(&self) -> [bool; 2] {
        self.betas.map(|[first, _]| first != 0.0)
    }

    /// Adam's settings for a network after `images`.
    fn adam(&self, network: Network, images: u64) -> AdamSettings {
        let factor = self.decay.as_ref().map_or(1.0, |decay| decay.factor(images));
        AdamSettings {
            learning_rate: self.learning_rates[network as usize] * factor,
            betas: self.betas[network as usize],
            epsilon: self.epsilon,
        }
    }

    fn clip(&self, network: Network) -> Clip {
        Clip { value: self.clip_values[network as usize], norm: self.clip_norm }
    }
}

/// Everything that decides the training of a run, the same on all ranks.
pub struct Recipe {
    /// Everything that decides a micro-batch.
    pub settings: Settings,
    /// Everything that decides a step.
    pub optimizer: Optimizer,
    /// The mixed precision of fp32 weights, where networks compute in another data type than that of their weights.
    pub mixed_precision: Option<LowerPrecision>,
    /// Whether each rank holds only its slice of the sum of gradients, where it holds a slice of the state.
    pub sharded_sum: bool,
    /// Whether micro-batches are computed as CUDA graphs.
    pub cuda_graphs: bool,
}

impl Recipe {
    /// From a specification, for a teacher.
    pub fn new(spec: &RunSpec, settings: Settings) -> Self {
        let mixed_precision = match spec.distillation.precision {
            _ if spec.memory.bf16_weights => None,
            Precision::Fp32 => None,
            Precision::Bf16 => Some(LowerPrecision::BFloat16),
            Precision::Fp16 => Some(LowerPrecision::Half),
        };
        Self {
            settings,
            optimizer: Optimizer::new(&spec.optimizer),
            mixed_precision,
            sharded_sum: matches!(spec.memory.shard, Shard::Gradients | Shard::Parameters),
            cuda_graphs: spec.distillation.cuda_graphs,
        }
    }
}

/// Sums of one rank's share of one phase.
#[derive(Default)]
pub struct Totals {
    /// The complete loss that is back-propagated, without the loss scale.
    #[cfg_attr(not(test), expect(dead_code, reason = "what is replayed is compared with it"))]
    pub loss: f64,
    /// See [`MicroBatchLoss::score_loss`].
    pub score_loss: f64,
    /// See [`MicroBatchLoss::adversarial_loss`].
    pub adversarial_loss: Option<f64>,
    /// See [`MicroBatchLoss::score_difference`].
    pub score_difference: f64,
    /// See [`MicroBatchLoss::dropped`].
    pub dropped: u32,
}

impl Totals {
    /// The sums over these micro-batches, which all report the same numbers. They are read from the device together: each reading
    /// waits until its queue is empty.
    fn of(batches: &[MicroBatchLoss]) -> Self {
        let numbers = batches.iter().map(|batch| {
            let none = batch.loss.zeros_like();
            let numbers = [
                &batch.loss,
                &batch.score_loss,
                batch.adversarial_loss.as_ref().unwrap_or(&none),
                batch.score_difference.as_ref().unwrap_or(&none),
                &batch.dropped,
            ];
            Tensor::stack(&numbers.map(|number| number.to_kind(Kind::Double)), 0)
        });
        let numbers = Tensor::stack(&numbers.collect::<Vec<_>>(), 0).to_device(Device::Cpu);
        let sum =
            |column| (0..batches.len() as i64).map(|row| numbers.double_value(&[row, column])).sum::<f64>();
        let is_adversarial = batches.iter().any(|batch| batch.adversarial_loss.is_some());
        Self {
            loss: sum(0),
            score_loss: sum(1),
            adversarial_loss: is_adversarial.then(|| sum(2)),
            score_difference: sum(3),
            dropped: sum(4) as u32,
        }
    }
}

/// The result of a phase's micro-batches, before the step.
pub struct Reduced {
    /// This rank's sums.
    pub totals: Totals,
    /// The gradient of the mean loss over the global batch, with non-finite elements set to 0, not yet clipped; or the
    /// slices of it that this rank holds.
    pub gradient: Gradient,
    /// The factor of the loss; the gradient is without it.
    pub loss_scale: f64,
}

/// A step that a rank can make by itself as soon as it knows the sums over the whole gradient. That one rank knows them
/// proves that every rank has got so far; so a rank that has lost its group then can still make the step.
pub struct Prepared {
    network: Network,
    iteration: u64,
    gradient: Gradient,
}

/// What a step has shown.
pub struct Stepped {
    /// The cursor that it leads to.
    pub cursor: Cursor,
    /// Whether values were not finite in a way that a smaller loss scale does not repair.
    pub sick: bool,
}

impl Prepared {
    /// A step with a reduced gradient.
    pub fn new(recipe: &Recipe, network: Network, iteration: u64, gradient: Gradient) -> Self {
        Self { network, iteration, gradient: gradient.clipped_by_value(recipe.optimizer.clip(network)) }
    }

    /// The cursor that the step leads to. Where the generator is not trained in this iteration, the iteration ends with the
    /// fake score's step.
    pub fn to(&self, recipe: &Recipe) -> Cursor {
        let iteration = self.iteration;
        match self.network {
            Network::FakeScore if recipe.settings.schedule.trains_generator(iteration) => {
                Cursor { iteration, phase: Phase::Generator }
            }
            _ => Cursor::boundary(iteration + 1),
        }
    }

    /// Makes the step, unless fp16 overflowed, and at the iteration's end updates G_ema. `whole`: the sums over all slices
    /// of the gradient.
    pub fn make(self, recipe: &Recipe, state: &mut State, whole: Sums) -> Stepped {
        let (network, cursor) = (self.network, self.to(recipe));
        let Recipe { optimizer, settings, .. } = recipe;
        let images = settings.schedule.images_seen(self.iteration);
        let overflowed = whole.non_finite > 0.0;
        let sick = overflowed && !state.counters.can_shrink(network);
        if state.counters.accept(network, !overflowed) {
            let gradient = self.gradient.clipped_by_norm(optimizer.clip(network), whole);
            state.step(network, &gradient, &optimizer.adam(network, images));
        }
        if cursor.phase == Phase::FakeScore {
            end_iteration(recipe, state, self.iteration);
        }
        Stepped { cursor, sick }
    }
}

/// The work at the end of every iteration. Returns the cursor after it.
pub fn end_iteration(recipe: &Recipe, state: &mut State, iteration: u64) -> Cursor {
    let Recipe { optimizer, settings, .. } = recipe;
    let schedule = &settings.schedule;
    let images = schedule.images_seen(iteration) as f64;
    state.update_average(optimizer.ema_half_life_images, images, schedule.global_batch as f64);
    Cursor::boundary(iteration + 1)
}

/// One rank's training in one generation.
pub struct Trainer<'a> {
    /// The settings.
    pub recipe: &'a Recipe,
    /// The source of micro-batches.
    pub draws: &'a dyn Draws,
    /// The ranks.
    pub groups: Groups,
    /// This rank's micro-batches.
    pub micro_batches: Range<u32>,
    /// Receives each wait and each micro-batch.
    pub progress: &'a Arc<Progress>,
    shares: Shares,
    rank: u32,
    fake_score: Reduction,
    generator: Reduction,
    networks: Networks,
    /// Where micro-batches are computed as graphs.
    graphs: Option<Graphs>,
    /// Each network's weights that are on their way.
    arriving: [RefCell<Option<Work>>; 2],
    /// How long weights were waited for in the pass, or why they did not arrive.
    waited: RefCell<Result<Duration, Error>>,
}

impl<'a> Trainer<'a> {
    /// A trainer of a state. `copied_by`: the rank that holds a copy of this rank's slice, where each holds one.
    ///
    /// # Errors
    /// The collectives' errors.
    #[allow(clippy::too_many_arguments, reason = "a rank's work in one generation")]
    pub fn new(
        recipe: &'a Recipe,
        networks: Networks,
        draws: &'a dyn Draws,
        groups: Groups,
        micro_batches: Range<u32>,
        progress: &'a Arc<Progress>,
        state: &State,
        copied_by: Option<u32>,
    ) -> Result<Self, Error> {
        let Layout { slice, copy, gathered, .. } = state.layout();
        let schedule = &recipe.settings.schedule;
        let all = schedule.global_batch.div_ceil(recipe.settings.micro_batch as u64) as usize;
        let shares = Shares {
            slice,
            copy,
            copied_by: copied_by.unwrap_or_default() as usize,
            sharded_sum: slice.world > 1 && recipe.sharded_sum,
            rounds: all.div_ceil(groups.all.member().world),
        };
        let trained = [Network::FakeScore, Network::Generator].map(|network| networks.trained(network));
        let graphs = recipe.cuda_graphs.then(|| Graphs::new(recipe.settings.device));
        let reductions = || Reduction::of(trained, !gathered && graphs.is_none(), shares, &groups, progress);
        // Autograd adds up gradients in the stream in which this was prepared.
        let [fake_score, generator] = match &graphs {
            Some(graphs) => graphs.within(reductions)?,
            None => reductions(),
        }?;
        let rank = groups.all.member().rank as u32;
        Ok(Self {
            recipe,
            draws,
            groups,
            micro_batches,
            progress,
            shares,
            rank,
            fake_score,
            generator,
            networks,
            graphs,
            arriving: Default::default(),
            waited: RefCell::new(Ok(Duration::ZERO)),
        })
    }

    fn reduction(&self, network: Network) -> &Reduction {
        match network {
            Network::FakeScore => &self.fake_score,
            Network::Generator => &self.generator,
        }
    }

    /// Computes this rank's micro-batches of the phase that trains `network`, and reduces the gradient. Adds to the
    /// times. `obey_orders` is called before each micro-batch and can interrupt the phase.
    ///
    /// # Errors
    /// A collective failed, or `obey_orders` interrupted the phase. No weights arrive after it.
    pub fn gradient(
        &self,
        state: &mut State,
        network: Network,
        iteration: u64,
        seconds: &mut StepSeconds,
        mut obey_orders: impl FnMut() -> Result<(), Interruption>,
    ) -> Result<Reduced, Interruption> {
        let reduced = self
            .gather_weights(state, iteration)
            .and_then(|()| self.reduced(state, network, iteration, seconds, &mut obey_orders));
        let arriving = self.arriving.each_ref().map(RefCell::take);
        if reduced.is_err() && arriving.iter().any(Option::is_some) {
            // Nothing may be written into the weights while another generation uses them.
            self.groups.shards.abort()?;
            for work in arriving.into_iter().flatten() {
                let _ = work.wait(None);
            }
        }
        reduced
    }

    fn reduced(
        &self,
        state: &State,
        network: Network,
        iteration: u64,
        seconds: &mut StepSeconds,
        obey_orders: &mut dyn FnMut() -> Result<(), Interruption>,
    ) -> Result<Reduced, Interruption> {
        let started = Instant::now();
        let loss_scale = state.counters.scale(network);
        let reduction = self.reduction(network);
        let batch = self.recipe.settings.schedule.global_batch as f64;
        let scale = reduction.scale(self.groups.all.member().world, batch) * loss_scale;
        let last = self.micro_batches.end - 1;
        let mut exposed = Duration::ZERO;
        if self.networks.are_gathered() {
            faults::point("gathering", iteration, self.rank);
        }
        self.networks.enter(network)?;
        let reported = match &self.graphs {
            None => self.one_by_one(network, iteration, scale, &mut exposed, obey_orders)?,
            Some(graphs) => {
                graphs.within(|| self.as_graphs(graphs, network, iteration, scale, obey_orders))??
            }
        };
        if self.graphs.is_some() {
            faults::point("reducing", iteration, self.rank);
            exposed += reduction.start()?;
        }
        let mut computed = self.micro_batches.len();
        while self.networks.are_gathered() && computed < self.shares.rounds {
            // Others have more micro-batches, for which this rank's weights are needed.
            let micro_batch = self.micro_batch(network, iteration, &self.draw(network, iteration, last))?;
            exposed += reduction.backward(&micro_batch.loss, true, false, self.progress)?;
            self.progress.tick();
            computed += 1;
        }
        exposed += self.networks.leave(network)?;
        for network in [Network::Generator, Network::FakeScore] {
            // A rank without micro-batches has not used them.
            self.arrive(network);
        }
        exposed += self.arrived()?;
        let totals = Totals::of(&reported);
        let trained = self.networks.trained(network);
        let (mut slices, waited) = self.progress.while_waiting(|| reduction.finish(trained, computed))?;
        exposed += waited;
        seconds.communication += exposed.as_secs_f64();
        seconds.compute += started.elapsed().saturating_sub(exposed).as_secs_f64();
        let step = Instant::now();
        faults::point("reduced", iteration, self.rank);
        if faults::tears("reduced", iteration, self.rank) {
            let _ = slices.iter_mut().map(|flat| flat.g_mul_scalar_(3.0)).count();
            self.groups.all.abort()?;
        }
        if loss_scale != 1.0 {
            let _ = slices.iter_mut().map(|flat| flat.g_mul_scalar_(loss_scale.recip())).count();
        }
        let gradient = Gradient::repaired(slices);
        seconds.optimizer += step.elapsed().as_secs_f64();
        Ok(Reduced { totals, gradient, loss_scale })
    }

    /// This rank's micro-batches, of which the last is reduced beside its backward pass. Adds to the time for which peers and
    /// weights were waited for.
    fn one_by_one(
        &self,
        network: Network,
        iteration: u64,
        scale: f64,
        exposed: &mut Duration,
        obey_orders: &mut dyn FnMut() -> Result<(), Interruption>,
    ) -> Result<Vec<MicroBatchLoss>, Interruption> {
        let last = self.micro_batches.end - 1;
        let reduction = self.reduction(network);
        let mut reported = Vec::with_capacity(self.micro_batches.len());
        for index in self.micro_batches.clone() {
            obey_orders()?;
            let begun = Instant::now();
            let micro_batch = self.micro_batch(network, iteration, &self.draw(network, iteration, index))?;
            *exposed += self.arrived()?;
            faults::drag("forward", iteration, self.rank, begun.elapsed());
            faults::point("forward", iteration, self.rank);
            let scaled = &micro_batch.loss * scale;
            if index == last {
                faults::point("reducing", iteration, self.rank);
            }
            *exposed += reduction.backward(&scaled, index == last, true, self.progress)?;
            if index != last {
                faults::point("backward", iteration, self.rank);
            }
            reported.push(MicroBatchLoss { loss: micro_batch.loss.detach(), ..micro_batch });
            self.progress.tick();
        }
        Ok(reported)
    }

    /// This rank's micro-batches, each as one graph with its backward pass. What they add up is not reduced yet.
    fn as_graphs(
        &self,
        graphs: &Graphs,
        network: Network,
        iteration: u64,
        scale: f64,
        obey_orders: &mut dyn FnMut() -> Result<(), Interruption>,
    ) -> Result<Vec<MicroBatchLoss>, Interruption> {
        let reduction = self.reduction(network);
        let joined = self.recipe.settings.schedule.adversarial_term_joined(iteration);
        // A graph does not wait for weights.
        for network in [Network::Generator, Network::FakeScore] {
            self.arrive(network);
        }
        let mut reported = Vec::with_capacity(self.micro_batches.len());
        for index in self.micro_batches.clone() {
            obey_orders()?;
            let begun = Instant::now();
            let compute = |draw: &Draw| {
                let micro_batch = self.micro_batch(network, iteration, draw)?;
                let scaled = &micro_batch.loss * scale;
                reduction.backward(&scaled, false, true, self.progress)?;
                Ok(MicroBatchLoss { loss: micro_batch.loss.detach(), ..micro_batch })
            };
            let discard = || reduction.discard();
            let draw = self.draw(network, iteration, index);
            reported.push(graphs.compute(network, joined, scale, draw, compute, discard)?);
            faults::drag("forward", iteration, self.rank, begun.elapsed());
            faults::point("forward", iteration, self.rank);
            self.progress.tick();
        }
        Ok(reported)
    }

    /// The sums over the whole gradient of a step that every rank has prepared. Adds to the times. With the result the step
    /// must be made: other ranks make it.
    ///
    /// # Errors
    /// A collective failed: some rank may not have prepared the step.
    pub fn agree(&self, prepared: &Prepared, seconds: &mut StepSeconds) -> Result<Sums, Interruption> {
        let started = Instant::now();
        let mut sums = prepared.gradient.sums();
        if self.shares.slice.world > 1 && self.groups.all.member().world > 1 {
            let numbers = match self.groups.replica().rank {
                0 => [sums.squares, sums.non_finite, sums.clipped_squares],
                // Those of the first replica are the others' too. All ranks take part, so that all have prepared the step.
                _ => [0.0; 3],
            };
            let sum = upload(&Tensor::from_slice(&numbers), self.groups.all.device());
            self.progress.while_waiting(|| self.groups.all.all_reduce(&sum, ReduceOp::Sum)?.wait(None))?;
            let sum = sum.to_device(Device::Cpu);
            let [squares, non_finite, clipped_squares] = [0, 1, 2].map(|index| sum.double_value(&[index]));
            sums = Sums { squares, non_finite, clipped_squares };
        }
        let iteration = prepared.iteration;
        if faults::tears("agreed", iteration, self.rank) {
            self.groups.all.abort()?;
        }
        // A reduction that was cut short changes nothing.
        self.groups.settle()?;
        faults::point("agreed", iteration, self.rank);
        seconds.communication += started.elapsed().as_secs_f64();
        Ok(sums)
    }

    /// Makes the step of a phase. Adds to the times. Its gradient must then be [cleared](Self::clear).
    pub fn step(
        &self,
        state: &mut State,
        prepared: Prepared,
        whole: Sums,
        seconds: &mut StepSeconds,
    ) -> Stepped {
        let step = Instant::now();
        let (network, iteration) = (prepared.network, prepared.iteration);
        for network in [Network::Generator, Network::FakeScore] {
            // What was gathered for the phase is complete: the agreement came after it.
            state.trained(network).set_gathered();
        }
        let stepped = prepared.make(self.recipe, state, whole);
        if self.groups.all.member().world == 1 {
            // One rank is measured alone, as if it were one of several: the other slices do not exist.
            state.trained(network).set_gathered();
        }
        seconds.optimizer += step.elapsed().as_secs_f64();
        faults::point("stepped", iteration, self.rank);
        stepped
    }

    /// Starts to gather the weights that are behind: they follow the slices that the ranks have stepped. Each network's are
    /// [waited for](Self::arrive) before it is used first.
    fn gather_weights(&self, state: &mut State, iteration: u64) -> Result<(), Interruption> {
        // In the order in which they are used.
        for network in [Network::Generator, Network::FakeScore] {
            let trained = state.trained(network);
            if trained.is_behind() {
                faults::point("gathering", iteration, self.rank);
                self.arriving[network as usize]
                    .replace(transfer::gather_weights(&self.groups.shards, trained)?);
            }
        }
        Ok(())
    }

    /// Waits until a network's weights have arrived. They count as gathered when the step has been agreed on.
    fn arrive(&self, network: Network) {
        let Some(work) = self.arriving[network as usize].take() else { return };
        let started = Instant::now();
        let arrived = self.progress.while_waiting(|| work.wait(None));
        let mut waited = self.waited.borrow_mut();
        // After a failure the pass goes on, and its results are not used.
        *waited = std::mem::replace(&mut *waited, Ok(Duration::ZERO))
            .and_then(|before| arrived.map(|()| before + started.elapsed()));
    }

    /// How long weights were waited for since the last call.
    fn arrived(&self) -> Result<Duration, Error> {
        self.waited.replace(Ok(Duration::ZERO))
    }

    /// Clears the gradient of a phase that is over.
    ///
    /// # Errors
    /// libtorch's error.
    pub fn clear(&self, network: Network) -> Result<(), Error> {
        self.reduction(network).clear()
    }

    fn draw(&self, network: Network, iteration: u64, index: u32) -> Draw {
        match network {
            Network::FakeScore => self.draws.fake_score(iteration, index),
            Network::Generator => self.draws.generator(iteration, index),
        }
    }

    /// A micro-batch's loss.
    fn micro_batch(
        &self,
        network: Network,
        iteration: u64,
        draw: &Draw,
    ) -> Result<MicroBatchLoss, Interruption> {
        let Recipe { settings, mixed_precision, .. } = self.recipe;
        let arrive = [Network::Generator, Network::FakeScore].map(|network| move || self.arrive(network));
        let generator = Watched::after(self.networks.generator.as_ref(), &arrive[0]);
        let _autocast = match mixed_precision {
            Some(precision) => Some(Autocast::enter(settings.device, *precision)?),
            None => None,
        };
        Ok(match network {
            Network::FakeScore => {
                let fake_score = Watched::after(self.networks.fake_score.as_ref(), &arrive[1]);
                phase::fake_score(&generator, &fake_score, draw, settings)
            }
            Network::Generator => {
                let fake_score = Watched::after(self.networks.frozen_fake_score.as_ref(), &arrive[1]);
                let teacher = Watched::new(self.networks.teacher.as_ref());
                phase::generator(&generator, &fake_score, &teacher, draw, settings, iteration)
            }
        })
    }
}
