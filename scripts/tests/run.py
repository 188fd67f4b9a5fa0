#!/usr/bin/env python3
"""Build and run every test of the repository, and say at the end how many passed, failed and were left out, these by name.

Started by scripts/test.sh, with .venv's Python. Arguments are handed to `cargo test`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
VENV = ROOT / ".venv"
# The newest that runs on Node before 21.
AZURITE = "azurite@3.35.0"
# Packages of Debian, and the program by which each is recognized.
DEBIAN = {"slurm-wlm": "slurmctld", "munge": "munged", "iproute2": "ip", "nftables": "nft"}
# How many tests of one program run at a time: each of the cluster's tests has two ranks of its own.
AT_A_TIME = 2
# Test programs that wait for time-outs and servers most of the time.
WAITING = {"partition", "slurm"}


def say(text: str) -> None:
    print(text, flush=True)


def install() -> None:
    """Installs servers that tests start, where this machine can."""
    wanted = [package for package, program in DEBIAN.items() if shutil.which(program) is None]
    if wanted and os.geteuid() == 0 and shutil.which("apt-get"):
        say(f"Installing {', '.join(wanted)} …")
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", *wanted]):
            done = subprocess.run(
                ["apt-get", "-qq", *command], env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                say(f"apt-get {command[0]}: {done.stderr.strip().splitlines()[-1:]}")
    stamp = VENV / "installed-azurite.txt"
    if shutil.which("npm") and not (stamp.exists() and stamp.read_text().strip() == AZURITE):
        say(f"Installing {AZURITE} …")
        command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", VENV / "azurite", AZURITE]
        if subprocess.run(command, check=False).returncode == 0:
            stamp.write_text(AZURITE + "\n")


def missing() -> list[str]:
    """What this machine lacks, by the names that tests give it."""
    root = os.geteuid() == 0
    has = {
        "azurite": (VENV / "azurite" / "node_modules" / ".bin" / "azurite-blob").exists() or shutil.which("azurite-blob"),
        "slurm": root and all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch", "scontrol"))),
        "root": root and shutil.which("unshare") and works("unshare", "--mount", "true"),
        "namespaces": root and shutil.which("nft") and namespaces(),
        "chromium": any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    }
    return [name for name, there in has.items() if not there]


def works(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def namespaces() -> bool:
    """Whether network namespaces can be made: root in a container may not."""
    name = f"potstill-probe-{os.getpid()}"
    made = works("ip", "netns", "add", name)
    if made:
        subprocess.run(["ip", "netns", "delete", name], check=False)
    return made


@dataclass
class Count:
    """Tests that passed, that failed, that were left out, and whether their programs ended well."""

    passed: int = 0
    failed: int = 0
    ignored: int = 0
    well: bool = True

    def run(self, command: list[str], folder: Path, environment: dict[str, str], show: bool = True) -> str:
        """Runs a command that prints results as tests do, and counts them. Returns what it printed."""
        lines = []
        with subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            for line in process.stdout:
                lines.append(line)
                if show:
                    print(line, end="", flush=True)
                if found := re.match(r"test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored", line):
                    passed, failed, ignored = map(int, found.groups())
                    self.passed, self.failed, self.ignored = self.passed + passed, self.failed + failed, self.ignored + ignored
        self.well &= process.returncode == 0
        return "".join(lines)

    def __add__(self, other: Count) -> Count:
        sums = (getattr(self, name) + getattr(other, name) for name in ("passed", "failed", "ignored"))
        return Count(*sums, self.well and other.well)


def programs() -> list[tuple[str, Path, str]]:
    """The test programs of the workspace, which are built: name, folder in which it runs, path."""
    command = ["cargo", "test", "--workspace", "--no-run", "--quiet", "--message-format=json"]
    built = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found = []
    for message in map(json.loads, built.stdout.splitlines()):
        if message["reason"] == "compiler-artifact" and message["profile"]["test"] and message["executable"]:
            folder = Path(message["manifest_path"]).parent
            found.append((message["target"]["name"], folder, message["executable"]))
    return found


def rust(environment: dict[str, str]) -> Count:
    """Runs every test of the workspace. Those that mostly wait run beside the others, which keep the cores busy."""

    def command(path: str) -> list[str]:
        return [path, "--quiet", f"--test-threads={AT_A_TIME}"]

    every = programs()
    waiting, busy = Count(), Count()

    def wait() -> str:
        chosen = [program for program in every if program[0] in WAITING]
        return "\n".join(
            f"{name}:\n" + waiting.run(command(path), folder, environment, show=False) for name, folder, path in chosen
        )

    with ThreadPoolExecutor() as threads:
        beside = threads.submit(wait)
        for name, folder, path in every:
            if name not in WAITING:
                say(f"{name} ({folder.relative_to(ROOT)}):")
                busy.run(command(path), folder, environment)
        busy.run(["cargo", "test", "--workspace", "--doc", "--quiet", "--no-fail-fast"], ROOT, environment)
        # Also raises what the thread raised: tests that did not run must not pass for passed.
        say(beside.result())
    return busy + waiting


class Result(unittest.TextTestResult):
    """Counts those that pass, too."""

    passed = 0

    def addSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        super().addSuccess(test)
        self.passed += 1


def main() -> int:
    arguments = sys.argv[1:]
    started = time.monotonic()

    def took(what: str) -> None:
        nonlocal started
        now = time.monotonic()
        say(f"[{what}: {now - started:.0f} s]")
        started = now

    install()
    without = sorted({*missing(), *filter(None, os.environ.get("POTSTILL_TEST_WITHOUT", "").split(","))})
    took("set-up")
    with tempfile.TemporaryDirectory() as folder:
        skipped_file = Path(folder) / "skipped"
        environment = os.environ | {
            "POTSTILL_TEST_WITHOUT": ",".join(without),
            "POTSTILL_TEST_SKIPPED": str(skipped_file),
            # Beside other processes, libtorch's threads that wait for each other by spinning are many times slower.
            "OMP_NUM_THREADS": "1",
        }
        say("Building the tests; the first time takes several minutes …")
        built = subprocess.run(["cargo", "test", "--workspace", "--no-run", "--quiet", *arguments], cwd=ROOT, check=False)
        took("build")
        if built.returncode != 0:
            return built.returncode
        os.environ.update(environment)
        subprocess.run([sys.executable, ROOT / "scripts/data/train_features.py", "--check"], cwd=ROOT, check=True)
        suite = unittest.defaultTestLoader.discover(str(ROOT / "scripts" / "tests"))
        python = unittest.TextTestRunner(resultclass=Result).run(suite)
        took("Python tests")
        if arguments:
            count = Count()
            split = ["--workspace", "--quiet", "--no-fail-fast", *arguments, "--", f"--test-threads={AT_A_TIME}"]
            count.run(["cargo", "test", *split], ROOT, environment)
        else:
            count = rust(environment)
        took("Rust tests")
        left_out = skipped_file.read_text().splitlines() if skipped_file.exists() else []
    left_out += [f"{test.id()}: {reason}" for test, reason in python.skipped]
    broken = len(python.failures) + len(python.errors)
    for line in sorted(left_out):
        say(f"skipped: {line}")
    # A test that is left out ends well for cargo.
    passed = count.passed + python.passed - len(left_out) + len(python.skipped)
    say(f"{passed} passed, {count.failed + broken} failed, {len(left_out) + count.ignored} skipped")
    return 0 if count.well and not broken else 1


if __name__ == "__main__":
    sys.exit(main())
