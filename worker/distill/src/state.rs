//! The state of a run: everything that an iteration changes, and all that a checkpoint holds.

use potstill_models::Denoiser;
use tch::Tensor;

use crate::{
    adam::{Adam, AdamSettings},
    ema,
    gradient::Gradient,
};

/// Generator, its average, fake score, and both Adam moments. Seven flat fp32 vectors; nothing else has to be saved or
/// sent, since all randomness is named by the iteration.
pub struct State {
    /// G_θ.
    pub generator: Box<dyn Denoiser>,
    /// G_ema; takes no gradient.
    pub generator_ema: Box<dyn Denoiser>,
    /// f_ψ.
    pub fake_score: Box<dyn Denoiser>,
    /// Moments of G_θ.
    pub generator_adam: Adam,
    /// Moments of f_ψ.
    pub fake_score_adam: Adam,
}

/// One of the state's vectors.
pub struct Part<'a> {
    /// Stable name: part of the checkpoint format.
    pub name: &'static str,
    /// The network whose layout gives its elements their names and shapes.
    pub network: &'a dyn Denoiser,
    /// The elements, fp32, flat.
    pub flat: &'a Tensor,
}

impl State {
    /// The state before the first iteration: three copies of the teacher.
    #[must_use]
    pub fn from_teacher(teacher: &dyn Denoiser) -> Self {
        let (generator, fake_score) = (teacher.duplicate(), teacher.duplicate());
        Self {
            generator_adam: Adam::new(generator.parameters().flat()),
            fake_score_adam: Adam::new(fake_score.parameters().flat()),
            generator_ema: teacher.duplicate().frozen(),
            generator,
            fake_score,
        }
    }

    /// Every vector, in a fixed order.
    #[must_use]
    pub fn parts(&self) -> [Part<'_>; 7] {
        let part = |name, network, flat| Part { name, network, flat };
        let (generator, fake_score) = (self.generator.as_ref(), self.fake_score.as_ref());
        let ema = self.generator_ema.as_ref();
        [
            part("generator", generator, generator.parameters().flat()),
            part("generator_ema", ema, ema.parameters().flat()),
            part("fake_score", fake_score, fake_score.parameters().flat()),
            part("generator_adam.exp_avg", generator, &self.generator_adam.exp_avg),
            part("generator_adam.exp_avg_sq", generator, &self.generator_adam.exp_avg_sq),
            part("fake_score_adam.exp_avg", fake_score, &self.fake_score_adam.exp_avg),
            part("fake_score_adam.exp_avg_sq", fake_score, &self.fake_score_adam.exp_avg_sq),
        ]
    }

    /// The fake score's step; `iteration` counts from 0.
    pub fn step_fake_score(&mut self, gradient: &Gradient, iteration: u64, settings: &AdamSettings) {
        let parameters = self.fake_score.parameters().flat();
        self.fake_score_adam.step(parameters, &gradient.flat, iteration + 1, settings);
    }

    /// The generator's step and its average's; `iteration` counts from 0.
    pub fn step_generator(
        &mut self,
        gradient: &Gradient,
        iteration: u64,
        settings: &AdamSettings,
        ema_half_life_images: f64,
        global_batch: u32,
    ) {
        let parameters = self.generator.parameters().flat();
        self.generator_adam.step(parameters, &gradient.flat, iteration + 1, settings);
        let batch = f64::from(global_batch);
        let beta = ema::beta(ema_half_life_images, iteration as f64 * batch, batch);
        ema::update(self.generator_ema.parameters().flat(), parameters, beta);
    }
}
