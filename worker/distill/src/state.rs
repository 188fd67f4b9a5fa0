//! The state of a run: everything that an iteration changes, which is the content of a checkpoint.

use std::ops::Range;

use potstill_models::{Denoiser, Entry};
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
    adam::{Adam, AdamSettings},
    counters::{Counters, Network},
    ema,
    gradient::Gradient,
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
    /// The slice of master weights, moments and average that is held.
    pub slice: Slice,
    /// Data type of the networks' weights. Where it is not fp32, fp32 master weights are held as well.
    pub weights: Kind,
    /// Whether G_ema is in the host's memory.
    pub average_on_host: bool,
    /// Whether Adam has a first moment, of generator and fake score: where its decay is not 0.
    pub first_moments: [bool; 2],
}

impl Layout {
    /// Everything in fp32, on the networks' device.
    pub const PLAIN: Self =
        Self { slice: Slice::WHOLE, weights: Kind::Float, average_on_host: false, first_moments: [true; 2] };
}

/// A network that trains, and its optimizer.
pub struct Trained {
    network: Box<dyn Denoiser>,
    /// The weights' memory, followed by room for the slices of all ranks, which have equal lengths.
    memory: Tensor,
    /// fp32 values of the slice: views of the weights where these are fp32.
    master: Tensor,
    adam: Adam,
    slice: Slice,
}

impl Trained {
    fn copy_of(network: &dyn Denoiser, of: Network, layout: Layout) -> Self {
        let values = network.parameters().flat();
        let numel = values.numel() as i64;
        let memory = Tensor::zeros([numel + MOST_SLICES as i64], (layout.weights, values.device()));
        let weights = memory.narrow(0, 0, numel);
        no_grad(|| weights.shallow_clone().copy_(values));
        Self::over(network, memory, weights, of, layout)
    }

    fn over(network: &dyn Denoiser, memory: Tensor, weights: Tensor, of: Network, layout: Layout) -> Self {
        let numel = weights.numel() as i64;
        let range = layout.slice.range(numel);
        let held = weights.narrow(0, range.start, range.end - range.start);
        // A copy only where the data types differ.
        let master = held.to_kind(Kind::Float);
        Self {
            adam: Adam::new(&master, layout.first_moments[of as usize]),
            network: network.over(weights, true),
            memory,
            master,
            slice: layout.slice,
        }
    }

    /// The network, with all its weights.
    #[must_use]
    pub fn network(&self) -> &dyn Denoiser {
        self.network.as_ref()
    }

    /// Steps the slice. The weights follow if the slice is the whole; otherwise when all slices have been
    /// [gathered](Self::gathered).
    fn step(&mut self, gradient: &Gradient, step: u64, settings: &AdamSettings) {
        self.adam.step(&self.master, &gradient.flat, step, settings);
        self.write_slice();
    }

    fn write_slice(&self) {
        if self.memory.kind() != Kind::Float {
            let range = self.slice.range(self.network.parameters().flat().numel() as i64);
            no_grad(|| self.memory.narrow(0, range.start, range.end - range.start).copy_(&self.master));
        }
    }

    /// This rank's slice of the weights, and the memory of all slices, one after the other, each as long as this one.
    pub fn gathered(&self) -> (Tensor, Tensor) {
        let width = self.slice.width(self.network.parameters().flat().numel() as i64);
        let own = self.memory.narrow(0, self.slice.rank as i64 * width, width);
        (own, self.memory.narrow(0, 0, self.slice.world as i64 * width))
    }
}

/// Generator, its average, fake score, both networks' Adam moments, counters. Only these flat vectors are saved or
/// sent, since all random numbers are named by the iteration.
pub struct State {
    /// G_θ.
    pub generator: Trained,
    /// f_ψ.
    pub fake_score: Trained,
    /// The slice of G_ema, fp32.
    average: Tensor,
    /// Optimizer steps and loss scale of each network.
    pub counters: Counters,
    counters_layout: [Entry; 1],
    layout: Layout,
    /// Whether the parts do not belong together: a slice has been stepped and the weights have not followed, or a part
    /// of the state has been overwritten.
    pub torn: bool,
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
        Self::starting_from(teacher, teacher, Counters::new(false), Layout::PLAIN)
    }

    /// The state before the first iteration: the fake score is a copy of the teacher, the generator and its average are
    /// copies of `generator`, which has the same parameters.
    #[must_use]
    pub fn starting_from(
        teacher: &dyn Denoiser,
        generator: &dyn Denoiser,
        counters: Counters,
        layout: Layout,
    ) -> Self {
        let generator = Trained::copy_of(generator, Network::Generator, layout);
        let host = if layout.average_on_host { Device::Cpu } else { generator.master.device() };
        Self {
            average: generator.master.to_device(host).copy(),
            generator,
            fake_score: Trained::copy_of(teacher, Network::FakeScore, layout),
            counters,
            counters_layout: [Entry {
                name: "loss_scale_and_steps".to_owned(),
                shape: Counters::SHAPE.to_vec(),
                offset: 0,
            }],
            layout,
            torn: false,
        }
    }

    /// A state of the same networks, in the same memory, for another slice, whose values are to be filled in.
    #[must_use]
    pub fn relaid(&self, slice: Slice) -> Self {
        let layout = Layout { slice, ..self.layout };
        let relaid = |trained: &Trained, of| {
            let weights = trained.network.parameters().flat().shallow_clone();
            Trained::over(trained.network.as_ref(), trained.memory.shallow_clone(), weights, of, layout)
        };
        let generator = relaid(&self.generator, Network::Generator);
        let fake_score = relaid(&self.fake_score, Network::FakeScore);
        Self {
            average: generator.master.to_device(self.average.device()).zeros_like(),
            generator,
            fake_score,
            counters: self.counters.duplicate(),
            counters_layout: self.counters_layout.clone(),
            layout,
            torn: true,
        }
    }

    /// Its layout in memory.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Every vector, in a fixed order.
    #[must_use]
    pub fn parts(&self) -> Vec<Part<'_>> {
        let (g, f) = (&self.generator, &self.fake_score);
        let vectors = [
            ("generator", g, Some(&g.master)),
            (GENERATOR_EMA, g, Some(&self.average)),
            ("fake_score", f, Some(&f.master)),
            (FIRST_MOMENTS[0], g, g.adam.exp_avg.as_ref()),
            ("generator_adam.exp_avg_sq", g, Some(&g.adam.exp_avg_sq)),
            (FIRST_MOMENTS[1], f, f.adam.exp_avg.as_ref()),
            ("fake_score_adam.exp_avg_sq", f, Some(&f.adam.exp_avg_sq)),
        ];
        let held = vectors.into_iter().filter_map(|(name, of, values)| Some(self.part(name, of, values?)));
        let counters = Part {
            name: COUNTERS,
            entries: &self.counters_layout,
            values: self.counters.values(),
            first: 0,
            replicated: true,
        };
        held.chain([counters]).collect()
    }

    fn part<'a>(&self, name: &'static str, of: &'a Trained, values: &'a Tensor) -> Part<'a> {
        let parameters = of.network.parameters();
        let first = self.layout.slice.range(parameters.flat().numel() as i64).start;
        let replicated = self.layout.slice.world == 1;
        Part { name, entries: parameters.entries(), values, first, replicated }
    }

    /// Updates this rank's slices of the weights from new values of the [parts](State::parts). With more than one slice
    /// the weights must then be [gathered](Trained::gathered).
    pub fn settle(&mut self) {
        self.generator.write_slice();
        self.fake_score.write_slice();
        self.torn = false;
    }

    /// G_ema's slice, as a vector on the device of the networks.
    pub fn average(&self) -> Tensor {
        self.average.to_device(self.generator.memory.device())
    }

    /// G_ema, from all its elements, fp32; without gradient.
    #[must_use]
    pub fn generator_ema(&self, average: Tensor) -> Box<dyn Denoiser> {
        self.generator.network.over(average, false)
    }

    /// One step of a network, and of its counter. `gradient` is that of the slice.
    pub fn step(&mut self, network: Network, gradient: &Gradient, settings: &AdamSettings) {
        self.torn = self.layout.slice.world > 1;
        let step = self.counters.count_step(network);
        let trained = match network {
            Network::Generator => &mut self.generator,
            Network::FakeScore => &mut self.fake_score,
        };
        trained.step(gradient, step, settings);
    }

    /// G_ema's update at the end of an iteration before which `images_seen` images were counted. It is made in every
    /// iteration, even if the generator was not stepped (EDM's training loop, which SiD keeps).
    pub fn update_average(&mut self, half_life_images: f64, images_seen: f64, batch: f64) {
        let beta = ema::beta(half_life_images, images_seen, batch);
        ema::update(&self.average, &self.generator.master.to_device(self.average.device()), beta);
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
