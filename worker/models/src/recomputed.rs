//! Blocks whose activations are computed again in the backward pass instead of being kept (1604.06174).

use potstill_torch_ext::{Block, SharedBlock};
use tch::{Device, Tensor};

use crate::{
    builder::{BufferDeclaration, Init, Registry, Scope},
    masks,
    weight::Weight,
};

/// A block, and the parameters that it computes with.
pub(crate) struct Recomputed<B> {
    block: SharedBlock<Named<B>>,
    parameters: Vec<Tensor>,
}

/// A block that draws the same masks each time. Its last input is the seed of their names, int64; empty: it draws none.
struct Named<B>(B);

impl<B: Block> Block for Named<B> {
    fn forward(&self, inputs: &[Tensor]) -> Tensor {
        let Some((seed, inputs)) = inputs.split_last() else { return self.0.forward(inputs) };
        let seed = (seed.numel() > 0).then(|| seed.int64_value(&[0]));
        masks::within(seed, || self.0.forward(inputs))
    }
}

impl<B: Block> Recomputed<B> {
    /// Builds a block in a node of the tree and records its parameters.
    pub fn new(mut scope: Scope, build: impl FnOnce(&mut Scope) -> B) -> Self {
        let (registry, path) = scope.parts();
        let mut collector = Collector { registry, parameters: Vec::new() };
        let block = build(&mut Scope::at(&mut collector, path));
        Self { block: SharedBlock::new(Named(block)), parameters: collector.parameters }
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
}

impl Registry for Collector<'_> {
    fn parameter(&mut self, name: String, shape: &[i64], init: Init) -> Tensor {
        let parameter = self.registry.parameter(name, shape, init);
        self.parameters.push(parameter.shallow_clone());
        parameter
    }

    fn weight(&mut self, module: &str, shape: &[i64], init: Init) -> Weight {
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
