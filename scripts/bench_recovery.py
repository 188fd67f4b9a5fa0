#!/usr/bin/env python3
"""Recovery, checkpoints and the forming of generations, measured. Started by scripts/bench_recovery.sh, which builds."""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "target" / "debug"
POTSTILL = PROGRAMS / "potstill"
KILLS = 10
# A network of 38 million parameters makes a state of 1 GiB: generator, average, fake score and two moments of two networks.
LARGE = {"network.model_channels": 256, "network.channel_mult": "[2, 2]", "network.num_blocks": 4}
SAVE_EVERY = 20
ROUNDS = 3


def environment(log: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "RUST_LOG": log}


def unscored(folder: Path, teacher: Path) -> Path:
    config = folder / f"{teacher.stem}.toml"
    config.write_text(f"[teacher]\nweights = {json.dumps(str(teacher))}\n")
    return config


def launch(folder: Path, config: Path, run: str, settings: dict[str, object], *flags: str) -> list[str]:
    pairs = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    where = ["--storage", str(folder), "--run-id", run, "--log-format", "json", "--threads", "1"]
    return [str(POTSTILL), "launch", str(config), "--workers", "2", *where, *pairs, *flags]


class Log:
    """The messages of a run, one after the other, with the time at which they were read."""

    def __init__(self, command: list[str], log: str):
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=environment(log),
        )  # fmt: skip
        self.attached = 0

    def until(self, message: str, **fields: object) -> tuple[dict, float]:
        for line in self.process.stderr:
            now = time.monotonic()
            try:
                said = json.loads(line)
            except ValueError:
                continue
            self.attached += said.get("message") == "worker attached"
            if said.get("message") == message and all(said.get(key) == value for key, value in fields.items()):
                return said, now
        sys.exit(f"the run ended before it said {message!r} {fields}")

    def end(self) -> None:
        self.process.kill()
        self.process.stderr.read()
        self.process.wait()


def kills(folder: Path, spares: int) -> list[float]:
    """Seconds from kill −9 of a rank to the next finished iteration."""
    config = unscored(folder, ROOT / "configs" / "digits" / "teacher.safetensors")
    settings = {"distillation.iterations": 1_000_000, "checkpoint.every": 1_000_000}
    log = Log(launch(folder, config, f"kill-{spares}", settings, "--spares", str(spares)), "potstill=debug,info")
    seconds = []
    try:
        generation = 1
        log.until("generation opened", generation=1)
        for _ in range(KILLS):
            for _ in range(20):
                log.until("iteration")
            members = json.loads(
                subprocess.run(
                    [str(POTSTILL), "status", f"kill-{spares}", "--storage", str(folder), "--json"],
                    capture_output=True, text=True, check=True,
                ).stdout
            )["members"]  # fmt: skip
            victim = next(member["pid"] for member in members if member["rank"] == 1)
            killed = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            generation += 1
            log.until("generation opened", generation=generation)
            while True:
                opened, at = log.until("iteration")
                if opened["world_size"] == 2:
                    break
            seconds.append(at - killed)
            # Whoever was started in its place stands by again before the next kill.
            while log.attached < 2 + spares + len(seconds):
                log.until("iteration")
    finally:
        log.end()
    return seconds


def step_seconds(folder: Path, run: str) -> list[float]:
    """Wall time of each iteration, from the log's times."""
    lines = [line for line in (folder / f"{run}.log").read_text().splitlines() if line.startswith("{")]
    rows = [json.loads(line) for line in lines]
    return [row["seconds"] for row in rows if row.get("message") == "iteration"][2:]


def checkpoints(folder: Path) -> None:
    teacher = folder / "large.safetensors"
    config = ROOT / "configs" / "digits" / "teacher.toml"
    sets = LARGE | {
        "training.iterations": 1,
        "evaluation.samples": 20,
        "evaluation.teacher_steps": 2,
        "output": teacher,
    }
    pairs = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    made = subprocess.run(
        [str(POTSTILL), "train-teacher", str(config), *pairs], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        sys.exit(f"cannot make the large teacher: {made.stderr}")
    config = unscored(folder, teacher)
    wall: dict[bool, list[float]] = {True: [], False: []}
    worst: dict[bool, list[float]] = {True: [], False: []}
    for number in range(ROUNDS):
        for saving in (True, False) if number % 2 == 0 else (False, True):
            run = f"large-{number}-{int(saving)}"
            iterations = 2 * SAVE_EVERY + 10
            settings = {
                "distillation.iterations": iterations,
                "distillation.global_batch": 4,
                "distillation.micro_batch": 2,
                "checkpoint.every": SAVE_EVERY if saving else 10 * iterations,
                "cluster.failure_timeout_seconds": 60,
            }
            with open(folder / f"{run}.log", "w") as log:
                subprocess.run(
                    launch(folder, config, run, settings), stderr=log, stdout=log, check=True,
                    env=environment("potstill=debug,info"),
                )  # fmt: skip
            rows = [json.loads(line) for line in (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]
            rows = [row for row in rows if row["kind"] == "iteration"]
            # From the end of the first window to the last iteration: two checkpoints lie between.
            wall[saving].append(rows[-1]["wall_seconds"] - rows[0]["wall_seconds"])
            worst[saving].append(max(step_seconds(folder, run)) - statistics.median(step_seconds(folder, run)))
            manifest = folder / "runs" / run / f"checkpoints/{iterations:012}/manifest.json"
            size = sum(shard["bytes"] for shard in json.loads(manifest.read_text())["shards"])
            subprocess.run(["rm", "-r", str(folder / "runs" / run / "checkpoints")], check=True)
    ratios = [a / b - 1 for a, b in zip(wall[True], wall[False], strict=True)]
    print(f"state of {size / 2**30:.2f} GiB, saved every {SAVE_EVERY} iterations of", end=" ")
    print(f"{statistics.median(wall[False]) / (2 * SAVE_EVERY):.2f} s: {statistics.median(ratios):+.1%} wall time", end=" ")
    print(f"(rounds: {', '.join(f'{ratio:+.1%}' for ratio in ratios)})")
    print(f"longest iteration beyond the median, with saves: {statistics.median(worst[True]) * 1000:.0f} ms,", end=" ")
    print(f"without: {statistics.median(worst[False]) * 1000:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="kill, checkpoint or form")
    only = parser.parse_args().only
    # Nothing here takes so long: whatever hangs is a finding.
    signal.alarm(3600)
    with tempfile.TemporaryDirectory(prefix="potstill-bench-") as name:
        folder = Path(name)
        if "kill".startswith(only):
            for spares in (0, 1):
                seconds = kills(folder, spares)
                spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
                print(
                    f"kill -9 of one of two ranks, {spares} spare(s): {statistics.median(seconds):.2f} s to the next finished"
                    f" iteration of two ranks (median of {len(seconds)}; {spread})",
                    flush=True,
                )
        if "checkpoint".startswith(only):
            checkpoints(folder)
        if "form".startswith(only):
            subprocess.run([str(PROGRAMS / "examples" / "form_generation"), "1000", "2000", "10000"], check=True)


if __name__ == "__main__":
    main()
