//! The state of a run: everything that an iteration changes, and all that a checkpoint holds.

use potstill_models::{Denoiser, Entry};
use tch::Tensor;

use crate::{
    adam::{Adam, AdamSettings},
    ema,
    gradient::Gradient,
    loss_scale::LossScales,
};

/// Generator, its average, fake score, both Adam moments, loss scales. Flat fp32 vectors; nothing else has to be saved or
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
    /// Factors of both losses; 1 unless the run computes in fp16.
    pub loss_scales: LossScales,
    loss_scales_layout: [Entry; 1],
}

/// Name of the averaged generator among the [parts](State::parts).
pub const GENERATOR_EMA: &str = "generator_ema";

/// One of the state's vectors.
pub struct Part<'a> {
    /// Stable name: part of the checkpoint format.
    pub name: &'static str,
    /// Names and shapes of its elements.
    pub entries: &'a [Entry],
    /// The elements, fp32, flat.
    pub flat: &'a Tensor,
}

impl State {
    /// The state before the first iteration: three copies of the teacher.
    #[must_use]
    pub fn from_teacher(teacher: &dyn Denoiser) -> Self {
        Self::starting_from(teacher, teacher, LossScales::new(false, teacher.parameters().flat().device()))
    }

    /// The state before the first iteration: the fake score is a copy of the teacher, the generator and its average are
    /// copies of `generator`, which has the same parameters.
    #[must_use]
    pub fn starting_from(teacher: &dyn Denoiser, generator: &dyn Denoiser, loss_scales: LossScales) -> Self {
        let fake_score = teacher.duplicate();
        let generator_ema = generator.duplicate().frozen();
        let generator = generator.duplicate();
        Self {
            generator_adam: Adam::new(generator.parameters().flat()),
            fake_score_adam: Adam::new(fake_score.parameters().flat()),
            generator_ema,
            generator,
            fake_score,
            loss_scales,
            loss_scales_layout: [Entry { name: "scale_and_steps".to_owned(), shape: vec![2, 2], offset: 0 }],
        }
    }

    /// Every vector, in a fixed order.
    #[must_use]
    pub fn parts(&self) -> [Part<'_>; 8] {
        let part = |name, entries, flat| Part { name, entries, flat };
        let [g, ema, f] = [&self.generator, &self.generator_ema, &self.fake_score].map(|n| n.parameters());
        let (generator, fake_score) = (g.entries(), f.entries());
        [
            part("generator", generator, g.flat()),
            part(GENERATOR_EMA, generator, ema.flat()),
            part("fake_score", fake_score, f.flat()),
            part("generator_adam.exp_avg", generator, &self.generator_adam.exp_avg),
            part("generator_adam.exp_avg_sq", generator, &self.generator_adam.exp_avg_sq),
            part("fake_score_adam.exp_avg", fake_score, &self.fake_score_adam.exp_avg),
            part("fake_score_adam.exp_avg_sq", fake_score, &self.fake_score_adam.exp_avg_sq),
            part("loss_scales", &self.loss_scales_layout, self.loss_scales.values()),
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
