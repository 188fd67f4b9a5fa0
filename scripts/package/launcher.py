"""The commands `potstill` and `potstill-worker` of the wheel: each becomes the program of its name beside this file."""

import os
import signal
import sys
from pathlib import Path

PROGRAMS = Path(__file__).resolve().parent / "bin"


def become(name: str) -> None:
    """Replaces this process by a program: the process id stays, and signals and the exit code are the program's own."""
    # Python ignores these two, and a program inherits what is ignored.
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)
    os.execv(PROGRAMS / name, [name, *sys.argv[1:]])


def potstill() -> None:
    become("potstill")


def worker() -> None:
    become("potstill-worker")
