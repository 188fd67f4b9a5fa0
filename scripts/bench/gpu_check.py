#!/usr/bin/env python3
"""Check and measure Potstill on this machine's GPU, and print each result as a line of JSON at once.

    scripts/bench/gpu_check.py                        everything that fits in the budget, the most valuable first
    scripts/bench/gpu_check.py --only sdxl,recovery   these parts
    scripts/bench/gpu_check.py --budget 330           seconds; a part that would not fit is left out, and one that takes
                                                      longer is cut short
    scripts/bench/gpu_check.py --rehearse             the same code on the CPU with tiny networks: 3 minutes
    scripts/dry_gpu/dry_gpu.py scripts/bench/gpu_check.py --rehearse cuda --only card,nccl,sdxl,recovery,graphs
                                                      and on a GPU that computes nothing, so that results are not compared

The parts, in their order:
    card           the measured rates of bf16 products and of copies, with which the others are compared
    nccl           a group of one rank: formed, aborted within an iteration, formed again by the same process
    digits         the digits on the GPU beside the CPU, with and without TF32
    sdxl, sd15     iterations of the shipped presets with random weights, beside PyTorch and diffusers: seconds,
                   images/s, TFLOP/s, memory beside `potstill plan`
    recovery       kill -9 of the rank, of the coordinator, and of both: whether the result is the same, bit by bit
    precision      loss and gradients of one iteration in bf16 beside fp32
    graphs         micro-batches as CUDA graphs: whether the result is the same, and how much faster the presets are
    sdxl-compiled, sd15-compiled
                   the baseline with what PyTorch and diffusers offer to make it faster
    sdxl-lora      adapters on SDXL
    profile        what the GPU does in an iteration on SDXL: kernels by their time
    fits           SDXL's full distillation with no more memory than a card of 80 GB has
    quality        the shapes example from beginning to end

Where OUT names a folder, it gets results.jsonl, logs.tar.gz and the profile's trace.json.gz. Where there is no GPU the
script says so and exits with 0. It runs in the repository, and in the folder that gpu_bundle.sh makes, on a machine
that has nothing but PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from gpu_run import BUNDLE, Check, Failed, Run, apart, libraries_of, tail

# Seconds without which a part is not begun on a GPU.
NEEDS = {
    "card": 10,
    "nccl": 20,
    "digits": 25,
    "sdxl": 50,
    "sd15": 40,
    "recovery": 30,
    "precision": 30,
    "graphs": 50,
    "sdxl-compiled": 60,
    "sd15-compiled": 50,
    "sdxl-lora": 45,
    "profile": 60,
    "fits": 40,
    "quality": 25,
}
PARTS = [
    "card",
    "nccl",
    "digits",
    "sdxl",
    "sd15",
    "recovery",
    "precision",
    "graphs",
    "sdxl-compiled",
    "sdxl-lora",
    "sd15-compiled",
    "profile",
    "fits",
    "quality",
]
GIB = 1 << 30
# What a card of 80 GB has for a process's tensors: 81,559 MiB less the context.
CARD_OF_80_GB = 79 * GIB
NO_FEATURES = {"evaluation.features": "none", "evaluation.reference": "none", "evaluation.every": "none"}


def card(check: Check) -> None:
    check.card = check.script("card", "gpu_card.py", check.device)
    check.emit("card", **check.card)


def nccl(check: Check) -> None:
    """The rank aborts its group within an iteration, as it does when a peer is lost, and forms the next one."""
    torn = check.work / "torn"
    at = 3 if check.rehearsal else 40
    settings = NO_FEATURES | {
        "distillation.iterations": 10**6,
        "distillation.global_batch": 8,
        "distillation.micro_batch": 8,
        "checkpoint.every": 10**6,
    }
    started = time.time()
    with Run(
        check,
        "nccl",
        check.root / "configs/digits/one-step.toml",
        settings,
        environment={"POTSTILL_FAULT": f"tear:reduced:{at}:0:{torn}", "TORCH_CPP_LOG_LEVEL": "WARNING"},
    ) as run:
        first = run.until(run.iterations, "the first iteration")[0]
        opened = run.messages("generation opened")[0]["seconds_since_epoch"]
        loaded = libraries_of(run.rank())
        on_device = any("libtorch_cuda" in path for path in loaded) and any("nccl" in path for path in loaded)
        if check.device == "cuda" and not on_device:
            raise Failed(f"the rank has loaded neither libtorch_cuda nor NCCL: {loaded}")
        if not any(Path(path).parent == check.libtorch for path in loaded):
            # A link to the same folder is as good.
            here = any(Path(path).resolve().parent == check.libtorch.resolve() for path in loaded)
            if not here:
                raise Failed(f"libtorch is not that of {check.libtorch}: {loaded}")
        check.emit(
            "nccl",
            libraries=loaded,
            seconds_to_attach=run.messages("worker attached")[0]["seconds_since_epoch"] - started,
            seconds_of_group_and_first_iteration=first["seconds_since_epoch"] - opened,
        )
        run.until(lambda: len(run.messages("generation opened")) > 1, "the next generation")
        reopened = run.messages("generation opened")[1]["seconds_since_epoch"]
        after = run.until(
            lambda: [i for i in run.iterations() if i["seconds_since_epoch"] > reopened], "an iteration after the abort"
        )
        before = [i for i in run.iterations() if i["seconds_since_epoch"] < reopened][-1]
        again = after[0]["seconds_since_epoch"] - before["seconds_since_epoch"]
        lost = run.messages("worker lost")
        check.emit(
            "nccl",
            aborted_at=at,
            seconds_from_iteration_to_iteration_over_the_abort=again,
            within_5_seconds=again < 5,
            same_process=not lost,
            iteration_after=after[0]["iteration"],
        )


def digits(check: Check) -> None:
    count = 2 if check.rehearsal else 20
    settings = NO_FEATURES | {"distillation.iterations": count}
    if check.rehearsal:
        settings |= {"distillation.global_batch": 8, "distillation.micro_batch": 4}
    config = check.root / "configs/digits/one-step.toml"
    kinds = {"digits-cpu": {}, "digits-tf32": {}, "digits-fp32": {"NVIDIA_TF32_OVERRIDE": "0"}}
    with contextlib.ExitStack() as stack:
        runs = {}
        for name, environment in kinds.items():
            on = "cpu" if name == "digits-cpu" else None
            run = Run(check, name, config, settings, environment=environment, device=on)
            runs[name] = stack.enter_context(run)
        for run in runs.values():
            run.success()
        reference = runs["digits-cpu"].state()
        for name in ("digits-fp32", "digits-tf32"):
            difference = apart(runs[name].state(), reference, "generator/")
            check.emit("digits", run=name, iterations=count, generators_apart=difference, ok=difference < 1e-2)


def preset(
    check: Check, model: str, name: str, adapters: bool = False, network: str | None = None
) -> tuple[Path, dict]:
    """A run file that extends the shipped preset, of another network if one is named."""
    folder, about = check.model(network or model)
    config = check.work / f"{name}.toml"
    file = "four-step-lora.toml" if adapters else "one-step.toml"
    # JSON's strings are TOML's.
    lines = [
        f"extends = {json.dumps(str(check.root / 'configs' / model / file))}",
        "[teacher]",
        f"model = {json.dumps(str(folder))}",
        "[prompts]",
        f"data = {json.dumps(str(folder / 'prompts.txt'))}",
        f"cache = {json.dumps(str(check.work / ('cache-' + folder.name)))}",
    ]
    config.write_text("\n".join(lines) + "\n")
    return config, about


def settings_of(check: Check, model: str, adapters: bool, offload: bool) -> dict:
    """The preset's settings on one device."""
    batch = 1 if model == "sdxl" or check.rehearsal else 4
    return (
        NO_FEATURES
        | {
            "distillation.micro_batch": batch,
            "distillation.global_batch": batch,
            "distillation.iterations": 10**6,
            "checkpoint.every": 10**6,
            "memory.shard": "none",
            "memory.offload_ema": str(offload and not adapters).lower(),
            "generator.steps": 1,
        }
        | ({"lora.rank": 4} if adapters and check.rehearsal else {})
    )


def planned(check: Check, name: str, config: Path, settings: dict) -> dict:
    pairs = [flag for key, value in settings.items() for flag in ("--set", f"{key}={value}")]
    command = [check.programs / "potstill", "plan", config, "--device-memory", "1024GiB", "--json", *pairs]
    return json.loads(check.run(f"plan-{name}", command, check.native))


def memory_of_card(check: Check) -> int:
    if not check.card:
        check.card = check.script("card", "gpu_card.py", check.device)
    return check.card["memory"] or CARD_OF_80_GB


def operations(flops: dict, batch: int, recompute: bool, adapters: bool) -> tuple[int, int]:
    """Floating-point operations of an iteration: those that the algorithm needs, and those with recomputation. Guided
    passes have two samples for each. Fake-score phase: G forward, f_psi forward and backward. Generator phase: G
    forward and backward, teacher and f_psi forward and backward to their inputs."""
    f, frozen = flops["forward"], flops["frozen"]
    # Those of the adapters themselves are left out.
    trained = frozen if adapters else flops["trained"]
    needed = batch * ((f + 2 * f + 2 * trained) + (f + 4 * f + 4 * frozen + trained))
    return needed, needed + (batch * (2 * f + f + 4 * f) if recompute else 0)


def rates(check: Check, name: str, about: dict, batch: int, seconds: float) -> dict:
    model, adapters = MODELS[name]
    needed, computed = operations(about["flops"], batch, model == "sdxl", adapters)
    found = {"images_per_second": batch / seconds, "tflops_per_second": needed / seconds / 1e12}
    if peak := check.card.get("bf16_flops"):
        found |= {
            "share_of_bf16_peak": needed / seconds / peak,
            "share_with_recomputation": computed / seconds / peak,
        }
    return found


# The measured networks: which preset, whether adapters.
MODELS = {"sdxl": ("sdxl", False), "sd15": ("sd15", False), "sdxl-lora": ("sdxl", True)}


def offloads(check: Check, name: str, config: Path) -> bool:
    """Whether the average must lie in the host's memory, by the plan."""
    model, adapters = MODELS[name]
    needed = planned(check, name, config, settings_of(check, model, adapters, False))["needed"]
    return not adapters and needed > memory_of_card(check)


def measured(check: Check, name: str, run: Run, batch: int, warm_up: int, count: int) -> tuple[float, dict]:
    """Seconds of an iteration, median, and of its parts as far as the log has them."""
    run.until(lambda: len(run.iterations()) >= warm_up + count, f"iteration {warm_up + count}")
    found = run.iterations()[warm_up : warm_up + count]
    parts = {
        part: statistics.median(i[part] for i in found)
        for part in ("compute", "communication", "optimizer")
        if part in found[0]
    }
    seconds = statistics.median(i["seconds"] for i in found)
    if len(parts) == 3:
        parts["average and the rest"] = seconds - sum(parts.values())
    finite = all(isinstance(i[loss], float) for i in found for loss in ("fake_score_loss", "generator_loss"))
    return seconds, {
        "seconds_per_iteration": seconds,
        "least": min(i["seconds"] for i in found),
        "most": max(i["seconds"] for i in found),
        "parts": parts,
        "iterations": count,
        "finite": finite,
        "tensors_peak": found[-1]["memory_peak_bytes"],
    }


def out_of_memory(error: Failed) -> bool:
    return "out of memory" in str(error).lower()


def iteration(check: Check, name: str) -> None:
    """One network: Potstill's iteration, then that of PyTorch and diffusers."""
    model, adapters = MODELS[name]
    config, about = preset(check, model, name, adapters)
    offload = offloads(check, name, config)
    settings = settings_of(check, model, adapters, offload)
    batch = settings["distillation.micro_batch"]
    plan = planned(check, name, config, settings)
    warm_up, count = (1, 2) if check.rehearsal else (2, 5 if model == "sdxl" else 10)
    segments = {}
    check.quiet()
    for environment in ({}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}):
        try:
            with (
                Run(check, name, config, settings, environment=environment) as run,
                check.peak_memory(run.rank) as memory,
            ):
                seconds, found = measured(check, name, run, batch, warm_up, count)
                used = memory()
            break
        except Failed as error:
            if not out_of_memory(error) or environment:
                raise
            check.emit(name, what="Potstill", note="out of memory; once more with expandable segments")
            shutil.rmtree(run.storage / "runs" / run.id)
            segments = {"expandable_segments": True}
    recompute = model == "sdxl"
    check.ours[name] = seconds
    check.emit(
        name,
        what="Potstill",
        model=about["name"],
        parameters=about["parameters"],
        micro_batch=batch,
        offload_ema=offload,
        recompute=recompute,
        **found,
        **rates(check, name, about, batch, seconds),
        memory_used=used,
        planned_peak=plan["peak"],
        planned_need=plan["needed"],
        tensors_over_planned=found["tensors_peak"] / plan["peak"],
        used_over_planned=used / plan["needed"],
        **segments,
    )
    eager(check, name, "plain", about, batch, offload)


def eager(check: Check, name: str, tuning: str, about: dict, batch: int, offload: bool) -> None:
    model, adapters = MODELS[name]
    # The presets: SD 1.5 has fp32 weights under autocast and keeps its activations, SDXL has bf16 weights and
    # recomputes.
    low = model == "sdxl"
    warm_up, count = (1, 1) if check.rehearsal else (2, 5 if low else 10)
    wanted = {
        "model": about["name"],
        "device": check.device,
        "tokens": 16 if check.rehearsal else 77,
        "micro_batch": batch,
        "iterations": warm_up + count,
        "warm_up": warm_up,
        "bf16_weights": low,
        "autocast": not low,
        "recompute": low,
        "offload_ema": offload,
        "lora_rank": (4 if check.rehearsal else 64) if adapters else None,
        "tuning": tuning,
        "backend": "eager" if check.rehearsal else "inductor",
    }
    found = check.script(f"{name}-{tuning}", "gpu_check_eager.py", json.dumps(wanted))
    if found["parameters"] != about["parameters"]:
        raise Failed(f"the networks differ: {about['parameters']} and {found['parameters']} parameters")
    seconds = found["seconds_per_iteration"]
    check.emit(
        name,
        what="PyTorch and diffusers",
        tuning=tuning,
        **found,
        **rates(check, name, about, batch, seconds),
        ratio=seconds / check.ours[name] if name in check.ours else None,
    )


def graphs(check: Check) -> None:
    """The digits with graphs and without, and then the presets with graphs, beside their iterations without."""
    count = 3 if check.rehearsal else 20
    settings = NO_FEATURES | {"distillation.iterations": count}
    if check.rehearsal:
        settings |= {"distillation.global_batch": 8, "distillation.micro_batch": 4}
    states, losses = {}, {}
    for on in ("false", "true"):
        name = f"graphs-digits-{on}"
        with Run(
            check, name, check.root / "configs/digits/one-step.toml", settings | {"distillation.cuda_graphs": on}
        ) as run:
            run.success()
            states[on] = run.state()
            losses[on] = [[line["fake_score_loss"], line["generator_loss"]] for line in run.iterations()]
    same = all(states["true"][key].tobytes() == value.tobytes() for key, value in states["false"].items())
    difference = 0.0 if same else apart(states["true"], states["false"], "generator/")
    check.emit(
        "graphs",
        model="digits",
        iterations=count,
        identical=same,
        generators_apart=difference,
        losses_identical=losses["true"] == losses["false"],
        last_losses=[losses[on][-1] for on in losses],
    )
    for name in ("sd15", "sdxl"):
        if not check.rehearsal and check.left() < NEEDS[name] / 2:
            check.emit("graphs", model=name, skipped=f"{check.left():.0f} s are left")
            continue
        config, about = preset(check, MODELS[name][0], f"graphs-{name}")
        settings = settings_of(check, name, False, offloads(check, name, config)) | {"distillation.cuda_graphs": "true"}
        warm_up, measured_ones = (2, 2) if check.rehearsal else (3, 5)
        check.quiet()
        with Run(check, f"graphs-{name}", config, settings) as run:
            batch = settings["distillation.micro_batch"]
            seconds, found = measured(check, name, run, batch, warm_up, measured_ones)
            refused = [line["error"] for line in run.messages() if "recorded as CUDA graphs" in line["message"]]
        plan = planned(check, f"graphs-{name}", config, settings)
        check.emit(
            "graphs",
            model=about["name"],
            recorded=not refused,
            refused=refused,
            **found,
            **rates(check, name, about, batch, seconds),
            tensors_over_planned=found["tensors_peak"] / plan["peak"],
            faster_than_without=check.ours[name] / seconds if name in check.ours else None,
        )


def compiled(check: Check, name: str) -> None:
    """The tuned baseline. Compiled blocks first; whole networks take minutes to compile, and are tried where there is
    time."""
    model, adapters = MODELS[name]
    config, about = preset(check, model, name, adapters)
    offload = offloads(check, name, config)
    batch = settings_of(check, model, adapters, offload)["distillation.micro_batch"]
    eager(check, name, "blocks", about, batch, offload)
    if not check.rehearsal and check.left() > 150:
        eager(check, name, "networks", about, batch, offload)


def recovery(check: Check) -> None:
    """Runs of the digits: undisturbed, twice, which tells whether the kernels give the same bits at all, and with a
    death of the rank, of the coordinator, and of everything."""
    count, at = (8, 4) if check.rehearsal else (600, 200)
    settings = NO_FEATURES | {
        "distillation.iterations": count,
        "checkpoint.every": 2 if check.rehearsal else 50,
        "distillation.global_batch": 16,
        "distillation.micro_batch": 8,
        "checkpoint.keep_last": 2,
        "evaluation.teacher_steps": 2,
        "cluster.failure_timeout": "2s",
    }
    config = check.root / "configs/digits/one-step.toml"
    found: dict[str, dict] = {}
    failures: dict[str, str] = {}

    def reached(run: Run) -> None:
        run.until(lambda: [i for i in run.iterations() if i["iteration"] >= at], f"iteration {at}")

    def resumed(run: Run, since: float) -> float:
        """Seconds until the next iteration."""
        after = run.until(
            lambda: [i for i in run.iterations() if i["seconds_since_epoch"] > since], "an iteration after the death"
        )
        return after[0]["seconds_since_epoch"] - since

    def undisturbed(name: str) -> dict:
        with Run(check, name, config, settings) as run:
            run.success()
            return {"state": run.state()}

    def rank_dies(name: str) -> dict:
        with Run(check, name, config, settings) as run:
            reached(run)
            os.kill(run.rank(), signal.SIGKILL)
            seconds = resumed(run, time.time())
            run.success()
            return {"state": run.state(), "seconds_to_the_next_iteration": seconds}

    def coordinator_dies(name: str) -> dict:
        with Run(check, name, config, settings, verb="serve") as first:
            first.until(lambda: first.messages("coordinator started"), "its start")
            with Run(check, f"{name}+agent", config, {}, verb="agent"):
                reached(first)
                os.killpg(first.process.pid, signal.SIGKILL)
                first.process.wait()
                killed = time.time()
                with Run(check, f"{name}+successor", config, settings, verb="serve", flags=("--resume",)) as second:
                    seconds = resumed(second, killed)
                    second.success()
                    return {
                        "state": second.state(),
                        "seconds_to_the_next_iteration": seconds,
                        "generations": len(second.messages("generation opened")),
                    }

    def all_die(name: str) -> dict:
        with Run(check, name, config, settings) as first:
            reached(first)
            os.kill(first.rank(), signal.SIGKILL)
        killed = time.time()
        with Run(check, f"{name}+again", config, settings, flags=("--resume",)) as second:
            seconds = resumed(second, killed)
            second.success()
            return {"state": second.state(), "seconds_to_the_next_iteration": seconds}

    works = {
        "undisturbed": undisturbed,
        # On a CPU they do.
        **({} if check.rehearsal else {"undisturbed-again": undisturbed}),
        "rank-dies": rank_dies,
        "coordinator-dies": coordinator_dies,
        "all-die": all_die,
    }

    def work(name: str) -> None:
        try:
            found[name] = works[name](name)
        except Exception as error:  # noqa: BLE001
            failures[name] = str(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in works]
    # Each takes the GPU's time from the others: the seconds are upper bounds, the results do not depend on it.
    for thread in threads:
        thread.start()
        if check.rehearsal:
            thread.join()
    for thread in threads:
        thread.join()
    reference = found.pop("undisturbed", {}).get("state")
    for name in works:
        if name in failures:
            check.emit("recovery", run=name, error=failures[name])
        elif name in found and reference is not None:
            state = found[name].pop("state")
            different = sorted(
                {key.split("/")[0] for key in reference if reference[key].tobytes() != state[key].tobytes()}
            )
            check.emit(
                "recovery",
                run=name,
                identical=not different,
                different=different,
                generators_apart=apart(state, reference, "generator/"),
                iterations=count,
                **found[name],
            )


def precision(check: Check) -> None:
    """One iteration in bf16 beside fp32, on a deep network with random weights and on the trained one of the shapes
    example."""
    folder, about = check.model("narrow")
    config, _ = preset(check, "sd15", "precision", network="narrow")
    compare_precisions(check, about["name"], config, settings_of(check, "sd15", False, False))
    settings = NO_FEATURES | {"distillation.global_batch": 32}
    compare_precisions(check, "shapes", check.root / "configs/shapes/one-step.toml", settings)


def compare_precisions(check: Check, model: str, config: Path, settings: dict) -> None:
    """With a first moment of decay 0.9, what Adam keeps after one step is a tenth of the gradient. In the generator's
    loss the teacher is guided and the fake score is not, so that their difference, which moves the generator, is not 0
    at the start."""
    import numpy

    settings = settings | {
        "distillation.iterations": 1,
        "optimizer.betas": "[0.9, 0.999]",
        "optimizer.generator_learning_rate": 1e-12,
        "optimizer.fake_score_learning_rate": 1e-12,
        "guidance.preset": "custom",
        "guidance.fake_score_training": 1.5,
        "guidance.fake_score": 1.0,
        "guidance.teacher": 1.5,
        "evaluation.teacher_steps": 2,
        "distillation.precision": "fp32",
    }
    bf16 = {"distillation.precision": "bf16"}
    kinds = {
        "fp32": ({}, {"NVIDIA_TF32_OVERRIDE": "0"}),
        "tf32": ({}, {}),
        "autocast": (bf16, {}),
        "bf16-weights": (bf16 | {"memory.bf16_weights": "true"}, {}),
    }
    parts = {"fake_score": "fake_score_adam.exp_avg/", "generator": "generator_adam.exp_avg/"}
    gradients, losses = {}, {}
    with contextlib.ExitStack() as stack:
        runs = {}
        for name, (changes, environment) in kinds.items():
            run = Run(check, f"precision-{model}-{name}", config, settings | changes, environment=environment)
            runs[name] = stack.enter_context(run)
            # The first one embeds the prompts for all.
            run.until(lambda run=run: run.messages("generation opened"), "its start")
        for name, run in runs.items():
            run.until(lambda run=run: run.messages("checkpoint committed"), "its checkpoint")
            state = run.state()
            for part, prefix in parts.items():
                names = sorted(key for key in state if key.startswith(prefix))
                gradients[name, part] = numpy.concatenate([state[key].ravel() for key in names]).astype("f8")
            losses[name] = run.iterations()[0]
    for name in list(kinds)[1:]:
        for part in parts:
            a, b = gradients[name, part], gradients["fp32", part]
            loss, reference = (losses[kind][f"{part}_loss"] for kind in (name, "fp32"))
            cosine = float(a @ b / (numpy.linalg.norm(a) * numpy.linalg.norm(b)))
            check.emit(
                "precision",
                run=name,
                model=model,
                network=part,
                loss=loss,
                loss_in_fp32=reference,
                loss_apart=abs(loss / reference - 1),
                gradient_cosine=cosine,
                norms=float(numpy.linalg.norm(a) / numpy.linalg.norm(b)),
                ok=abs(loss / reference - 1) < 0.01 and cosine >= 0.999,
            )


def profile(check: Check) -> None:
    """PyTorch's own tracer in the rank, started by a signal: its file is reduced to the kernels by their time."""
    name = "profile"
    config, about = preset(check, "sdxl", name)
    settings = settings_of(check, "sdxl", False, offloads(check, "sdxl", config))
    trace, asked = check.work / "trace.json", Path("/tmp/libkineto.conf")
    milliseconds = 1500 if check.rehearsal else int(1000 * max(2.5, 2.2 * check.ours.get("sdxl", 2)))
    asked.write_text(
        f"ACTIVITIES_LOG_FILE={trace}\nACTIVITIES_DURATION_MSECS={milliseconds}\nACTIVITIES_WARMUP_PERIOD_SECS=0\n"
    )
    switch = check.work / "kineto.conf"
    switch.write_text("ENABLE_SIGUSR2=YES\n")
    begin = check.programs / "potstill_profile.so"
    if not begin.exists():
        raise Failed("gpu_bundle.sh makes what starts the tracer: run this in its folder")
    environment = {
        "LD_PRELOAD": str(begin),
        "KINETO_CONFIG": str(switch),
        "KINETO_USE_DAEMON": "1",
        "KINETO_LOG_LEVEL": "0",
    }
    try:
        with Run(check, name, config, settings, environment=environment) as run:
            run.until(lambda: len(run.iterations()) >= 2, "two iterations")
            os.kill(run.rank(), signal.SIGUSR2)
            run.until(
                lambda: list(check.work.glob("trace*.json")) and "Chrome Trace written" in run.log.read_text(),
                "the trace",
                60,
            )
            pace = statistics.median(i["seconds"] for i in run.iterations()[1:])
    finally:
        asked.unlink()
    text = next(iter(check.work.glob("trace*.json"))).read_bytes()
    if check.out:
        (check.out / "trace.json.gz").write_bytes(gzip.compress(text, 6))
    events = json.loads(text)["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if check.device == "cuda" else ("cpu_op",)
    spans = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") in kinds)
    if not spans:
        raise Failed(f"the trace has nothing of {kinds}\n{tail(run.log)}")
    seconds: dict[str, list[float]] = {}
    busy, end = 0.0, 0.0
    for first, last, what in spans:
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
        seconds.setdefault(what[:120], []).append((last - first) / 1e6)
    top = sorted(seconds.items(), key=lambda item: -sum(item[1]))[:25]
    check.emit(
        name,
        model=about["name"],
        traced_seconds=(spans[-1][1] - spans[0][0]) / 1e6,
        busy_share=busy / (spans[-1][1] - spans[0][0]),
        seconds_per_iteration=pace,
        operations=len(spans),
        kernels=[{"name": what, "seconds": round(sum(each), 4), "count": len(each)} for what, each in top],
    )


def fits(check: Check) -> None:
    """SDXL's whole networks in the memory of a card of 80 GB, which the allocator holds to on a larger one."""
    name = "fits"
    config, about = preset(check, "sdxl", name)
    settings = settings_of(check, "sdxl", False, True)
    share = min(1.0, CARD_OF_80_GB / memory_of_card(check))
    environment = {"PYTORCH_CUDA_ALLOC_CONF": f"per_process_memory_fraction:{share:.4f}"}
    with Run(check, name, config, settings, environment=environment) as run:
        _, found = measured(check, name, run, 1, 1, 2)
    check.emit(
        name,
        model=about["name"],
        limit=CARD_OF_80_GB,
        ran=True,
        planned_need=planned(check, name, config, settings)["needed"],
        **found,
    )


def quality(check: Check) -> None:
    settings: dict = {"evaluation.every": "none"}
    if check.rehearsal:
        settings |= {
            "distillation.iterations": 1,
            "evaluation.samples": 48,
            "evaluation.teacher_steps": 2,
            "distillation.global_batch": 8,
            "distillation.micro_batch": 8,
        }
    with Run(check, "quality", check.root / "configs/shapes/one-step.toml", settings) as run:
        run.success()
        summary = json.loads((run.storage / "runs" / run.id / "summary.json").read_text())
    check.emit(
        "quality",
        **{key: summary[key] for key in ("iterations", "wall_seconds", "images_per_second", "teacher", "student")},
    )


WORK = {
    "card": card,
    "nccl": nccl,
    "digits": digits,
    "recovery": recovery,
    "precision": precision,
    "graphs": graphs,
    "profile": profile,
    "fits": fits,
    "quality": quality,
    "sdxl": lambda check: iteration(check, "sdxl"),
    "sd15": lambda check: iteration(check, "sd15"),
    "sdxl-lora": lambda check: iteration(check, "sdxl-lora"),
    "sdxl-compiled": lambda check: compiled(check, "sdxl"),
    "sd15-compiled": lambda check: compiled(check, "sd15"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=3600, help="seconds for everything")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument(
        "--rehearse", nargs="?", const="cpu", choices=["cpu", "cuda"], help="with tiny networks, by default on the CPU"
    )
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    if unknown := sorted(set(wanted) - set(PARTS)):
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not arguments.rehearse and not Path("/dev/nvidiactl").exists():
        print("gpu_check: this machine has no CUDA device; nothing was checked")
        return 0
    if not BUNDLE.exists() and shutil.which("cargo"):
        import prepare

        prepare.python()
        # A rehearsal takes the programs as they are, which is how the tests build them.
        if not arguments.rehearse:
            prepare.programs()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
        check = Check(arguments, Path(folder))
        uses = {"sdxl": ("sdxl", "graphs", "profile", "fits"), "sd15": ("sd15", "graphs"), "narrow": ("precision",)}
        check.prepare([name for name, parts in uses.items() if any(part.startswith(parts) for part in wanted)])
        for part in (part for part in PARTS if part in wanted):
            if not arguments.rehearse and check.left() < NEEDS[part]:
                check.emit(part, skipped=f"needs {NEEDS[part]} s, {check.left():.0f} are left")
                continue
            try:
                WORK[part](check)
            except Exception as error:  # noqa: BLE001
                # The other parts do not depend on it.
                failed += 1
                check.emit(part, error=f"{type(error).__name__}: {error}")
            check.keep_logs()
        check.emit("end", failed=failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
