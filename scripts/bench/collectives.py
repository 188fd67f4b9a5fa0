#!/usr/bin/env python3
"""Measure c10d's collectives with Gloo between ranks on hosts of their own whose links are slowed down: what it costs to reduce gradients
to slices, and to gather weights from them, in each of the ways that there are. Needs root, iproute2, nftables and .venv's PyTorch. About
two minutes.

    scripts/bench/collectives.py              2 ranks at 1 Gbit/s
    scripts/bench/collectives.py --ranks 4
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from hosts import Hosts, slow_down

# A vector in buckets as large as those of a run.
BUCKETS, ELEMENTS, ROUNDS = 8, (25 << 20) // 4, 3


def ways(rank: int, ranks: int) -> dict:
    """For each way what it starts for a bucket, given its number and its tensor."""
    part = torch.empty(ELEMENTS // ranks)

    def in_turn(number: int) -> int:
        return number % ranks

    def at_a_stretch(number: int) -> int:
        return ranks - 1 - number * ranks // BUCKETS

    def own(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.narrow(0, rank * part.numel(), part.numel())

    def splits(to: int) -> list[int]:
        return [ELEMENTS // ranks if to % ranks == other else 0 for other in range(ranks)]

    def pass_on(_: int, tensor: torch.Tensor) -> dist.Work:
        return dist.all_to_all_single(part, own(tensor), splits(rank - 1), splits(rank + 1), async_op=True)

    def send_on(_: int, tensor: torch.Tensor) -> dist.Work:
        sent = dist.isend(own(tensor), (rank + 1) % ranks)
        dist.irecv(part, (rank - 1) % ranks).wait()
        return sent

    return {
        "slices to the next rank, all-to-all": pass_on,
        "slices to the next rank, send and receive": send_on,
        "all-reduce": lambda _, tensor: dist.all_reduce(tensor, async_op=True),
        "reduce-scatter": lambda _, tensor: dist.reduce_scatter_tensor(part, tensor, async_op=True),
        "reduce to one owner after the other": lambda n, tensor: dist.reduce(tensor, at_a_stretch(n), async_op=True),
        "reduce to the owners in turn": lambda n, tensor: dist.reduce(tensor, in_turn(n), async_op=True),
        "all-gather": lambda _, tensor: dist.all_gather_into_tensor(tensor, own(tensor), async_op=True),
        "broadcast from one owner after the other": lambda n, tensor: dist.broadcast(tensor, at_a_stretch(n), async_op=True),
        "broadcast from the owners in turn": lambda n, tensor: dist.broadcast(tensor, in_turn(n), async_op=True),
    }


def measure(rank: int, ranks: int, address: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://{address}:29555", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    tensors = [torch.zeros(ELEMENTS // ranks * ranks) for _ in range(BUCKETS)]
    for way, start in ways(rank, ranks).items():
        seconds = []
        for _ in range(ROUNDS):
            dist.barrier()
            started = time.monotonic()
            for work in [start(number, tensor) for number, tensor in enumerate(tensors)]:
                work.wait()
            dist.barrier()
            seconds.append(time.monotonic() - started)
        if rank == 0:
            print(json.dumps({"way": way, "seconds": statistics.median(seconds)}), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rate", default="1gbit", help="of the link of each host, as tc writes it")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        return measure(arguments.rank, arguments.ranks, arguments.address)
    names = [f"r{rank}" for rank in range(arguments.ranks)]
    hosts = Hosts(names)
    if not hosts.separate:
        sys.exit("this needs root, iproute2 and nftables")
    try:
        slow_down(hosts, names, arguments.rate)
        own = [sys.executable, str(Path(__file__).resolve()), "--ranks", str(arguments.ranks), "--address", hosts.address("r0")]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth0"}
        ranks = [subprocess.Popen(hosts.on(name, [*own, "--rank", name[1:]]), env=environment) for name in names]
        if any(process.wait() for process in ranks):
            sys.exit("a rank failed")
    finally:
        hosts.remove()
    return None


if __name__ == "__main__":
    main()
