//! Score identity Distillation: the computations of an iteration, and the metrics of its result.
//!
//! This crate uses networks only as [`Denoiser`](potstill_models::Denoiser)s and does not depend on a cluster: a caller
//! asks for the loss of one micro-batch, back-propagates, reduces, and passes the gradient to [`adam`].
//!
//! - [`random`]: every random number from (seed, iteration, phase, micro-batch), never from the rank.
//! - [`noise_distribution`]: the distributions of diffusion times.
//! - [`condition`]: classes or texts of generated samples.
//! - [`generator`]: the K-step generator, and which of its steps an iteration trains.
//! - [`guidance`]: predictions from a conditional and an unconditional one.
//! - [`loss`]: the two losses, as plain functions of tensors.
//! - [`adversarial`]: the adversarial loss, with real samples.
//! - [`augmentation`]: EDM's, for the fake score's samples.
//! - [`schedule`]: when the generator and its adversarial term start.
//! - [`settings`]: everything that decides a micro-batch besides the networks.
//! - [`draws`]: the random numbers of a micro-batch, as values.
//! - [`phase`]: one micro-batch of either phase: networks and losses together.
//! - [`state`]: the content of a checkpoint: generator, its average, fake score, their Adam moments, and [`counters`].
//! - [`adam`], [`ema`], [`gradient`]: the optimizer step.
//! - [`metrics`]: FID, precision, recall, agreement, CLIP score.

pub mod adam;
pub mod adversarial;
pub mod augmentation;
pub mod condition;
pub mod counters;
pub mod draws;
pub mod ema;
pub mod generator;
pub mod gradient;
pub mod guidance;
mod host;
pub mod loss;
pub mod metrics;
pub mod noise_distribution;
pub mod phase;
pub mod random;
pub mod schedule;
pub mod settings;
pub mod state;
