"""convert_edm.py on pickles of EDM's form that are made here, and on hostile ones."""

import collections
import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import types
import unittest
from pathlib import Path

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import convert_edm  # noqa: E402

TEACHER = ROOT / "configs" / "digits" / "teacher.safetensors"
WORKER = ROOT / "target" / "debug" / "potstill-worker"
# Executed, this leaves a file; carried along as text, it does not.
HOSTILE_SOURCE = "import pathlib; pathlib.Path({path!r}).write_text('executed')"


class Module:
    """Pickles as EDM's persistent classes do: a function's name and a dict of source code and state."""

    source = "class EDMPrecond: pass"

    def __init__(self, class_name, parameters=(), buffers=(), modules=(), kwargs=None):
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": self.source,
            "class_name": class_name,
            "state": {
                "training": False,
                "_parameters": collections.OrderedDict(parameters),
                "_buffers": collections.OrderedDict(buffers),
                "_modules": collections.OrderedDict(modules),
                "_non_persistent_buffers_set": set(),
                "_init_args": (),
                "_init_kwargs": kwargs or {},
            },
        }

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def install_stand_ins():
    """pickle writes a function by its module's name, so there must be such a module."""

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("EDM's loader was called")

    module = types.ModuleType("torch_utils.persistence")
    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    sys.modules["torch_utils"] = types.ModuleType("torch_utils")
    sys.modules["torch_utils.persistence"] = module


def as_module(tensors, class_name, kwargs=None):
    """Nested modules out of dotted names."""
    own, below = {}, collections.OrderedDict()
    for name, value in tensors.items():
        first, _, rest = name.partition(".")
        if rest:
            below.setdefault(first, {})[rest] = value
        else:
            own[first] = value
    modules = [(name, as_module(part, "Anything")) for name, part in below.items()]
    buffers = {n: t for n, t in own.items() if n.startswith("resample_filter")}
    parameters = {n: torch.nn.Parameter(t) for n, t in own.items() if n not in buffers}
    return Module(class_name, parameters.items(), buffers.items(), modules, kwargs)


class Convert(unittest.TestCase):
    def setUp(self):
        install_stand_ins()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        with safe_open(TEACHER, "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}

    def pickled(self, **changes):
        network = as_module(self.tensors, changes.pop("class_name", "EDMPrecond"), self.config | changes)
        return pickle.dumps({"ema": network, "loss_fn": Module("EDMLoss"), "dataset_kwargs": {"path": "x"}})

    def refused(self, data, *words):
        with self.assertRaises(convert_edm.Refused) as caught:
            convert_edm.convert(data, self.folder / "out.safetensors")
        for word in words:
            self.assertIn(word, str(caught.exception))
        self.assertFalse((self.folder / "out.safetensors").exists())

    def test_the_converted_network_is_the_pickled_one(self):
        half = dict(self.tensors)
        name = next(iter(half))
        self.tensors = {n: t.half() if n == name else t for n, t in half.items()}
        data = self.pickled(sigma_max=float("inf"))
        (self.folder / "in.pkl").write_bytes(data)
        out = self.folder / "out.safetensors"
        command = [sys.executable, ROOT / "scripts" / "convert_edm.py", self.folder / "in.pkl", out]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        self.assertIn("SHA-256", said)
        with safe_open(out, "pt") as file:
            config = json.loads(file.metadata()["config"])
            self.assertEqual({n: file.get_tensor(n).dtype for n in file.keys()}, dict.fromkeys(half, torch.float32))
            for other, tensor in self.tensors.items():
                self.assertTrue(torch.equal(file.get_tensor(other), tensor.float()), other)
        self.assertEqual(config, {k: v for k, v in self.config.items() if k != "sigma_max"})

        wrong = subprocess.run([*command, "--sha256", "00"], capture_output=True, text=True)
        self.assertEqual((wrong.returncode, "expected 00" in wrong.stderr), (1, True))
        if not WORKER.exists():
            self.skipTest("the worker is not built: what it says of the file is not looked at")
        spec = f"[teacher]\nweights = {json.dumps(str(out))}\n"
        checked = subprocess.run([WORKER, "check"], input=spec, capture_output=True, text=True)
        self.assertEqual(checked.returncode, 0, checked.stderr)

    def test_source_code_in_a_pickle_is_not_executed(self):
        mark = self.folder / "executed"
        Module.source = HOSTILE_SOURCE.format(path=str(mark))
        self.addCleanup(setattr, Module, "source", "class EDMPrecond: pass")
        convert_edm.convert(self.pickled(), self.folder / "fine.safetensors")
        self.assertFalse(mark.exists())

    def test_a_pickle_that_calls_something_is_refused(self):
        mark = self.folder / "executed"

        class Hostile:
            def __reduce__(self):
                return os.system, (f"touch {mark}",)

        self.refused(pickle.dumps({"ema": Hostile()}), "system")
        self.assertFalse(mark.exists())

        class Hidden:
            """Inside a tensor's storage, which is a file of its own."""

            def __reduce__(self):
                inner = io.BytesIO()
                torch.save({"x": Hostile()}, inner)
                return torch.storage._load_from_bytes, (inner.getvalue(),)

        self.refused(pickle.dumps({"ema": Hidden()}))
        self.assertFalse(mark.exists())

    def test_what_is_no_network_is_refused_by_name(self):
        self.refused(b"not a pickle", "not a pickle")
        self.refused(self.pickled()[:500], "not a pickle")
        self.refused(pickle.dumps({"ema": 3}), "'ema'")
        self.refused(self.pickled(class_name="VPPrecond"), "VPPrecond", "EDMPrecond")
        self.refused(self.pickled(flavour="new"), "flavour")


if __name__ == "__main__":
    unittest.main()
