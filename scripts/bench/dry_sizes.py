#!/usr/bin/env python3
"""What the shipped presets of Stable Diffusion ask of a GPU, on a machine without one: `scripts/dry_gpu` computes nothing.

    scripts/bench/dry_sizes.py [NAME …]       of sd15, sdxl, sdxl-lora; 6 minutes

Prints for one rank, with the settings of gpu_check.py: the peak of its tensors by libtorch's CUDA allocator beside the plan's, what
the allocator took of the device for them, and per iteration what the host launches, how often it waits, and how long that
takes it, which is the least time of an iteration whatever the GPU. The same iteration in PyTorch and diffusers is
gpu_check_eager.py's. The weights' files are empty, and nothing is computed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from subprocess import DEVNULL, Popen, run

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "scripts" / "bench"), str(ROOT / "scripts" / "dry_gpu")]

import dry_gpu  # noqa: E402
import gpu_models  # noqa: E402
import prepare  # noqa: E402

POTSTILL = ROOT / "target" / "debug" / "potstill"
GIB = 1 << 30
# The preset, gpu_models.py's network, whether with adapters.
NAMES = {"sd15": ("sd15", "sd15", False), "sdxl": ("sdxl", "sdxl", False), "sdxl-lora": ("sdxl", "sdxl", True)}
WARM_UP, MEASURED = 2, 20
# More than a card has, and nothing large is copied: what is not touched needs no memory here.
LARGE = {"DRY_GPU_MEMORY": str(256 * GIB), "DRY_GPU_COPIES": str(1 << 20)}


def sparse(tensors: dict, path: Path) -> None:
    """A safetensors file of fp16 zeros that takes no space."""
    offset, header = 0, {}
    for name, tensor in tensors.items():
        size = 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


def preset(name: str, work: Path) -> tuple[Path, dict]:
    """A run file that extends the shipped preset, and the settings for one rank, as gpu_check.py has them."""
    model, network, adapters = NAMES[name]
    folder = work / network
    if not folder.exists():
        gpu_models.save_file, saved = lambda tensors, path: sparse(tensors, Path(path)), gpu_models.save_file
        try:
            gpu_models.write(network, folder, "meta", ROOT / "configs/shapes/model/tokenizer")
        finally:
            gpu_models.save_file = saved
    file = ROOT / "configs" / model / ("four-step-lora.toml" if adapters else "one-step.toml")
    config = work / f"{name}.toml"
    config.write_text(
        f"extends = {json.dumps(str(file))}\n[teacher]\nmodel = {json.dumps(str(folder))}\n"
        f"[prompts]\ndata = {json.dumps(str(folder / 'prompts.txt'))}\ncache = {json.dumps(str(work / ('cache-' + network)))}\n"
    )
    batch = 1 if model == "sdxl" else 4
    return config, {
        "distillation.micro_batch": batch,
        # A kind of micro-batch is recorded when it comes for the second time.
        "distillation.global_batch": batch,
        "distillation.iterations": 10**6,
        "checkpoint.every": 10**6,
        "memory.shard": "none",
        "generator.steps": 1,
        "evaluation.every": "none",
        "evaluation.features": "none",
        "evaluation.reference": "none",
    }


def iterations(log: Path) -> list[dict]:
    lines = (json.loads(line) for line in log.read_text().splitlines() if line.startswith("{"))
    return [line for line in lines if line.get("message") == "iteration"]


def measure(name: str, work: Path, changes: dict | None = None, workers: int = 1, measured: int = MEASURED) -> dict:
    """What the table has of a rank with a preset, with some settings changed, over so many iterations."""
    config, settings = preset(name, work)
    settings |= {"distillation.global_batch": workers * settings["distillation.micro_batch"]} | (changes or {})
    sets = [flag for key, value in settings.items() for flag in ("--set", f"{key}={value}")]
    plan = [POTSTILL, "plan", config, "--workers", workers, "--device-memory", "1024GiB", "--json", *sets]
    planned = json.loads(run(list(map(str, plan)), capture_output=True, text=True, check=True).stdout)
    id, counted = f"run-{len(list(work.glob('run-*.log')))}", work / "counts"
    counted.unlink(missing_ok=True)
    command = [POTSTILL, "launch", config, "--workers", workers, "--device", "cuda", "--storage", work / "store"]
    command += ["--run-id", id, "--log-format", "json", *sets]
    environment = dry_gpu.environment(counted, workers) | LARGE | {"RUST_LOG": "potstill=debug,info"}
    log = work / f"{id}.log"
    with log.open("w") as errors:
        process = Popen(
            list(map(str, command)), stdout=DEVNULL, stderr=errors, env=environment, start_new_session=True
        )

    def after(count: int) -> Counter:
        """What a rank has counted after this many iterations."""
        while len(iterations(log)) < count:
            if process.poll() is not None:
                raise SystemExit(f"{id} ended:\n" + "\n".join(log.read_text().splitlines()[-10:]))
            time.sleep(0.05)
        before = len(dry_gpu.counts(counted))
        for child in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
            with contextlib.suppress(OSError):
                if os.getsid(child) == process.pid and b"libdry_gpu" in Path(f"/proc/{child}/maps").read_bytes():
                    os.kill(child, signal.SIGRTMIN + 5)
        while len(dry_gpu.counts(counted)) == before:
            time.sleep(0.01)
        return Counter(dry_gpu.counts(counted)[-1]["counts"]) + Counter(iterations=len(iterations(log)))

    try:
        first, last = after(WARM_UP), after(WARM_UP + measured)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = iterations(log)[WARM_UP:]
    each = {key: (last[key] - first[key]) / (last["iterations"] - first["iterations"]) for key in last}
    return {
        "planned": planned["peak"],
        "tensors": done[-1]["memory_peak_bytes"],
        "taken": last["bytes at most"],
        "launches": each["kernels"] + each["matrix products"] + each.get("convolutions", 0),
        "graph launches": each.get("graph launches", 0),
        "waits": each["waits"],
        "seconds": min(line["seconds"] for line in done),
    }


def eager(name: str) -> tuple[float, float]:
    """What the same iteration in PyTorch and diffusers takes of the device, in bytes, and of the host, in seconds."""
    model, network, adapters = NAMES[name]
    low = model == "sdxl"
    wanted = {
        "model": network,
        "device": "cuda",
        "tokens": 77,
        "micro_batch": 1 if low else 4,
        "iterations": 9,
        "warm_up": 2,
        "bf16_weights": low,
        "autocast": not low,
        "recompute": low,
        "offload_ema": False,
        "lora_rank": 64 if adapters else None,
        "tuning": "plain",
        "backend": "eager",
    }
    with tempfile.TemporaryDirectory() as folder:
        counted = Path(folder) / "counts"
        command = [sys.executable, str(ROOT / "scripts/bench/gpu_check_eager.py"), json.dumps(wanted)]
        done = run(command, capture_output=True, text=True, check=True, env=dry_gpu.environment(counted) | LARGE)
        found = json.loads(done.stdout.strip().splitlines()[-1])
        return dry_gpu.counts(counted)[-1]["counts"]["bytes at most"], found["seconds_per_iteration"]


def main() -> None:
    prepare.python()
    prepare.programs()
    graphs = {"distillation.cuda_graphs": "true"}
    print("| | tensors' peak, GiB | planned | ratio | taken of the device | launches | of graphs | waits | host, ms |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="dry-sizes-") as folder:

        def row(label: str, name: str, changes: dict, workers: int = 1) -> None:
            found = measure(name, Path(folder), changes, workers)
            print(
                f"| {label} | {found['tensors'] / GIB:.1f} | {found['planned'] / GIB:.1f} "
                f"| {found['tensors'] / found['planned']:.2f} | {found['taken'] / GIB:.1f} | {found['launches']:.0f} "
                f"| {found['graph launches']:.0f} | {found['waits']:.0f} | {1000 * found['seconds']:.0f} |",
                flush=True,
            )

        for name in sys.argv[1:] or NAMES:
            row(name, name, {})
            row(f"{name}, CUDA graphs", name, graphs)
            taken, seconds = eager(name)
            print(f"| {name}, PyTorch and diffusers | | | | {taken / GIB:.1f} | | | | {1000 * seconds:.0f} |", flush=True)
        if "sdxl" in (sys.argv[1:] or NAMES):
            for shard in ("optimizer", "gradients", "parameters"):
                row(f"sdxl, one of 4 ranks, {shard}", "sdxl", {"memory.shard": shard}, 4)


if __name__ == "__main__":
    main()
