//! The state of a run: everything that an iteration changes, which is the content of a checkpoint.

use std::ops::Range;

use potstill_models::{Denoiser, Entry, gate};
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
    adam::{Adam, AdamSettings},
    counters::{Counters, Network},
    ema,
    gradient::Gradient,
    host,
};

/// The part of a flat vector that one rank's optimizer steps: one of `world` ranges of equal length (ZeRO stage 1,
/// 1910.02054). The last ones are shorter where the length is not a multiple.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Index of the range, from 0.
    pub rank: usize,
    /// Number of ranges.
    pub world: usize,
}

/// The largest number of ranks that can share an optimizer.
pub const MOST_SLICES: usize = 4096;

impl Slice {
    /// The slice that is the whole vector.
    pub const WHOLE: Self = Self { rank: 0, world: 1 };

    /// Elements in a range of a vector of `numel`, before the last ones are cut short.
    #[must_use]
    pub fn width(self, numel: i64) -> i64 {
        let world = self.world as i64;
        (numel + world - 1) / world
    }

    /// The slice's elements in a vector of `numel`.
    #[must_use]
    pub fn range(self, numel: i64) -> Range<i64> {
        let first = (self.rank as i64 * self.width(numel)).min(numel);
        first..(first + self.width(numel)).min(numel)
    }
}

/// The layout of a state in memory. It affects no result but through the weights' precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The slice of master weights, moments and average that this rank owns.
    pub slice: Slice,
    /// The slice of another rank that this one holds too, and steps in the same way, so that it survives its owner.
    pub copy: Option<Slice>,
    /// Data type of the networks' weights. Where it is not fp32, fp32 master weights are held as well.
    pub weights: Kind,
    /// Whether G_ema is in the host's memory.
    pub average_on_host: bool,
    /// Whether master weights and Adam's moments are in the host's memory, where they are stepped. Then G_ema has to be there too.
    pub optimizer_on_host: bool,
    /// Whether Adam has a first moment, of generator and fake score: where its decay is not 0.
    pub first_moments: [bool; 2],
    /// Whether the networks' weights are gathered from the ranks' slices when they are needed, instead of being held.
    pub gathered: bool,
}

impl Layout {
    /// Everything in fp32, on the networks' device.
    pub const PLAIN: Self = Self {
        slice: Slice::WHOLE,
        copy: None,
        weights: Kind::Float,
        average_on_host: false,
        optimizer_on_host: false,
        first_moments: [true; 2],
        gathered: false,
    };
}

/// A network with its first weights, or without weights in memory and with a source of any range of the first ones.
#[derive(Clone, Copy)]
pub struct Start<'a> {
    /// The network.
    pub network: &'a dyn Denoiser,
    /// Elements of the flat vector, fp32. `None`: the network has them.
    pub values: Option<&'a dyn Fn(Range<i64>) -> Tensor>,
}

impl<'a> Start<'a> {
    /// A network that has its weights.
    #[must_use]
    pub fn of(network: &'a dyn Denoiser) -> Self {
        Self { network, values: None }
    }

    /// The elements of a slice, in memory of their own, fp32, on the network's device.
    fn slice(&self, slice: Slice) -> Tensor {
        let flat = self.network.parameters().flat();
        let range = slice.range(flat.numel() as i64);
        match self.values {
            Some(values) => values(range).to_device(flat.device()),
            None => flat.narrow(0, range.start, range.end - range.start).to_kind(Kind::Float).copy(),
        }
    }
}

/// The weights of a network that trains.
pub struct Trained {
    network: Box<dyn Denoiser>,
    /// The weights' memory, followed by room for the slices of all ranks, which have equal lengths. `None`: the weights are
    /// gathered from the slices' masters when they are needed.
    memory: Option<Tensor>,
    slice: Slice,
    /// Whether slices have been stepped, and the weights of other ranks' slices have not followed.
    behind: bool,
}

impl Trained {
    fn copy_of(network: &dyn Denoiser, layout: Layout) -> Self {
        let values = network.parameters().flat();
        let (numel, options) = (values.numel() as i64, (layout.weights, values.device()));
        if layout.gathered {
            let network = network.over(gate::absent(numel, options), true);
            return Self { network, memory: None, slice: layout.slice, behind: false };
        }
        let memory = Tensor::zeros([numel + MOST_SLICES as i64], options);
        let weights = memory.narrow(0, 0, numel);
        no_grad(|| weights.shallow_clone().copy_(values));
        let network = network.over(weights, true);
        Self { network, memory: Some(memory), slice: layout.slice, behind: false }
    }

    /// The same weights, of which this rank owns another slice.
    fn relaid(&self, slice: Slice) -> Self {
        let network = self.network.over(self.network.parameters().flat().shallow_clone(), true);
        let memory = self.memory.as_ref().map(Tensor::shallow_clone);
        Self { network, behind: memory.is_some() && slice.world > 1, memory, slice }
    }

    /// The network: with all its weights, or without any where these are gathered.
    #[must_use]
    pub fn network(&self) -> &dyn Denoiser {
        self.network.as_ref()
    }

    fn numel(&self) -> i64 {
        self.network.parameters().flat().numel() as i64
    }

    /// The weights of a slice, where they are held.
    fn range(&self, slice: Slice) -> Option<Tensor> {
        let range = slice.range(self.numel());
        Some(self.memory.as_ref()?.narrow(0, range.start, range.end - range.start))
    }

    /// The weights of this rank's own slice follow its master weights; those of the others are behind.
    fn follow(&mut self, master: &Tensor) {
        let Some(mut own) = self.range(self.slice) else { return };
        if own.device() != master.device() {
            host::copy_in_pieces(&own, master, host::PIECE);
        } else if own.data_ptr() != master.data_ptr() {
            no_grad(|| own.copy_(master));
        }
        self.behind = self.slice.world > 1;
    }

    /// Whether the weights must be [gathered](Self::gathered) before the network is used.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        self.behind
    }

    /// All ranks' slices have been gathered.
    pub fn set_gathered(&mut self) {
        self.behind = false;
    }

    /// This rank's slice of the weights, and the memory of all slices, one after the other, each as long as this one; where they
    /// are held.
    pub fn gathered(&self) -> Option<(Tensor, Tensor)> {
        let (memory, width) = (self.memory.as_ref()?, self.slice.width(self.numel()));
        let own = memory.narrow(0, self.slice.rank as i64 * width, width);
        Some((own, memory.narrow(0, 0, self.slice.world as i64 * width)))
    }
}

/// What an optimizer holds of one slice of a network, fp32.
struct Optimized {
    master: Tensor,
    adam: Adam,
}

impl Optimized {
    fn new(master: Tensor, of: Network, layout: Layout) -> Self {
        Self { adam: Adam::new(&master, layout.first_moments[of as usize]), master }
    }
}

/// Everything that is held of one slice.
struct Held {
    slice: Slice,
    /// By [`Network`].
    networks: [Optimized; 2],
    average: Tensor,
}

impl Held {
    /// This rank's own slice of generator and fake score, with views of the weights where these are held and fp32; or another,
    /// in memory of its own: what is gathered half must not reach it. `first` gives the first values of weights that are not
    /// held.
    fn of(
        slice: Slice,
        is_own: bool,
        networks: [&Trained; 2],
        layout: Layout,
        first: impl Fn(Network) -> Tensor,
    ) -> Self {
        let device = networks[0].network.parameters().flat().device();
        let place = |on_host: bool| if on_host { Device::Cpu } else { device };
        // fp32 in memory of its own, with no further copy where the move or the data type has made one.
        let copied = |values: &Tensor, on_host: bool| {
            let moved = values.to_device(place(on_host)).to_kind(Kind::Float);
            if moved.data_ptr() == values.data_ptr() { moved.copy() } else { moved }
        };
        let master = |network: Network| match networks[network as usize].range(slice) {
            // A copy only where the data types differ.
            Some(weights) if is_own && !layout.optimizer_on_host => weights.to_kind(Kind::Float),
            Some(weights) => copied(&weights, layout.optimizer_on_host),
            None => first(network).to_device(place(layout.optimizer_on_host)),
        };
        let (generator, fake_score) = (master(Network::Generator), master(Network::FakeScore));
        let average = copied(&generator, layout.average_on_host);
        let networks = [
            Optimized::new(generator, Network::Generator, layout),
            Optimized::new(fake_score, Network::FakeScore, layout),
        ];
        Self { slice, networks, average }
    }
}

/// Generator, its average, fake score, both networks' Adam moments, counters. Only these flat vectors are saved or
/// sent, since all random numbers are named by the iteration.
pub struct State {
    /// G_θ.
    pub generator: Trained,
    /// f_ψ.
    pub fake_score: Trained,
    /// This rank's own slice, and the one that it holds a copy of.
    held: Vec<Held>,
    /// Optimizer steps and loss scale of each network.
    pub counters: Counters,
    counters_layout: [Entry; 1],
    layout: Layout,
}

/// Name of the averaged generator among the [parts](State::parts).
pub const GENERATOR_EMA: &str = "generator_ema";

/// Name of the [`Counters`] among the [parts](State::parts): the one part that is never sliced.
pub const COUNTERS: &str = "counters";

/// Names of the parts that exist only where Adam has a first moment: the generator's and the fake score's.
pub const FIRST_MOMENTS: [&str; 2] = ["generator_adam.exp_avg", "fake_score_adam.exp_avg"];

/// One of the state's vectors, or the slice that this rank holds of it.
pub struct Part<'a> {
    /// Stable name: part of the checkpoint format.
    pub name: &'static str,
    /// Names and shapes of the whole vector's elements.
    pub entries: &'a [Entry],
    /// The elements that are held, fp32, flat.
    pub values: &'a Tensor,
    /// Index of the first of them in the whole vector.
    pub first: i64,
    /// Whether every rank holds the whole vector.
    pub replicated: bool,
}

impl Part<'_> {
    /// Length of the whole vector.
    #[must_use]
    pub fn whole(&self) -> i64 {
        self.entries.iter().map(Entry::numel).sum()
    }

    /// The range of the whole vector that is held.
    #[must_use]
    pub fn held(&self) -> Range<i64> {
        self.first..self.first + self.values.numel() as i64
    }
}

impl State {
    /// The state before the first iteration: three copies of the teacher.
    #[must_use]
    pub fn from_teacher(teacher: &dyn Denoiser) -> Self {
        Self::starting_from(Start::of(teacher), Start::of(teacher), Counters::new(false), Layout::PLAIN)
    }

    /// The state before the first iteration: the fake score is a copy of the teacher, the generator and its average are
    /// copies of `generator`, which has the same parameters.
    #[must_use]
    pub fn starting_from(
        teacher: Start<'_>,
        generator: Start<'_>,
        counters: Counters,
        layout: Layout,
    ) -> Self {
        let trained =
            (Trained::copy_of(generator.network, layout), Trained::copy_of(teacher.network, layout));
        let counters_layout =
            [Entry { name: "loss_scale_and_steps".to_owned(), shape: Counters::SHAPE.to_vec(), offset: 0 }];
        Self::over(trained, counters, counters_layout, layout, |network, slice| match network {
            Network::Generator => generator.slice(slice),
            Network::FakeScore => teacher.slice(slice),
        })
    }

    /// `first` gives the first values of a slice of weights that are not held.
    fn over(
        (generator, fake_score): (Trained, Trained),
        counters: Counters,
        counters_layout: [Entry; 1],
        layout: Layout,
        first: impl Fn(Network, Slice) -> Tensor,
    ) -> Self {
        let held = |slice: Slice, is_own| {
            Held::of(slice, is_own, [&generator, &fake_score], layout, |network| first(network, slice))
        };
        let own = held(layout.slice, true);
        let held = [own].into_iter().chain(layout.copy.map(|slice| held(slice, false))).collect();
        Self { generator, fake_score, held, counters, counters_layout, layout }
    }

    /// A state of the same networks, in the same memory, for other slices, whose values are to be filled in. Slices that
    /// this one holds stay as they are if what is filled in is of the same state.
    #[must_use]
    pub fn relaid(&self, slice: Slice, copy: Option<Slice>) -> Self {
        let layout = Layout { slice, copy, ..self.layout };
        let trained = (self.generator.relaid(slice), self.fake_score.relaid(slice));
        let counters = self.counters.duplicate();
        Self::over(trained, counters, self.counters_layout.clone(), layout, |_, slice| {
            let flat = self.generator.network.parameters().flat();
            let range = slice.range(flat.numel() as i64);
            Tensor::zeros([range.end - range.start], (Kind::Float, flat.device()))
        })
    }

    /// Its layout in memory.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Every vector, or this rank's own slice of it, in a fixed order.
    #[must_use]
    pub fn parts(&self) -> Vec<Part<'_>> {
        self.parts_of(0)
    }

    /// The parts of a slice that this rank holds, with the counters; `None` where it does not hold it.
    #[must_use]
    pub fn parts_of_slice(&self, slice: Slice) -> Option<Vec<Part<'_>>> {
        let index = self.held.iter().position(|held| held.slice == slice)?;
        Some(self.parts_of(index))
    }

    /// The parts of every slice that this rank holds.
    #[must_use]
    pub fn all_parts(&self) -> Vec<Part<'_>> {
        let copies = 1..self.held.len();
        let copied = copies.flat_map(|index| self.parts_of(index)).filter(|part| part.name != COUNTERS);
        self.parts().into_iter().chain(copied).collect()
    }

    fn parts_of(&self, index: usize) -> Vec<Part<'_>> {
        let held = &self.held[index];
        let [generator, fake_score] = &held.networks;
        let (g, f) = (&self.generator, &self.fake_score);
        let vectors = [
            ("generator", g, Some(&generator.master)),
            (GENERATOR_EMA, g, Some(&held.average)),
            ("fake_score", f, Some(&fake_score.master)),
            (FIRST_MOMENTS[0], g, generator.adam.exp_avg.as_ref()),
            ("generator_adam.exp_avg_sq", g, Some(&generator.adam.exp_avg_sq)),
            (FIRST_MOMENTS[1], f, fake_score.adam.exp_avg.as_ref()),
            ("fake_score_adam.exp_avg_sq", f, Some(&fake_score.adam.exp_avg_sq)),
        ];
        let parts = vectors.into_iter().filter_map(|(name, of, values)| {
            let (values, entries) = (values?, of.network.parameters().entries());
            let first = held.slice.range(of.numel()).start;
            Some(Part { name, entries, values, first, replicated: held.slice.world == 1 })
        });
        let counters = Part {
            name: COUNTERS,
            entries: &self.counters_layout,
            values: self.counters.values(),
            first: 0,
            replicated: true,
        };
        parts.chain([counters]).collect()
    }

    /// Updates the weights from new values of the [parts](State::parts). With more than one slice they must then be
    /// [gathered](Trained::gathered).
    pub fn settle(&mut self) {
        let [generator, fake_score] = &self.held[0].networks;
        self.generator.follow(&generator.master);
        self.fake_score.follow(&fake_score.master);
    }

    /// This rank's slice of G_ema: fp32, where it is kept.
    pub fn average(&self) -> &Tensor {
        &self.held[0].average
    }

    /// The master weights of this rank's slice of a network: fp32, the memory that [`step`](Self::step) changes.
    pub fn master(&self, network: Network) -> &Tensor {
        &self.held[0].networks[network as usize].master
    }

    /// G_ema, from all its elements, fp32; without gradient. `None`: without weights, which are to be gathered.
    #[must_use]
    pub fn generator_ema(&self, average: Option<Tensor>) -> Box<dyn Denoiser> {
        let network = &self.generator.network;
        let flat = network.parameters().flat();
        let none = || gate::absent(flat.numel() as i64, (Kind::Float, flat.device()));
        network.over(average.unwrap_or_else(none), false)
    }

    /// The weights of one of the networks.
    pub fn trained(&mut self, network: Network) -> &mut Trained {
        match network {
            Network::Generator => &mut self.generator,
            Network::FakeScore => &mut self.fake_score,
        }
    }

    /// One step of a network, and of its counter. `gradient` is that of the slices that are held. With more than one slice
    /// the weights must then be [gathered](Trained::gathered).
    pub fn step(&mut self, network: Network, gradient: &Gradient, settings: &AdamSettings) {
        let step = self.counters.count_step(network);
        for (held, gradient) in self.held.iter_mut().zip(&gradient.slices) {
            let Optimized { master, adam } = &mut held.networks[network as usize];
            adam.step(master, gradient, step, settings);
        }
        let master = self.held[0].networks[network as usize].master.shallow_clone();
        self.trained(network).follow(&master);
    }

    /// G_ema's update at the end of an iteration before which `images_seen` images were counted. It is made in every
    /// iteration, even if the generator was not stepped (EDM's training loop, which SiD keeps).
    pub fn update_average(&mut self, half_life_images: f64, images_seen: f64, batch: f64) {
        let beta = ema::beta(half_life_images, images_seen, batch);
        for held in &self.held {
            ema::update(&held.average, &held.networks[Network::Generator as usize].master, beta);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_cover_a_vector_without_overlap() {
        for (numel, world) in [(10, 1), (10, 3), (10, 4), (2, 4), (4096, 7)] {
            let ranges: Vec<_> = (0..world).map(|rank| Slice { rank, world }.range(numel)).collect();
            assert_eq!((ranges[0].start, ranges[world - 1].end), (0, numel));
            assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start), "{ranges:?}");
            let width = Slice { rank: 0, world }.width(numel);
            assert!(ranges.iter().all(|range| range.end - range.start <= width));
            assert!(width * world as i64 <= numel + MOST_SLICES as i64);
        }
    }
}
