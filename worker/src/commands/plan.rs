//! `plan`: checks whether a run fits its devices, and what its ranks send each other, before anything is loaded.

use std::{path::PathBuf, process::ExitCode};

use anyhow::ensure;
use clap::Args;
use potstill_distill::state::Slice;
use potstill_logging::print;
use potstill_models::diffusers::{Kept, ModelFolder, Pass, UNetConfig};
use potstill_proto::message::Replica;
use potstill_spec::{AdversarialSpec, Matching, Precision, RunSpec, Shard};
use serde::Serialize;

use crate::{
    model::{adapters, teacher_folder},
    training::buckets,
};

#[derive(Args)]
pub struct Arguments {
    /// The run file (TOML)
    config: PathBuf,
    /// Memory of one device, as in 80GiB
    #[arg(long, value_name = "SIZE", value_parser = potstill_spec::units::bytes)]
    device_memory: u64,
    /// Number of ranks
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    workers: u32,
    /// Bytes that a rank can send in a second, as in 25GB, for an estimate of the time that it takes
    #[arg(long, value_name = "SIZE", value_parser = potstill_spec::units::bytes)]
    bandwidth: Option<u64>,
    /// Change one key, as in memory.shard=optimizer
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    sets: Vec<String>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// The largest number of ranks for which a plan looks.
const MOST_WORKERS: u32 = 1024;

/// Memory beyond the tensors: CUDA's context, libraries, NCCL's buffers, and what the allocator cannot use. An estimate
/// of Potstill's.
const OVERHEAD: f64 = 0.08;

/// Memory of one rank by purpose, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Weights of teacher, generator and fake score; with adapters those of the network beneath and of both adapters. Of weights
    /// that are gathered: a slice of the teacher's.
    pub weights: u64,
    /// fp32 master weights that are not the weights themselves.
    pub master_weights: u64,
    /// Adam's moments.
    pub moments: u64,
    /// G_ema, unless it is kept in the host's memory.
    pub average: u64,
    /// Text encoders and autoencoder.
    pub surroundings: u64,
    /// The buffers in which gradients are summed and reduced.
    pub gradients: u64,
    /// The most that one phase keeps for its backward pass, or the gradients at its end.
    pub activations: u64,
    /// Weights that are gathered while a phase computes: those that belong to no block, a block's, and the next one's.
    pub gathered: u64,
    /// Temporaries of an optimizer step, which come when there are no activations.
    pub step: u64,
    /// Whether the memory of activations is kept.
    pub graphs: bool,
}

/// The configurations and sizes of a model, without its weights.
struct Sizes {
    unet: UNetConfig,
    /// Parameters of the U-Net.
    size: i64,
    /// Parameters of each of its blocks.
    blocks: Vec<i64>,
    /// Height and width of the latents.
    sides: [i64; 2],
    /// Tokens of a prompt.
    tokens: i64,
    /// Parameters of the text encoders.
    text: i64,
    /// Parameters of the autoencoder.
    autoencoder: i64,
}

impl Sizes {
    /// The dimensions of the run's model.
    ///
    /// # Errors
    /// The model cannot be found, or is not supported.
    fn of(spec: &RunSpec) -> anyhow::Result<Self> {
        ensure!(
            spec.teacher.model.is_some(),
            "a plan is for text-to-image models, and {} is not one",
            spec.teacher
        );
        let found = teacher_folder(&spec.teacher, false)?;
        let read = || -> anyhow::Result<_> {
            let folder = ModelFolder::open(&found.path)?;
            Ok((folder.unet_config()?, folder.autoencoder_config()?, folder.text_size()?))
        };
        let (unet, autoencoder, (text, tokens)) = read().map_err(|error| found.named(error))?;
        let cell = autoencoder.downscale() as u32;
        let sides = match spec.teacher.image_size {
            Some(sides) => sides.map(|side| i64::from(side / cell)),
            None => unet.sides(),
        };
        Self::new(unet, sides, tokens, text, autoencoder.size()?)
    }

    fn new(
        unet: UNetConfig,
        sides: [i64; 2],
        tokens: i64,
        text: i64,
        autoencoder: i64,
    ) -> anyhow::Result<Self> {
        Ok(Self { size: unet.size()?, blocks: unet.block_sizes()?, unet, sides, tokens, text, autoencoder })
    }
}

impl Plan {
    /// The memory of one of `workers` ranks.
    ///
    /// # Errors
    /// The model's configuration is not that of a valid network.
    fn new(spec: &RunSpec, model: &Sizes, workers: u32) -> anyhow::Result<Self> {
        let size = model.size;
        let memory = &spec.memory;
        let kind = if memory.bf16_weights { 2 } else { 4 };
        // The trained parameters of one network, and their data type.
        let (trained, trained_kind) = match &spec.lora {
            Some(lora) => (model.unet.lora_size(&adapters::described(lora))?, 4),
            None => (size, kind),
        };
        let (slices, replicas) = divided(spec, workers);
        let shared = slices > 1;
        let part = |numel| Slice { rank: 0, world: slices as usize }.width(numel);
        let slice = part(trained);
        // The copy of another rank's slice, whose master weights are never views of the weights.
        let copy = if shared && replicas == 1 { slice } else { 0 };
        let held = slice + copy;
        let on_device = |elements| if memory.offload_optimizer { 0 } else { elements };
        let low = trained_kind < 4;
        let gathered = memory.shard == Shard::Parameters;
        let trained_is_gathered = gathered && spec.lora.is_none();
        let graphs = spec.distillation.cuda_graphs;
        let bucketed = low || shared || trained_is_gathered || graphs;
        let bucket = 4 * buckets::elements(trained);
        let networks = 3 + i64::from(spec.generator.start_from.is_some());
        let weights = match spec.lora {
            // The first values of the adapters are kept beside those that train.
            Some(_) => (if gathered { part(size) } else { size }) * kind + 2 * 2 * trained * 4,
            None if gathered => part(size) * kind,
            None => networks * size * kind,
        };
        let moments = [spec.optimizer.generator_betas.unwrap_or(spec.optimizer.betas), spec.optimizer.betas]
            .iter()
            .map(|[first, _]| 1 + i64::from(*first != 0.0))
            .sum::<i64>();
        let cached = spec.prompts.as_ref().is_some_and(|prompts| prompts.cache.is_some());
        let encoders = if cached { 0 } else { model.text };
        Ok(Self {
            weights: bytes_of(weights),
            master_weights: bytes_of(2 * 4 * on_device(if low || trained_is_gathered { held } else { copy })),
            moments: bytes_of(moments * 4 * on_device(held)),
            average: bytes_of(if memory.offload_ema { 0 } else { 4 * on_device(held) }),
            surroundings: bytes_of(4 * (encoders + model.autoencoder)),
            gradients: bytes_of(match bucketed {
                true if shared && memory.shard != Shard::Optimizer => {
                    4 * slice + buckets::UNDER_WAY as i64 * bucket
                }
                // The sum over micro-batches.
                true => 4 * trained,
                // c10d's buckets of both networks.
                false => 2 * 4 * trained,
            }),
            activations: bytes_of(match bucketed {
                // The gradients of one micro-batch are released bucket by bucket.
                true => activations(spec, model) + bucket,
                false => activations(spec, model).max(trained_kind * trained),
            }),
            gathered: bytes_of(if gathered { kind * gathered_at_once(model) } else { 0 }),
            // The reduced gradient of the slice that is copied, or of the whole where it is in many buckets.
            step: bytes_of(4 * if bucketed { copy } else { trained }),
            graphs,
        })
    }

    /// The most at a time. Activations and temporaries of an optimizer step do not exist at once; but graphs keep the memory of
    /// activations.
    pub fn peak(&self) -> u64 {
        let computing = self.activations + self.gathered;
        self.resident() + if self.graphs { computing + self.step } else { computing.max(self.step) }
    }

    fn resident(&self) -> u64 {
        self.weights + self.master_weights + self.moments + self.average + self.surroundings + self.gradients
    }

    /// The memory that a device needs.
    pub fn needed(&self) -> u64 {
        (self.peak() as f64 * (1.0 + OVERHEAD)) as u64
    }

    fn rows(&self) -> [(&'static str, u64); 9] {
        [
            ("weights of teacher, generator, fake score", self.weights),
            ("fp32 master weights beside them", self.master_weights),
            ("Adam's moments", self.moments),
            ("averaged generator", self.average),
            ("text encoders and autoencoder", self.surroundings),
            ("gradients", self.gradients),
            ("activations of a micro-batch, at most", self.activations),
            ("and weights gathered for it", self.gathered),
            ("or an optimizer step's temporaries", self.step),
        ]
    }
}

/// The number of slices of the state that this many ranks make, and how many ranks hold each as its owner.
fn divided(spec: &RunSpec, workers: u32) -> (u32, u32) {
    if !spec.memory.is_sharded() {
        return (1, workers);
    }
    let replicas = spec.memory.shard_group.map_or(1, |smallest| Replica::count(workers, smallest));
    (workers / replicas, replicas)
}

fn bytes_of(elements: i64) -> u64 {
    u64::try_from(elements).unwrap_or(0)
}

/// Parameters that are gathered at a time: of three networks those that belong to no block, and of one network two blocks.
fn gathered_at_once(model: &Sizes) -> i64 {
    let inside: i64 = model.blocks.iter().sum();
    let two = model.blocks.windows(2).map(|pair| pair[0] + pair[1]).max().unwrap_or(inside);
    3 * (model.size - inside) + two
}

/// Activations in bytes of the phase that keeps the most.
fn activations(spec: &RunSpec, model: &Sizes) -> i64 {
    let Sizes { unet, sides, tokens, .. } = model;
    let [training, fake, teacher] = spec.guidance.scales();
    let samples = |scale: f64| match scale == 0.0 || scale == 1.0 {
        true => i64::from(spec.distillation.micro_batch),
        // Both halves of a guided call run as one batch.
        false => 2 * i64::from(spec.distillation.micro_batch),
    };
    let again = spec.memory.recompute;
    let dropout = spec.lora.as_ref().is_some_and(|lora| lora.dropout > 0.0);
    let mixed = !spec.memory.bf16_weights && spec.distillation.precision != Precision::Fp32;
    let kept = |samples, trained| {
        unet.kept(Pass { samples, sides: *sides, tokens: *tokens, trained, again, dropout, mixed })
    };
    let steps = match spec.generator.matching {
        Matching::UniformStep => 1,
        Matching::FinalStep => i64::from(spec.generator.steps),
    };
    let generator = kept(samples(1.0), true);
    let [fake, teacher] = [fake, teacher].map(|scale| kept(samples(scale), false));
    let trained_fake = kept(samples(training), true);
    let encoded = |adversarial: &Option<AdversarialSpec>| match adversarial {
        // The encoder is less than half of the network.
        Some(_) => kept(samples(1.0), true).elements / 2,
        None => 0,
    };
    // The backward pass goes through both scores before the generator's steps.
    let more = |kept: &Kept| kept.peak - kept.elements;
    let scores = fake.elements + teacher.elements + more(&fake).max(more(&teacher));
    let generator_phase = steps * generator.elements + scores.max(more(&generator));
    let fake_phase = trained_fake.elements + encoded(&spec.adversarial) + more(&trained_fake);
    let kind = if spec.distillation.precision == Precision::Fp32 { 4 } else { 2 };
    // Each product's copy of its weights in lower precision is kept for the backward pass.
    let casts = if mixed && !again { 2 * model.size * (2 + steps) } else { 0 };
    kind * generator_phase.max(fake_phase) + casts
}

/// Bytes that a rank sends in an iteration.
#[derive(Clone, Copy, Debug)]
struct Sent {
    all: u64,
    /// Of these, to ranks of other groups.
    between: u64,
}

/// Bytes that each of `workers` ranks sends in an iteration, with ring algorithms. Checkpoints, evaluations and the norms of
/// gradients are left out.
fn sent(spec: &RunSpec, model: &Sizes, workers: u32) -> anyhow::Result<Sent> {
    let (size, distillation) = (model.size, &spec.distillation);
    let kind = if spec.memory.bf16_weights { 2.0 } else { 4.0 };
    let (trained, trained_kind) = match &spec.lora {
        Some(lora) => (model.unet.lora_size(&adapters::described(lora))?, 4.0),
        None => (size, kind),
    };
    let (slices, replicas) = divided(spec, workers);
    // What passes through one of `ranks` of a vector that is reduced to all their slices, or gathered from them.
    let share = |bytes: f64, ranks: u32| bytes * f64::from(ranks - 1) / f64::from(ranks);
    let world = if spec.memory.is_sharded() { slices } else { workers };
    let through = |bytes: f64| share(bytes, world);
    let micro_batches = distillation.global_batch.div_ceil(distillation.micro_batch);
    let rounds = f64::from(micro_batches.div_ceil(workers));
    // Two ranks with slices reduce to both of them.
    let both = spec.memory.is_sharded() && slices == 2;
    let reduced = through(4.0 * trained as f64) * if both { 2.0 } else { 1.0 };
    // A slice to the rank that holds its copy.
    let slice = 4.0 * trained as f64 / f64::from(world);
    let copied = if workers > 1 && replicas == 1 { slice } else { 0.0 };
    // A slice's gradient is reduced over the replicas, to all of them.
    let between = if spec.memory.is_sharded() { 2.0 * share(slice, replicas) } else { 0.0 };
    let gathered = through(trained_kind * trained as f64);
    let each = match spec.memory.shard {
        Shard::None => 2.0 * reduced,
        Shard::Optimizer => reduced + if both { 0.0 } else { copied } + gathered,
        Shard::Gradients => rounds * reduced + copied + gathered,
        Shard::Parameters => rounds * reduced + copied + if spec.lora.is_some() { gathered } else { 0.0 },
    };
    let passes = match spec.memory.shard {
        Shard::Parameters => rounds * passes(spec) * through(kind * size as f64),
        _ => 0.0,
    };
    Ok(Sent { all: (2.0 * (each + between) + passes) as u64, between: (2.0 * between) as u64 })
}

/// Forward and backward passes through a network in the micro-batches of both phases, on average. One through the encoder alone
/// counts as a whole one.
fn passes(spec: &RunSpec) -> f64 {
    let steps = f64::from(spec.generator.steps);
    let (sampling, training) = match spec.generator.matching {
        // Each number of steps is as likely; the last one is trained.
        Matching::UniformStep => ((steps + 1.0) / 2.0, (steps - 1.0) / 2.0 + 2.0),
        Matching::FinalStep => (steps, 2.0 * steps),
    };
    let discriminator = spec
        .adversarial
        .as_ref()
        .map_or(0.0, |adversarial| if adversarial.approximate_r1 > 0.0 { 4.0 } else { 2.0 });
    // A forward and a backward pass of the fake score in both phases, and of the teacher in the generator's.
    sampling + 2.0 + discriminator + training + 4.0
}

/// A value of `memory.shard` with which a run may be tried.
#[derive(Debug, Serialize)]
struct Sharding {
    shard: Shard,
    /// Memory that a device needs.
    needed: u64,
    /// Bytes that a rank sends in an iteration.
    sent: u64,
    /// The fewest ranks with which it fits.
    fewest_workers: Option<u32>,
}

/// The values of `memory.shard` that the run can have, from the one that sends the least.
fn shardings(
    spec: &RunSpec,
    model: &Sizes,
    workers: u32,
    device_memory: u64,
) -> anyhow::Result<Vec<Sharding>> {
    let shards = [Shard::None, Shard::Optimizer, Shard::Gradients, Shard::Parameters];
    let can = |shard: &Shard| *shard != Shard::Parameters || spec.memory.recompute;
    let of = |shard| {
        let mut spec = spec.clone();
        spec.memory.shard = shard;
        let needed = |workers| Ok::<_, anyhow::Error>(Plan::new(&spec, model, workers)?.needed());
        let fits = |workers| Ok::<_, anyhow::Error>(needed(workers)? <= device_memory);
        let fewest_workers = if let (Some(group), true) = (spec.memory.shard_group, spec.memory.is_sharded())
        {
            // More ranks need less of each only until there are several groups, whose sizes repeat.
            let mut found = None;
            for workers in (1..=MOST_WORKERS.min(4 * group.get())).rev() {
                if fits(workers)? {
                    found = Some(workers);
                }
            }
            found
        } else if fits(1)? {
            Some(1)
        } else if fits(MOST_WORKERS)? {
            // From two ranks on, each more needs less of each.
            let (mut less, mut enough) = (1, MOST_WORKERS);
            while enough - less > 1 {
                let middle = less.midpoint(enough);
                if fits(middle)? { enough = middle } else { less = middle }
            }
            Some(enough)
        } else {
            None
        };
        Ok(Sharding {
            shard,
            needed: needed(workers)?,
            sent: sent(&spec, model, workers)?.all,
            fewest_workers,
        })
    };
    let mut found: Vec<Sharding> = shards.into_iter().filter(can).map(of).collect::<anyhow::Result<_>>()?;
    found.sort_by_key(|sharding| sharding.sent);
    Ok(found)
}

pub fn main(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let Arguments { config, device_memory, workers, bandwidth, sets, json } = arguments;
    let spec = RunSpec::load(&config, &sets)?;
    let model = Sizes::of(&spec)?;
    let plan = Plan::new(&spec, &model, workers)?;
    let fits = plan.needed() <= device_memory;
    let savers = savers(&spec, &model, workers)?;
    let shardings = shardings(&spec, &model, workers, device_memory)?;
    let sent = sent(&spec, &model, workers)?;
    let seconds = |bytes: u64| bandwidth.map(|bandwidth| bytes as f64 / bandwidth as f64);
    if json {
        let report = serde_json::json!({
            "plan": plan,
            "peak": plan.peak(),
            "needed": plan.needed(),
            "device_memory": device_memory,
            "fits": fits,
            "savers": savers,
            "sent": sent.all,
            "sent_between_groups": sent.between,
            "seconds_to_send": seconds(sent.all),
            "shardings": shardings,
        });
        print(format_args!("{}", serde_json::to_string_pretty(&report)?));
        return Ok(if fits { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    for (what, size) in plan.rows() {
        print(format_args!("{what:<46} {:>10.2} GiB", gib(size)));
    }
    print(format_args!("{:<46} {:>10.2} GiB", "peak", gib(plan.peak())));
    print(format_args!("{:<46} {:>10.2} GiB", "peak with the device's overhead", gib(plan.needed())));
    let taking = |bytes: u64| seconds(bytes).map_or(String::new(), |seconds| format!(", {seconds:.3} s"));
    print(format_args!(
        "{:<46} {:>10.2} GiB{}",
        "sent by a rank in an iteration",
        gib(sent.all),
        taking(sent.all)
    ));
    if sent.between > 0 {
        print(format_args!("{:<46} {:>10.2} GiB", "of that, between groups", gib(sent.between)));
    }
    print(format_args!("with {workers} ranks, from what sends the least:"));
    for Sharding { shard, needed, sent, fewest_workers } in shardings {
        let shard = serde_json::to_string(&shard)?;
        let fewest = match fewest_workers {
            Some(fewest) => format!("fits from {fewest} ranks on"),
            None => format!("does not fit with {MOST_WORKERS} ranks"),
        };
        let needs = format!("needs {:.2} GiB, sends {:.2} GiB{}", gib(needed), gib(sent), taking(sent));
        print(format_args!("  memory.shard={shard:<14} {needs}; {fewest}"));
    }
    if fits {
        print(format_args!("yes: it fits in {:.1} GiB", gib(device_memory)));
        return Ok(ExitCode::SUCCESS);
    }
    let short = plan.needed() - device_memory;
    print(format_args!("no: {:.1} GiB are {:.1} GiB too little", gib(device_memory), gib(short)));
    for Saver { change, saved } in savers {
        let enough = if saved >= short { ": enough" } else { "" };
        print(format_args!("  {change:<58} saves {:>7.2} GiB{enough}", gib(saved)));
    }
    Ok(ExitCode::FAILURE)
}

/// A change of a run, and how much less memory a device needs with it.
#[derive(Debug, PartialEq, Serialize)]
struct Saver {
    change: &'static str,
    saved: u64,
}

/// The changes that save memory, each by itself, the greatest first.
fn savers(spec: &RunSpec, model: &Sizes, workers: u32) -> anyhow::Result<Vec<Saver>> {
    type Change = fn(&mut RunSpec, &mut u32);
    let changes: [(&str, Change); 10] = [
        ("memory.recompute=true", |spec, _| spec.memory.recompute = true),
        ("memory.bf16_weights=true with distillation.precision=bf16", |spec, _| {
            spec.memory.bf16_weights = true;
            spec.distillation.precision = Precision::Bf16;
        }),
        ("memory.shard=optimizer", |spec, _| spec.memory.shard = Shard::Optimizer),
        ("memory.shard=gradients", |spec, _| spec.memory.shard = Shard::Gradients),
        ("memory.shard=parameters with memory.recompute=true", |spec, _| {
            spec.memory.shard = Shard::Parameters;
            spec.memory.recompute = true;
        }),
        ("distillation.micro_batch=1", |spec, _| spec.distillation.micro_batch = 1),
        ("memory.offload_ema=true", |spec, _| spec.memory.offload_ema = true),
        ("memory.offload_optimizer=true", |spec, _| {
            spec.memory.offload_optimizer = spec.memory.bf16_weights;
        }),
        ("lora={rank=64}", |spec, _| {
            spec.lora.get_or_insert_default();
        }),
        ("twice as many workers", |_, workers| *workers *= 2),
    ];
    let needed = Plan::new(spec, model, workers)?.needed();
    let mut found = Vec::new();
    for (change, make) in changes {
        let (mut spec, mut workers) = (spec.clone(), workers);
        make(&mut spec, &mut workers);
        // A network too small for the adapters has none.
        let Ok(plan) = Plan::new(&spec, model, workers) else { continue };
        match needed.checked_sub(plan.needed()) {
            None | Some(0) => {}
            Some(saved) => found.push(Saver { change, saved }),
        }
    }
    found.sort_by_key(|saver| std::cmp::Reverse(saver.saved));
    Ok(found)
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1u32 << 30)
}

#[cfg(test)]
mod tests {
    use std::{rc::Rc, sync::Arc, time::Duration};

    use potstill_c10d::{Backend, ProcessGroup, Store};
    use potstill_distill::{
        condition::Conditions,
        counters::{Counters, Network},
        draws::NamedStreams,
        random::Stream,
        state::{Layout, Start, State},
    };
    use potstill_models::{
        Condition, Denoiser, Embedded, TextCondition,
        diffusers::{LatentDenoiser, ScheduleConfig},
        gate,
    };
    use potstill_proto::wire::StepSeconds;
    use potstill_spec::{GuidancePreset, LoraSpec, PromptsSpec};
    use potstill_torch_ext::MemoryMeter;
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::{
        model::{adapters, weights_kind},
        session::Progress,
        training::{Prepared, Recipe, networks::Networks, settings, step::Trainer},
    };

    const TOKENS: i64 = 16;
    const WIDTH: i64 = 32;

    /// Prompts whose embeddings are noise.
    struct Noise;

    impl Conditions for Noise {
        fn draw(&self, stream: &mut Stream, n: i64, _: Device) -> Condition {
            let states = stream.normal(&[n, TOKENS, WIDTH]);
            let null = Embedded { states: stream.normal(&[1, TOKENS, WIDTH]), pooled: None };
            Condition::Text(TextCondition::new(Embedded { states, pooled: None }, Rc::new(null), None))
        }
    }

    fn unet() -> UNetConfig {
        UNetConfig::parse(
            r#"{"block_out_channels": [32, 64, 96], "layers_per_block": 2, "attention_head_dim": 4, "norm_num_groups": 8,
                "cross_attention_dim": 32, "transformer_layers_per_block": [1, 1, 2], "use_linear_projection": true,
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "sample_size": 32}"#,
        )
        .unwrap()
    }

    /// The peak memory of one of `world` ranks in two iterations of the training step, without the exchange with other
    /// ranks: the threads of collectives free their memory at a time of their own.
    fn measured(spec: &RunSpec, workers: u32) -> u64 {
        let timeout = Duration::from_secs(60);
        let store = Store::alone(timeout).unwrap();
        let backend = Backend::Gloo { host: "127.0.0.1".to_owned() };
        let alone = ProcessGroup::new(&backend, &store, 0, 1, timeout).unwrap();
        let schedule = ScheduleConfig::parse(r#"{"_class_name": "DDIMScheduler"}"#).unwrap();
        let weights = weights_kind(spec);
        // In place of the files, which are not counted.
        let files = LatentDenoiser::initialise(unet(), schedule, 0, Device::Cpu).unwrap();
        let files = files.with_recomputation(spec.memory.recompute);
        let held = files.parameters().flat();
        let numel = held.numel() as i64;
        let meter = MemoryMeter::start(Device::Cpu).unwrap();
        let gathered = spec.memory.shard == Shard::Parameters;
        let teacher = match gathered {
            true => files.over(gate::absent(numel, (weights, Device::Cpu)), false),
            false => {
                let mut flat = Tensor::empty([numel], (weights, Device::Cpu));
                flat.copy_(held);
                files.over(flat, false)
            }
        };
        let (slices, replicas) = divided(spec, workers);
        let slice = Slice { rank: 0, world: slices as usize };
        let copy = (slices > 1 && replicas == 1).then_some(Slice { rank: slices as usize - 1, ..slice });
        let recipe = Recipe::new(spec, settings(spec, teacher.process(), Device::Cpu));
        let first_moments = recipe.optimizer.first_moments();
        // As in a run, where a state that starts anew is made of them: they are kept to the end.
        let adapted = spec.lora.as_ref().map(|lora| adapters::first(teacher.as_ref(), lora, 0).unwrap());
        let layout = |weights, gathered| Layout {
            slice,
            copy,
            weights,
            average_on_host: false,
            optimizer_on_host: false,
            first_moments,
            gathered,
        };
        let values =
            |range: std::ops::Range<i64>| held.narrow(0, range.start, range.end - range.start).copy();
        let mut state = match &adapted {
            None => {
                let values = gathered.then_some(&values as &dyn Fn(_) -> _);
                let start = Start { network: teacher.as_ref(), values };
                State::starting_from(start, start, Counters::new(false), layout(weights, gathered))
            }
            Some([fake_score, generator]) => {
                let [fake_score, generator] = [fake_score, generator].map(|n| Start::of(n.as_ref()));
                State::starting_from(fake_score, generator, Counters::new(false), layout(Kind::Float, false))
            }
        };
        let draws = NamedStreams::data_free(&recipe.settings, &Noise, teacher.as_ref());
        let progress = Arc::new(Progress::default());
        let slice_of_teacher = gathered.then(|| {
            let values = values(slice.range(numel));
            if weights == Kind::Float { values } else { values.to_kind(weights) }
        });
        let networks = Networks::new(&state, teacher.as_ref(), slice_of_teacher.as_ref(), &alone, &progress);
        let trainer =
            Trainer::new(&recipe, networks, &draws, alone.into(), 0..1, &progress, &state, None).unwrap();
        for iteration in 0..2 {
            for network in [Network::FakeScore, Network::Generator] {
                let mut seconds = StepSeconds::default();
                let reduced = trainer.gradient(&mut state, network, iteration, &mut seconds, || Ok(()));
                let gradient = reduced.ok().unwrap().gradient;
                let prepared = Prepared::new(&recipe, network, iteration, gradient);
                let whole = trainer.agree(&prepared, &mut seconds).ok().unwrap();
                trainer.step(&mut state, prepared, whole, &mut seconds);
                trainer.clear(network).unwrap();
            }
        }
        meter.peak().unwrap()
    }

    #[test]
    fn advice_is_what_saves() {
        let model = Sizes::new(unet(), [32, 32], TOKENS, 0, 0).unwrap();
        let mut spec = RunSpec::default();
        spec.teacher.model = Some("model".to_owned());
        spec.distillation.micro_batch = 1;
        let changes = |spec: &RunSpec, workers| -> Vec<&str> {
            let savers = savers(spec, &model, workers).unwrap();
            assert!(savers.is_sorted_by(|a, b| a.saved >= b.saved), "{savers:?}");
            savers.iter().map(|saver| saver.change).collect()
        };
        let alone = changes(&spec, 1);
        assert!(alone.contains(&"memory.recompute=true") && alone.contains(&"memory.offload_ema=true"));
        let useless = ["memory.shard=optimizer", "distillation.micro_batch=1", "twice as many workers"];
        assert!(!alone.iter().any(|change| useless.contains(change)), "{alone:?}");
        // Each slice has two holders, so two ranks hold everything.
        assert!(!changes(&spec, 2).contains(&"memory.shard=optimizer"));
        assert!(changes(&spec, 4).contains(&"memory.shard=optimizer"));
        spec.memory.shard = Shard::Optimizer;
        assert!(changes(&spec, 2).contains(&"twice as many workers"));
        spec.lora = Some(LoraSpec { rank: std::num::NonZeroU32::MIN, ..LoraSpec::default() });
        assert!(!changes(&spec, 2).contains(&"lora={rank=64}"));
    }

    #[test]
    fn more_ranks_need_less_memory_and_send_more() {
        let model = Sizes::new(unet(), [32, 32], TOKENS, 0, 0).unwrap();
        let mut spec = RunSpec::default();
        spec.teacher.model = Some("model".to_owned());
        spec.memory.recompute = true;
        spec.distillation.micro_batch = 1;
        let needed = |spec: &RunSpec, shard, workers| {
            let mut spec = spec.clone();
            spec.memory.shard = shard;
            Plan::new(&spec, &model, workers).unwrap().needed()
        };
        let memory = needed(&spec, Shard::Parameters, 16);
        let shardings_of = |spec: &RunSpec, memory| shardings(spec, &model, 8, memory).unwrap();
        let found = shardings_of(&spec, memory);
        assert!(found.is_sorted_by(|a, b| a.sent <= b.sent), "{found:?}");
        let of = |shard| found.iter().find(|sharding| sharding.shard == shard).unwrap();
        // Without slices more ranks do not help, and the slices of weights help most.
        assert_eq!(of(Shard::None).fewest_workers, None);
        assert!(of(Shard::Parameters).needed < of(Shard::Gradients).needed);
        assert!(of(Shard::Gradients).needed < of(Shard::Optimizer).needed);
        let fewest = of(Shard::Parameters).fewest_workers.unwrap();
        assert!(fewest <= 16 && needed(&spec, Shard::Parameters, fewest) <= memory);
        assert!(needed(&spec, Shard::Parameters, fewest - 1) > memory);
        // An all-reduce sends each gradient twice, less what a rank keeps.
        let size = unet().size().unwrap() as f64;
        assert_eq!(of(Shard::None).sent, (2.0 * 2.0 * 4.0 * size * 7.0 / 8.0) as u64);
        assert_eq!(sent(&spec, &model, 1).unwrap().all, 0);
        // The weights of a network that does not recompute cannot be gathered.
        spec.memory.recompute = false;
        assert!(shardings_of(&spec, memory).iter().all(|sharding| sharding.shard != Shard::Parameters));
    }

    #[test]
    fn the_plan_is_what_is_measured() {
        let model = Sizes::new(unet(), [32, 32], TOKENS, 0, 0).unwrap();
        let base = || {
            let mut spec = RunSpec::default();
            spec.teacher.model = Some("model".to_owned());
            spec.prompts = Some(PromptsSpec::default());
            spec.distillation.micro_batch = 2;
            // No more than the one rank that is measured computes.
            spec.distillation.global_batch = 2;
            spec.distillation.alpha = 1.0;
            spec
        };
        let guided = |spec: &mut RunSpec| {
            spec.guidance.preset = GuidancePreset::Lsg;
            spec.guidance.scale = 1.5;
        };
        let low = |spec: &mut RunSpec| {
            spec.distillation.precision = Precision::Bf16;
            spec.memory.bf16_weights = true;
        };
        let divided = |spec: &mut RunSpec| {
            spec.memory.shard = Shard::Parameters;
            spec.memory.recompute = true;
        };
        type Change<'a> = &'a dyn Fn(&mut RunSpec);
        let adapted = |spec: &mut RunSpec| {
            let rank = std::num::NonZeroU32::new(4).unwrap();
            spec.lora = Some(LoraSpec { rank, ..LoraSpec::default() });
        };
        let cases: [(&str, u32, Change); 25] = [
            ("plain", 1, &|_| {}),
            ("guided", 1, &guided),
            ("recompute", 1, &|spec| {
                guided(spec);
                spec.memory.recompute = true;
            }),
            ("final step", 1, &|spec| {
                spec.generator.matching = Matching::FinalStep;
                spec.generator.steps = 2;
            }),
            ("bf16", 1, &low),
            ("first moment", 1, &|spec| spec.optimizer.betas = [0.9, 0.999]),
            ("adapters", 1, &adapted),
            ("adapters on bf16", 1, &|spec| {
                low(spec);
                adapted(spec);
            }),
            ("adapters, recompute", 1, &|spec| {
                low(spec);
                guided(spec);
                adapted(spec);
                spec.memory.recompute = true;
            }),
            ("dropout", 1, &|spec| {
                adapted(spec);
                spec.lora.as_mut().unwrap().dropout = 0.1;
            }),
            ("dropout, recompute", 1, &|spec| {
                low(spec);
                adapted(spec);
                spec.lora.as_mut().unwrap().dropout = 0.1;
                spec.memory.recompute = true;
            }),
            ("sharded", 2, &|spec| spec.memory.shard = Shard::Optimizer),
            ("sharded over 4", 4, &|spec| spec.memory.shard = Shard::Optimizer),
            ("gradients over 4", 4, &|spec| spec.memory.shard = Shard::Gradients),
            ("gradients over 4, bf16", 4, &|spec| {
                low(spec);
                spec.memory.shard = Shard::Gradients;
                spec.memory.recompute = true;
            }),
            ("parameters alone", 1, &divided),
            ("parameters over 2", 2, &divided),
            ("parameters over 4", 4, &divided),
            ("parameters over 4, guided", 4, &|spec| {
                divided(spec);
                guided(spec);
            }),
            ("gradients over 2", 2, &|spec| spec.memory.shard = Shard::Gradients),
            ("gradients over 8 in groups of 4", 8, &|spec| {
                spec.memory.shard = Shard::Gradients;
                spec.memory.shard_group = std::num::NonZeroU32::new(4);
            }),
            ("parameters over 4 in groups of 2", 4, &|spec| {
                divided(spec);
                spec.memory.shard_group = std::num::NonZeroU32::new(2);
            }),
            ("parameters over 8, bf16", 8, &|spec| {
                low(spec);
                divided(spec);
            }),
            ("parameters over 4, adapters", 4, &|spec| {
                low(spec);
                divided(spec);
                adapted(spec);
            }),
            ("all", 2, &|spec| {
                low(spec);
                guided(spec);
                spec.memory.shard = Shard::Optimizer;
                spec.memory.recompute = true;
            }),
        ];
        let mut wrong = Vec::new();
        for (name, workers, change) in cases {
            let mut spec = base();
            change(&mut spec);
            let plan = Plan::new(&spec, &model, workers).unwrap();
            // One rank is measured alone: no reduction of a bucket is under way.
            let trained = spec
                .lora
                .as_ref()
                .map_or(Ok(model.size), |lora| model.unet.lora_size(&adapters::described(lora)));
            let under_way = match spec.memory.shard {
                Shard::Gradients | Shard::Parameters if workers > 1 => {
                    bytes_of(4 * buckets::UNDER_WAY as i64 * buckets::elements(trained.unwrap()))
                }
                _ => 0,
            };
            let (planned, found) = (plan.peak() - under_way, measured(&spec, workers));
            let ratio = planned as f64 / found as f64;
            println!("{name}: planned {planned}, measured {found}: {ratio:.3}; {plan:?}");
            if (ratio - 1.0).abs() > 0.1 {
                wrong.push(format!("{name}: {ratio:.3}"));
            }
        }
        assert!(wrong.is_empty(), "more than 10 % off: {wrong:?}");
    }
}
