//! Repair and clipping of a reduced gradient before the optimizer's step. Where each rank has a slice of it, values of
//! the whole are summed over the slices by `sum`.

use std::convert::Infallible;

use tch::{Kind, Tensor};

/// Optional bounds of a gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Clip {
    /// Elements are limited to ± this.
    pub value: Option<f64>,
    /// A gradient with a larger L2 norm is scaled down to this one.
    pub norm: Option<f64>,
}

/// Sums numbers over all slices of a gradient.
pub trait Sum<E>: FnMut([f64; 2]) -> Result<[f64; 2], E> {}

impl<E, F: FnMut([f64; 2]) -> Result<[f64; 2], E>> Sum<E> for F {}

/// The sum where there is one slice.
fn own(numbers: [f64; 2]) -> Result<[f64; 2], Infallible> {
    Ok(numbers)
}

/// L2 norm. The sum of squares of an fp32 vector may overflow although each element is finite: then it is summed in fp64.
fn norm_of(flat: &Tensor) -> f64 {
    let norm = flat.norm().double_value(&[]);
    if norm.is_infinite() { flat.norm_scalaropt_dtype(2, Kind::Double).double_value(&[]) } else { norm }
}

/// A network's gradient as one flat vector, or this rank's slice of it, made finite.
pub struct Gradient {
    /// fp32, in the order of the network's flat parameters.
    pub flat: Tensor,
    /// L2 norm after the repair and before clipping.
    pub norm: f64,
    /// Elements that were NaN or infinite and became 0.
    pub non_finite: u64,
}

impl Gradient {
    /// Takes a flat gradient, replaces non-finite elements by 0, and counts them.
    ///
    /// The official SiD code replaces NaN by 0 and ±∞ by ±1e5 (`nan_to_num`), counts nothing, and lets Adam step with
    /// the result. Here an infinite element, whose size is unknown, contributes nothing.
    ///
    /// Every rank has the same reduced gradient, or the same sums, so the numbers are the same on every rank.
    #[must_use]
    pub fn repaired(flat: Tensor) -> Self {
        let Ok(gradient) = Self::repaired_slice(flat, own);
        gradient
    }

    /// [`repaired`](Self::repaired) of a slice.
    ///
    /// # Errors
    /// The error of `sum`.
    pub fn repaired_slice<E>(mut flat: Tensor, mut sum: impl Sum<E>) -> Result<Self, E> {
        let mut norm = norm_of(&flat);
        let mut non_finite = 0;
        if !norm.is_finite() {
            let finite = flat.isfinite();
            non_finite = flat.numel() as i64 - finite.sum(Kind::Int64).int64_value(&[]);
            let _ = flat.nan_to_num_(0.0, 0.0, 0.0);
            norm = norm_of(&flat);
        }
        let [squares, non_finite] = sum([norm * norm, non_finite as f64])?;
        Ok(Self { flat, norm: squares.sqrt(), non_finite: non_finite as u64 })
    }

    /// Clips it: by value first, then by norm.
    #[must_use]
    pub fn clipped(self, clip: Clip) -> Self {
        let Ok(gradient) = self.clipped_slice(clip, own);
        gradient
    }

    /// [`clipped`](Self::clipped) of a slice.
    ///
    /// # Errors
    /// The error of `sum`.
    pub fn clipped_slice<E>(mut self, clip: Clip, mut sum: impl Sum<E>) -> Result<Self, E> {
        let mut norm = self.norm;
        if let Some(value) = clip.value {
            let _ = self.flat.clamp_(-value, value);
            let own = norm_of(&self.flat);
            norm = sum([own * own, 0.0])?[0].sqrt();
        }
        if let Some(greatest) = clip.norm
            && norm > greatest
        {
            let _ = self.flat.g_mul_scalar_(greatest / norm);
        }
        Ok(self)
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
    fn a_norm_beyond_fp32_is_a_norm_all_the_same() {
        let gradient = Gradient::repaired(Tensor::from_slice(&[3e30f32, -4e30]));
        assert!((gradient.norm / 5e30 - 1.0).abs() < 1e-6 && gradient.non_finite == 0, "{}", gradient.norm);
        let clipped = gradient.clipped(Clip { value: None, norm: Some(2.5) });
        let [a, b] = <[f32; 2]>::try_from(Vec::<f32>::try_from(clipped.flat).unwrap()).unwrap();
        assert!((a - 1.5).abs() < 1e-5 && (b + 2.0).abs() < 1e-5, "{a} {b}");
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
