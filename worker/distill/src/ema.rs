//! G_ema, the exponential moving average of the generator: the network that is exported.

use tch::{Device, Kind, Tensor, no_grad};

/// β of this iteration's update `ema ← β·ema + (1−β)·θ` (EDM's training loop, 2206.00364): β = 0.5^(batch/h) with
/// h = min(half-life, 5 % of the images seen before), so that a young average forgets its untrained start.
///
/// All in images.
#[must_use]
pub fn beta(half_life: f64, images_seen: f64, batch: f64) -> f64 {
    let half_life = half_life.min(0.05 * images_seen).max(1e-8);
    0.5f64.powf(batch / half_life)
}

/// Elements of the parameters that are on the host at a time, if the average is there and they are not: 64 MiB.
const PIECE: i64 = 1 << 24;

/// The update, in place on `average`; both are flat parameter vectors. The parameters may be on a GPU and the average on the host.
pub fn update(average: &Tensor, parameters: &Tensor, beta: f64) {
    no_grad(|| match (average.device(), parameters.device()) {
        (Device::Cpu, gpu @ Device::Cuda(_)) => {
            // Page-locked memory is copied to several times as fast as other memory.
            let piece = |elements: i64| Tensor::empty([elements], (Kind::Float, Device::Cpu)).pin_memory(gpu);
            in_pieces(average, parameters, beta, &piece(PIECE.min(parameters.numel() as i64)));
        }
        _ => {
            let _ = average.shallow_clone().lerp_(parameters, 1.0 - beta);
        }
    });
}

/// The update of a piece after the other, by way of `piece`, which is as large as a piece and in the memory of the average.
fn in_pieces(average: &Tensor, parameters: &Tensor, beta: f64, piece: &Tensor) {
    let (count, most) = (average.numel() as i64, piece.numel() as i64);
    let mut start = 0;
    while start < count {
        let length = most.min(count - start);
        let mut piece = piece.narrow(0, 0, length);
        piece.copy_(&parameters.narrow(0, start, length));
        let _ = average.narrow(0, start, length).lerp_(&piece, 1.0 - beta);
        start += length;
    }
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

    #[test]
    fn pieces_are_updated_as_the_whole_is() {
        let (start, parameters) =
            (Tensor::arange(10, (Kind::Float, Device::Cpu)), Tensor::from_slice(&[0.3f32; 10]));
        let (whole, pieces) = (start.copy(), start.copy());
        update(&whole, &parameters, 0.9);
        in_pieces(&pieces, &parameters, 0.9, &Tensor::zeros([4], (Kind::Float, Device::Cpu)));
        assert!(whole.equal(&pieces) && !whole.equal(&start));
    }
}
