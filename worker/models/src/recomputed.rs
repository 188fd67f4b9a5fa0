//! Blocks whose activations are computed again in the backward pass instead of being kept (1604.06174), and whose weights may
//! be in memory only while they compute.

use std::{ops::Range, sync::OnceLock};

use potstill_torch_ext::{Block, SharedBlock};
use tch::{Device, Tensor};

use crate::{
    builder::{BufferDeclaration, Init, Registry, Scope},
    gate::Place,
    masks,
    parameters::Entry,
    weight::Weight,
};

/// A block, and the parameters that it computes with.
pub(crate) struct Recomputed<B> {
    block: SharedBlock<Inner<B>>,
    /// Those that are trained.
    parameters: Vec<Tensor>,
    /// Names of the network's own parameters, in their order there.
    names: Vec<String>,
}

/// A block that draws the same masks each time. Its last input is the seed of their names, int64; empty: it draws none.
struct Inner<B> {
    block: B,
    /// Where its weights come from, unless they are always there.
    place: OnceLock<Place>,
}

impl<B: Block> Block for Inner<B> {
    fn forward(&self, inputs: &[Tensor]) -> Tensor {
        let Some((seed, inputs)) = inputs.split_last() else { return self.block.forward(inputs) };
        let seed = (seed.numel() > 0).then(|| seed.int64_value(&[0]));
        masks::within(seed, || self.block.forward(inputs))
    }

    fn enter(&self, backward: bool) {
        if let Some((gate, number)) = self.place.get() {
            gate.enter(*number, backward);
        }
    }

    fn leave(&self) {
        if let Some((gate, number)) = self.place.get() {
            gate.leave(*number);
        }
    }
}

/// A block of any kind.
pub(crate) trait AnyBlock {
    /// Its leaves among those of the network's own parameters.
    fn leaves(&self, entries: &[Entry]) -> Range<usize>;

    /// Sets the gate through which its weights come.
    fn set_place(&self, place: Place);
}

impl<B: Block> AnyBlock for Recomputed<B> {
    fn leaves(&self, entries: &[Entry]) -> Range<usize> {
        let first = self.names.first().and_then(|name| entries.iter().position(|entry| entry.name == *name));
        let first = first.unwrap_or(entries.len());
        let leaves = first..first + self.names.len();
        debug_assert!(
            entries[leaves.clone()].iter().map(|entry| &entry.name).eq(&self.names),
            "the parameters of a block follow one another"
        );
        leaves
    }

    fn set_place(&self, place: Place) {
        let set = self.block.get().place.set(place);
        assert!(set.is_ok(), "a network has one gate");
    }
}

impl<B: Block> Recomputed<B> {
    /// Builds a block in a node of the tree and records its parameters.
    pub fn new(mut scope: Scope, build: impl FnOnce(&mut Scope) -> B) -> Self {
        let (registry, path) = scope.parts();
        let mut collector = Collector { registry, parameters: Vec::new(), names: Vec::new() };
        let block = build(&mut Scope::at(&mut collector, path));
        let Collector { parameters, names, .. } = collector;
        Self { block: SharedBlock::new(Inner { block, place: OnceLock::new() }), parameters, names }
    }

    /// The block's output. With `again` only the inputs are kept for the backward pass.
    pub fn forward(&self, inputs: &[&Tensor], again: bool) -> Tensor {
        let seed: Vec<i64> = masks::next().into_iter().collect();
        let inputs: Vec<Tensor> =
            inputs.iter().map(|input| input.shallow_clone()).chain([Tensor::from_slice(&seed)]).collect();
        if again && inputs.iter().chain(&self.parameters).any(Tensor::requires_grad) {
            return potstill_torch_ext::recompute(&self.block, &inputs, &self.parameters);
        }
        self.block.forward(&inputs)
    }
}

/// Forwards a block's requests for tensors, and records its parameters.
struct Collector<'a> {
    registry: &'a mut dyn Registry,
    parameters: Vec<Tensor>,
    names: Vec<String>,
}

impl Registry for Collector<'_> {
    fn parameter(&mut self, name: String, shape: &[i64], init: Init) -> Tensor {
        self.names.push(name.clone());
        let parameter = self.registry.parameter(name, shape, init);
        self.parameters.push(parameter.shallow_clone());
        parameter
    }

    fn weight(&mut self, module: &str, shape: &[i64], init: Init) -> Weight {
        self.names.push(format!("{module}.weight"));
        let weight = self.registry.weight(module, shape, init);
        self.parameters.extend(weight.trained());
        weight
    }

    fn buffer(&mut self, declaration: BufferDeclaration) -> Tensor {
        self.registry.buffer(declaration)
    }

    fn problem(&mut self, problem: String) {
        self.registry.problem(problem);
    }

    fn device(&self) -> Device {
        self.registry.device()
    }
}
