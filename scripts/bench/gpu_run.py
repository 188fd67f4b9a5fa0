"""What gpu_check.py starts: programs of Potstill, whose log it watches, and scripts in the Python that has PyTorch."""

from __future__ import annotations

import argparse
import contextlib
import glob
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUNDLE = HERE / "bundle.tar.xz"


class Failed(Exception):
    """A part cannot go on. The text says why; it ends with the last lines of a log."""


def tail(path: Path, lines: int = 12) -> str:
    if not path.exists():
        return ""
    return "\n".join(line[-600:] for line in path.read_text(errors="replace").splitlines()[-lines:])


class Check:
    """Where everything is, how much time is left, and what was found."""

    def __init__(self, arguments: argparse.Namespace, work: Path):
        self.started = time.monotonic()
        self.rehearsal, self.budget = arguments.rehearse, arguments.budget
        self.device = self.rehearsal or "cuda"
        self.work, self.logs = work, work / "logs"
        self.logs.mkdir()
        self.out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
        if self.out:
            self.out.mkdir(parents=True, exist_ok=True)
        if BUNDLE.exists():
            self.root = work / "bundle"
            with tarfile.open(BUNDLE) as archive:
                archive.extractall(self.root, filter="data")
            self.programs, site = self.root / "bin", self.root / "site"
        else:
            self.root, site = HERE.parent.parent, None
            self.programs = self.root / "target" / "debug"
        self.scripts = HERE
        torch = importlib.util.find_spec("torch")
        if torch is None:
            raise Failed(
                f"{sys.executable} has no torch, which libtorch comes from: start this with the Python that has it"
            )
        # Not resolved: the libraries find NVIDIA's by paths beside the folder that they are loaded from.
        packages = Path(torch.origin).parent.parent
        libraries = [packages / "torch/lib", *map(Path, sorted(glob.glob(str(packages / "nvidia/*/lib"))))]
        found = os.environ.get("LD_LIBRARY_PATH")
        self.libtorch = packages / "torch/lib"
        self.native = os.environ | {"LD_LIBRARY_PATH": ":".join([*map(str, libraries), *([found] if found else [])])}
        self.python = dict(os.environ)
        if site:
            self.python["PYTHONPATH"] = str(site)
        if self.rehearsal:
            # Beside other processes, threads that wait for each other by spinning are many times slower.
            self.native["OMP_NUM_THREADS"] = self.python["OMP_NUM_THREADS"] = "1"
        self.card: dict = {}
        self.models: dict[str, dict | Failed] = {}
        self.making = threading.Lock()
        self.ours: dict[str, float] = {}
        # Models that are written while the first parts run.
        self.preparing = threading.Thread(target=lambda: None)
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            self.nvml = lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used
        except Exception:  # noqa: BLE001
            # The package or the driver is not there.
            self.nvml = None

    def prepare(self, names: list[str]) -> None:
        def write() -> None:
            for name in names:
                with contextlib.suppress(Failed):
                    self.model(name)

        self.preparing = threading.Thread(target=write)
        self.preparing.start()

    def quiet(self) -> None:
        """Waits until the GPU has nothing else to do."""
        if self.preparing.ident is not None:
            self.preparing.join()

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.started)

    def emit(self, part: str, **found: object) -> None:
        line = json.dumps({"part": part, "at": round(time.monotonic() - self.started, 1)} | found)
        print(line, flush=True)
        if self.out:
            with (self.out / "results.jsonl").open("a") as file:
                file.write(line + "\n")

    def keep_logs(self) -> None:
        """So that they are there too where the whole is cut short later."""
        if self.out:
            with tarfile.open(self.out / "logs.tar.gz", "w:gz") as archive:
                archive.add(self.logs, "logs")

    def run(self, name: str, command: list, environment: dict[str, str], seconds: float | None = None) -> str:
        """Standard output of a command that is killed when the time is over."""
        log = self.logs / f"{name}.log"
        with (
            log.open("w") as errors,
            subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=True,
            ) as process,
        ):
            try:
                out, _ = process.communicate(timeout=max(1.0, min(self.left(), seconds or self.left())))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                out, _ = process.communicate()
                raise Failed(f"{name}: time is over; so far: {out[-1500:]}\n{tail(log)}") from None
        if process.returncode != 0:
            raise Failed(f"{name}: exit code {process.returncode}; {out[-600:]}\n{tail(log)}")
        return out

    def script(self, name: str, script: str, *arguments: str) -> dict:
        """The last line of a script of this folder, which is JSON."""
        out = self.run(name, [sys.executable, self.scripts / script, *arguments], self.python)
        return json.loads(out.strip().splitlines()[-1])

    def model(self, name: str) -> tuple[Path, dict]:
        """A model's folder, made when it is wanted first, with its size and its operations."""
        name = f"tiny-{'sdxl' if name == 'sdxl' else 'sd15'}" if self.rehearsal else name
        folder, tokenizer = self.work / "models" / name, self.root / "configs/shapes/model/tokenizer"
        with self.making:
            if name not in self.models:
                try:
                    arguments = (name, str(folder), str(tokenizer), self.device)
                    self.models[name] = self.script(f"model-{name}", "gpu_models.py", *arguments)
                except Failed as error:
                    # It would fail again.
                    self.models[name] = error
            made = self.models[name]
        if isinstance(made, Failed):
            raise made
        return folder, made | {"name": name}

    def memory_used(self, process: int | None) -> int:
        """Bytes of the device that are in use, by whomever; on the CPU those of a process."""
        if self.device == "cpu":
            try:
                fields = Path(f"/proc/{process}/status").read_text()
            except OSError:
                return 0
            return 1024 * int(fields.split("VmHWM:")[1].split()[0])
        if self.nvml:
            return self.nvml()
        if not shutil.which("nvidia-smi"):
            # Neither the driver's tool nor its package.
            return 0
        asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
        return int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout) << 20

    @contextmanager
    def peak_memory(self, process: Callable[[], int | None]) -> Iterator[Callable[[], int]]:
        """The most that is in use while the block runs, beyond what is before."""
        before = 0 if self.device == "cpu" else self.memory_used(None)
        most, over = 0, threading.Event()

        def watch() -> None:
            nonlocal most
            while not over.wait(0.05 if self.nvml else 0.5):
                most = max(most, self.memory_used(process()) - before)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield lambda: most
        finally:
            over.set()
            thread.join()


class Run:
    """A run of Potstill, of which only the log is watched."""

    def __init__(
        self,
        check: Check,
        name: str,
        config: Path,
        settings: dict,
        *,
        verb: str = "launch",
        flags: tuple = (),
        environment: dict | None = None,
        device: str | None = None,
    ):
        self.check, self.name = check, name
        device = device or check.device
        self.id = name.split("+")[0]
        self.log = check.logs / f"{name}.log"
        self.storage = check.work / "storage"
        self.storage.mkdir(exist_ok=True)
        command = [check.programs / "potstill", verb]
        if verb == "agent":
            command += ["--device", device, "--ranks", "1"]
        else:
            command += [
                config,
                "--workers",
                "1",
                *(f for pair in settings.items() for f in ("--set", "{}={}".format(*pair))),
            ]
            command += ["--device", device] if verb == "launch" else ["--listen", "127.0.0.1:0"]
        command += ["--storage", self.storage, "--run-id", self.id, "--log-format", "json", *flags]
        known = (
            check.native
            | {"RUST_LOG": "potstill=debug,info", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
            | (environment or {})
        )
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=known,
                start_new_session=True,
            )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        # Agents and ranks end when who started them does.
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def messages(self, message: str | None = None) -> list[dict]:
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            try:
                said = json.loads(line)
            except ValueError:
                continue
            if message is None or said.get("message") == message:
                said["seconds_since_epoch"] = datetime.fromisoformat(
                    said["timestamp"].replace("Z", "+00:00")
                ).timestamp()
                found.append(said)
        return found

    def iterations(self) -> list[dict]:
        return self.messages("iteration")

    def until(self, condition: Callable[[], object], what: str, seconds: float | None = None) -> object:
        """What the condition gives as soon as it gives something."""
        end = time.monotonic() + min(self.check.left(), seconds or self.check.left())
        while True:
            ended = self.process.poll()
            if found := condition():
                return found
            if ended is not None:
                raise Failed(f"{self.name} ended with {ended} before {what}\n{tail(self.log)}")
            if time.monotonic() > end:
                raise Failed(f"{self.name}: time is over before {what}\n{tail(self.log)}")
            time.sleep(0.02)

    def rank(self) -> int | None:
        """The process of the rank: the newest child of the agent, by what the rank says when it attaches."""
        attached = self.messages("worker attached")
        return int(attached[-1]["worker"].split("process ")[1].split(",")[0]) if attached else None

    def success(self, seconds: float | None = None) -> None:
        """Waits until the run has ended well."""
        self.until(lambda: self.process.poll() is not None, "its end", seconds)
        if self.process.returncode != 0:
            raise Failed(f"{self.name}: exit code {self.process.returncode}\n{tail(self.log)}")

    def state(self) -> dict:
        """The newest checkpoint, by the names of its tensors."""
        from safetensors.numpy import load_file

        folder = sorted((self.storage / "runs" / self.id / "checkpoints").iterdir())[-1]
        return {name: value for shard in folder.rglob("*.safetensors") for name, value in load_file(shard).items()}


def libraries_of(process: int | None) -> list[str]:
    """The libraries of a process that tell what it computes with."""
    known = ("libtorch_cpu", "libtorch_cuda.so", "libnccl", "potstill-nccl", "libcuda.so")
    maps = Path(f"/proc/{process}/maps").read_text().splitlines()
    return sorted({line.split(maxsplit=5)[5] for line in maps if any(name in line for name in known)})


def apart(a: dict, b: dict, prefix: str) -> float:
    """The relative difference of two states' tensors of this prefix."""
    import numpy

    names = [name for name in b if name.startswith(prefix)]
    difference = sum(float(numpy.square(a[name].astype("f8") - b[name]).sum()) for name in names)
    return (difference / sum(float(numpy.square(b[name].astype("f8")).sum()) for name in names)) ** 0.5
