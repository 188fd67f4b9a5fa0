#!/usr/bin/env python3
"""Build and run every test of the repository, and say at the end how many passed, failed and were left out, these by name.

Started by scripts/test.sh, with .venv's Python. Arguments are handed to `cargo test`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
VENV = ROOT / ".venv"
# The newest that runs on Node before 21.
AZURITE = "azurite@3.35.0"
# Packages of Debian, and the program by which each is recognized.
DEBIAN = {"slurm-wlm": "slurmctld", "munge": "munged", "iproute2": "ip", "nftables": "nft"}
# How many tests of one program run at a time: each of the cluster's tests has two ranks of its own.
AT_A_TIME = 2


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


def cargo(arguments: list[str], environment: dict[str, str]) -> tuple[int, int, int, bool]:
    """Runs `cargo test`, shows what it prints, and counts: passed, failed, left out, and whether all is well."""
    passed = failed = ignored = 0
    with subprocess.Popen(["cargo", "test", *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := re.match(r"test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored", line):
                passed, failed, ignored = (n + int(m) for n, m in zip((passed, failed, ignored), found.groups()))
    return passed, failed, ignored, process.returncode == 0


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
        # Test programs run one after the other.
        split = ["--workspace", "--quiet", "--no-fail-fast", *arguments, "--", f"--test-threads={AT_A_TIME}"]
        passed, failed, ignored, well = cargo(split, environment)
        took("Rust tests")
        left_out = skipped_file.read_text().splitlines() if skipped_file.exists() else []
    left_out += [f"{test.id()}: {reason}" for test, reason in python.skipped]
    broken = len(python.failures) + len(python.errors)
    for line in sorted(left_out):
        say(f"skipped: {line}")
    # A test that is left out ends well for cargo.
    passed += python.passed - len(left_out) + len(python.skipped)
    say(f"{passed} passed, {failed + broken} failed, {len(left_out) + ignored} skipped")
    return 0 if well and not broken else 1


if __name__ == "__main__":
    sys.exit(main())
