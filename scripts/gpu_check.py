"""Checks a machine with a GPU. Started by scripts/gpu_check.sh."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
BINARIES = ROOT / "target/debug"
# SDXL base 1.0's U-Net, as its config.json has it.
SDXL = {
    "in_channels": 4, "out_channels": 4, "sample_size": 128, "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10], "cross_attention_dim": 2048,
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
TINY = SDXL | {
    "sample_size": 8, "block_out_channels": [8, 16, 16], "attention_head_dim": [1, 2, 2], "norm_num_groups": 4,
    "transformer_layers_per_block": [1, 1, 1], "cross_attention_dim": 16, "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}  # fmt: skip


def environment() -> dict[str, str]:
    """Where the programs find libtorch: beside this Python's torch."""
    libraries = str(Path(torch.__file__).parent / "lib")
    known = os.environ.get("LD_LIBRARY_PATH")
    return os.environ | {"LD_LIBRARY_PATH": f"{libraries}:{known}" if known else libraries}


def run(command: list[str]) -> str:
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"gpu_check: {' '.join(command)}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    return done.stdout


def digits(device: str, workers: int, iterations: int, storage: str) -> dict[str, torch.Tensor]:
    """The generator after a short run."""
    name = f"{device}-{workers}"
    run([
        str(BINARIES / "potstill"), "launch", str(ROOT / "configs/digits/one-step.toml"), "--workers", str(workers),
        "--device", device, "--run-id", name, "--storage", storage,
        "--set", f"distillation.iterations={iterations}", "--set", "evaluation.samples=200",
        "--set", "evaluation.every=none",
    ])  # fmt: skip
    folder = Path(storage) / "runs" / name / "checkpoints" / f"{iterations:012}"
    tensors = {}
    for shard in folder.rglob("*.safetensors"):
        tensors |= load_file(shard)
    return {key: value for key, value in tensors.items() if key.startswith("generator/")}


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    squares = sum(((a[key] - b[key]).double() ** 2).sum() for key in b)
    return float((squares / sum((b[key].double() ** 2).sum() for key in b)) ** 0.5)


def iterations(config: dict, side: int, tokens: int, count: int, device: str) -> dict[str, dict]:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        arguments = [file.name, str(side), str(tokens), "1", str(count), device]
        ours = run([str(BINARIES / "examples/iteration"), *arguments])
        eager = run([sys.executable, str(ROOT / "scripts/gpu_check_eager.py"), *arguments])
    return {"Potstill": json.loads(ours), "eager PyTorch": json.loads(eager)}


def gib(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**30:.1f} GiB"


def main() -> None:
    rehearsal = "--rehearse" in sys.argv[1:]
    if not rehearsal and not torch.cuda.is_available():
        print("gpu_check: PyTorch finds no CUDA device; nothing was checked")
        return
    device = "cpu" if rehearsal else "cuda"
    name = "CPU, rehearsal" if rehearsal else torch.cuda.get_device_name(0)
    workers = 1 if rehearsal else min(2, torch.cuda.device_count())
    print(f"## {name}, torch {torch.__version__}\n")

    with tempfile.TemporaryDirectory() as storage:
        count = 2 if rehearsal else 20
        reference = digits("cpu", 1 if not rehearsal else 2, count, storage)
        found = digits(device, workers, count, storage)
    apart = difference(found, reference)
    group = "Gloo" if rehearsal else "NCCL"
    print(f"- {group} group of {workers}: formed, trained, saved.")
    print(f"- Digits, {count} iterations on {device} and on the CPU: generators apart by {apart:.1e} (relative).")
    if not apart < 1e-2:
        sys.exit(f"gpu_check: the digits differ by {apart}")

    config, side, tokens, times = (TINY, 8, 16, 2) if rehearsal else (SDXL, 128, 77, 6)
    results = iterations(config, side, tokens, times, device)
    ours, eager = results["Potstill"], results["eager PyTorch"]
    if ours["parameters"] != eager["parameters"]:
        sys.exit(f"gpu_check: networks differ: {ours['parameters']} and {eager['parameters']} parameters")
    if not (ours["finite"] and eager["finite"]):
        sys.exit("gpu_check: a loss was not finite")
    what = "bf16, " if not rehearsal else ""
    print(
        f"- One SiD iteration, {ours['parameters'] / 1e6:.0f} million parameters, latents of {side}×{side}, {what}"
        f"activation checkpointing, guidance 1.5, micro-batch 1; medians of {times - 1}:\n"
    )
    print("| | Potstill | eager PyTorch + diffusers | ratio |\n|---|---|---|---|")
    for part, other in eager["seconds"].items():
        seconds = ours["seconds"][part]
        print(f"| {part} | {seconds:.3f} s | {other:.3f} s | {other / seconds:.2f} |")
    total, other = ours["seconds_per_iteration"], eager["seconds_per_iteration"]
    print(f"| whole iteration | {total:.3f} s | {other:.3f} s | {other / total:.2f} |")
    print(f"| peak memory | {gib(ours['peak_bytes'])} | {gib(eager['peak_bytes'])} | |")


if __name__ == "__main__":
    main()
