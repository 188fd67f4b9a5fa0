#!/usr/bin/env python3
"""How OpenMP's threads should wait for each other: an iteration of one rank on all cores, with and without other busy processes.

    scripts/bench/threads.py              two configurations of threads and three ways to wait, idle and busy; about 15 minutes
    scripts/bench/threads.py --rounds 5   more of each
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import prepare

CORES = os.cpu_count() or 1
# Threads, and the variable that decides how they wait; libgomp spins 300,000 times unless it is told otherwise.
CASES = {
    "one thread": (1, {}),
    "a thread a core, as Potstill starts them": (CORES, {}),
    "a thread a core, spinning": (CORES, {"GOMP_SPINCOUNT": "300000"}),
    "a thread a core, passive": (CORES, {"GOMP_SPINCOUNT": "0"}),
}
ITERATIONS = 16


def seconds(name: str, storage: Path, threads: int, environment: dict[str, str]) -> list[float]:
    """Seconds of an iteration, as the run's metrics have them, each over several iterations."""
    command = [prepare.PROGRAMS / "potstill", "launch", prepare.ROOT / "configs" / "digits" / "one-step.toml"]
    command += ["--workers", "1", "--threads", str(threads), "--storage", storage, "--run-id", name]
    settings = {
        "distillation.iterations": ITERATIONS, "checkpoint.every": 1000, "evaluation.samples": 20, "evaluation.neighbours": 3,
        "evaluation.teacher_steps": 2, "evaluation.collapse_share": 0.0,
    }  # fmt: skip
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    subprocess.run([str(part) for part in command], env=ours | environment, check=True, capture_output=True)
    lines = (storage / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [line["seconds"]["total"] for line in map(json.loads, lines) if line["kind"] == "iteration"]


def measure(rounds: int, storage: Path, what: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in CASES}
    for turn in range(rounds):
        for index, (name, (threads, environment)) in enumerate(CASES.items()):
            found[name] += seconds(f"{what}-{turn}-{index}", storage, threads, environment)
            print(f"{what}, {name}: {found[name][-1]:.3f} s", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    prepare.programs()
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder)
        idle = measure(arguments.rounds, storage, "idle")
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(CORES)]
        try:
            busy = measure(arguments.rounds, storage, "busy")
        finally:
            for other in others:
                other.kill()
                other.wait()
    print(f"| seconds of an iteration, medians of {arguments.rounds} rounds | idle | beside {CORES} busy processes |")
    print("|---|---|---|")
    for name in CASES:
        print(f"| {name} | {statistics.median(idle[name]):.2f} | {statistics.median(busy[name]):.2f} |")


if __name__ == "__main__":
    main()
