//! A network whose evaluations are progress: sampling with many steps, or on a slow device, is not a hang.

use std::sync::Arc;

use potstill_models::{Condition, Denoiser, ForwardProcess, Mode, Parameters};
use tch::Tensor;

use crate::session::Progress;

/// See the module's documentation.
pub struct Watched {
    network: Box<dyn Denoiser>,
    progress: Arc<Progress>,
}

impl Watched {
    pub fn new(network: Box<dyn Denoiser>, progress: &Arc<Progress>) -> Self {
        Self { network, progress: Arc::clone(progress) }
    }
}

impl Denoiser for Watched {
    fn denoise_and_encode(
        &self,
        x_t: &Tensor,
        time: &Tensor,
        condition: &Condition,
        mode: Mode,
    ) -> (Tensor, Tensor) {
        let made = self.network.denoise_and_encode(x_t, time, condition, mode);
        self.progress.tick();
        made
    }

    fn encode(&self, x_t: &Tensor, time: &Tensor, condition: &Condition, mode: Mode) -> Tensor {
        let made = self.network.encode(x_t, time, condition, mode);
        self.progress.tick();
        made
    }

    fn process(&self) -> &ForwardProcess {
        self.network.process()
    }

    fn parameters(&self) -> &Parameters {
        self.network.parameters()
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
