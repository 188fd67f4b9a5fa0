//! A network whose evaluations are completed work: sampling with many steps, or on a slow device, is not a hang.

use potstill_models::{Condition, Denoiser, ForwardProcess, Mode, Parameters};
use tch::Tensor;

use crate::process::work;

/// See the module's documentation.
pub struct Watched<'a> {
    network: &'a dyn Denoiser,
    before: Option<&'a dyn Fn()>,
}

impl<'a> Watched<'a> {
    /// Over a network.
    pub fn new(network: &'a dyn Denoiser) -> Self {
        Self { network, before: None }
    }

    /// Calls `before` at each evaluation.
    pub fn after(network: &'a dyn Denoiser, before: &'a dyn Fn()) -> Self {
        Self { network, before: Some(before) }
    }

    fn begin(&self) {
        if let Some(before) = self.before {
            before();
        }
    }
}

impl Denoiser for Watched<'_> {
    fn denoise_and_encode(
        &self,
        x_t: &Tensor,
        time: &Tensor,
        condition: &Condition,
        mode: Mode,
    ) -> (Tensor, Tensor) {
        self.begin();
        let made = self.network.denoise_and_encode(x_t, time, condition, mode);
        work::complete();
        made
    }

    fn encode(&self, x_t: &Tensor, time: &Tensor, condition: &Condition, mode: Mode) -> Tensor {
        self.begin();
        let made = self.network.encode(x_t, time, condition, mode);
        work::complete();
        made
    }

    fn process(&self) -> &ForwardProcess {
        self.network.process()
    }

    fn parameters(&self) -> &Parameters {
        self.network.parameters()
    }

    fn base(&self) -> &Parameters {
        self.network.base()
    }

    fn rebased(&self, flat: Tensor) -> Box<dyn Denoiser> {
        self.network.rebased(flat)
    }

    fn sample_shape(&self) -> [i64; 3] {
        self.network.sample_shape()
    }

    fn classes(&self) -> i64 {
        self.network.classes()
    }

    fn augment_dim(&self) -> i64 {
        self.network.augment_dim()
    }

    fn time_range(&self) -> [f64; 2] {
        self.network.time_range()
    }

    fn over(&self, flat: Tensor, trainable: bool) -> Box<dyn Denoiser> {
        self.network.over(flat, trainable)
    }

    fn config_json(&self) -> String {
        self.network.config_json()
    }
}
