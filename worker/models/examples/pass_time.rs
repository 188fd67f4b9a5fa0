//! Time of a forward and backward pass of a SongUNet, one thread, fp32.
//!
//! `cargo run -p potstill-models --example pass_time -- [batch] [model_channels]`

#![allow(clippy::unwrap_used, reason = "an example may panic")]

use std::time::Instant;

use potstill_models::{Condition, Denoiser, EdmConfig, EdmNetwork, Mode};
use tch::{Device, Kind, Tensor};

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
    let (mut forward, mut both) = (Vec::new(), Vec::new());
    for _ in 0..60 {
        network.parameters().zero_grad();
        let start = Instant::now();
        let loss = network.denoise(&x, &sigma, &condition, Mode::Train).square().sum(Kind::Float);
        forward.push(start.elapsed().as_secs_f64() * 1e3);
        loss.backward();
        both.push(start.elapsed().as_secs_f64() * 1e3);
    }
    for times in [&mut forward, &mut both] {
        times.sort_by(f64::total_cmp);
    }
    println!(
        "{} parameters, batch {batch}: forward {:.2} ms, forward and backward {:.2} ms (medians; least {:.2} and {:.2})",
        network.parameters().flat().numel(),
        forward[forward.len() / 2],
        both[both.len() / 2],
        forward[0],
        both[0],
    );
}
