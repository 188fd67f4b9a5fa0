"""What every measurement does first: set-up, the programs, and the Python that has torch.

    import prepare
    prepare.python()    # before the imports of packages: goes on under .venv's Python
    prepare.programs()  # before the measurement: builds what it starts
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAMS = ROOT / "target" / "debug"


def python() -> None:
    """Installs what is missing and starts this script again with .venv's Python, unless it runs with that already."""
    interpreter = ROOT / ".venv" / "bin" / "python"
    if Path(sys.prefix).resolve() == interpreter.parent.parent.resolve():
        return
    # Standard output is for results.
    subprocess.run([ROOT / "scripts" / "setup.sh"], stdout=sys.stderr, check=True)
    os.execv(interpreter, [str(interpreter), *sys.argv])


def programs(*example: str) -> None:
    """Builds both programs, and an example given as package and name."""
    commands = [["-p", "potstill-cli", "-p", "potstill-worker", "--bins"]]
    if example:
        package, name = example
        commands.append(["-p", package, "--example", name])
    for arguments in commands:
        # The same features for all of them, so that nothing is built twice.
        subprocess.run(["cargo", "build", *arguments], cwd=ROOT, stdout=sys.stderr, check=True)
