#!/usr/bin/env python3
"""Measure on this machine how long a run takes to go on after a rank was killed, what checkpoints of a large state cost, and how long a
generation takes to form. About 20 minutes on 2 idle CPU cores, after the build.

    scripts/bench/bench_recovery.py                  everything
    scripts/bench/bench_recovery.py --only kill      only what begins so: kill, checkpoint, form
"""

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
from collections.abc import Iterator
from pathlib import Path

import prepare

prepare.python()

import numpy  # noqa: E402
from teachers import TEACHERS, unscored  # noqa: E402

ROOT = prepare.ROOT
PROGRAMS = prepare.PROGRAMS
POTSTILL = PROGRAMS / "potstill"
KILLS = 10
# Teacher, spares and what the ranks divide among themselves. Weights are gathered for text-to-image networks alone.
CASES = [("digits", spares, shard) for spares in (0, 1) for shard in ("none", "optimizer", "gradients")]
CASES += [("shapes", 0, shard) for shard in ("none", "parameters")]
# Finished between two kills.
ITERATIONS = 5
# A network of 38 million parameters makes a state of 1 GiB: generator, average, fake score and two moments of two networks.
LARGE = {"network.model_channels": 128, "network.channel_mult": "[2, 2]", "network.num_blocks": 4}
SAVE_EVERY = 20
SAVES = 2
GLOBAL_BATCH = 64


def environment(log: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "RUST_LOG": log}


def launch(folder: Path, config: Path, run: str, settings: dict[str, object], *flags: str) -> list[str]:
    pairs = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    where = ["--storage", str(folder), "--run-id", run, "--log-format", "json", "--threads", "1"]
    return [str(POTSTILL), "launch", str(config), "--workers", "2", *where, *pairs, *flags]


class Log:
    """The log messages of a run, in order, with the time at which they were read."""

    def __init__(self, command: list[str], log: str):
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=environment(log),
        )  # fmt: skip
        self.attached = 0

    def messages(self) -> Iterator[tuple[dict, float]]:
        for line in self.process.stderr:
            now = time.monotonic()
            try:
                yield json.loads(line), now
            except ValueError:
                continue

    def until(self, message: str, **fields: object) -> tuple[dict, float]:
        for said, now in self.messages():
            self.attached += said.get("message") == "worker attached"
            if said.get("message") == message and all(said.get(key) == value for key, value in fields.items()):
                return said, now
        sys.exit(f"the run ended before it said {message!r} {fields}")

    def end(self) -> None:
        self.process.kill()
        self.process.stderr.read()
        self.process.wait()


def kills(folder: Path, teacher: str, spares: int, shard: str) -> list[float]:
    """Seconds from kill −9 of a rank to the next finished iteration."""
    config = unscored(folder, TEACHERS[teacher])
    settings = {"distillation.iterations": 1_000_000, "checkpoint.every": 1_000_000, "memory.shard": shard}
    if teacher == "shapes":
        # Two micro-batches, and what gathered weights need, whether they are gathered or not.
        settings |= {"distillation.global_batch": 16, "distillation.micro_batch": 8, "memory.recompute": "true"}
    run = f"kill-{teacher}-{spares}-{shard}"
    log = Log(launch(folder, config, run, settings, "--spares", str(spares)), "potstill=debug,info")
    seconds = []
    try:
        generation = 1
        log.until("generation opened", generation=1)
        for _ in range(KILLS):
            for _ in range(ITERATIONS):
                log.until("iteration")
            members = json.loads(
                subprocess.run(
                    [str(POTSTILL), "status", run, "--storage", str(folder), "--json"],
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
            # The process that was started in its place must be standby before the next kill.
            while log.attached < 2 + spares + len(seconds):
                log.until("iteration")
    finally:
        log.end()
    return seconds


def copy_seconds(size: int) -> float:
    """Seconds of one memory copy of this many bytes on one thread, into memory that was written to before."""
    source, target = numpy.ones(size, numpy.uint8), numpy.ones(size, numpy.uint8)
    seconds = []
    for _ in range(5):
        started = time.monotonic()
        numpy.copyto(target, source)
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds)


def large_teacher(folder: Path) -> Path:
    """Makes a teacher of 38 million parameters, which is hardly trained."""
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
    return teacher


def checkpoints(folder: Path) -> None:
    """The cost of saves within one run: iterations during a save against the others."""
    config = unscored(folder, large_teacher(folder))
    settings = {
        "distillation.iterations": 1_000_000,
        "distillation.global_batch": GLOBAL_BATCH,
        "distillation.micro_batch": GLOBAL_BATCH // 2,
        "checkpoint.every": SAVE_EVERY,
        "cluster.failure_timeout": "60s",
    }
    log = Log(launch(folder, config, "large", settings), "potstill=debug,info")
    seconds, waits, size, committed = [], [], 0, []
    try:
        for said, _ in log.messages():
            match said.get("message"):
                case "iteration":
                    seconds.append(said["seconds"])
                    print(f"\riteration {len(seconds)}/{SAVES * SAVE_EVERY + SAVE_EVERY}", end="", file=sys.stderr)
                case "training waited until the state was copied for the checkpoint":
                    waits.append(said["seconds"])
                case "checkpoint committed" if "bytes" in said:
                    size = said["bytes"]
                    committed.append(len(seconds) - said["iteration"])
            if len(seconds) == (SAVES + 1) * SAVE_EVERY:
                break
    finally:
        log.end()
        print(file=sys.stderr)
    if len(committed) != SAVES:
        sys.exit(f"{len(committed)} of {SAVES} checkpoints were committed")
    beside = max(committed) + 1
    slower = []
    for start in range(SAVE_EVERY, len(seconds), SAVE_EVERY):
        window = seconds[start : start + SAVE_EVERY]
        usual = statistics.median(window[beside:])
        slower.append((sum(window[:beside]) - beside * usual) / (SAVE_EVERY * usual))
    usual = statistics.median(seconds)
    print(f"state of {size / 2**30:.2f} GiB, saved every {SAVE_EVERY} iterations of {usual:.2f} s:", end=" ")
    print(f"{statistics.median(slower):+.1%} wall time ({', '.join(f'{ratio:+.1%}' for ratio in slower)});", end=" ")
    print(f"committed within {beside} iterations")
    print(f"longest wait of a rank for the copy of its share: {max(waits) * 1000:.0f} ms;", end=" ")
    print(f"one memory copy of the state: {copy_seconds(size) * 1000:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="kill, checkpoint or form")
    only = parser.parse_args().only
    prepare.programs("potstill-server", "form_generation")
    # No step takes so long: a timeout means a hang.
    signal.alarm(3600)
    with tempfile.TemporaryDirectory(prefix="potstill-bench-") as name:
        folder = Path(name)
        if "kill".startswith(only):
            for teacher, spares, shard in CASES:
                seconds = kills(folder, teacher, spares, shard)
                spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
                print(
                    f"kill -9 of one of two ranks, {teacher}, {spares} spare(s), memory.shard={shard}: {statistics.median(seconds):.2f} s to"
                    f" the next finished iteration of two ranks (median of {len(seconds)}; {spread})",
                    flush=True,
                )
        if "checkpoint".startswith(only):
            checkpoints(folder)
        if "form".startswith(only):
            subprocess.run([str(PROGRAMS / "examples" / "form_generation"), "1000", "2000", "10000"], check=True)


if __name__ == "__main__":
    main()
