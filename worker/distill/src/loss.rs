//! The two losses of SiD, as plain functions of tensors. Both return one number per sample, summed over its elements;
//! dividing by the batch is the caller's, since only it knows the global batch.

use tch::{Kind, Tensor};

/// Sums over everything but the batch: [N, …] → `[N]`.
fn sum_elements(x: &Tensor) -> Tensor {
    x.flatten(1, -1).sum_dim_intlist([1i64].as_slice(), false, Kind::Float)
}

/// EDM's weighted denoising loss (2206.00364, table 1): `(σ² + σ_d²)/(σ·σ_d)² · |D(x + σn, σ) − x|²`, per sample.
///
/// Trains the fake score on generated images, and a teacher on real ones. `denoised` and `clean` are [N, C, H, W],
/// `sigma` is `[N]`.
pub fn denoising(denoised: &Tensor, clean: &Tensor, sigma: &Tensor, sigma_data: f64) -> Tensor {
    let weight = (sigma.square() + sigma_data * sigma_data) / (sigma * sigma_data).square();
    sum_elements(&(denoised - clean).square()) * weight
}

/// The generator's score identity loss (2404.04057, eq. 23) per sample: with δ = f_φ − f_ψ,
/// `ω · δ · [(f_φ − x_g) − α·δ]`, where ω = 1 / max(mean|x_g − f_φ|, 1e-5) takes no gradient.
///
/// All three tensors are [N, C, H, W]; gradients flow through each of them into the generator.
pub fn score_identity(generated: &Tensor, teacher: &Tensor, fake_score: &Tensor, alpha: f64) -> Tensor {
    let weight = tch::no_grad(|| {
        (generated - teacher)
            .abs()
            .flatten(1, -1)
            .mean_dim([1i64].as_slice(), false, Kind::Float)
            .clamp_min(1e-5)
            .reciprocal()
    });
    let difference = teacher - fake_score;
    // The bracket, with fewer operations where terms cancel.
    let residual =
        if alpha == 1.0 { fake_score - generated } else { teacher - generated - &difference * alpha };
    sum_elements(&(difference * residual)) * weight
}
