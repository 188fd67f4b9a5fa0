//! The weights of a network with adapters, and their declaration.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use tch::{Device, Kind, Tensor, no_grad};

use super::{Lora, LoraError};
use crate::{
    builder::{Binding, BufferDeclaration, Declaration, Init, Registry, placeholder},
    parameters::Parameters,
    weight::{DOWN, UP, Weight},
};

/// How many of the nearest names an error lists.
const SHOWN: usize = 3;

/// The weights of a network: all of its own, or frozen ones with adapters.
pub(crate) struct Weights {
    base: Parameters,
    adapters: Option<(Lora, Parameters)>,
}

impl Weights {
    pub fn own(parameters: Parameters) -> Self {
        Self { base: parameters, adapters: None }
    }

    /// Those that train: the adapters, if there are any.
    pub fn trained(&self) -> &Parameters {
        self.adapters.as_ref().map_or(&self.base, |(_, adapters)| adapters)
    }

    /// Those with which the layers compute, without adapters.
    pub fn base(&self) -> &Parameters {
        &self.base
    }

    /// Whether the weights that train see a part of their inputs only while they train.
    pub fn has_dropout(&self) -> bool {
        self.adapters.as_ref().is_some_and(|(lora, _)| lora.dropout > 0.0)
    }

    /// A source of tensors for the network's second pass.
    pub fn binding(&self) -> Binding<'_> {
        match &self.adapters {
            None => Binding::new(&self.base),
            Some((lora, adapters)) => Binding::adapted(&self.base, adapters, lora),
        }
    }

    /// The same weights, those that train replaced by views into `flat`.
    pub fn over(&self, flat: Tensor, trainable: bool) -> Self {
        match &self.adapters {
            None => Self::own(self.base.over(flat, trainable)),
            Some((lora, adapters)) => Self {
                base: self.frozen_base(),
                adapters: Some((lora.clone(), adapters.over(flat, trainable))),
            },
        }
    }

    /// Frozen, with another base.
    pub fn rebased(&self, flat: Tensor) -> Self {
        let frozen = |adapters: &Parameters| adapters.over(adapters.flat().shallow_clone(), false);
        let adapters = self.adapters.as_ref().map(|(lora, adapters)| (lora.clone(), frozen(adapters)));
        Self { base: self.base.over(flat, false), adapters }
    }

    fn frozen_base(&self) -> Parameters {
        self.base.over(self.base.flat().shallow_clone(), false)
    }

    /// These weights, frozen, with adapters: A is what `draw` returns for its shape, divided by r; B is 0.
    pub fn adapted(
        &self,
        lora: &Lora,
        declared: Declaration,
        draw: &mut dyn FnMut(&[i64]) -> Tensor,
    ) -> Self {
        let device = self.base.flat().device();
        let flat = Tensor::zeros([declared.numel()], (Kind::Float, device));
        for entry in declared.entries().iter().filter(|entry| entry.name.ends_with(DOWN)) {
            let drawn = draw(&entry.shape).to_device(device) / lora.rank as f64;
            no_grad(|| flat.narrow(0, entry.offset, entry.numel()).copy_(&drawn.reshape([-1])));
        }
        let adapters = declared.parameters(flat, BTreeMap::new());
        Self { base: self.frozen_base(), adapters: Some((lora.clone(), adapters)) }
    }

    /// One set of weights, fp32, that computes the same without adapters.
    pub fn merged(&self) -> Parameters {
        let merged = self.base.over(self.base.flat().to_kind(Kind::Float).copy(), false);
        if let Some((lora, adapters)) = &self.adapters {
            let named: BTreeMap<&str, &Tensor> =
                adapters.entries().iter().map(|entry| entry.name.as_str()).zip(adapters.leaves()).collect();
            for (entry, weight) in merged.entries().iter().zip(merged.leaves()) {
                let Some(module) = entry.name.strip_suffix("weight") else { continue };
                let (down, up) = (format!("{module}{DOWN}"), format!("{module}{UP}"));
                if let (Some(down), Some(up)) = (named.get(down.as_str()), named.get(up.as_str())) {
                    let update = product(down, up) * lora.scale();
                    let _ = no_grad(|| weight.shallow_clone().g_add_(&update.view(entry.shape.as_slice())));
                }
            }
        }
        merged
    }
}

/// B·A, fp32, one row for each output of the layer.
pub(crate) fn product(down: &Tensor, up: &Tensor) -> Tensor {
    let rows = |x: &Tensor| x.detach().to_kind(Kind::Float).reshape([x.size()[0], -1]);
    rows(up).matmul(&rows(down))
}

/// Whether a module is meant by the name `target`.
pub(crate) fn is_meant(module: &str, target: &str) -> bool {
    module.strip_suffix(target).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// Declares the adapters of a network: the first pass over its description.
pub(crate) struct AdapterDeclaration<'a> {
    lora: &'a Lora,
    targets: &'a [String],
    declared: Declaration,
    modules: Vec<String>,
    met: BTreeSet<&'a str>,
    too_large: Option<LoraError>,
}

impl<'a> AdapterDeclaration<'a> {
    pub fn new(lora: &'a Lora, targets: &'a [String]) -> Self {
        Self {
            lora,
            targets,
            declared: Declaration::default(),
            modules: Vec::new(),
            met: BTreeSet::new(),
            too_large: None,
        }
    }

    /// The adapters' parameters.
    ///
    /// # Errors
    /// A target that no layer has, where the caller named it; a rank that is too large.
    pub fn finish(self) -> Result<Declaration, LoraError> {
        let unknown = self.targets.iter().filter(|target| !self.met.contains(target.as_str()));
        let unknown: Vec<String> = match self.lora.targets {
            Some(_) => unknown.map(|target| self.with_nearest(target)).collect(),
            // Of the usual names a network may have some only.
            None => vec![],
        };
        if !unknown.is_empty() {
            return Err(LoraError::UnknownTargets { targets: unknown });
        }
        if let Some(error) = self.too_large {
            return Err(error);
        }
        match self.declared.entries() {
            [] => Err(LoraError::Unsupported),
            _ => Ok(self.declared),
        }
    }

    /// The target, with the names nearest to it.
    fn with_nearest(&self, target: &str) -> String {
        let parts = target.split('.').count();
        let ends: BTreeSet<String> = self
            .modules
            .iter()
            .map(|module| {
                let names: Vec<&str> = module.split('.').collect();
                names[names.len().saturating_sub(parts)..].join(".")
            })
            .collect();
        let mut ends: Vec<String> = ends.into_iter().collect();
        ends.sort_by_key(|end| Reverse((strsim::jaro_winkler(end, target) * 1e6) as i64));
        ends.truncate(SHOWN);
        format!("{target} (nearest: {})", ends.join(", "))
    }
}

impl Registry for AdapterDeclaration<'_> {
    fn parameter(&mut self, _name: String, shape: &[i64], _init: Init) -> Tensor {
        placeholder(shape)
    }

    fn weight(&mut self, module: &str, shape: &[i64], _init: Init) -> Weight {
        self.modules.push(module.to_owned());
        let targets = self.targets;
        let meant = || targets.iter().filter(|target| is_meant(module, target)).map(String::as_str);
        self.met.extend(meant());
        if meant().next().is_some() {
            let rank = self.lora.rank;
            let (outputs, inputs) = (shape[0], shape[1..].iter().product::<i64>());
            if rank > outputs.min(inputs) && self.too_large.is_none() {
                let most = outputs.min(inputs);
                self.too_large = Some(LoraError::Rank { module: module.to_owned(), rank, most });
            }
            let (down, up) = shapes(shape, rank);
            let init = Init::Constant(0.0);
            let _ = self.declared.parameter(format!("{module}.{DOWN}"), &down, init);
            let _ = self.declared.parameter(format!("{module}.{UP}"), &up, init);
        }
        Weight::own(placeholder(shape))
    }

    fn buffer(&mut self, declaration: BufferDeclaration) -> Tensor {
        placeholder(&declaration.shape)
    }

    // The network itself has been declared without problems.
    fn problem(&mut self, _problem: String) {}

    fn device(&self) -> Device {
        Device::Cpu
    }
}

/// Shapes of A and B for a weight of this shape.
pub(crate) fn shapes(weight: &[i64], rank: i64) -> (Vec<i64>, Vec<i64>) {
    let mut down = weight.to_vec();
    down[0] = rank;
    let mut up = vec![1; weight.len()];
    (up[0], up[1]) = (weight[0], rank);
    (down, up)
}
