//! EDM preconditioning (2206.00364, table 1): makes a denoiser D of a raw network F.

use tch::Tensor;

/// D(x, σ) = c_skip·x + c_out·F(c_in·x, c_noise). Each coefficient but `noise` is [N, 1, 1, 1].
pub(crate) struct Coefficients {
    skip: Tensor,
    out: Tensor,
    input: Tensor,
    /// ln(σ)/4, `[N]`.
    pub noise: Tensor,
}

impl Coefficients {
    /// `sigma` is fp32 `[N]`.
    pub fn new(sigma: &Tensor, sigma_data: f64) -> Self {
        let column = sigma.view([-1, 1, 1, 1]);
        let variance = column.square() + sigma_data * sigma_data;
        let input = variance.rsqrt();
        Self {
            skip: variance.reciprocal() * (sigma_data * sigma_data),
            out: &column * &input * sigma_data,
            input,
            noise: sigma.log() / 4.0,
        }
    }

    pub fn network_input(&self, x: &Tensor) -> Tensor {
        x * &self.input
    }

    pub fn denoised(&self, x: &Tensor, network_output: &Tensor) -> Tensor {
        (x * &self.skip).addcmul(&self.out, network_output)
    }
}
