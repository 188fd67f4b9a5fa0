#!/usr/bin/env python3
"""Train on the digits while ranks and the coordinator are killed and paused at random and the storage misbehaves, and compare the result
with an undisturbed run's. Exits with 1 if anything was lost, repeated or changed.

    scripts/bench/chaos.py --minutes 2 --seed 0
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import prepare

prepare.python()

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

ROOT = prepare.ROOT
POTSTILL = prepare.PROGRAMS / "potstill"
RUN = "chaos"
# Always two ranks: the sum of two numbers does not depend on their order, so the result must be bit-identical.
WORLD = 2
SETTINGS = {
    "distillation.global_batch": 32,
    "distillation.micro_batch": 16,
    "checkpoint.every": 20,
    "cluster.failure_timeout": "2s",
    "cluster.wait_timeout": "120s",
}
# The rates of storage faults while faults are injected.
STORAGE_FAULTS = "error=0.02,delay=0.05,lost=0.02"


def settings(iterations: int) -> list[str]:
    pairs = SETTINGS | {"distillation.iterations": iterations}
    return [part for key, value in pairs.items() for part in ("--set", f"{key}={value}")]


class Lab:
    """Storage, a run file without evaluation, and the started processes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = folder / "chaos.toml"
        teacher = ROOT / "configs" / "digits" / "teacher.safetensors"
        self.config.write_text(f"[teacher]\nweights = {json.dumps(str(teacher))}\n")
        self.processes: list[subprocess.Popen] = []

    def start(self, name: str, *arguments: str, faults: str | None = None) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if faults:
            environment["POTSTILL_STORAGE_FAULTS"] = faults
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                [str(POTSTILL), *arguments], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
            )
        self.processes.append(process)
        return process

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def run_arguments(self, subcommand: str, run: str, iterations: int) -> list[str]:
        storage = ["--storage", str(self.folder), "--run-id", run]
        return [subcommand, str(self.config), "--workers", str(WORLD), *storage, *settings(iterations)]

    def status(self) -> dict | None:
        command = [str(POTSTILL), "status", RUN, "--storage", str(self.folder), "--json"]
        output = subprocess.run(command, capture_output=True, text=True, check=False)
        return json.loads(output.stdout) if output.returncode == 0 else None

    def checkpoint(self, run: str, iteration: int) -> dict[str, torch.Tensor]:
        folder = self.folder / "runs" / run
        manifest = json.loads((folder / f"checkpoints/{iteration:012}/manifest.json").read_text())
        tensors: dict[str, torch.Tensor] = {}
        for shard in manifest["shards"]:
            tensors |= load_file(folder / shard["key"])
        return tensors


def undisturbed(lab: Lab, iterations: int) -> float:
    started = time.monotonic()
    process = lab.start("undisturbed", *lab.run_arguments("launch", "undisturbed", iterations), "--threads", "1")
    if process.wait() != 0:
        sys.exit(f"the undisturbed run failed: see {lab.folder}/undisturbed.log")
    return time.monotonic() - started


class Chaos:
    """A coordinator and its agents, and the faults injected into them."""

    def __init__(self, lab: Lab, iterations: int, seed: int):
        self.lab = lab
        self.random = random.Random(seed)
        self.iterations = iterations
        self.faults: Counter[str] = Counter()
        self.paused: dict[int, float] = {}
        self.storage_faults = f"seed={seed},{STORAGE_FAULTS}"
        self.coordinator = self.serve()
        agent = ["agent", "--storage", str(self.lab.folder), "--run-id", RUN, "--threads", "1"]
        self.agents = [
            lab.start("agent", *agent, "--ranks", str(WORLD), "--spares", "1", faults=self.storage_faults)
        ]

    def serve(self) -> subprocess.Popen:
        arguments = self.lab.run_arguments("serve", RUN, self.iterations)
        listen = ["--listen", "127.0.0.1:0", "--resume=auto"]
        return self.lab.start("coordinator", *arguments, *listen, faults=self.storage_faults)

    def holders(self, status: dict) -> list[dict]:
        return [member for member in status["members"] if member["rank"] is not None]

    def wake(self, all_ranks: bool = False) -> None:
        for pid, until in list(self.paused.items()):
            if all_ranks or until <= time.monotonic():
                del self.paused[pid]
                try:
                    os.kill(pid, signal.SIGCONT)
                except ProcessLookupError:
                    pass

    def disturb(self) -> None:
        """Injects one fault, if at least one rank that holds the state survives it."""
        status = self.lab.status()
        if status is None or status["state"] != "training":
            return
        holders = self.holders(status)
        kind = self.random.choices(["kill", "pause", "coordinator", "kill and coordinator"], [5, 2, 2, 1])[0]
        able = [m["pid"] for m in holders if m["liveness"] == "alive" and m["pid"] not in self.paused]
        # A rank that has just joined may not have taken over the state yet.
        cursors = [int(re.findall(r"\d+", m["cursor"])[0]) for m in holders]
        settled = len(able) == WORLD and min(cursors) + 1 >= max(cursors) >= max(status["iteration"], 1)
        if kind != "coordinator" and (not settled or self.paused):
            return
        self.faults[kind] += 1
        if kind == "pause":
            pid = self.random.choice(able)
            os.kill(pid, signal.SIGSTOP)
            self.paused[pid] = time.monotonic() + self.random.uniform(0.2, 4.0)
        if "kill" in kind:
            os.kill(self.random.choice(able), signal.SIGKILL)
        if "coordinator" in kind:
            self.coordinator.kill()
            self.coordinator.wait()
            time.sleep(self.random.uniform(0.0, 3.0))
            self.coordinator = self.serve()

    def run(self, patience: float) -> None:
        deadline = time.monotonic() + patience
        shown = 0.0
        while self.coordinator.poll() is None:
            if time.monotonic() > deadline:
                raise Lost(f"the run did not end within {patience:.0f} s")
            time.sleep(self.random.expovariate(1 / 1.5))
            self.wake()
            self.disturb()
            if time.monotonic() - shown > 10:
                shown = time.monotonic()
                status = self.lab.status() or {}
                at = f"iteration {status.get('iteration')}/{self.iterations}, generation {status.get('generation')}"
                print(f"  {at}, faults: {dict(self.faults)}", flush=True)
        self.wake(all_ranks=True)
        if self.coordinator.returncode != 0:
            raise Lost(f"the coordinator ended with {self.coordinator.returncode}")
        for agent in self.agents:
            if agent.wait() != 0:
                raise Lost(f"an agent ended with {agent.returncode}")


class Lost(Exception):
    """An invariant was violated."""


def compare(lab: Lab, iterations: int) -> float:
    """The greatest relative difference of the generator's tensors."""
    ours, theirs = lab.checkpoint(RUN, iterations), lab.checkpoint("undisturbed", iterations)
    if ours.keys() != theirs.keys():
        raise Lost("the two runs have different tensors")
    squares = {"error": 0.0, "norm": 0.0}
    for name in ours:
        if name.startswith("generator/"):
            squares["error"] += float((ours[name].double() - theirs[name].double()).square().sum())
            squares["norm"] += float(theirs[name].double().square().sum())
    return (squares["error"] / squares["norm"]) ** 0.5


def count(lab: Lab, iterations: int) -> None:
    """Checks that every iteration counts once, and none was repeated."""
    summary = json.loads((lab.folder / "runs" / RUN / "summary.json").read_text())
    if summary["iterations"] != iterations or summary["repeated_iterations"] != 0:
        raise Lost(f"{summary['iterations']} iterations, {summary['repeated_iterations']} of them repeated")


def transitions(lab: Lab) -> Counter[str]:
    log = (lab.folder / "coordinator.log").read_text()
    return Counter(
        {
            "generations": len(re.findall("generation opened", log)),
            "workers lost": len(re.findall("worker lost", log)),
            "coordinators": len(re.findall("coordinator started", log)),
            "checkpoints": len(re.findall("checkpoint committed", log)),
            "failed checkpoints": len(re.findall("checkpoint failed", log)),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="approximate duration of the disturbed run in minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep the folder with logs and checkpoints")
    arguments = parser.parse_args()
    prepare.programs()
    folder = Path(tempfile.mkdtemp(prefix="potstill-chaos-"))
    lab = Lab(folder)
    failed = True
    try:
        # The speed of this machine: the disturbed run gets as many iterations as an undisturbed one completes in half
        # its time.
        trial = Lab(folder)
        (folder / "trial").mkdir()
        trial.folder = folder / "trial"
        seconds = (undisturbed(trial, 60) - 2.0) / 60
        iterations = max(40, int(arguments.minutes * 60 * 0.5 / max(seconds, 1e-3)))
        print(f"{iterations} iterations undisturbed …", flush=True)
        quiet = undisturbed(lab, iterations)
        print(f"the same with faults, seed {arguments.seed} …", flush=True)
        started = time.monotonic()
        chaos = Chaos(lab, iterations, arguments.seed)
        chaos.run(patience=20 * quiet + 300)
        took = time.monotonic() - started
        count(lab, iterations)
        difference = compare(lab, iterations)
        print(f"faults: {dict(chaos.faults)}; {dict(transitions(lab))}")
        print(f"{iterations} iterations completed, 0 repeated, in {took:.0f} s ({quiet:.0f} s undisturbed)")
        print(f"relative difference of the generator: {difference:.2g}")
        if difference > 1e-4:
            raise Lost("the generator differs")
        failed = False
    except Lost as lost:
        print(f"LOST: {lost}; logs in {folder}", file=sys.stderr)
    finally:
        lab.end()
        if not failed and not arguments.keep:
            subprocess.run(["rm", "-r", str(folder)], check=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
