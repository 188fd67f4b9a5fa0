//! When the generator and its adversarial term start: thresholds in images, so that a trajectory does not depend on the
//! number of images in an iteration.
//!
//! Images are counted **before** an iteration (iteration·batch), and a threshold is passed when **more** images than it have
//! been seen, as in the official loops of SiDA (2410.14919) and SiD-DiT (2509.25127).

/// The schedule of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// Samples of one iteration, over all ranks.
    pub global_batch: u64,
    /// The generator is frozen until more images than this have been seen; without it the generator is never frozen.
    pub generator_start_images: Option<u64>,
    /// The generator's adversarial term joins when more images than this have been seen; without it, it is present from
    /// the first image. The discriminator learns from the first image in either case.
    pub join_images: Option<u64>,
    /// Iterations, each with one update of the fake score, for each update of the generator: 1 in SiD, 5 in DMD2
    /// (2405.14867).
    pub fake_score_updates: u64,
}

fn passed(threshold: Option<u64>, images: u64) -> bool {
    threshold.is_none_or(|threshold| images > threshold)
}

impl Schedule {
    /// Images that all ranks together have generated per phase before an iteration.
    #[must_use]
    pub fn images_seen(&self, iteration: u64) -> u64 {
        iteration * self.global_batch
    }

    /// Whether the generator steps in an iteration: in the last one of each round of fake-score updates, once it is not frozen.
    #[must_use]
    pub fn trains_generator(&self, iteration: u64) -> bool {
        (iteration + 1).is_multiple_of(self.fake_score_updates)
            && passed(self.generator_start_images, self.images_seen(iteration))
    }

    /// Whether the generator's loss has its adversarial term in an iteration.
    #[must_use]
    pub fn adversarial_term_joined(&self, iteration: u64) -> bool {
        passed(self.join_images, self.images_seen(iteration))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_passed_by_more_images_than_they_say() {
        let schedule = Schedule {
            global_batch: 8,
            generator_start_images: Some(24),
            join_images: Some(56),
            fake_score_updates: 1,
        };
        let first = |holds: fn(&Schedule, u64) -> bool| (0..100).find(|i| holds(&schedule, *i));
        assert_eq!(first(Schedule::trains_generator), Some(4), "32 images are more than 24");
        assert_eq!(first(Schedule::adversarial_term_joined), Some(8));
        let none = Schedule { generator_start_images: None, join_images: None, ..schedule.clone() };
        assert!(none.trains_generator(0) && none.adversarial_term_joined(0));
        let zero = Schedule { generator_start_images: Some(0), ..schedule };
        assert!(!zero.trains_generator(0) && zero.trains_generator(1));
    }

    #[test]
    fn the_generator_waits_for_its_round_of_updates() {
        let schedule = Schedule {
            global_batch: 1,
            generator_start_images: None,
            join_images: None,
            fake_score_updates: 5,
        };
        let steps: Vec<u64> = (0..15).filter(|i| schedule.trains_generator(*i)).collect();
        assert_eq!(steps, [4, 9, 14]);
    }
}
