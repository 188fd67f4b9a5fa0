//! Declares and builds a network in two passes over one description.
//!
//! A network's constructor asks a [`Scope`] for each of its tensors. In the first pass a [`Declaration`] records names,
//! shapes and distributions of initial values, and returns placeholders; in the second a [`Binding`] returns the
//! network's real tensors. So the layout of the flat vector always fits the network that uses it.

use std::{collections::BTreeMap, sync::Arc};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use tch::{Device, Kind, Tensor};

use crate::{
    lora::Lora,
    parameters::{Entry, Parameters},
    weight::{DOWN, UP, Weight},
};

/// The distribution of a tensor's initial elements.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Init {
    /// A constant.
    Constant(f32),
    /// U[−bound, bound).
    Uniform { bound: f64 },
    /// N(0, std²).
    Normal { std: f64 },
}

impl Init {
    fn draw(self, rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
        match self {
            Self::Constant(value) => vec![value; count],
            Self::Uniform { bound } => {
                (0..count).map(|_| ((rng.random::<f64>() * 2.0 - 1.0) * bound) as f32).collect()
            }
            Self::Normal { std } => {
                (0..count).map(|_| (rng.sample::<f64, _>(StandardNormal) * std) as f32).collect()
            }
        }
    }
}

/// The origin of a buffer's values.
#[derive(Clone, Debug)]
pub(crate) enum BufferSource {
    /// Fixed by the configuration; a file with other values is rejected.
    Fixed(Vec<f32>),
    /// Drawn once, then saved and loaded with the weights.
    Drawn(Init),
}

/// A tensor that is saved but not trained.
#[derive(Clone, Debug)]
pub(crate) struct BufferDeclaration {
    pub name: String,
    pub shape: Vec<i64>,
    pub source: BufferSource,
}

/// Gives a network its tensors.
pub(crate) trait Registry {
    fn parameter(&mut self, name: String, shape: &[i64], init: Init) -> Tensor;

    /// The parameter `weight` of a layer, which may have an adapter.
    fn weight(&mut self, module: &str, shape: &[i64], init: Init) -> Weight {
        Weight::own(self.parameter(format!("{module}.weight"), shape, init))
    }

    fn buffer(&mut self, declaration: BufferDeclaration) -> Tensor;
    fn problem(&mut self, problem: String);
    fn device(&self) -> Device;
}

/// A node in the tree of modules.
pub(crate) struct Scope<'a> {
    registry: &'a mut dyn Registry,
    path: String,
}

impl<'a> Scope<'a> {
    pub fn root(registry: &'a mut dyn Registry) -> Self {
        Self { registry, path: String::new() }
    }

    /// A node with its path.
    pub fn at(registry: &'a mut dyn Registry, path: String) -> Self {
        Self { registry, path }
    }

    /// The parts of a node.
    pub fn parts(&mut self) -> (&mut dyn Registry, String) {
        (self.registry, self.path.clone())
    }

    pub fn child(&mut self, name: impl AsRef<str>) -> Scope<'_> {
        let path = self.join(name.as_ref());
        Scope { registry: self.registry, path }
    }

    fn join(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    pub fn parameter(&mut self, name: &str, shape: &[i64], init: Init) -> Tensor {
        self.registry.parameter(self.join(name), shape, init)
    }

    /// The parameter `weight` of a layer that is a product with it.
    pub fn weight(&mut self, shape: &[i64], init: Init) -> Weight {
        self.registry.weight(&self.path, shape, init)
    }

    pub fn buffer(&mut self, name: &str, shape: &[i64], source: BufferSource) -> Tensor {
        let declaration = BufferDeclaration { name: self.join(name), shape: shape.to_vec(), source };
        self.registry.buffer(declaration)
    }

    /// Records that the configuration asks for an impossible module.
    pub fn problem(&mut self, problem: impl AsRef<str>) {
        self.registry.problem(format!("{}: {}", self.path, problem.as_ref()));
    }

    pub fn device(&self) -> Device {
        self.registry.device()
    }
}

/// The first pass.
#[derive(Default)]
pub(crate) struct Declaration {
    entries: Vec<Entry>,
    inits: Vec<Init>,
    buffers: Vec<BufferDeclaration>,
    problems: Vec<String>,
    numel: i64,
}

impl Declaration {
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Names and shapes of all parameters.
    pub fn named_shapes(&self) -> Vec<(String, Vec<i64>)> {
        self.entries.iter().map(|entry| (entry.name.clone(), entry.shape.clone())).collect()
    }

    /// The number of elements of all parameters.
    pub fn numel(&self) -> i64 {
        self.numel
    }

    pub fn buffers(&self) -> &[BufferDeclaration] {
        &self.buffers
    }

    /// Parameters with given values. `flat` must have as many elements as were declared.
    pub fn parameters(self, flat: Tensor, buffers: BTreeMap<String, Tensor>) -> Parameters {
        Parameters::new(Arc::from(self.entries), flat, buffers, true)
    }

    /// Parameters drawn on the host from ChaCha8, so that a seed gives the same values on every platform.
    pub fn draw(self, seed: u64, device: Device) -> Parameters {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut values = Vec::with_capacity(self.numel as usize);
        for (entry, init) in self.entries.iter().zip(&self.inits) {
            values.extend(init.draw(&mut rng, entry.numel() as usize));
        }
        let flat = Tensor::from_slice(&values).to_device(device);
        let mut buffers = BTreeMap::new();
        for declaration in &self.buffers {
            let count = declaration.shape.iter().product::<i64>() as usize;
            let values = match &declaration.source {
                BufferSource::Fixed(values) => values.clone(),
                BufferSource::Drawn(init) => init.draw(&mut rng, count),
            };
            let tensor = Tensor::from_slice(&values).view(declaration.shape.as_slice()).to_device(device);
            buffers.insert(declaration.name.clone(), tensor);
        }
        self.parameters(flat, buffers)
    }
}

impl Registry for Declaration {
    fn parameter(&mut self, name: String, shape: &[i64], init: Init) -> Tensor {
        let entry = Entry { name, shape: shape.to_vec(), offset: self.numel };
        self.numel += entry.numel();
        self.entries.push(entry);
        self.inits.push(init);
        placeholder(shape)
    }

    fn buffer(&mut self, declaration: BufferDeclaration) -> Tensor {
        let placeholder = placeholder(&declaration.shape);
        self.buffers.push(declaration);
        placeholder
    }

    fn problem(&mut self, problem: String) {
        self.problems.push(problem);
    }

    fn device(&self) -> Device {
        Device::Cpu
    }
}

/// A tensor of this shape without memory for its elements.
pub(crate) fn placeholder(shape: &[i64]) -> Tensor {
    Tensor::zeros([1], (Kind::Float, Device::Cpu)).expand(shape, false)
}

/// The second pass.
pub(crate) struct Binding<'a> {
    parameters: &'a Parameters,
    next: usize,
    adapters: Option<Adapters<'a>>,
}

/// Adapters that have not been asked for yet.
struct Adapters<'a> {
    scale: f64,
    dropout: f64,
    left: BTreeMap<&'a str, &'a Tensor>,
}

impl<'a> Binding<'a> {
    pub fn new(parameters: &'a Parameters) -> Self {
        Self { parameters, next: 0, adapters: None }
    }

    /// With adapters beside some of the weights.
    pub fn adapted(parameters: &'a Parameters, adapters: &'a Parameters, lora: &Lora) -> Self {
        let names = adapters.entries().iter().map(|entry| entry.name.as_str());
        let left = names.zip(adapters.leaves()).collect();
        let (scale, dropout) = (lora.scale(), lora.dropout);
        Self { parameters, next: 0, adapters: Some(Adapters { scale, dropout, left }) }
    }
}

impl Registry for Binding<'_> {
    fn parameter(&mut self, name: String, _shape: &[i64], _init: Init) -> Tensor {
        let index = self.next;
        self.next += 1;
        debug_assert_eq!(self.parameters.entries()[index].name, name, "both passes run the same code");
        self.parameters.leaves()[index].shallow_clone()
    }

    fn weight(&mut self, module: &str, shape: &[i64], init: Init) -> Weight {
        let own = self.parameter(format!("{module}.weight"), shape, init);
        let Some(Adapters { scale, dropout, left }) = &mut self.adapters else { return Weight::own(own) };
        let mut take = |ending| left.remove(format!("{module}.{ending}").as_str());
        match (take(DOWN), take(UP)) {
            (Some(down), Some(up)) => {
                Weight::adapted(own, down.shallow_clone(), up.shallow_clone(), *scale, *dropout)
            }
            _ => Weight::own(own),
        }
    }

    fn buffer(&mut self, declaration: BufferDeclaration) -> Tensor {
        self.parameters.buffers()[&declaration.name].shallow_clone()
    }

    fn problem(&mut self, problem: String) {
        debug_assert!(false, "declared without problems, yet {problem}");
    }

    fn device(&self) -> Device {
        self.parameters.flat().device()
    }
}
