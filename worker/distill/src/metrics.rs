//! Metrics of samples: FID, precision and recall on features, agreement on logits, CLIP score on embeddings
//! (docs/algorithm.md §8).

use tch::{Kind, Tensor};

/// Mean and covariance of a feature distribution, fp64.
pub struct Moments {
    mean: Tensor,
    covariance: Tensor,
}

impl Moments {
    /// Moments of `features` [N, D], N ≥ 2; the covariance is the unbiased one.
    #[must_use]
    pub fn of(features: &Tensor) -> Self {
        let x = features.to_kind(Kind::Double);
        let mean = x.mean_dim([0i64].as_slice(), false, Kind::Double);
        let centred = x - &mean;
        let covariance = centred.transpose(0, 1).matmul(&centred) / (centred.size()[0] - 1) as f64;
        Self { mean, covariance }
    }

    /// Given moments, fp64: `mean` `[D]`, `covariance` [D, D], symmetric.
    #[must_use]
    pub fn given(mean: Tensor, covariance: Tensor) -> Self {
        Self { mean, covariance }
    }

    /// Fréchet distance to `other` (1706.08500, eq. 6): |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½).
    ///
    /// The trace of the square root is computed from the symmetric product Σ₁^½ Σ₂ Σ₁^½, which has the same eigenvalues
    /// as Σ₁Σ₂ and, unlike it, real non-negative ones up to rounding.
    #[must_use]
    pub fn frechet_distance(&self, other: &Self) -> f64 {
        let (values, vectors) = self.covariance.linalg_eigh("L");
        let root = (&vectors * values.clamp_min(0.0).sqrt()).matmul(&vectors.transpose(0, 1));
        let product = root.matmul(&other.covariance).matmul(&root);
        let trace_of_root = product.linalg_eigvalsh("L").clamp_min(0.0).sqrt().sum(Kind::Double);
        let trace = (&self.covariance + &other.covariance).trace() - trace_of_root * 2.0;
        let distance = (&self.mean - &other.mean).square().sum(Kind::Double) + trace;
        distance.double_value(&[]).max(0.0)
    }
}

/// Improved precision and recall (1904.06991): the share of generated samples inside the k-nearest-neighbor manifold of
/// the real ones, and the reverse. Features are [N, D] and [M, D]; both N and M exceed `k`. `tell` is called often: with tens
/// of thousands of features it takes minutes.
#[must_use]
pub fn precision_recall(real: &Tensor, generated: &Tensor, k: i64, tell: &mut dyn FnMut()) -> (f64, f64) {
    let (real, generated) = (real.to_kind(Kind::Double), generated.to_kind(Kind::Double));
    (covered(&generated, &real, k, tell), covered(&real, &generated, k, tell))
}

/// Rows at a time, which bounds the memory of the distance matrix, and the time between two calls of `tell`.
const ROWS: i64 = 128;

/// Share of `points` that lie in at least one of the balls around `centres`, whose radii reach their k-th nearest
/// neighbor.
fn covered(points: &Tensor, centres: &Tensor, k: i64, tell: &mut dyn FnMut()) -> f64 {
    let radii: Vec<Tensor> = centres
        .split(ROWS, 0)
        .iter()
        .map(|rows| {
            tell();
            // The nearest is the point itself.
            distances(rows, centres).kthvalue(k + 1, 1, false).0
        })
        .collect();
    let radii = Tensor::cat(&radii, 0);
    let inside: i64 = points
        .split(ROWS, 0)
        .iter()
        .map(|rows| {
            tell();
            let inside = distances(rows, centres).le_tensor(&radii).any_dim(1, false);
            inside.sum(Kind::Int64).int64_value(&[])
        })
        .sum();
    inside as f64 / points.size()[0] as f64
}

/// Euclidean distances between all rows of two matrices.
fn distances(a: &Tensor, b: &Tensor) -> Tensor {
    // Without matrix multiplication, which is faster but loses the precision of small distances, which decide here.
    const EXACT: i64 = 2;
    Tensor::cdist(a, b, 2.0, EXACT)
}

/// Share of samples whose largest logit is their own class. `logits` [N, classes], `labels` int64 `[N]`.
#[must_use]
pub fn agreement(logits: &Tensor, labels: &Tensor) -> f64 {
    logits.argmax(1, false).eq_tensor(labels).to_kind(Kind::Double).mean(Kind::Double).double_value(&[])
}

/// CLIPScore (2104.08718, section 3) of each sample, 100·max(cos(image, text), 0), fp64 `[N]`: with the usual factor
/// 100 instead of the paper's 2.5. Embeddings of images and of their prompts are [N, D].
pub fn clip(images: &Tensor, texts: &Tensor) -> Tensor {
    let (images, texts) = (images.to_kind(Kind::Double), texts.to_kind(Kind::Double));
    Tensor::cosine_similarity(&images, &texts, 1, 1e-12).clamp_min(0.0) * 100.0
}

/// Diversity among samples of one condition: the mean Euclidean distance between two of them, over all pairs of each class
/// and then over classes. Sample i of `features` [N, D] is of class i mod `classes`; 0 or 1 classes: all pairs.
///
/// NaN when no class has two samples.
#[must_use]
pub fn diversity(features: &Tensor, classes: i64) -> f64 {
    let x = features.to_kind(Kind::Double);
    let classes = classes.max(1);
    let means: Vec<f64> = (0..classes)
        .filter_map(|class| {
            let members = x.slice(0, class, None, classes);
            let n = members.size()[0];
            // The diagonal is zero in the sum and does not count as a pair.
            (n > 1).then(|| {
                distances(&members, &members).sum(Kind::Double).double_value(&[]) / (n * (n - 1)) as f64
            })
        })
        .collect();
    means.iter().sum::<f64>() / means.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Purpose, Stream};

    fn normal(index: u32, shape: &[i64]) -> Tensor {
        Stream::new(0, 0, Purpose::Evaluation, index, tch::Device::Cpu).normal(shape)
    }

    #[test]
    fn frechet_distance_of_commuting_gaussians_is_the_textbook_one() {
        let moments = |mean: &[f64], variances: &[f64]| Moments {
            mean: Tensor::from_slice(mean),
            covariance: Tensor::from_slice(variances).diag(0),
        };
        let (a, b) = (moments(&[0.0, 1.0], &[1.0, 4.0]), moments(&[2.0, 1.0], &[9.0, 1.0]));
        // |μ|² = 4; (1 − 3)² + (2 − 1)² = 5.
        assert!((a.frechet_distance(&b) - 9.0).abs() < 1e-10);
        assert!(a.frechet_distance(&a) < 1e-10);
    }

    #[test]
    fn frechet_distance_does_not_depend_on_the_basis_or_the_order() {
        let mix = normal(9, &[6, 6]);
        let (a, b) = (normal(1, &[500, 6]).matmul(&mix), normal(2, &[400, 6]) * 1.5 + 0.3);
        let d = |a: &Tensor, b: &Tensor| Moments::of(a).frechet_distance(&Moments::of(b));
        let (q, _) = Tensor::linalg_qr(&normal(3, &[6, 6]), "reduced");
        let forth = d(&a, &b);
        assert!((forth - d(&b, &a)).abs() < 1e-6 * forth);
        assert!((forth - d(&a.matmul(&q), &b.matmul(&q))).abs() < 1e-4 * forth);
    }

    #[test]
    fn precision_and_recall_agree_with_their_definition() {
        let (real, fake) = (normal(4, &[70, 3]), normal(5, &[50, 3]) * 0.5);
        let rows = |t: &Tensor| -> Vec<Vec<f64>> { Vec::try_from(t.to_kind(Kind::Double)).unwrap() };
        let distance =
            |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| (x - y).powi(2)).sum::<f64>().sqrt();
        let share = |points: &[Vec<f64>], centres: &[Vec<f64>], k: usize| {
            let radius = |c: &Vec<f64>| {
                let mut all: Vec<f64> = centres.iter().map(|o| distance(c, o)).collect();
                all.sort_by(f64::total_cmp);
                all[k]
            };
            let radii: Vec<f64> = centres.iter().map(radius).collect();
            let inside = |p: &Vec<f64>| centres.iter().zip(&radii).any(|(c, r)| distance(p, c) <= *r);
            points.iter().filter(|p| inside(p)).count() as f64 / points.len() as f64
        };
        let (r, f) = (rows(&real), rows(&fake));
        for k in [1, 3, 5] {
            let (precision, recall) = precision_recall(&real, &fake, k, &mut || {});
            assert!((precision - share(&f, &r, k as usize)).abs() < 1e-12);
            assert!((recall - share(&r, &f, k as usize)).abs() < 1e-12);
        }
    }

    #[test]
    fn diversity_is_the_mean_distance_within_a_class() {
        // Classes alternate; the first lies at 0, 2, 4, the second at 10 and 13.
        let features = Tensor::from_slice(&[0.0f32, 10.0, 2.0, 13.0, 4.0]).reshape([5, 1]);
        let first = (2.0 + 4.0 + 2.0) / 3.0;
        assert!((diversity(&features, 2) - f64::midpoint(first, 3.0)).abs() < 1e-9);
        let all = diversity(&features.slice(0, 0, 2, 1), 0);
        assert!((all - 10.0).abs() < 1e-9);
        assert!(diversity(&features, 5).is_nan(), "no class has a pair");
    }

    #[test]
    fn the_clip_score_is_the_cosine_in_percent_and_never_negative() {
        let (images, texts) = (normal(6, &[40, 5]), normal(7, &[40, 5]) * 3.0);
        let rows = |t: &Tensor| -> Vec<Vec<f64>> { Vec::try_from(t.to_kind(Kind::Double)).unwrap() };
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        let found = Vec::<f64>::try_from(clip(&images, &texts)).unwrap();
        assert!(found.contains(&0.0) && found.iter().any(|x| *x > 10.0), "{found:?}");
        for ((image, text), found) in rows(&images).iter().zip(&rows(&texts)).zip(found) {
            let cosine = dot(image, text) / (dot(image, image) * dot(text, text)).sqrt();
            assert!((found - 100.0 * cosine.max(0.0)).abs() < 1e-9, "{found} {cosine}");
        }
    }

    #[test]
    fn agreement_counts_matching_classes() {
        let logits = Tensor::from_slice(&[1.0f32, 0.0, 0.0, 1.0, 0.3, 0.2]).reshape([3, 2]);
        assert!((agreement(&logits, &Tensor::from_slice(&[0i64, 1, 1])) - 2.0 / 3.0).abs() < 1e-12);
    }
}
