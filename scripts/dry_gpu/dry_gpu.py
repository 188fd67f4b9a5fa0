#!/usr/bin/env python3
"""Run a command as if this machine had GPUs that compute nothing, and say what its processes did with them.

    scripts/dry_gpu/dry_gpu.py [--devices N] COMMAND …

Nothing is computed: losses are 0, and samples are whatever was in memory. All that the host does is real: libtorch's CUDA
and NCCL parts, memory, copies, launches, waits, captures. runtime.cpp says how, and which variables tell more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIBRARY = ROOT / "target" / "dry_gpu" / "libdry_gpu.so"
SOURCES = [HERE / "runtime.cpp", HERE / "libraries.cpp", HERE / "tracker.cpp"]


def build() -> Path:
    """The library, compiled where it is not there or is older than its sources."""
    sources = [*SOURCES, HERE / "runtime.h"]
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        packages = (ROOT / ".venv" / "libtorch").resolve().parent
        cuda = packages / "nvidia" / "cu13" / "include"
        headers = [cuda, cuda / "cccl", packages / "torch" / "include"]
        if not (headers[0] / "cuda_runtime_api.h").exists():
            raise FileNotFoundError(f"{headers[0]} has no CUDA headers: this libtorch is for the CPU only")
        LIBRARY.parent.mkdir(parents=True, exist_ok=True)
        command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-o", LIBRARY]
        subprocess.run([*command, *(f"-I{folder}" for folder in headers), *SOURCES, "-ldl", "-lpthread"], check=True)
        # What libtorch opens as the driver.
        driver = LIBRARY.with_name("libcuda.so.1")
        driver.unlink(missing_ok=True)
        driver.symlink_to(LIBRARY.name)
    return LIBRARY


def environment(log: Path, devices: int = 1) -> dict[str, str]:
    """What makes a process run on such GPUs. Its counts are appended to `log` when it ends, unless it is killed."""
    library = build()
    found = os.environ.get("LD_LIBRARY_PATH")
    return os.environ | {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": ":".join([str(library.parent), *([found] if found else [])]),
        "DRY_GPU_LOG": str(log),
        "DRY_GPU_DEVICES": str(devices),
    }


def counts(log: Path) -> list[dict]:
    """What each process that used a GPU has counted."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        code = subprocess.run(arguments.command, env=environment(log, arguments.devices), check=False).returncode
        for found in counts(log):
            print(json.dumps(found, indent=1))
    return code


if __name__ == "__main__":
    sys.exit(main())
