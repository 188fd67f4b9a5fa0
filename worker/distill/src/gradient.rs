//! Repair and clipping of a reduced gradient before the optimizer's step. Where each rank has slices of it, values of the
//! whole are sums over the slices.

use tch::{Kind, Tensor};

/// Optional bounds of a gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Clip {
    /// Elements are limited to ± this.
    pub value: Option<f64>,
    /// A gradient with a larger L2 norm is scaled down to this one.
    pub norm: Option<f64>,
}

/// L2 norm. The sum of squares of an fp32 vector may overflow although each element is finite: then it is summed in fp64.
fn norm_of(flat: &Tensor) -> f64 {
    let norm = flat.norm().double_value(&[]);
    if norm.is_infinite() { flat.norm_scalaropt_dtype(2, Kind::Double).double_value(&[]) } else { norm }
}

/// Sums over the elements of a gradient. Those of the whole are the sums of its slices'.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sums {
    /// Of squares, after the repair and before clipping.
    pub squares: f64,
    /// Elements that were NaN or infinite and became 0.
    pub non_finite: f64,
    /// Of squares, after the elements were clipped.
    pub clipped_squares: f64,
}

impl Sums {
    /// L2 norm after the repair and before clipping.
    #[must_use]
    pub fn norm(&self) -> f64 {
        self.squares.sqrt()
    }
}

/// A network's gradient, made finite: the whole, or the slices of it that this rank holds.
pub struct Gradient {
    /// fp32, in the order of the network's flat parameters. This rank's own slice comes first; the others are copies of
    /// other ranks'.
    pub slices: Vec<Tensor>,
    sums: Sums,
}

impl Gradient {
    /// Takes a flat gradient, replaces non-finite elements by 0, and counts them.
    ///
    /// The official SiD code replaces NaN by 0 and ±∞ by ±1e5 (`nan_to_num`), counts nothing, and lets Adam step with
    /// the result. Here an infinite element, whose size is unknown, contributes nothing.
    #[must_use]
    pub fn repaired(mut slices: Vec<Tensor>) -> Self {
        let mut sums = Sums::default();
        for (index, flat) in slices.iter_mut().enumerate() {
            let mut norm = norm_of(flat);
            let mut non_finite = 0;
            if !norm.is_finite() {
                let finite = flat.isfinite();
                non_finite = flat.numel() as i64 - finite.sum(Kind::Int64).int64_value(&[]);
                let _ = flat.nan_to_num_(0.0, 0.0, 0.0);
                norm = norm_of(flat);
            }
            if index == 0 {
                let squares = norm * norm;
                sums = Sums { squares, non_finite: non_finite as f64, clipped_squares: squares };
            }
        }
        Self { slices, sums }
    }

    /// The sums over this rank's own slice.
    #[must_use]
    pub fn sums(&self) -> Sums {
        self.sums
    }

    /// Clips the elements, which changes the sums.
    #[must_use]
    pub fn clipped_by_value(mut self, clip: Clip) -> Self {
        let Some(value) = clip.value else { return self };
        for flat in &mut self.slices {
            let _ = flat.clamp_(-value, value);
        }
        if let Some(own) = self.slices.first() {
            let norm = norm_of(own);
            self.sums.clipped_squares = norm * norm;
        }
        self
    }

    /// Clips the norm, after the elements. `whole` are the sums over all slices.
    #[must_use]
    pub fn clipped_by_norm(mut self, clip: Clip, whole: Sums) -> Self {
        let norm = whole.clipped_squares.sqrt();
        if let Some(greatest) = clip.norm
            && norm > greatest
        {
            for flat in &mut self.slices {
                let _ = flat.g_mul_scalar_(greatest / norm);
            }
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
            let gradient = Gradient::repaired(vec![Tensor::from_slice(&[3.0f32, -4.0])]);
            let gradient = gradient.clipped_by_value(Clip { value, norm });
            let sums = gradient.sums();
            assert_eq!(sums.norm(), 5.0, "what is reported is the norm before");
            Vec::<f32>::try_from(&gradient.clipped_by_norm(Clip { value, norm }, sums).slices[0]).unwrap()
        };
        assert_eq!(clipped(None, None), [3.0, -4.0]);
        assert_eq!(clipped(None, Some(10.0)), [3.0, -4.0]);
        assert_eq!(clipped(None, Some(2.5)), [1.5, -2.0]);
        assert_eq!(clipped(Some(3.5), None), [3.0, -3.5]);
        assert_eq!(clipped(Some(4.0), Some(2.5)), [1.5, -2.0]);
    }

    #[test]
    fn a_norm_beyond_fp32_is_a_norm_all_the_same() {
        let gradient = Gradient::repaired(vec![Tensor::from_slice(&[3e30f32, -4e30])]);
        let sums = gradient.sums();
        assert!((sums.norm() / 5e30 - 1.0).abs() < 1e-6 && sums.non_finite == 0.0, "{sums:?}");
        let clipped = gradient.clipped_by_norm(Clip { value: None, norm: Some(2.5) }, sums);
        let [a, b] = <[f32; 2]>::try_from(Vec::<f32>::try_from(&clipped.slices[0]).unwrap()).unwrap();
        assert!((a - 1.5).abs() < 1e-5 && (b + 2.0).abs() < 1e-5, "{a} {b}");
    }

    #[test]
    fn what_is_not_finite_becomes_zero_and_is_counted() {
        let g = Gradient::repaired(vec![Tensor::from_slice(&[3.0f32, f32::NAN, 4.0, f32::NEG_INFINITY])]);
        assert_eq!(g.sums(), Sums { squares: 25.0, non_finite: 2.0, clipped_squares: 25.0 });
        assert_eq!(Vec::<f32>::try_from(&g.slices[0]).unwrap(), [3.0, 0.0, 4.0, 0.0]);
        let g = Gradient::repaired(vec![Tensor::from_slice(&[3.0f32, 4.0])]);
        assert_eq!((g.sums().norm(), g.sums().non_finite), (5.0, 0.0));
    }

    #[test]
    fn a_copied_slice_is_treated_like_its_owners() {
        let [a, b] = [[3.0f32, f32::INFINITY], [0.5, -4.0]];
        let clip = Clip { value: Some(2.0), norm: Some(1.0) };
        let of = |own: [f32; 2], copy: [f32; 2]| {
            let slices = vec![Tensor::from_slice(&own), Tensor::from_slice(&copy)];
            Gradient::repaired(slices).clipped_by_value(clip)
        };
        let (first, second) = (of(a, b), of(b, a));
        let (x, y) = (first.sums(), second.sums());
        let whole = Sums {
            squares: x.squares + y.squares,
            non_finite: x.non_finite + y.non_finite,
            clipped_squares: x.clipped_squares + y.clipped_squares,
        };
        assert!(
            (whole.squares - 25.25).abs() < 1e-5 && (whole.clipped_squares - 8.25).abs() < 1e-5,
            "{whole:?}"
        );
        assert_eq!(whole.non_finite, 1.0);
        let (first, second) = (first.clipped_by_norm(clip, whole), second.clipped_by_norm(clip, whole));
        assert_eq!(first.slices[0], second.slices[1]);
        assert_eq!(first.slices[1], second.slices[0]);
    }
}
