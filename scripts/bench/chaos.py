#!/usr/bin/env python3
"""Train while ranks and the coordinator are killed and paused at random, hosts are cut off, workers that cannot work join, and
the storage misbehaves, and compare the result with an undisturbed run's. Exits with 1 if anything was lost, repeated or changed.

Four ranks and two spares of two agents; where namespaces can be made (root, iproute2, nftables), coordinator and agents are on hosts of
their own.

    scripts/bench/chaos.py --minutes 2 --seed 0
    scripts/bench/chaos.py --minutes 10 --teacher shapes --set memory.shard=parameters --set memory.recompute=true
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
from hosts import Hosts

prepare.python()

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from teachers import TEACHERS, unscored  # noqa: E402

POTSTILL = prepare.PROGRAMS / "potstill"
RUN = "chaos"
WORLD = 4
# Each host of an agent has half of the ranks, and a spare.
AGENTS = ["a", "b"]
SETTINGS = {
    "distillation.global_batch": 32,
    "distillation.micro_batch": 8,
    "checkpoint.every": 20,
    "cluster.failure_timeout": "3s",
    "cluster.wait_timeout": "120s",
}
# Kinds of faults, and how often each is drawn. Cuts need hosts of their own.
FAULTS = {"kill": 5, "pause": 2, "coordinator": 2, "kill and coordinator": 1, "stop coordinator": 1, "bad joiner": 1}
CUTS = {"cut from coordinator": 1, "cut from peers": 1}
# The rates of storage faults while faults are injected.
STORAGE_FAULTS = "error=0.02,delay=0.05,lost=0.02"


def settings(iterations: int, own: dict[str, str]) -> list[str]:
    pairs = SETTINGS | own | {"distillation.iterations": iterations}
    return [part for key, value in pairs.items() for part in ("--set", f"{key}={value}")]


class Lab:
    """Storage, a run file without evaluation, and the started processes."""

    def __init__(self, folder: Path, hosts: Hosts, teacher: str, own: dict[str, str]):
        self.folder = folder
        # Settings of the run that come from the command line.
        self.own = own
        self.hosts = hosts
        self.config = unscored(folder, TEACHERS[teacher])
        self.processes: list[subprocess.Popen] = []

    def start(self, name: str, *arguments: str, host: str | None = None, faults: str | None = None) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if faults:
            environment["POTSTILL_STORAGE_FAULTS"] = faults
        command = [str(POTSTILL), *arguments]
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                self.hosts.on(host, command) if host else command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
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
        workers = ["--workers", str(WORLD), "--set", "cluster.min_workers=1"]
        return [subcommand, str(self.config), *workers, *storage, *settings(iterations, self.own)]

    def status(self) -> dict | None:
        command = [str(POTSTILL), "status", RUN, "--storage", str(self.folder), "--json"]
        output = subprocess.run(self.hosts.on("c", command), capture_output=True, text=True, check=False)
        return json.loads(output.stdout) if output.returncode == 0 else None

    def checkpoint(self, run: str, iteration: int) -> dict[str, torch.Tensor]:
        folder = self.folder / "runs" / run
        manifest = json.loads((folder / f"checkpoints/{iteration:012}/manifest.json").read_text())
        # Of a run whose ranks hold slices, a tensor may come in pieces: name@first element.
        pieces: dict[str, dict[int, torch.Tensor]] = {}
        for shard in manifest["shards"]:
            for name, values in load_file(folder / shard["key"]).items():
                tensor, _, first = name.partition("@")
                pieces.setdefault(tensor, {})[int(first or 0)] = values.flatten()
        return {name: torch.cat([parts[first] for first in sorted(parts)]) for name, parts in pieces.items()}


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
        # Until when a host is cut off.
        self.cuts: dict[str, float] = {}
        self.stopped: float | None = None
        # No rank is taken away before this iteration is completed.
        self.steady_after = 0
        self.joiner: tuple[subprocess.Popen, float] | None = None
        self.agents = [self.agent(host, str(self.lab.folder), spares=1) for host in AGENTS]

    def agent(self, host: str, storage: str, spares: int = 0, join: Path | None = None) -> subprocess.Popen:
        arguments = ["agent", "--storage", storage, "--run-id", RUN, "--threads", "1", "--spares", str(spares)]
        ranks = WORLD // len(AGENTS) if spares else 1
        invited = ["--join", str(join)] if join else []
        name = f"agent-{host}" if spares else "joiner"
        return self.lab.start(name, *arguments, "--ranks", str(ranks), *invited, host=host, faults=self.storage_faults)

    def serve(self) -> subprocess.Popen:
        arguments = self.lab.run_arguments("serve", RUN, self.iterations)
        listen = ["--listen", f"{self.lab.hosts.address('c')}:0", "--resume=auto"]
        return self.lab.start("coordinator", *arguments, *listen, host="c", faults=self.storage_faults)

    def join_badly(self) -> None:
        """Starts a worker that sees another storage, or one that reaches the coordinator and not its peers."""
        blind = not self.lab.hosts.separate or self.random.random() < 0.5
        invitation = None
        storage = str(self.lab.folder)
        if blind:
            storage = tempfile.mkdtemp(dir=self.lab.folder)
            invitation = self.lab.folder / "invitation.json"
            command = [str(POTSTILL), "invite", RUN, "--role", "worker", "--storage", str(self.lab.folder)]
            if subprocess.run([*command, "--output", str(invitation)], capture_output=True, check=False).returncode != 0:
                return
        # Host d is cut off from a and b from the start.
        self.joiner = (self.agent("d", storage, join=invitation), time.monotonic() + self.random.uniform(5.0, 25.0))

    def holders(self, status: dict) -> list[dict]:
        return [member for member in status["members"] if member["rank"] is not None]

    def wake(self, all_faults: bool = False) -> None:
        """Ends the faults whose time is over, or all of them."""
        now = time.monotonic()
        for pid, until in list(self.paused.items()):
            if all_faults or until <= now:
                del self.paused[pid]
                try:
                    os.kill(pid, signal.SIGCONT)
                except ProcessLookupError:
                    pass
        for host, until in list(self.cuts.items()):
            if all_faults or until <= now:
                del self.cuts[host]
                self.lab.hosts.heal(host)
        if self.stopped is not None and (all_faults or self.stopped <= now):
            self.stopped = None
            self.coordinator.send_signal(signal.SIGCONT)
        if self.joiner is not None and (all_faults or self.joiner[1] <= now):
            self.joiner[0].kill()
            self.joiner[0].wait()
            self.joiner = None

    def disturb(self) -> None:
        """Injects one fault, if at least one rank that holds the state survives it."""
        status = self.lab.status()
        if status is None or status["state"] != "training":
            return
        holders = self.holders(status)
        kinds = FAULTS | (CUTS if self.lab.hosts.separate else {})
        kind = self.random.choices(list(kinds), list(kinds.values()))[0]
        able = [m["pid"] for m in holders if m["liveness"] == "alive" and m["pid"] not in self.paused]
        # A rank that has just joined may not have taken over the state yet; and of an iteration that a death interrupted one rank
        # alone may hold the result. Once an iteration is completed after that, all of them hold the state.
        cursors = [int(re.findall(r"\d+", m["cursor"])[0]) for m in holders]
        settled = len(able) >= 2 and min(cursors) + 1 >= max(cursors) >= max(status["iteration"], 1)
        settled = settled and status["iteration"] > self.steady_after
        quiet = not self.paused and not self.cuts and self.stopped is None
        if not quiet or (kind not in ("coordinator", "stop coordinator", "bad joiner") and not settled):
            return
        # Where both hosts have a rank that holds the state, one of them may be cut off.
        if kind in CUTS and (len(able) < WORLD or status["generation"] == 0):
            return
        if kind == "bad joiner" and self.joiner is not None:
            return
        self.faults[kind] += 1
        if kind not in ("coordinator", "stop coordinator", "bad joiner"):
            self.steady_after = max(cursors) + 1
        for_a_while = time.monotonic() + self.random.uniform(0.2, 6.0)
        if kind == "pause":
            pid = self.random.choice(able)
            os.kill(pid, signal.SIGSTOP)
            self.paused[pid] = for_a_while
        elif kind == "stop coordinator":
            self.coordinator.send_signal(signal.SIGSTOP)
            self.stopped = for_a_while
        elif kind == "bad joiner":
            self.join_badly()
        elif kind in CUTS:
            self.lab.hosts.cut("b", ["c"] if kind == "cut from coordinator" else ["a"])
            self.cuts["b"] = for_a_while + 4.0
        if "kill" in kind:
            os.kill(self.random.choice(able), signal.SIGKILL)
        if kind.endswith("coordinator") and kind not in CUTS and kind != "stop coordinator":
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
        self.wake(all_faults=True)
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
    parser.add_argument("--teacher", choices=TEACHERS, default="digits")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the run, such as lora.rank=4")
    parser.add_argument("--keep", action="store_true", help="keep the folder with logs and checkpoints")
    arguments = parser.parse_args()
    prepare.programs()
    folder = Path(tempfile.mkdtemp(prefix="potstill-chaos-"))
    hosts = Hosts(["c", *AGENTS, "d"])
    if hosts.separate:
        hosts.cut("d", AGENTS)
    own = dict(pair.split("=", 1) for pair in arguments.set)
    lab = Lab(folder, hosts, arguments.teacher, own)
    failed = True
    try:
        # The speed of this machine: the disturbed run gets as many iterations as an undisturbed one completes in half
        # its time.
        trial = Lab(folder, hosts, arguments.teacher, own)
        (folder / "trial").mkdir()
        trial.folder = folder / "trial"
        seconds = (undisturbed(trial, 60) - 2.0) / 60
        iterations = max(40, int(arguments.minutes * 60 * 0.5 / max(seconds, 1e-3)))
        print(f"{iterations} iterations undisturbed …", flush=True)
        quiet = undisturbed(lab, iterations)
        where = "on hosts of their own" if hosts.separate else "on one host"
        print(f"the same with faults, seed {arguments.seed}, {where} …", flush=True)
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
        hosts.remove()
        if not failed and not arguments.keep:
            subprocess.run(["rm", "-r", str(folder)], check=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
