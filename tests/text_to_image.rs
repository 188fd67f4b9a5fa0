//! Text-to-image models as real processes: a tiny random SDXL teacher is distilled on two workers, resumed, exported, sampled,
//! and loaded by Python's diffusers.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use nix::{
    sys::{signal::Signal, stat::Mode},
    unistd::mkfifo,
};
use potstill_tests::{
    Cluster, Process, binary, kill, lacks, relative_difference, repository, text, tiny_model,
};
use safetensors::{Dtype, tensor::TensorView};

#[path = "../storage/tests/s3_server/mod.rs"]
#[allow(dead_code, reason = "the tests of the storage use the rest")]
mod s3_server;

/// A cluster with a model and prompts.
struct Studio {
    cluster: Cluster,
    config: PathBuf,
}

impl Studio {
    fn new(family: &str) -> Self {
        let cluster = Cluster::default();
        tiny_model::write(family, &cluster.storage().join("model"));
        let prompts =
            "a red circle\ntwo blue squares\nthe best photo\nwe say word\na circle beside a square\n";
        std::fs::write(cluster.storage().join("prompts.txt"), prompts).unwrap();
        let config = cluster.storage().join("run-file.toml");
        let spec = "[teacher]\nmodel = 'model'\n[prompts]\ndata = 'prompts.txt'\n[generator]\nsteps = 4\n\
                    [distillation]\nglobal_batch = 8\nmicro_batch = 2\nalpha = 1.0\n\
                    [optimizer]\ngenerator_learning_rate = 1e-4\nfake_score_learning_rate = 1e-4\n\
                    [evaluation]\nteacher_steps = 2\n";
        std::fs::write(&config, spec).unwrap();
        Self { cluster, config }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.cluster.storage().join(name)
    }

    /// Writes twelve images with captions, and returns where.
    fn pairs(&self) -> PathBuf {
        let mut members = Vec::new();
        for index in 0..12u8 {
            let mut bytes = std::io::Cursor::new(Vec::new());
            image::RgbImage::from_fn(20 + u32::from(index), 24, |x, y| {
                image::Rgb([index * 20, (x * 10) as u8, (y * 10) as u8])
            })
            .write_to(&mut bytes, image::ImageFormat::Png)
            .unwrap();
            members.push((format!("{index:03}.png"), bytes.into_inner()));
            members.push((format!("{index:03}.txt"), format!("photo {index}").into_bytes()));
        }
        let path = self.path("pairs.tar");
        tiny_model::write_tar(&path, &members);
        path
    }

    fn launch(&self, run: &str, workers: u32, sets: &[&str], flags: &[&str]) -> Command {
        let mut command = Command::new(binary("potstill"));
        command
            .arg("launch")
            .arg(&self.config)
            .args(["--workers", &workers.to_string(), "--run-id", run, "--threads", "1", "--storage"])
            .arg(self.cluster.storage())
            .args(sets.iter().flat_map(|set| ["--set", set]))
            .args(flags)
            // Models that are made from others.
            .env("XDG_CACHE_HOME", self.path("cache"))
            .stdin(Stdio::null());
        command
    }

    fn output(&self, run: &str, workers: u32, sets: &[&str], flags: &[&str]) -> Output {
        self.launch(run, workers, sets, flags).output().unwrap()
    }

    fn succeed(&self, run: &str, workers: u32, sets: &[&str], flags: &[&str]) -> String {
        let output = self.output(run, workers, sets, flags);
        assert!(output.status.success(), "{run}: {}: {}", output.status, text(&output.stderr));
        text(&output.stderr)
    }

    /// Ranks of which one dies in each iteration, from the second one on, at these points of it, end as those of the run
    /// `undisturbed` do. Both runs have two iterations more than deaths.
    fn survive(&self, undisturbed: &str, workers: u32, sets: &[&str], deaths: &[(&str, u32)]) {
        let run = format!("without-{}", deaths[0].0);
        let deaths: Vec<_> =
            (1..).zip(deaths).map(|(iteration, (at, rank))| (*at, iteration, *rank)).collect();
        let end = deaths.len() as u64 + 2;
        let mut command = self.launch(&run, workers, sets, &[]);
        command.args(["--set", &format!("distillation.iterations={end}")]);
        command.env("POTSTILL_FAULT", potstill_tests::deaths(self.cluster.storage(), &run, &deaths));
        let output = command.output().unwrap();
        let log = text(&output.stderr);
        assert!(output.status.success(), "{run}: {log}");
        let died = log.matches("because of POTSTILL_FAULT").count();
        assert_eq!(died, deaths.len(), "{run}: {log}");
        assert!(log.contains(&format!("generation={}", 1 + deaths.len())), "{run}: {log}");
        self.cluster.assert_same_end(&run, undisturbed, end);
    }

    fn refused(&self, sets: &[&str]) -> String {
        let output = self.output("bad", 2, sets, &[]);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{sets:?}: {message}");
        assert!(!self.cluster.run("bad").exists(), "{sets:?} left something behind: {message}");
        message
    }

    #[track_caller]
    fn assert_close(&self, a: &str, b: &str, iteration: u64, most: f64) {
        let (a, b) = (self.cluster.checkpoint(a, iteration), self.cluster.checkpoint(b, iteration));
        for part in ["generator/", "fake_score/", "generator_ema/"] {
            let difference = relative_difference(&a, &b, part);
            assert!(difference <= most, "{part}: {difference}");
        }
    }
}

fn potstill(arguments: &[&str]) -> String {
    let output = Command::new(binary("potstill")).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// Python with diffusers, if `scripts/test.sh` has installed it.
fn python(test: &str) -> Option<PathBuf> {
    let python = repository().join(".venv/bin/python");
    let mut command = Command::new(&python);
    command.args(["-c", "import diffusers, transformers"]).stderr(Stdio::null());
    let found = command.status().is_ok_and(|status| status.success());
    if !found {
        lacks("diffusers", test, "pip install -r requirements-test.txt");
    }
    found.then_some(python)
}

const PROMPTS: [&str; 2] = ["a red circle", "two blue squares"];

/// The arguments of `potstill sample` that ask for an image of each prompt.
fn asked() -> [&'static str; 6] {
    ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--count", "2"]
}

/// Loads an export with diffusers, which must make the images that were sampled from this noise.
fn diffusers_makes_the_same(python: &Path, exported: &str, noise: &str, pictures: &str) {
    let checked = Command::new(python)
        .arg(repository().join("tests/diffusers_image.py"))
        .args([exported, noise, pictures])
        .args(PROMPTS)
        .output()
        .unwrap();
    assert!(checked.status.success(), "{exported}: {}", text(&checked.stderr));
}

#[test]
fn sdxl_is_distilled_with_each_preset_resumed_exported_and_loaded_by_diffusers() {
    let studio = Studio::new("sdxl");
    let storage = studio.cluster.storage().to_str().unwrap().to_owned();
    let python = python("sdxl_is_distilled_…");
    for (preset, more) in [
        ("none", vec![]),
        ("lsg", vec!["guidance.scale=1.5"]),
        ("zero-cfg", vec![]),
        ("anti-cfg", vec![]),
        ("custom", vec!["guidance.teacher=2.0", "guidance.fake_score=0.5", "generator.initial_timestep=999"]),
    ] {
        let preset_set = format!("guidance.preset={preset}");
        let sets = |iterations: &'static str| [&[iterations, preset_set.as_str()], &more[..]].concat();
        studio.succeed(preset, 2, &sets("distillation.iterations=3"), &[]);
        studio.succeed(preset, 2, &sets("distillation.iterations=6"), &["--resume"]);
        let run = format!("{storage}/runs/{preset}");
        let exported = format!("{storage}/exported-{preset}");
        potstill(&["export", "--checkpoint", &run, "--out", &exported]);
        let (pictures, noise) = (format!("{storage}/{preset}"), format!("{storage}/{preset}.safetensors"));
        let asked = asked();
        potstill(
            &[&["sample", "--checkpoint", &exported, "--out", &pictures, "--save-noise", &noise], &asked[..]]
                .concat(),
        );
        let again = format!("{storage}/{preset}-run");
        potstill(&[&["sample", "--checkpoint", &run, "--out", &again], &asked[..]].concat());
        let read = |folder: &str| std::fs::read(Path::new(folder).join("000001.png")).unwrap();
        assert_eq!(read(&pictures), read(&again), "{preset}: the run's and its export's images differ");
        if let Some(python) = &python {
            diffusers_makes_the_same(python, &exported, &noise, &pictures);
        }
    }
    // Six iterations are the same as three and three more, bit by bit.
    studio.succeed("straight", 2, &["distillation.iterations=6", "guidance.preset=none"], &[]);
    assert!(studio.cluster.checkpoint("straight", 6) == studio.cluster.checkpoint("none", 6));
}

/// Longer than the run waits for workers: one that loads is coming.
#[test]
fn a_worker_that_embeds_many_prompts_is_waited_for() {
    let studio = Studio::new("sd15");
    let many: String = (0..12_000).map(|n| format!("photo {n} of a red circle\n")).collect();
    std::fs::write(studio.path("many.txt"), many).unwrap();
    let cache = format!("prompts.cache={}", studio.path("prompts").display());
    let data = format!("prompts.data={}", studio.path("many.txt").display());
    let patience = ["cluster.failure_timeout=2s", "cluster.wait_timeout=2s"];
    let sets =
        [&["distillation.iterations=1", "evaluation.teacher_steps=2", &cache, &data][..], &patience].concat();
    studio.succeed("long", 1, &sets, &[]);
}

/// As SSD-1B has it, as latent consistency models have it, and with the tokenizer as transformers 5 writes it.
#[test]
fn other_u_nets_and_tokenizers_are_teachers_whose_students_diffusers_loads() {
    let studio = Studio::new("sd15");
    let python = python("other_u_nets_…");
    for unet in ["sd_unet_asymmetric", "sd_guided"] {
        let model = studio.path("model");
        tiny_model::replace_unet(&model, unet);
        tiny_model::join_tokenizer(&model);
        if unet == "sd_guided" {
            let index = model.join("model_index.json");
            let pipeline = std::fs::read_to_string(&index).unwrap();
            let pipeline = pipeline.replace("StableDiffusionPipeline", "LatentConsistencyModelPipeline");
            std::fs::write(&index, pipeline).unwrap();
        }
        studio.succeed(unet, 1, &["distillation.iterations=2"], &[]);
        let path = |name: &str| studio.path(&format!("{name}-{unet}")).to_str().unwrap().to_owned();
        let (exported, pictures, noise) = (path("exported"), path("pictures"), path("noise"));
        let run = studio.cluster.run(unet);
        potstill(&["export", "--checkpoint", run.to_str().unwrap(), "--out", &exported]);
        let asked = asked();
        let files = ["sample", "--checkpoint", &exported, "--out", &pictures, "--save-noise", &noise];
        potstill(&[&files[..], &asked].concat());
        if let Some(python) = &python {
            diffusers_makes_the_same(python, &exported, &noise, &pictures);
        }
    }
}

#[test]
fn what_saves_memory_changes_nothing() {
    let studio = Studio::new("sdxl");
    let sets = |more: &[&'static str]| -> Vec<&'static str> {
        [&["distillation.iterations=3", "guidance.preset=lsg", "guidance.scale=1.5"], more].concat()
    };
    studio.succeed("plain", 1, &sets(&[]), &[]);
    for (run, workers, more) in [
        ("checkpointing", 2, vec!["memory.recompute=true"]),
        ("cache", 2, vec!["prompts.cache=embeddings"]),
        ("graphs", 2, vec!["distillation.cuda_graphs=true", "memory.shard=optimizer"]),
        ("sharded-2", 2, vec!["memory.shard=optimizer", "optimizer.clip_norm=1e9"]),
        ("sharded-3", 3, vec!["memory.shard=optimizer", "memory.offload_ema=true"]),
        ("gradients-3", 3, vec!["memory.shard=gradients", "memory.recompute=true"]),
        ("parameters-1", 1, vec!["memory.shard=parameters", "memory.recompute=true"]),
        ("parameters-4", 4, vec!["memory.shard=parameters", "memory.recompute=true"]),
    ] {
        studio.succeed(run, workers, &sets(&more), &[]);
        studio.assert_close(run, "plain", 3, 1e-4);
    }
    assert!(studio.path("embeddings").is_dir(), "embeddings were kept");
    // bf16 weights with fp32 master weights: close, but not equal; sharded or not.
    let bf16 = ["distillation.precision=bf16", "memory.bf16_weights=true"];
    studio.succeed("bf16", 1, &sets(&bf16), &[]);
    studio.succeed(
        "bf16-sharded",
        2,
        &sets(&[&bf16[..], &["memory.shard=optimizer", "memory.offload_optimizer=true"]].concat()),
        &[],
    );
    studio.succeed("bf16-gradients", 4, &sets(&[&bf16[..], &["memory.shard=gradients"]].concat()), &[]);
    let parameters = ["memory.shard=parameters", "memory.recompute=true", "memory.offload_ema=true"];
    studio.succeed("bf16-parameters", 3, &sets(&[&bf16[..], &parameters].concat()), &[]);
    studio.succeed("bf16-whole", 3, &sets(&bf16), &[]);
    studio.assert_close("bf16-parameters", "bf16", 3, 2e-2);
    studio.assert_close("bf16", "plain", 3, 2e-2);
    studio.assert_close("bf16-gradients", "bf16", 3, 2e-2);
    studio.assert_close("bf16-whole", "bf16", 3, 2e-2);
    studio.assert_close("bf16-sharded", "bf16", 3, 2e-2);
    let (bf16, plain) = (studio.cluster.checkpoint("bf16", 3), studio.cluster.checkpoint("plain", 3));
    assert!(relative_difference(&bf16, &plain, "generator/") > 0.0);
    // What is exported is what was saved, whatever the weights of the run.
    let (run, exported) = (studio.cluster.run("bf16"), studio.path("exported-bf16"));
    potstill(&["export", "--checkpoint", run.to_str().unwrap(), "--out", exported.to_str().unwrap()]);
    let bytes = std::fs::read(exported.join("unet/diffusion_pytorch_model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert!(!file.is_empty());
    for (name, view) in file.iter() {
        let (values, _) = view.data().as_chunks::<4>();
        let values: Vec<f32> = values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        assert!(values == bf16[&format!("generator_ema/{name}")], "{name} differs from the checkpoint");
    }
}

/// Adapters, an adversarial loss and gradients through several steps, each with several values of `memory.shard`, on 2 ranks
/// and on 3, which have unequal numbers of micro-batches.
#[test]
fn whatever_the_ranks_divide_among_themselves_they_compute_the_same() {
    let studio = Studio::new("sdxl");
    let pairs = format!("adversarial.data={}", studio.pairs().display());
    let base = ["distillation.iterations=2", "memory.recompute=true", "checkpoint.every=1000"];
    type Kind<'a> = (&'a str, &'a [&'a str], &'a [(&'a str, u32)]);
    let kinds: [Kind; 3] = [
        (
            "adapters",
            &["lora={rank=2, alpha=3.0}", "optimizer.generator_learning_rate=3e-2"],
            &[("optimizer", 3), ("parameters", 2), ("parameters", 3)],
        ),
        (
            "adversarial",
            &[
                "guidance.preset=zero-cfg",
                "adversarial.scaling=sid-dit",
                "adversarial.approximate_r1=0.1",
                &pairs,
            ],
            &[("gradients", 3), ("parameters", 3)],
        ),
        (
            "final-step",
            &["generator.matching=final-step", "generator.steps=3", "optimizer.clip_norm=0.5"],
            &[("gradients", 2), ("optimizer", 2), ("parameters", 3)],
        ),
    ];
    for (kind, sets, shards) in kinds {
        let sets = [&base[..], sets].concat();
        let whole = format!("{kind}-whole");
        studio.succeed(&whole, 1, &sets, &[]);
        for (shard, workers) in shards {
            let (run, shard) = (format!("{kind}-{shard}-{workers}"), format!("memory.shard={shard}"));
            studio.succeed(&run, *workers, &[&sets[..], &[&shard]].concat(), &[]);
            studio.assert_close(&run, &whole, 2, 1e-4);
        }
    }
}

/// Evaluations and pictures, also on ranks that have no share of the samples.
#[test]
fn samples_are_the_same_where_no_rank_holds_a_whole_network() {
    let studio = Studio::new("sd15");
    let file = |key: &str, path: &str| format!("evaluation.{key}={}", repository().join(path).display());
    let (features, reference) = (
        file("features", "configs/shapes/features.pt"),
        file("reference", "configs/shapes/shapes.safetensors"),
    );
    let base = [
        "distillation.iterations=1",
        "evaluation.samples=110",
        "generator.steps=1",
        "evaluation.collapse_share=0.0",
        "evaluation.pictures_every=1",
        "memory.recompute=true",
        &features,
        &reference,
    ];
    let scores = |run: &str| -> Vec<f64> {
        let rows = studio.cluster.metrics(run);
        let scores = rows.iter().filter(|row| row["kind"] == "evaluation").map(|row| &row["scores"]);
        scores.flat_map(|of| ["fid", "diversity"].map(|name| of[name].as_f64().unwrap())).collect()
    };
    // One chunk of such images goes through a network in two passes, the other one in one.
    let large = ["teacher.image_size=[64, 64]", "evaluation.images=resized", "evaluation.image_size=16"];
    for (kind, sets) in [("networks", large.to_vec()), ("adapters", vec!["lora={rank=2, alpha=3.0}"])] {
        let sets = [&base[..], &sets].concat();
        let (whole, gathered) = (format!("{kind}-whole"), format!("{kind}-gathered"));
        studio.succeed(&whole, 1, &sets, &[]);
        let sharded = ["memory.shard=parameters", "memory.offload_ema=true"];
        studio.succeed(&gathered, 3, &[&sets[..], &sharded].concat(), &[]);
        let (one, three) = (scores(&whole), scores(&gathered));
        assert!(one.len() >= 4 && one.len() == three.len(), "{kind}: {one:?}, {three:?}");
        for (one, three) in one.iter().zip(&three) {
            assert!((one - three).abs() <= 1e-3 * one.abs().max(1.0), "{kind}: {one} and {three}");
        }
        for picture in ["samples.png", &format!("pictures/{:012}.png", 1)] {
            let [one, three] = [&whole, &gathered]
                .map(|run| image::open(studio.cluster.run(run).join(picture)).unwrap().to_rgb8());
            assert_eq!(one.dimensions(), three.dimensions());
            assert!(one.iter().zip(three.iter()).all(|(a, b)| a.abs_diff(*b) <= 1), "{kind}: {picture}");
        }
    }
}

#[test]
fn a_sharded_optimizers_checkpoint_is_loaded_by_any_number_of_ranks() {
    let studio = Studio::new("sd15");
    let (sharded, parameters) = ("memory.shard=optimizer", "memory.shard=parameters");
    studio.succeed("straight", 1, &["distillation.iterations=4"], &[]);
    for (workers, then, more) in [
        (3, 1, sharded),
        (2, 4, sharded),
        (1, 3, parameters),
        (3, 2, parameters),
        (3, 2, "memory.shard=none"),
    ] {
        let run = format!("from-{workers}-to-{then}-{}", more.len());
        studio.succeed(&run, workers, &["distillation.iterations=2", sharded], &[]);
        let then_with = ["distillation.iterations=4", more, "memory.recompute=true"];
        studio.succeed(&run, then, &then_with, &["--resume"]);
        let (a, b) = (studio.cluster.checkpoint(&run, 4), studio.cluster.checkpoint("straight", 4));
        for part in ["generator/", "fake_score/", "generator_ema/", "generator_adam.exp_avg_sq/"] {
            let difference = relative_difference(&a, &b, part);
            assert!(difference <= 1e-4, "{run}: {part}: {difference}");
        }
    }
    // Resumed with the same number of workers, it is the same bit by bit.
    studio.succeed("halves", 2, &["distillation.iterations=2", sharded], &[]);
    studio.succeed("halves", 2, &["distillation.iterations=4", sharded], &["--resume"]);
    studio.succeed("whole", 2, &["distillation.iterations=4", sharded], &[]);
    assert!(studio.cluster.checkpoint("halves", 4) == studio.cluster.checkpoint("whole", 4));
}

#[test]
fn a_rank_of_a_sharded_run_dies_and_its_partner_goes_on_with_its_slice() {
    let studio = Studio::new("sd15");
    // bf16 weights: the master weights that a rank takes with it are nowhere else.
    let sets = [
        "distillation.iterations=4",
        "checkpoint.every=1000",
        "memory.shard=optimizer",
        "distillation.precision=bf16",
        "memory.bf16_weights=true",
        "memory.offload_ema=true",
    ];
    studio.succeed("undisturbed", 3, &sets, &[]);
    studio.survive("undisturbed", 3, &sets, &[("forward", 0), ("stepped", 1)]);
}

#[test]
fn a_rank_of_a_run_whose_weights_are_gathered_may_die_at_any_point_of_an_iteration() {
    let studio = Studio::new("sd15");
    let sets = [
        "distillation.iterations=10",
        "checkpoint.every=1000",
        "memory.shard=parameters",
        "memory.recompute=true",
        "optimizer.clip_norm=0.5",
    ];
    studio.succeed("undisturbed", 3, &sets, &[]);
    let points = ["gathering", "forward", "backward", "reducing", "reduced", "agreed", "stepped", "reported"];
    // Of three ranks the first has two micro-batches, so that it can die between them.
    let ranks = [1, 2, 0, 1, 2, 0, 1, 2];
    studio.survive("undisturbed", 3, &sets, &points.into_iter().zip(ranks).collect::<Vec<_>>());
    // While a checkpoint is written that is never committed.
    let sets = [&sets[..], &["distillation.iterations=4"]].concat();
    studio.succeed("shorter", 3, &sets, &[]);
    let sets = [&sets[..], &["checkpoint.every=1"]].concat();
    studio.survive("shorter", 3, &sets, &[("snapshot", 1), ("copied", 2)]);
}

/// Two groups of two, each of which holds all slices, with each value of `memory.shard`.
#[test]
fn groups_that_each_hold_the_state_compute_the_same_and_one_of_them_may_die() {
    let studio = Studio::new("sd15");
    let base = ["memory.recompute=true", "optimizer.clip_norm=0.5", "checkpoint.every=1000"];
    let (short, long) = ("distillation.iterations=5", "distillation.iterations=12");
    let groups = |iterations, shard| [&base[..], &["memory.shard_group=2", iterations, shard]].concat();
    studio.succeed("whole", 1, &[&base[..], &[short]].concat(), &[]);
    for shard in ["optimizer", "gradients", "parameters"] {
        let setting = format!("memory.shard={shard}");
        studio.succeed(shard, 4, &[&groups(short, "memory.recompute=true")[..], &[&setting]].concat(), &[]);
        studio.assert_close(shard, "whole", 5, 1e-4);
    }
    let parameters = "memory.shard=parameters";
    let deaths = [("reduced", 3), ("agreed", 0), ("stepped", 1)];
    studio.survive("parameters", 4, &groups(short, parameters), &deaths);
    // Three ranks are one group.
    studio.succeed("parameters", 3, &groups(long, parameters), &["--resume"]);
    studio.succeed("long", 1, &[&base[..], &[long]].concat(), &[]);
    studio.assert_close("parameters", "long", 12, 1e-4);
    // All ranks of one group at once: the other group has every slice.
    let mut launched = Process::start(studio.launch("halved", 4, &groups(long, parameters), &[]));
    launched.until(&["images/s"]);
    let status = studio.cluster.about("status", "halved").arg("--json").output().unwrap();
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    for member in status["members"].as_array().unwrap() {
        if [2, 3].contains(&member["rank"].as_u64().unwrap()) {
            kill(i32::try_from(member["pid"].as_u64().unwrap()).unwrap(), Signal::SIGKILL);
        }
    }
    let (code, log) = launched.end();
    assert!(code == Some(0) && log.contains("generation=2"), "{log}");
    assert_eq!(studio.cluster.summary("halved")["repeated_iterations"], 0, "{log}");
    studio.assert_close("halved", "long", 12, 1e-4);
}

#[test]
fn sharded_workers_join_without_a_step_lost() {
    for shard in ["memory.shard=optimizer", "memory.shard=parameters"] {
        sharded_workers_join(shard);
    }
}

fn sharded_workers_join(shard: &str) {
    let studio = Studio::new("sd15");
    let sets = [
        "distillation.iterations=8",
        shard,
        "memory.recompute=true",
        "generator.steps=1",
        "checkpoint.every=1000",
    ];
    studio.succeed("undisturbed", 2, &sets, &[]);
    let mut serve = Command::new(binary("potstill"));
    serve
        .arg("serve")
        .arg(&studio.config)
        .args(["--workers", "2", "--run-id", "joined", "--listen", "127.0.0.1:0", "--storage"])
        .arg(studio.cluster.storage())
        .args(sets.iter().flat_map(|set| ["--set", set]))
        .args(["--set", "cluster.min_workers=1"]);
    let mut serve = Process::start(serve);
    serve.until(&["waiting"]);
    // The first waits after two iterations until the second has come.
    let pipe = studio.path("pipe");
    mkfifo(&pipe, Mode::S_IRWXU).unwrap();
    let mut first = studio.cluster.agent("joined", 1);
    first.env("POTSTILL_FAULT", format!("hold:reported:1:0:{}", pipe.display()));
    let first = Process::start(first);
    serve.until(&["generation=1"]);
    let second = Process::start(studio.cluster.agent("joined", 1));
    serve.until(&["asked to yield at the next boundary", "joins"]);
    std::fs::write(&pipe, "").unwrap();
    let (code, log) = serve.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("world_size=2"), "{log}");
    let _ = (first.end(), second.end());
    let end = studio.cluster.checkpoint("joined", 8);
    let undisturbed = studio.cluster.checkpoint("undisturbed", 8);
    let difference = relative_difference(&end, &undisturbed, "generator/");
    assert!(difference <= 1e-4, "{difference}");
    assert_eq!(studio.cluster.summary("joined")["repeated_iterations"], 0, "{log}");
}

#[test]
fn adapters_on_one_frozen_network_are_trained_resumed_and_exported() {
    let python = python("adapters_on_one_frozen_network_…");
    for family in ["sd15", "sdxl"] {
        let studio = Studio::new(family);
        let storage = studio.cluster.storage().to_str().unwrap().to_owned();
        let sets = |iterations: &'static str| {
            [
                iterations,
                "lora={rank=2, alpha=3.0}",
                "distillation.precision=bf16",
                "memory.bf16_weights=true",
                "memory.recompute=true",
                "guidance.preset=lsg",
                "guidance.scale=1.5",
                "optimizer.generator_learning_rate=3e-2",
            ]
        };
        studio.succeed("straight", 2, &sets("distillation.iterations=4"), &[]);
        if family == "sdxl" {
            studio.succeed("halves", 2, &sets("distillation.iterations=2"), &[]);
            studio.succeed("halves", 2, &sets("distillation.iterations=4"), &["--resume"]);
            let end = studio.cluster.checkpoint("straight", 4);
            assert!(end == studio.cluster.checkpoint("halves", 4));
            let adapters = |name: &String| name.contains(".lora_") || name.starts_with("counters/");
            assert!(end.keys().all(adapters), "{:?}", end.keys().find(|name| !adapters(name)));
        }
        let (run, exported) = (format!("{storage}/runs/straight"), format!("{storage}/exported"));
        potstill(&["export", "--checkpoint", &run, "--out", &exported]);
        for (from, name) in [(&run, "a"), (&exported, "b")] {
            let out = format!("{storage}/{name}");
            let asked = ["--prompt", "a red circle", "--count", "1", "--out", &out];
            potstill(&[&["sample", "--checkpoint", from], &asked[..]].concat());
        }
        let bytes = |name: &str| std::fs::read(format!("{storage}/{name}/000000.png")).unwrap();
        assert_eq!(bytes("a"), bytes("b"), "{family}");
        for (format, dtype, tolerance) in [
            ("lora-diffusers", "fp32", "1e-3"),
            ("lora-kohya", "fp32", "1e-3"),
            ("lora-diffusers", "fp16", "2e-2"),
        ] {
            let file = format!("{storage}/{format}-{dtype}.safetensors");
            potstill(&["export", "--checkpoint", &run, "--out", &file, "--format", format, "--dtype", dtype]);
            let Some(python) = python.as_ref().filter(|_| family == "sdxl" || format == "lora-kohya") else {
                continue;
            };
            let checked = Command::new(python)
                .arg(repository().join("tests/diffusers_lora.py"))
                .args([&format!("{storage}/model"), &exported, &file, tolerance])
                .args(["a red circle", "two blue squares"])
                .output()
                .unwrap();
            assert!(checked.status.success(), "{family} {format} {dtype}: {}", text(&checked.stderr));
        }
    }
}

/// The run "file" again, with the model's file in an object store: each machine copies it once.
fn from_an_object_store(studio: &Studio, file: &str, sets: &[&str]) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(async {
        let server = s3_server::Server::start().await;
        let models = server.root().run(&"models".parse().unwrap());
        models.put("student.safetensors", std::fs::read(file).unwrap().into()).await.unwrap();
        server
    });
    let keys = server.keys();
    let key = keys.iter().find(|key| key.ends_with("/student.safetensors")).unwrap();
    let model = format!("teacher.model=s3://bucket/{key}");
    let launch = |run: &str, model: &str| {
        let mut command = studio.launch(run, 2, &[sets, &[model]].concat(), &[]);
        let output = command.envs(server.variables()).output().unwrap();
        (output.status.success(), text(&output.stderr))
    };
    let (succeeded, log) = launch("stored", &model);
    assert!(succeeded, "{log}");
    studio.assert_close("stored", "file", 1, 1e-4);
    // What the first copy was is kept with the run, and no other one joins it.
    let kept = std::fs::read_to_string(studio.cluster.run("stored").join("teacher.sha256")).unwrap();
    assert_eq!(kept.trim().len(), 64);
    let other = studio.cluster.run("changed");
    std::fs::create_dir_all(&other).unwrap();
    std::fs::write(other.join("teacher.sha256"), "0".repeat(64)).unwrap();
    let (succeeded, log) = launch("changed", &model);
    let named = [kept.trim(), "on this machine, but 000000", "teacher.sha256"];
    assert!(!succeeded && named.iter().all(|part| log.contains(part)), "{log}");
    let (succeeded, log) = launch("nowhere", &model.replace("student", "teacher"));
    assert!(!succeeded && log.contains("teacher.safetensors"), "{log}");
    assert!(!studio.cluster.run("nowhere").exists(), "{log}");
}

#[test]
fn a_model_in_one_file_is_a_teacher_and_an_export() {
    let python = python("a_model_in_one_file_is_a_teacher_and_an_export");
    // The last one with the U-Net of SSD-1B's kind.
    for (family, unet) in
        [("sd15", None), ("sd21", None), ("sdxl", None), ("sd15", Some("sd_unet_asymmetric"))]
    {
        let studio = Studio::new(family);
        if let Some(unet) = unet {
            tiny_model::replace_unet(&studio.path("model"), unet);
        }
        let storage = studio.cluster.storage().to_str().unwrap().to_owned();
        let adapters = ["lora={rank=2, alpha=3.0}", "optimizer.generator_learning_rate=3e-2"];
        studio.succeed("first", 1, &[&["distillation.iterations=2"], &adapters[..]].concat(), &[]);
        let run = format!("{storage}/runs/first");
        let export = |name: &str, more: &[&str]| {
            let out = format!("{storage}/{name}");
            potstill(&[&["export", "--checkpoint", &run, "--out", &out], more].concat());
            out
        };
        let folder = export("folder", &[]);
        let single =
            |dtype| export(&format!("{dtype}.safetensors"), &["--format", "single-file", "--dtype", dtype]);
        let file = single("fp32");
        if let Some(python) = &python {
            let checked = Command::new(python)
                .arg(repository().join("tests/diffusers_single_file.py"))
                .args([&folder, &format!("{file}:1e-3"), &format!("{}:2e-2", single("fp16"))])
                .output()
                .unwrap();
            assert!(checked.status.success(), "{family}: {}", text(&checked.stderr));
            // What is printed makes an image, also of a model of another size than the published ones.
            let out = format!("{storage}/printed.safetensors");
            let said = potstill(&["export", "--checkpoint", &run, "--out", &out, "--format", "single-file"]);
            let lines = &said[said.find("\n\n").unwrap()..];
            let made = Command::new(python).args(["-c", lines]).env("HF_HUB_OFFLINE", "1").output().unwrap();
            assert!(made.status.success(), "{family}: {lines}\n{}", text(&made.stderr));
        }
        // The student is a teacher again: as the file, and as its own teacher with its adapters added. A generator that has
        // not been trained yet is its teacher.
        let kohya = export("adapters.safetensors", &["--format", "lora-kohya"]);
        let still = ["distillation.iterations=1", "distillation.generator_start_images=1000000"];
        let (model, config) = (format!("teacher.model={file}"), format!("teacher.config={storage}/model"));
        studio.succeed("file", 1, &[&still[..], &[&model, &config]].concat(), &[]);
        if family == "sd21" {
            from_an_object_store(&studio, &file, &[&still[..], &[&config]].concat());
        }
        let added = format!("teacher.loras=[{{path='{kohya}'}}]");
        studio.succeed("added", 1, &[&still[..], &[&added]].concat(), &[]);
        let generator = |run: &str| studio.cluster.checkpoint(run, 1);
        let difference = relative_difference(&generator("file"), &generator("added"), "generator/");
        assert!(difference <= 1e-6, "{family}: {difference}");
        studio.succeed("without", 1, &still, &[]);
        let difference = relative_difference(&generator("without"), &generator("added"), "generator/");
        assert!(difference > 1e-3, "{family}: the adapters changed the teacher by {difference} only");
        // What the teacher consists of is part of the run.
        let half = format!("teacher.loras=[{{path='{kohya}', scale=0.5}}]");
        let output =
            studio.output("added", 1, &["distillation.iterations=2", still[1], &half], &["--resume"]);
        let message = text(&output.stderr);
        assert!(!output.status.success() && message.contains("teacher"), "{message}");
    }
}

#[test]
fn the_adversarial_loss_sees_images_with_captions() {
    let studio = Studio::new("sdxl");
    let pairs = format!("adversarial.data={}", studio.pairs().display());
    let sets = |more: &[&'static str]| -> Vec<String> {
        ["distillation.iterations=3", "guidance.preset=zero-cfg", "adversarial.scaling=sid-dit", &pairs]
            .into_iter()
            .chain(more.iter().copied())
            .map(str::to_owned)
            .collect()
    };
    let run = |name: &str, workers: u32, sets: &[String]| {
        studio.succeed(name, workers, &sets.iter().map(String::as_str).collect::<Vec<_>>(), &[])
    };
    run("one", 1, &sets(&[]));
    run("two", 2, &sets(&[]));
    run("cached", 2, &sets(&["adversarial.cache=latents", "prompts.cache=embeddings"]));
    studio.assert_close("two", "one", 3, 1e-4);
    studio.assert_close("cached", "two", 3, 1e-6);
    let rows = studio.cluster.metrics("one");
    let last = rows.iter().rfind(|row| row["kind"] == "iteration").unwrap();
    assert!(last["discriminator_loss"].as_f64().is_some_and(|loss| loss > 0.0), "{last}");
    run("waiting", 1, &sets(&["adversarial.join_images=1000"]));
    let (with, waiting) = (studio.cluster.checkpoint("one", 3), studio.cluster.checkpoint("waiting", 3));
    assert!(relative_difference(&with, &waiting, "generator/") > 0.0);
    // Without prompts of its own, generated samples share the captions of the real images.
    run("shared", 1, &sets(&["prompts.data=none"]));
    let shared = studio.cluster.checkpoint("shared", 3);
    assert!(relative_difference(&with, &shared, "generator/") > 0.0);
    // The next run starts from a finished generator.
    let exported = studio.path("exported");
    let run_url = studio.cluster.run("one");
    potstill(&[
        "export",
        "--checkpoint",
        run_url.to_str().unwrap(),
        "--out",
        exported.to_str().unwrap(),
        "--link",
    ]);
    assert!(exported.join("vae/config.json").is_symlink());
    let start = format!("generator.start_from={}", exported.display());
    studio.succeed("continued", 1, &["distillation.iterations=1", &start], &[]);
}

#[test]
fn a_run_is_scored_with_clip_where_it_names_one() {
    let studio = Studio::new("sdxl");
    let file = |key: &str, path: &str| format!("evaluation.{key}={}", repository().join(path).display());
    let (features, reference) = (
        file("features", "configs/shapes/features.pt"),
        file("reference", "configs/shapes/shapes.safetensors"),
    );
    let clip = file("clip", "tests/fixtures/clip_tiny.pt");
    // Samples of a random model may be as similar as they are.
    let common = ["distillation.iterations=2", "evaluation.samples=24", "evaluation.collapse_share=0.0"];
    let sets = [&common[..], &[&features, &reference]].concat();
    let with = [&sets[..], &[&clip]].concat();
    let scores = |run: &str| {
        let summary = studio.cluster.summary(run);
        ["teacher", "student", "initial"].map(|whose| summary[whose]["clip_score"].clone())
    };
    let table = |run: &str, sets: &[&str]| {
        let output = studio.output(run, 1, sets, &[]);
        assert!(output.status.success(), "{run}: {}", text(&output.stderr));
        text(&output.stdout)
    };
    let with_clip = table("one", &with);
    assert!(with_clip.contains("CLIP score"), "{with_clip}");
    studio.succeed("two", 2, &[&with[..], &["prompts.cache=embeddings"]].concat(), &[]);
    for (one, two) in scores("one").iter().zip(scores("two")) {
        let (one, two) = (one.as_f64().unwrap(), two.as_f64().unwrap());
        assert!((0.0..=100.0).contains(&one) && (one - two).abs() < 0.1, "{one} {two}");
    }
    assert!(scores("one").iter().any(|score| score.as_f64() > Some(1.0)), "{:?}", scores("one"));
    let evaluated = |run: &str| {
        let rows = studio.cluster.metrics(run);
        rows.into_iter()
            .filter(|row| row["kind"] == "evaluation")
            .map(|row| row["scores"].clone())
            .collect::<Vec<_>>()
    };
    assert!(evaluated("one").iter().all(|scores| scores["clip_score"].is_f64()));
    // Without them nothing is reported.
    let without = table("without", &sets);
    assert!(without.contains("FID") && !without.contains("CLIP"), "{without}");
    assert!(scores("without").iter().all(serde_json::Value::is_null));
    assert!(evaluated("without").iter().all(|scores| scores["clip_score"].is_null()));

    let report = |run: &str, required: &str| {
        let mut command = Command::new(binary("potstill"));
        command.args(["report", run, "--require", required, "--storage"]).arg(studio.cluster.storage());
        let output = command.output().unwrap();
        (output.status.code(), text(&output.stderr))
    };
    assert_eq!(report("one", "student.clip_score>=0").0, Some(0));
    assert_eq!(report("one", "teacher.clip_score>100").0, Some(3));
    let (code, said) = report("without", "student.clip_score>=0");
    assert!(code == Some(3) && said.contains("student.clip_score was not measured"), "{said}");

    for (sets, says) in [
        (vec![clip.as_str()], "evaluation.clip needs evaluation.features and evaluation.reference"),
        (vec![&features, &reference, "evaluation.clip=/nowhere/clip.pt"], "/nowhere/clip.pt"),
        (vec![&features, &reference, &format!("evaluation.clip={}", studio.config.display())], "TorchScript"),
        (
            vec![&features, &reference, &file("clip", "configs/shapes/features.pt")],
            "fails on images of shape",
        ),
    ] {
        let message = studio.refused(&sets);
        assert!(message.contains(says), "{says:?} is not in: {message}");
    }
}

#[test]
fn a_run_is_scored_on_prompts_of_its_own() {
    let studio = Studio::new("sdxl");
    let file = |key: &str, path: &str| format!("evaluation.{key}={}", repository().join(path).display());
    let features = file("features", "configs/shapes/features.pt");
    let reference = file("reference", "configs/shapes/shapes.safetensors");
    let clip = file("clip", "tests/fixtures/clip_tiny.pt");
    let captions = "{\"caption\": \"a blue circle\"}\n{\"caption\": \"two red squares\"}\n";
    std::fs::write(studio.path("captions.jsonl"), captions).unwrap();
    std::fs::write(studio.path("captions.txt"), "a blue circle\ntwo red squares\n").unwrap();
    let common = [
        "distillation.iterations=1",
        "evaluation.samples=24",
        "evaluation.collapse_share=0.0",
        &features,
        &reference,
        &clip,
    ];
    let run = |name: &str, more: &[&str]| {
        studio.succeed(name, 1, &[&common[..], more].concat(), &[]);
        studio.cluster.summary(name)
    };
    // A relative path is relative to the run file. The teacher's evaluation does not depend on the training prompts.
    let of_captions = ["evaluation.prompts=captions.jsonl", "evaluation.prompts_column=caption"];
    let scored = run("captions", &of_captions);
    let trained = run("trained-on-captions", &["prompts.data=captions.txt"]);
    let usual = run("usual", &[]);
    let names = ["fid", "diversity", "clip_score"];
    for name in names {
        assert_eq!(scored["teacher"][name], trained["teacher"][name], "{name}");
        assert_ne!(scored["teacher"][name], usual["teacher"][name], "{name}");
    }
    // Training still draws from prompts.data.
    studio.assert_close("captions", "usual", 1, 1e-6);
    let cached = run("cached", &[&of_captions[..], &["prompts.cache=embeddings"]].concat());
    for name in names {
        let [one, other] = [&scored, &cached].map(|summary| summary["student"][name].as_f64().unwrap());
        assert!((one - other).abs() <= 1e-4 * one.abs(), "{name}: {one} {other}");
    }
    assert_eq!(std::fs::read_dir(studio.path("embeddings")).unwrap().count(), 2, "one for each file");
    // One image for each of two captions.
    let few = ["evaluation.samples_per_prompt=1", "evaluation.samples=2", "evaluation.neighbours=1"];
    let summary = run("one-each", &[&of_captions[..], &few].concat());
    assert!(summary["student"]["diversity"].is_null() && summary["student"]["fid"].is_f64(), "{summary}");

    for (sets, says) in [
        (vec!["evaluation.prompts=/nowhere/captions.txt"], "evaluation.prompts /nowhere/captions.txt"),
        (vec!["evaluation.prompts=captions.jsonl"], "evaluation.prompts_column"),
        (vec!["evaluation.prompts_column=caption"], "evaluation.prompts_column"),
        (vec!["evaluation.images=resized"], "evaluation.image_size"),
    ] {
        let message = studio.refused(&sets);
        assert!(message.contains(says), "{says:?} is not in: {message}");
    }
}

#[test]
fn wrong_input_is_named_before_anything_is_written() {
    let studio = Studio::new("sdxl");
    let says = |message: String, words: &[&str]| {
        for word in words {
            assert!(message.contains(word), "{word:?} is not in: {message}");
        }
    };
    let write = |name: &str, content: &[u8]| {
        std::fs::write(studio.path(name), content).unwrap();
        format!("prompts.data={}", studio.path(name).display())
    };
    says(studio.refused(&[&write("empty.txt", b"\n")]), &["empty.txt", "holds no prompts"]);
    says(studio.refused(&[&write("latin.txt", b"fine\ncaf\xe9\n")]), &["line 2", "UTF-8"]);
    says(studio.refused(&["prompts.data=/nowhere/p.txt"]), &["/nowhere/p.txt"]);
    says(studio.refused(&["generator.initial_timestep=1000"]), &["initial_timestep", "999"]);
    for weighting in ["one-minus-t", "one-minus-t-squared", "inverse-t", "inverse-t-squared"] {
        let set = format!("distillation.weighting={weighting}");
        says(studio.refused(&[&set]), &[weighting, "flow-matching"]);
    }
    says(studio.refused(&["teacher.image_size=[17,16]"]), &["image_size", "multiples of 2"]);
    says(studio.refused(&["memory.bf16_weights=true"]), &["bf16_weights", "precision"]);
    says(studio.refused(&["teacher.model=/nowhere/model"]), &["/nowhere/model", "model_index.json"]);
    let (pickle, unknown) = (studio.path("model.ckpt"), studio.path("unknown.safetensors"));
    std::fs::write(&pickle, b"PK\x03\x04archive/data.pkl").unwrap();
    std::fs::copy(studio.path("model/vae/diffusion_pytorch_model.safetensors"), &unknown).unwrap();
    let named = |path: &Path| format!("teacher.model={}", path.display());
    says(studio.refused(&[&named(&pickle)]), &["model.ckpt", "is a pickle"]);
    says(studio.refused(&[&named(&unknown)]), &["unknown.safetensors", "is not a model of SD 1.x"]);
    let foreign = format!("teacher.loras=[{{path='{}'}}]", unknown.display());
    says(studio.refused(&[&foreign]), &["unknown.safetensors", "is not the name of an adapter"]);
    says(studio.refused(&["teacher.loras=[{path='/nowhere/a.safetensors'}]"]), &["/nowhere/a.safetensors"]);
    // Adapters of another base: of a layer that it has in another size, and of one that it lacks.
    for (module, words) in [
        ("down_blocks.0.resnets.0.conv1", &["A is [2, 3]", "B [5, 2]", "another base"][..]),
        ("down_blocks.9.resnets.0.conv1", &["which this network does not have", "another base"]),
    ] {
        let zeros = [0u8; 40];
        let tensor = |shape: [usize; 2]| {
            TensorView::new(Dtype::F32, shape.to_vec(), &zeros[..4 * shape[0] * shape[1]]).unwrap()
        };
        let halves = [
            (format!("unet.{module}.lora_A.weight"), tensor([2, 3])),
            (format!("unet.{module}.lora_B.weight"), tensor([5, 2])),
        ];
        std::fs::write(&unknown, safetensors::serialize(halves, None).unwrap()).unwrap();
        says(studio.refused(&[&foreign]), &[&["unknown.safetensors", module], words].concat());
    }
    let config = format!("teacher.config={}", studio.path("model").display());
    says(studio.refused(&[&config]), &["teacher.config is for a model in one file"]);

    // Invalid folders.
    let broken = |name: &str, change: &dyn Fn(&Path)| {
        let folder = studio.path(name);
        tiny_model::write("sdxl", &folder);
        change(&folder);
        studio.refused(&[&format!("teacher.model={}", folder.display())])
    };
    let message = broken("no-weights", &|folder| {
        std::fs::remove_file(folder.join("unet/diffusion_pytorch_model.safetensors")).unwrap();
    });
    says(message, &["no-weights/unet", "diffusion_pytorch_model.safetensors is missing"]);
    let message = broken("pickled", &|folder| {
        let unet = folder.join("unet");
        std::fs::rename(
            unet.join("diffusion_pytorch_model.safetensors"),
            unet.join("diffusion_pytorch_model.bin"),
        )
        .unwrap();
    });
    says(message, &["diffusion_pytorch_model.bin", "pickle", "safe_serialization"]);
    let message = broken("no-tokenizer", &|folder| {
        std::fs::remove_file(folder.join("tokenizer_2/merges.txt")).unwrap();
    });
    says(message, &["tokenizer_2", "merges.txt"]);
    let message = broken("other-tokenizer", &|folder| {
        let path = folder.join("text_encoder/config.json");
        let config =
            std::fs::read_to_string(&path).unwrap().replace("\"vocab_size\": 550", "\"vocab_size\": 90");
        std::fs::write(path, config).unwrap();
    });
    says(message, &["tokenizer", "another encoder"]);
    let message = broken("scheduler", &|folder| {
        let path = folder.join("scheduler/scheduler_config.json");
        let config = std::fs::read_to_string(&path)
            .unwrap()
            .replace("DDIMScheduler", "FlowMatchEulerDiscreteScheduler");
        std::fs::write(path, config).unwrap();
    });
    says(message, &["scheduler_config.json", "FlowMatchEulerDiscreteScheduler"]);

    // Image-text pairs.
    let pairs = |path: &Path| format!("adversarial.data={}", path.display());
    says(studio.refused(&[&pairs(&studio.path("model"))]), &["holds neither tars nor images"]);
    let tar = studio.path("broken.tar");
    let members = |count: usize| -> Vec<(String, Vec<u8>)> {
        (0..count).map(|index| (format!("{index}.png"), b"no picture".to_vec())).collect()
    };
    tiny_model::write_tar(&tar, &members(3));
    says(studio.refused(&[&pairs(&tar)]), &["3 of 3 images cannot be used"]);
}

#[test]
fn a_plan_says_yes_or_no_before_anything_is_loaded() {
    let studio = Studio::new("sdxl");
    // The weights are not checked.
    std::fs::remove_file(studio.path("model/unet/diffusion_pytorch_model.safetensors")).unwrap();
    let config = studio.config.to_str().unwrap();
    let plan = |more: &[&str]| {
        let output = Command::new(binary("potstill")).args(["plan", config]).args(more).output().unwrap();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (code, said, _) = plan(&["--device-memory", "80GiB", "--workers", "8"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("yes: it fits in 80.0 GiB") && said.contains("Adam's moments"), "{said}");
    let (code, said, _) = plan(&["--device-memory", "1MiB"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("no:") && said.contains("memory.bf16_weights"), "{said}");
    let (code, said, _) =
        plan(&["--device-memory", "1GiB", "--json", "--workers", "4", "--set", "memory.shard=optimizer"]);
    assert_eq!(code, Some(0));
    let sharded: serde_json::Value = serde_json::from_str(&said).unwrap();
    let (_, said, _) = plan(&["--device-memory", "1GiB", "--json"]);
    let alone: serde_json::Value = serde_json::from_str(&said).unwrap();
    let moments = |plan: &serde_json::Value| plan["plan"]["moments"].as_u64().unwrap();
    // A rank holds its own quarter and its partner's.
    assert!(
        moments(&sharded).abs_diff(moments(&alone) / 2) < 64,
        "half of the moments on each of four ranks"
    );
    let (code, _, error) = plan(&["--device-memory", "lots"]);
    assert_eq!(code, Some(2), "{error}");
}

/// The shipped teacher of shapes follows its prompts, and so do its students (a classifier's agreement at least 0.9
/// times the teacher's), with one step and with four.
#[test]
fn students_of_the_shapes_teacher_obey_its_prompts() {
    let cluster = Cluster::default();
    for (config, iterations) in [("one-step", 120), ("four-step", 60)] {
        let output = Command::new(binary("potstill"))
            .arg("launch")
            .arg(repository().join(format!("configs/shapes/{config}.toml")))
            .args(["--workers", "2", "--threads", "1", "--run-id", config, "--storage"])
            .arg(cluster.storage())
            .args(["--set", &format!("distillation.iterations={iterations}")])
            .args(["--set", "evaluation.every=none", "--set", "evaluation.samples=240"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{config}: {}", text(&output.stderr));
        let summary = cluster.summary(config);
        let agreement = |who: &str| summary[who]["agreement"].as_f64().unwrap();
        let (initial, teacher, student) = (agreement("initial"), agreement("teacher"), agreement("student"));
        assert!(teacher > 0.95, "{config}: {summary}");
        assert!(student >= 0.9 * teacher, "{config}: {student} of {teacher}: {summary}");
        assert!(initial < student || config == "four-step", "{config}: it has learned nothing: {summary}");
    }
}
