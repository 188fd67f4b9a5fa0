//! What happens to a reduced gradient before the optimiser sees it.

use tch::Tensor;

/// Optional bounds of a gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Clip {
    /// Elements are kept within ± this.
    pub value: Option<f64>,
    /// A longer gradient is scaled down to this L2 norm.
    pub norm: Option<f64>,
}

/// A network's gradient as one flat vector, made finite.
pub struct Gradient {
    /// fp32, in the order of the network's flat parameters.
    pub flat: Tensor,
    /// L2 norm after the repair and before clipping.
    pub norm: f64,
    /// Elements that were NaN or infinite and became 0.
    pub non_finite: u64,
}

impl Gradient {
    /// Takes a flat gradient and replaces what is not finite by 0, as the official SiD code does, but counts it.
    ///
    /// Every rank holds the same reduced gradient, so every rank comes to the same numbers.
    #[must_use]
    pub fn repaired(mut flat: Tensor) -> Self {
        let norm = flat.norm().double_value(&[]);
        if norm.is_finite() {
            return Self { flat, norm, non_finite: 0 };
        }
        // The norm may overflow although each element is finite; then nothing is replaced.
        let finite = flat.isfinite();
        let non_finite = flat.numel() as i64 - finite.sum(tch::Kind::Int64).int64_value(&[]);
        let _ = flat.nan_to_num_(0.0, 0.0, 0.0);
        let norm = flat.norm().double_value(&[]);
        Self { flat, norm, non_finite: non_finite as u64 }
    }

    /// Bounds it: by value first, then by norm.
    #[must_use]
    pub fn clipped(mut self, clip: Clip) -> Self {
        let mut norm = self.norm;
        if let Some(value) = clip.value {
            let _ = self.flat.clamp_(-value, value);
            norm = self.flat.norm().double_value(&[]);
        }
        if let Some(greatest) = clip.norm
            && norm > greatest
        {
            let _ = self.flat.g_mul_scalar_(greatest / norm);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipping_bounds_values_and_length() {
        let clipped = |value, norm| {
            let gradient = Gradient::repaired(Tensor::from_slice(&[3.0f32, -4.0]));
            let gradient = gradient.clipped(Clip { value, norm });
            assert_eq!(gradient.norm, 5.0, "what is reported is the norm before");
            Vec::<f32>::try_from(gradient.flat).unwrap()
        };
        assert_eq!(clipped(None, None), [3.0, -4.0]);
        assert_eq!(clipped(None, Some(10.0)), [3.0, -4.0]);
        assert_eq!(clipped(None, Some(2.5)), [1.5, -2.0]);
        assert_eq!(clipped(Some(3.5), None), [3.0, -3.5]);
        assert_eq!(clipped(Some(4.0), Some(2.5)), [1.5, -2.0]);
    }

    #[test]
    fn what_is_not_finite_becomes_zero_and_is_counted() {
        let g = Gradient::repaired(Tensor::from_slice(&[3.0f32, f32::NAN, 4.0, f32::NEG_INFINITY]));
        assert_eq!(g.non_finite, 2);
        assert_eq!(g.norm, 5.0);
        assert_eq!(Vec::<f32>::try_from(g.flat).unwrap(), [3.0, 0.0, 4.0, 0.0]);
        let g = Gradient::repaired(Tensor::from_slice(&[3.0f32, 4.0]));
        assert_eq!((g.norm, g.non_finite), (5.0, 0));
    }
}
