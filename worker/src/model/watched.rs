//! A network whose evaluations are completed work: sampling with many steps, or on a slow device, is not a hang.

use potstill_models::{Condition, Denoiser, ForwardProcess, Mode, Parameters};
use tch::Tensor;

use crate::process::work;

/// See the module's documentation.
pub struct Watched<'a>(pub &'a dyn Denoiser);

impl Denoiser for Watched<'_> {
    fn denoise_and_encode(
        &self,
        x_t: &Tensor,
        time: &Tensor,
        condition: &Condition,
        mode: Mode,
    ) -> (Tensor, Tensor) {
        let made = self.0.denoise_and_encode(x_t, time, condition, mode);
        work::complete();
        made
    }

    fn encode(&self, x_t: &Tensor, time: &Tensor, condition: &Condition, mode: Mode) -> Tensor {
        let made = self.0.encode(x_t, time, condition, mode);
        work::complete();
        made
    }

    fn process(&self) -> &ForwardProcess {
        self.0.process()
    }

    fn parameters(&self) -> &Parameters {
        self.0.parameters()
    }

    fn base(&self) -> &Parameters {
        self.0.base()
    }

    fn rebased(&self, flat: Tensor) -> Box<dyn Denoiser> {
        self.0.rebased(flat)
    }

    fn sample_shape(&self) -> [i64; 3] {
        self.0.sample_shape()
    }

    fn classes(&self) -> i64 {
        self.0.classes()
    }

    fn augment_dim(&self) -> i64 {
        self.0.augment_dim()
    }

    fn time_range(&self) -> [f64; 2] {
        self.0.time_range()
    }

    fn over(&self, flat: Tensor, trainable: bool) -> Box<dyn Denoiser> {
        self.0.over(flat, trainable)
    }

    fn config_json(&self) -> String {
        self.0.config_json()
    }
}
