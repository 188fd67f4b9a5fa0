//! Small networks, and adapters for them.

use std::rc::Rc;

use potstill_models::{
    Condition, Denoiser, EdmNetwork, Embedded, Lora, TextCondition,
    diffusers::{LatentDenoiser, ScheduleConfig, UNetConfig},
};
use tch::{Device, Kind, Tensor};

use super::small;

pub const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

pub fn unet() -> LatentDenoiser {
    let config = UNetConfig::parse(
        r#"{"block_out_channels": [16, 32], "layers_per_block": 1, "attention_head_dim": 4, "norm_num_groups": 4,
            "cross_attention_dim": 8, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "sample_size": 8}"#,
    );
    let schedule = ScheduleConfig::parse(r#"{"_class_name": "DDIMScheduler"}"#).unwrap();
    LatentDenoiser::initialise(config.unwrap(), schedule, 3, Device::Cpu).unwrap()
}

/// Both families, their last layers not near 0, each with samples, times and a condition.
pub fn networks() -> Vec<(Box<dyn Denoiser>, Tensor, Tensor, Condition)> {
    tch::manual_seed(5);
    let lively = |network: &dyn Denoiser| {
        let flat = network.parameters().flat();
        network.over(flat + flat.randn_like() * 0.05, false)
    };
    let config = small();
    let labels = Tensor::from_slice(&[0i64, 1]).one_hot(config.label_dim).to_kind(Kind::Float);
    let side = config.img_resolution;
    let x = Tensor::randn([2, config.img_channels, side, side], CPU);
    let edm = EdmNetwork::initialise(config, 1, Device::Cpu).unwrap();
    let texts = Embedded { states: Tensor::randn([2, 5, 8], CPU), pooled: None };
    let null = Embedded { states: Tensor::randn([1, 5, 8], CPU), pooled: None };
    let text = TextCondition::new(texts, Rc::new(null), None);
    vec![
        (lively(&edm), x, Tensor::from_slice(&[0.4f32, 2.0]), Condition::Class(labels)),
        (
            lively(&unet()),
            Tensor::randn([2, 4, 8, 8], CPU),
            Tensor::from_slice(&[100.0f32, 600.0]),
            Condition::Text(text),
        ),
    ]
}

pub fn lora(rank: i64, targets: Option<&[&str]>) -> Lora {
    let targets = targets.map(|names| names.iter().map(|name| (*name).to_owned()).collect());
    Lora { rank, alpha: 3.0, targets, dropout: 0.0 }
}

pub fn adapted(network: &dyn Denoiser, lora: &Lora) -> Box<dyn Denoiser> {
    network.adapted(lora, &mut |shape| Tensor::randn(shape, CPU)).unwrap()
}

/// Gives B values, too.
pub fn stirred(network: Box<dyn Denoiser>) -> Box<dyn Denoiser> {
    let flat = network.parameters().flat();
    network.over(flat + flat.randn_like() * 0.1, true)
}
