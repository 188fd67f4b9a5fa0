//! CPU time of a forward and backward pass of a SongUNet, one thread, fp32.
//!
//! `cargo run -p potstill-models --example pass_time -- [batch] [model_channels]`

#![allow(clippy::unwrap_used, reason = "an example may panic")]

use potstill_models::{Condition, Denoiser, EdmConfig, EdmNetwork, Mode};
use tch::{Device, Kind, Tensor};

/// CPU time of this thread, which other processes affect less than wall time. Linux only.
fn cpu_ms() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1e6
}

const PASSES: u32 = 200;

fn main() {
    let mut arguments = std::env::args().skip(1).map(|a| a.parse::<i64>().unwrap());
    let (batch, channels) = (arguments.next().unwrap_or(64), arguments.next().unwrap_or(24));
    let config = EdmConfig {
        img_resolution: 8,
        img_channels: 1,
        label_dim: 10,
        model_channels: channels,
        channel_mult: vec![1, 2],
        num_blocks: 1,
        attn_resolutions: vec![4],
        dropout: 0.0,
        ..Default::default()
    };
    tch::set_num_threads(1);
    let network = EdmNetwork::initialise(config, 0, Device::Cpu).unwrap();
    let options = (Kind::Float, Device::Cpu);
    let x = Tensor::randn([batch, 1, 8, 8], options);
    let sigma = Tensor::rand([batch], options) + 0.1;
    let labels = Tensor::randint(10, [batch], (Kind::Int64, Device::Cpu)).one_hot(10).to_kind(Kind::Float);
    let condition = Condition::Class(labels);
    let (mut forward, mut backward) = (0.0, 0.0);
    for _ in 0..PASSES {
        network.parameters().zero_grad();
        let start = cpu_ms();
        let loss = network.denoise(&x, &sigma, &condition, Mode::Train).square().sum(Kind::Float);
        let middle = cpu_ms();
        loss.backward();
        forward += middle - start;
        backward += cpu_ms() - middle;
    }
    println!(
        "{} parameters, batch {batch}: forward {:.2} ms, backward {:.2} ms, both {:.2} ms",
        network.parameters().flat().numel(),
        forward / f64::from(PASSES),
        backward / f64::from(PASSES),
        (forward + backward) / f64::from(PASSES),
    );
}
