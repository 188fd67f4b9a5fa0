#!/usr/bin/env python3
"""Measure how much of the communication of two ranks is hidden behind what they compute, on hosts of their own: the time that an
iteration takes longer over a link that is slowed down than over one that is not, beside the time that the link needs at least.
Needs root, iproute2 and nftables. About 10 minutes on 2 idle CPU cores, after the build.

    scripts/bench/overlap.py                   1 Gbit/s
    scripts/bench/overlap.py --rate 500mbit    another rate of tc
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import bench_recovery
import prepare
from hosts import Hosts, slow_down
from teachers import unscored

# The first two are not counted. The batch is so large that the last backward pass takes longer than what is sent beside it.
ITERATIONS, WARM_UP = 8, 2
BATCH = 96
# What each of two ranks sends in a phase, in bytes for a parameter. An all-reduce is twice half of the vector. With slices both ranks
# still need the whole gradient, as each holds a copy of the other's slice; then half of the weights is gathered. With gradients the copy
# is not kept from the all-reduce, and comes after it.
SENT = {"none": 4.0, "optimizer": 6.0, "gradients": 8.0}
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def measured(folder: Path, config: Path, hosts: Hosts, shard: str, link: str) -> dict[str, float]:
    """Seconds by part of an iteration of the slowest rank, medians."""
    run = f"overlap-{shard}-{link}"
    sets = {
        "distillation.iterations": ITERATIONS,
        "distillation.global_batch": BATCH,
        "distillation.micro_batch": BATCH // 2,
        "checkpoint.every": 1000,
        "cluster.failure_timeout": "60s",
        "memory.shard": shard,
    }
    pairs = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    where = ["--storage", str(folder), "--run-id", run]
    listen = ["--workers", "2", "--listen", f"{hosts.address('c')}:0", "--log-format", "json"]
    commands = {
        "c": ["serve", str(config), *where, *pairs, *listen],
        "a": ["agent", *where, "--threads", "1"],
        "b": ["agent", *where, "--threads", "1"],
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RUST_LOG": "potstill=debug,info"}
    started = []
    with open(folder / f"{run}.log", "wb") as log:
        for host, arguments in commands.items():
            command = hosts.on(host, [str(bench_recovery.POTSTILL), *arguments])
            started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment))
        ended = [process.wait() for process in started]
    if any(ended):
        sys.exit(f"{run} failed: {(folder / f'{run}.log').read_text()[-2000:]}")
    lines = [json.loads(line) for line in (folder / f"{run}.log").read_text().splitlines() if line.startswith("{")]
    found = [line for line in lines if line.get("message") == "iteration"][WARM_UP:]
    return {part: statistics.median(line[part] for line in found) for part in ("optimizer", "communication", "seconds")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", default="1gbit", help="of the link of each host, as tc writes it")
    rate = parser.parse_args().rate
    number, unit = re.fullmatch(r"([0-9.]+)([a-z]+)", rate).groups()
    bits = float(number) * UNITS[unit]
    prepare.programs()
    hosts = Hosts(["c", "a", "b"])
    if not hosts.separate:
        sys.exit("this needs root, iproute2 and nftables")
    try:
        with tempfile.TemporaryDirectory(prefix="potstill-bench-") as name:
            folder = Path(name)
            teacher = bench_recovery.large_teacher(folder)
            config = unscored(folder, teacher)
            parameters = teacher.stat().st_size / 4
            fast = {shard: measured(folder, config, hosts, shard, "fast") for shard in SENT}
            slow_down(hosts, ["a", "b"], rate)
            for shard, bytes_of in SENT.items():
                of = measured(folder, config, hosts, shard, rate)
                sent = 2 * parameters * bytes_of
                least, longer = sent * 8 / bits, of["seconds"] - fast[shard]["seconds"]
                print(
                    f"memory.shard={shard}: {sent / 1e6:.0f} MB sent by a rank in an iteration, {least:.2f} s at {rate}; an iteration"
                    f" takes {fast[shard]['seconds']:.2f} s without this limit and {of['seconds']:.2f} s with it, of which it waits"
                    f" {fast[shard]['communication']:.2f} and {of['communication']:.2f} s;"
                    f" its steps take {of['optimizer']:.2f} s; hidden {max(0.0, 1 - longer / least):.0%}",
                    flush=True,
                )
    finally:
        hosts.remove()


if __name__ == "__main__":
    main()
