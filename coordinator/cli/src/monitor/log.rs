//! The structured log: one line for each observation.

use potstill_core::observation::{Observation, Outcome};
use potstill_proto::message::Source;
use tracing::{debug, error, info, warn};

/// Writes one log line about `observation`, with its reason. Iterations are logged at `debug`: the progress shows them.
pub fn observation(observation: &Observation) {
    match observation {
        Observation::Started { address, resumed, .. } => info!(%address, resumed, "coordinator started"),
        Observation::Waiting { have, need, reason } => info!(have, need, %reason, "waiting for workers"),
        Observation::Attached { worker } => info!(%worker, "worker attached"),
        Observation::Lost { worker, reason } => warn!(%worker, %reason, "worker lost"),
        Observation::GenerationOpened { generation, world_size, source, repeated, reason } => {
            let source = match source {
                Source::Fresh => "the teacher".to_owned(),
                Source::Checkpoint { manifest_key } => manifest_key.clone(),
                Source::Peer { rank } => format!("rank {rank}"),
            };
            info!(generation = generation.0, world_size, state_from = %source, repeated, %reason, "generation opened");
        }
        Observation::GenerationAbandoned { generation, reason } => {
            warn!(generation = generation.0, %reason, "generation abandoned");
        }
        Observation::Straggler { worker, straggles: true, seconds, median } => warn!(
            %worker, seconds, median,
            "the others wait for this rank: it computes {:.1} times as long for a micro-batch as the median",
            seconds / median
        ),
        Observation::Straggler { worker, straggles: false, seconds, median } => {
            info!(%worker, seconds, median, "this rank keeps up again");
        }
        Observation::Iteration(t) if t.samples > 0 && t.non_finite_samples >= t.samples => {
            warn!(iteration = t.iteration, "no sample of a phase was finite, so that it has changed nothing");
        }
        Observation::Iteration(t) => debug!(
            iteration = t.iteration,
            world_size = t.world_size,
            fake_score_loss = t.fake_score_loss,
            generator_loss = t.generator_loss,
            seconds = t.seconds.total,
            compute = t.seconds.compute,
            communication = t.seconds.communication,
            optimizer = t.seconds.optimizer,
            memory_peak_bytes = t.memory_peak,
            "iteration"
        ),
        Observation::Evaluated(evaluation) => {
            let scores = evaluation.scores;
            let rounded = |number: Option<f64>| number.map(|number| (number * 1000.0).round() / 1000.0);
            info!(
                iteration = evaluation.iteration,
                fid = rounded(scores.fid),
                agreement = rounded(scores.agreement),
                recall = rounded(scores.recall),
                diversity = rounded(scores.diversity),
                clip_score = rounded(scores.clip_score),
                "{} evaluated",
                evaluation.subject
            );
        }
        Observation::Committed { iteration, bytes } => {
            info!(iteration, bytes, reason = %"the shards of all ranks are written", "checkpoint committed");
        }
        Observation::CheckpointFailed { iteration, reason } => {
            warn!(iteration, %reason, "checkpoint failed; training continues");
        }
        Observation::Ended(Outcome::Succeeded { iteration }) => {
            info!(iteration, reason = %"all iterations are done and saved", "run succeeded");
        }
        Observation::Ended(Outcome::Stopped { iteration, reason }) => {
            info!(iteration, %reason, "run stopped");
        }
        Observation::Ended(Outcome::Failed { reason }) => error!(%reason, "run failed"),
    }
}
