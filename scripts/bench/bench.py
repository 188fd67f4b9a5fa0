#!/usr/bin/env python3
"""Measure Potstill on this machine and print one table: distillation with one and with two workers, where a step's time goes, how
long a start takes, peak memory, and Gloo's all-reduce. About 1.5 minutes on 2 CPU cores, after the build.

    scripts/bench/bench.py                                 the table
    scripts/bench/bench.py --json FILE                     and the same as JSON, with every round
    scripts/bench/bench.py --rounds 1 --iterations 20      a short look

Times depend on the machine and on what else it does: compare only numbers of one table, best its ratios.

Distillation is configs/digits/one-step.toml with `potstill launch`, without evaluation and without checkpoints
(the one at the end, which every run saves, comes after the last measured iteration). Runs with one and with two workers
alternate, in reverse order in every other round, so that a machine that slows down affects both equally. All
numbers are medians over the rounds; ratios are taken within a round, and then their median.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import prepare

prepare.python()

REPOSITORY = prepare.ROOT
PROGRAMS = prepare.PROGRAMS
CONFIG = "configs/digits/one-step.toml"
WORKERS = (1, 2)
PARTS = {
    "compute": "forward and backward",
    "communication": "waiting for communication",
    "optimizer": "optimizers",
    "other": "other",
}
PROCESSES = ("rank", "agent", "launcher")
SAMPLING_SECONDS = 0.1  # the kernel keeps the peak: one sample before the process's end is enough
SIZES = {4 << 10: "4 KiB", 4 << 20: "4 MiB", 64 << 20: "64 MiB"}
QUIET_CORES = 0.2  # two threads that synchronize after each operation lose far more to another program than its share
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


def fail(message: str) -> NoReturn:
    """End with a message."""
    raise SystemExit(f"bench: {message}")


# Processes


def tied_to_us() -> None:
    """In a new child: ends it with this process, even if this one is killed."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def environment() -> dict[str, str]:
    """This process's environment, without variables that would change a run or silence its log."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("POTSTILL_")}
    return kept | {"RUST_LOG": "info"}


def read_proc(pid: int | str, name: str) -> str:
    """A file of /proc; empty when the process has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def stat_fields(pid: int | str) -> list[str]:
    """/proc/PID/stat from the state on: the name before it may contain spaces and parentheses."""
    return read_proc(pid, "stat").rpartition(")")[2].split()


def children(pid: int) -> list[int]:
    """The child processes of `pid`."""
    pids = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return [child for child in pids if stat_fields(child)[1:2] == [str(pid)]]


class Others:
    """How many cores all other programs used during a run, including those on the machine's host."""

    def __init__(self) -> None:
        self.started, self.busy, self.own = time.monotonic(), self.busy_seconds(), self.own_seconds()

    @staticmethod
    def busy_seconds() -> float:
        """CPU seconds of all programs since the start of the machine."""
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, read_proc(".", "stat").split()[1:9])
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def own_seconds() -> float:
        """CPU seconds of this process and of its children that have ended."""
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(of.ru_utime + of.ru_stime for of in used)

    def cores(self) -> float:
        """Cores, on average since the start."""
        others = self.busy_seconds() - self.busy - (self.own_seconds() - self.own)
        return max(0.0, others / (time.monotonic() - self.started))


class Watch(threading.Thread):
    """Finds a launcher's agent and ranks, and samples peak memory while they run."""

    def __init__(self, launcher: int, workers: int) -> None:
        super().__init__(daemon=True)
        self.workers = workers
        self.found: dict[str, list[int]] = {"launcher": [launcher], "agent": [], "rank": []}
        self.peak_kib: dict[int, int] = {}
        self.rank_starts: list[float] = []
        self.threads = 0
        self.over = threading.Event()

    def run(self) -> None:
        """Sample until the run is over."""
        while not self.over.wait(SAMPLING_SECONDS):
            if len(self.found["rank"]) < self.workers:
                self.look()
            for pid in [pid for pids in self.found.values() for pid in pids]:
                for line in read_proc(pid, "status").splitlines():
                    if line.startswith("VmHWM:"):
                        self.peak_kib[pid] = int(line.split()[1])

    def look(self) -> None:
        """Find new processes."""
        parents = {"agent": self.found["launcher"], "rank": self.found["agent"]}
        for role, above in parents.items():
            for pid in [child for parent in above for child in children(parent)]:
                arguments = read_proc(pid, "cmdline").split("\0")
                if pid in self.found[role] or arguments[1:2] != [role]:
                    continue
                self.found[role].append(pid)
                if role == "rank":
                    ticks = stat_fields(pid)[19:20]
                    self.rank_starts += [int(t) / os.sysconf("SC_CLK_TCK") for t in ticks]
                    if "--threads" in arguments[:-1]:
                        self.threads = int(arguments[arguments.index("--threads") + 1])

    def peak_mb(self, role: str) -> float | None:
        """The largest peak among the processes of a kind, in MB."""
        peaks = [self.peak_kib[pid] for pid in self.found[role] if pid in self.peak_kib]
        return max(peaks) * 1024 / 1e6 if peaks else None


# Distillation


def write_config(work: Path) -> Path:
    """The digits run without its evaluation section, so that nothing is evaluated, not even at the end."""
    kept, section = [], ""
    for line in (REPOSITORY / CONFIG).read_text().splitlines():
        if line.startswith("["):
            section = line.strip()
        if section == "[evaluation]":
            continue
        name, _, value = line.partition("=")
        if section == "[teacher]" and name.strip() == "weights":
            # The path is relative to the file that names it, and the copy is in another folder.
            path = REPOSITORY / Path(CONFIG).parent / value.strip().strip("\"'")
            line = f"weights = {json.dumps(str(path))}"
        kept.append(line)
    path = work / "bench.toml"
    path.write_text("\n".join(kept) + "\n")
    return path


def distil(work: Path, config: Path, name: str, workers: int, iterations: int) -> dict:
    """Run once, and return what was measured."""
    command = [PROGRAMS / "potstill", "launch", config, "--workers", str(workers)]
    command += ["--storage", work, "--run-id", name, "--log-format", "json"]
    for setting in (f"distillation.iterations={iterations}", f"checkpoint.every={iterations + 1}"):
        command += ["--set", setting]
    others = Others()
    started = time.clock_gettime(time.CLOCK_BOOTTIME)
    launcher = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        preexec_fn=tied_to_us,
        start_new_session=True,
    )
    watch = Watch(launcher.pid, workers)
    said: list[str] = []
    first_step = None
    try:
        watch.start()
        for line in launcher.stderr:
            said.append(line)
            if first_step is None and f'"iteration 1/{iterations}: ' in line:
                first_step = time.clock_gettime(time.CLOCK_BOOTTIME)
        status = launcher.wait()
    finally:
        watch.over.set()
        if launcher.poll() is None:
            launcher.kill()
        # The agent and its ranks end with their launcher. Each keeps the other end of this pipe open until then.
        for _ in launcher.stderr:
            pass
        launcher.wait()
        watch.join()
    busy_elsewhere = others.cores()
    if status != 0 or first_step is None:
        sys.stderr.writelines(said[-20:])
        fail(f"the run with {workers} worker(s) ended with status {status}; its last messages are above")
    measured = step_times(work / "runs" / name / "metrics.jsonl", workers)
    since_rank = first_step - min(watch.rank_starts) if watch.rank_starts else None
    measured["cores_busy_for_others"] = busy_elsewhere
    measured["threads_per_worker"] = watch.threads
    measured["first_step_seconds"] = {"launch": first_step - started, "rank": since_rank}
    measured["peak_mb"] = {role: watch.peak_mb(role) for role in PROCESSES}
    return measured


def step_times(path: Path, workers: int) -> dict:
    """Images per second and milliseconds of a step by part, from a run's metrics without their first window."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    warm_up, *rows = [row for row in rows if row["kind"] == "iteration"]
    if not rows:
        fail("the run was too short: nothing is left without the first iterations")
    if any(row["world_size"] != workers for row in [warm_up, *rows]):
        fail(f"a worker was lost in the run with {workers}: its speed cannot be measured")
    iterations = sum(row["iterations"] for row in rows)
    images = rows[-1]["images"] - warm_up["images"]

    def mean_ms(part: str) -> float:
        return 1e3 * sum(row["seconds"][part] * row["iterations"] for row in rows) / iterations

    ms = {part: mean_ms(part) for part in PARTS if part != "other"}
    total = mean_ms("total")
    ms |= {"other": total - sum(ms.values()), "total": total}
    return {
        "images_per_second": images / (total / 1e3 * iterations),
        "step_ms": ms,
        "iterations_left_out": warm_up["iterations"],
    }


# All-reduce


def all_reduce() -> list[dict]:
    """Build and run the all-reduce example, and read what it prints."""
    command = ["cargo", "run", "-q", "-p", "potstill-c10d", "--example", "all_reduce"]
    with subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=tied_to_us,
    ) as process:
        try:
            output = process.communicate()[0]
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        fail(f"the all_reduce example ended with status {process.returncode}")
    rows = [line.split() for line in output.splitlines()[1:]]
    return [
        {"bytes": int(size), "operations": int(count), "median_us": float(us), "gb_per_second": float(rate)}
        for size, count, us, rate in rows
    ]


# Summing up


def median(values: list[float | None]) -> float | None:
    """The median, if every round has a value."""
    return None if None in values else statistics.median(values)


class Rounds:
    """The measurements of all rounds, with one and with two workers."""

    def __init__(self) -> None:
        self.of: dict[int, list[dict]] = {workers: [] for workers in WORKERS}

    def values(self, workers: int, *path: str) -> list:
        """One quantity, round by round."""
        found = self.of[workers]
        for key in path:
            found = [entry[key] for entry in found]
        return found

    def summary(self, *path: str) -> dict:
        """Medians of one quantity with one and two workers, and of the ratio within a round."""
        one, two = (self.values(workers, *path) for workers in WORKERS)
        ratios = [b / a if a and b is not None else None for a, b in zip(one, two, strict=True)]
        return {"1": median(one), "2": median(two), "ratio": median(ratios)}


def machine() -> dict:
    """The machine and the versions on which the numbers depend, without names and paths."""
    lines = (line.partition(":") for line in read_proc(".", "cpuinfo").splitlines())
    models = [value.strip() for name, _, value in lines if name.strip() == "model name"]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": models[0] if models else platform.processor() or "unknown CPU",
        "architecture": platform.machine(),
        "system": platform.system(),
        "torch": metadata.version("torch"),
    }


def table(rows: list[list[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right. A row of one cell is a line by itself."""
    widths = [max(len(row[i]) for row in rows if len(row) > 1 and i < len(row)) for i in range(max(map(len, rows)))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=False)]
        cells[0] = row[0].ljust(widths[0]) if len(row) > 1 else row[0]
        lines.append("   ".join(cells).rstrip())
    return "\n".join(lines)


def shown(value: float | None, form: Callable[[float], str]) -> str:
    return "n/a" if value is None else form(value)


def report(results: dict) -> str:
    """The table."""
    facts, method, runs = results["machine"], results["method"], results["distillation"]
    threads = results["threads_per_worker"]

    def row(name: str, entry: dict, form: Callable[[float], str]) -> list[str]:
        cells = [shown(entry[str(workers)], form) for workers in WORKERS]
        return [f"  {name}", *cells, shown(entry["ratio"], "{:.2f}".format)]

    def part(name: str, key: str) -> list[str]:
        entry = runs["step_ms"][key]
        cells = [f"{entry[w]:.1f} {100 * entry[w] / runs['step_ms']['total'][w]:5.1f}%" for w in ("1", "2")]
        return [f"  {name}", *cells, shown(entry["ratio"], "{:.2f}".format)]

    def counted(count: int, thing: str) -> str:
        return f"{count} {thing}{'' if count == 1 else 's'}"

    heads = [f"{counted(w, 'worker')}, {counted(threads[str(w)], 'thread')}{' each' * (w > 1)}" for w in WORKERS]
    spread = [f"{min(found):.0f} .. {max(found):.0f}" for found in runs["images_per_second_rounds"].values()]
    rows = [
        ["", *heads, "2 : 1"],
        ["distillation"],
        row("images/s", runs["images_per_second"], "{:.1f}".format),
        ["  slowest .. fastest round", *spread, ""],
        row("cores used by other programs", runs["cores_busy_for_others"], "{:.2f}".format)[:3] + [""],
        ["a step of the slowest rank, ms and share"],
        *(part(name, key) for key, name in PARTS.items()),
        part("total", "total"),
        ["until the first step is reported"],
        row("from `potstill launch`, s", results["first_step_seconds"]["launch"], "{:.2f}".format),
        row("from the first rank process, s", results["first_step_seconds"]["rank"], "{:.2f}".format),
        ["peak resident memory of a process (VmHWM)"],
        *(row(f"{role}, MB", results["peak_mb"][role], "{:.0f}".format) for role in PROCESSES),
        ["Gloo all-reduce, 2 processes, loopback", "GB/s", "microseconds", ""],
        *(
            [f"  {SIZES.get(e['bytes'], e['bytes'])}", f"{e['gb_per_second']:.3f}", f"{e['median_us']:.0f}", ""]
            for e in results["all_reduce"]
        ),
    ]
    busiest = max(run["cores_busy_for_others"] for rounds in results["rounds"].values() for run in rounds)
    warning = f"Not an idle machine: in one run, other programs used {busiest:.1f} cores. Measure again."
    return "\n".join(
        [
            f"{counted(facts['cores'], 'core')}, {facts['cpu']}, {facts['system']} {facts['architecture']}, "
            f"torch {facts['torch']}",
            f"{method['config']}: {counted(method['rounds'], 'round')} of {method['iterations']} iterations, "
            f"the first {method['iterations_left_out']} left out; medians over rounds",
            "",
            table(rows),
            "",
            "images/s: of training alone. other: the total less the three parts. MB: the largest process of its kind,",
            "each with the shared libraries that it has loaded.",
            "GB/s: bytes of one rank's fp32 tensor divided by the median time of an operation.",
            "Only numbers of one table can be compared.",
            *([warning] if busiest > QUIET_CORES else []),
        ]
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench/bench.py", description="Measure Potstill on this machine and print one table."
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="R", help="runs of each kind [default: 3]")
    parser.add_argument(
        "--iterations", type=int, default=60, metavar="N", help="iterations of a run, at least 20 [default: 60]"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers, of every round, to FILE")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    if given.iterations < 20:
        parser.error("--iterations must be at least 20: the first 10 are left out")
    if given.json and not given.json.absolute().parent.is_dir():
        parser.error(f"--json {given.json}: no such folder")
    return given


def end_on_signals() -> None:
    """Turn the first signal into an exception, so that all started processes are ended."""
    signals = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)

    def end(number: int, _frame: object) -> NoReturn:
        for other in signals:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in signals:
        signal.signal(number, end)


def main() -> None:
    """Measure, and print."""
    given = arguments()
    end_on_signals()
    if sys.platform != "linux":
        fail("needs Linux: processes are watched in /proc")
    prepare.programs("potstill-c10d", "all_reduce")
    with tempfile.TemporaryDirectory() as work:
        measure(given, Path(work))


def measure(given: argparse.Namespace, work: Path) -> None:
    """All of it, in a folder that goes away."""
    config = write_config(work)
    rounds = Rounds()
    for number in range(given.rounds):
        for workers in WORKERS if number % 2 == 0 else WORKERS[::-1]:
            print(f"round {number + 1} of {given.rounds}, {workers} worker(s) …", file=sys.stderr, flush=True)
            name = f"bench-{number}-{workers}"
            rounds.of[workers].append(distil(work, config, name, workers, given.iterations))
    print("all-reduce …", file=sys.stderr, flush=True)

    results = {
        "machine": machine(),
        "method": {
            "config": CONFIG,
            "rounds": given.rounds,
            "iterations": given.iterations,
            "iterations_left_out": rounds.values(1, "iterations_left_out")[0],
        },
        "threads_per_worker": {str(w): rounds.values(w, "threads_per_worker")[0] for w in WORKERS},
        "distillation": {
            "images_per_second": rounds.summary("images_per_second"),
            "images_per_second_rounds": {str(w): rounds.values(w, "images_per_second") for w in WORKERS},
            "cores_busy_for_others": rounds.summary("cores_busy_for_others"),
            "step_ms": {part: rounds.summary("step_ms", part) for part in (*PARTS, "total")},
        },
        "first_step_seconds": {since: rounds.summary("first_step_seconds", since) for since in ("launch", "rank")},
        "peak_mb": {role: rounds.summary("peak_mb", role) for role in PROCESSES},
        "all_reduce": all_reduce(),
        "rounds": {str(w): rounds.of[w] for w in WORKERS},
    }
    print(report(results))
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
