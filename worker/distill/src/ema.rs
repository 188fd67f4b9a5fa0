//! G_ema, the exponential moving average of the generator: the network that is exported.

use tch::{Tensor, no_grad};

use crate::host;

/// β of this iteration's update `ema ← β·ema + (1−β)·θ` (EDM's training loop, 2206.00364): β = 0.5^(batch/h) with
/// h = min(half-life, 5 % of the images seen before), so that a young average forgets its untrained start.
///
/// All in images.
#[must_use]
pub fn beta(half_life: f64, images_seen: f64, batch: f64) -> f64 {
    let half_life = half_life.min(0.05 * images_seen).max(1e-8);
    0.5f64.powf(batch / half_life)
}

/// The update, in place on `average`; both are flat parameter vectors. The parameters may be on a GPU and the average on the host.
pub fn update(average: &Tensor, parameters: &Tensor, beta: f64) {
    no_grad(|| match average.device() == parameters.device() {
        true => {
            let _ = average.shallow_clone().lerp_(parameters, 1.0 - beta);
        }
        false => host::for_each_piece(parameters, host::PIECE, |range, piece| {
            let _ = host::part(average, &range).lerp_(piece, 1.0 - beta);
        }),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_weight_is_gone_after_a_half_life() {
        let (batch, half_life) = (10.0, 1000.0);
        let kept: f64 = (0..100).map(|_| beta(half_life, 1e9, batch)).product();
        assert!((kept - 0.5).abs() < 1e-9);
        assert_eq!(beta(half_life, 0.0, batch), 0.0, "the first update copies the parameters");
        assert!(beta(half_life, 2000.0, batch) < beta(half_life, 1e9, batch));
    }
}
