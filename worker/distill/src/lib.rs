//! Score identity Distillation itself: what is computed in an iteration, and how good its result is.
//!
//! This crate sees networks only as [`Denoiser`](potstill_models::Denoiser)s and knows nothing of a cluster: a caller
//! asks for the loss of one micro-batch, back-propagates and reduces as it likes, and hands the gradient to [`adam`].
//!
//! - [`random`]: every random number from (seed, iteration, phase, micro-batch), never from the rank.
//! - [`noise_distribution`]: how diffusion times are drawn.
//! - [`condition`]: classes or texts of generated samples.
//! - [`generator`]: the K-step generator, and which of its steps an iteration trains.
//! - [`guidance`]: predictions between and beyond conditional and unconditional.
//! - [`loss`]: the two losses, as plain functions of tensors.
//! - [`adversarial`]: the third one, with real samples.
//! - [`augmentation`]: EDM's, of what the fake score sees.
//! - [`schedule`]: when the generator and its adversarial term start.
//! - [`settings`]: what decides a micro-batch besides the networks.
//! - [`draws`]: the random numbers of a micro-batch, as data.
//! - [`phase`]: one micro-batch of either phase, networks and losses put together.
//! - [`state`]: what a checkpoint holds: generator, its average, fake score, their Adam moments, and [`counters`].
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
pub mod loss;
pub mod metrics;
pub mod noise_distribution;
pub mod phase;
pub mod random;
pub mod schedule;
pub mod settings;
pub mod state;
