"""convert_edm.py on pickles of EDM's form made here, and on malicious ones."""

import collections
import hashlib
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

import numpy as np
import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts" / "data"))

import convert_edm  # noqa: E402

TEACHER = ROOT / "configs" / "digits" / "teacher.safetensors"
WORKER = ROOT / "target" / "debug" / "potstill-worker"
# Executed, this writes a file; kept as text, it does not.
HOSTILE_SOURCE = "import pathlib; pathlib.Path({path!r}).write_text('executed')"
# The names in the pickles of EDM's own code, with torch 2.11 and numpy 2: recorded from that code, so that the pickles
# of these tests are not of a simpler form than the real ones.
ASKED_BY_EDM = {
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "scalar"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch.nn.modules.container", "ModuleDict"),
    ("torch.storage", "_load_from_bytes"),
    ("torch_utils.persistence", "_reconstruct_persistent_obj"),
}
ATTRIBUTES = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max", "sigma_data")


class Module:
    """Is pickled as EDM's persistent classes are: a function's name and a dict of source code and state."""

    source = "class EDMPrecond: pass"

    def __init__(self, class_name, parameters=(), buffers=(), modules=(), kwargs=None, attributes=None):
        # EDM's blocks are made with roots of numbers, which numpy makes numpy's.
        kwargs = {"skip_scale": np.sqrt(0.5)} if kwargs is None else kwargs
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": self.source,
            "class_name": class_name,
            "state": {
                "training": False,
                "_parameters": collections.OrderedDict(parameters),
                "_buffers": collections.OrderedDict(buffers),
                "_non_persistent_buffers_set": set(),
                "_backward_hooks": collections.OrderedDict(),
                "_modules": collections.OrderedDict(modules),
                **(attributes or {}),
                "_init_args": (),
                "_init_kwargs": kwargs,
            },
        }

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


class FromBytes:
    """A tensor whose storage is the given file of torch's."""

    def __init__(self, data, size, stride):
        self.data, self.size, self.stride = data, size, stride

    def __reduce__(self):
        storage = Call(torch.storage._load_from_bytes, self.data)
        rest = (0, self.size, self.stride, False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, (storage, *rest)


class Call:
    """Unpickled by an ordinary reader, it calls a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


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


def as_module(tensors, class_name, **more):
    """Nested modules from dotted names; a U-Net's `enc` and `dec` are torch's own dicts of modules, as in EDM."""
    own, below = {}, collections.OrderedDict()
    for name, value in tensors.items():
        first, _, rest = name.partition(".")
        if rest:
            below.setdefault(first, {})[rest] = value
        else:
            own[first] = value
    modules = [(name, as_module(part, name)) for name, part in below.items()]
    if class_name in ("enc", "dec"):
        container = torch.nn.ModuleDict()
        container._modules.update(modules)
        return container
    buffers = {n: t for n, t in own.items() if n in ("resample_filter", "freqs")}
    parameters = {n: torch.nn.Parameter(t, requires_grad=False) for n, t in own.items() if n not in buffers}
    # Absent parts of a layer are there too, as None.
    return Module(class_name, [*parameters.items(), ("absent", None)], buffers.items(), modules, **more)


def legacy_storage(tensor, **replaced):
    """A storage in a pickle's form."""
    file = io.BytesIO()
    torch.save(tensor._typed_storage(), file, _use_new_zipfile_serialization=False)
    data = file.getvalue()
    for old, new in replaced.items():
        text = [b"X" + len(word).to_bytes(4, "little") + word.encode() for word in (old, new)]
        assert text[0] in data
        data = data.replace(*text)
    return data


class Convert(unittest.TestCase):
    def setUp(self):
        install_stand_ins()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.out = self.folder / "out.safetensors"
        with safe_open(TEACHER, "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}

    def network(self, class_name="EDMPrecond", attributes=None, **changes):
        kwargs = self.config | changes
        known = {name: kwargs[name] for name in ATTRIBUTES} | {"sigma_max": float("inf")} | (attributes or {})
        return as_module(self.tensors, class_name, kwargs=kwargs, attributes=known)

    def pickled(self, protocol=4, **changes):
        data = {"ema": self.network(**changes), "loss_fn": Module("EDMLoss"), "dataset_kwargs": {"path": "x"}}
        return pickle.dumps(data, protocol)

    def convert(self, data):
        return convert_edm.convert(io.BytesIO(data), self.out)

    def refused(self, data, *words):
        with self.assertRaises(convert_edm.Refused) as caught:
            self.convert(data)
        for word in words:
            self.assertIn(word, str(caught.exception))
        self.assertEqual([path.name for path in self.folder.iterdir() if path.name != "in.pkl"], [])

    def run_script(self, *more):
        command = [sys.executable, ROOT / "scripts" / "data" / "convert_edm.py", self.folder / "in.pkl", self.out, *more]
        return subprocess.run(command, capture_output=True, text=True)

    def read(self):
        with safe_open(self.out, "pt") as file:
            metadata = file.metadata()
            self.assertEqual(list(metadata), ["config"])
            return json.loads(metadata["config"]), {name: file.get_tensor(name) for name in file.keys()}

    def test_the_pickles_here_are_of_the_form_that_edm_writes(self):
        asked = set()

        class Listening(convert_edm.Reader):
            def find_class(self, module, name):
                asked.add((module, name.rpartition(".")[2]))
                return super().find_class(module, name)

        Listening(io.BytesIO(self.pickled())).load()
        asked = {(module.replace("numpy.core", "numpy._core"), name) for module, name in asked}
        self.assertEqual(asked, ASKED_BY_EDM)

    def test_the_converted_network_is_the_pickled_one(self):
        self.tensors = {n: t.half() if n.endswith("bias") else t for n, t in self.tensors.items()}
        (self.folder / "in.pkl").write_bytes(self.pickled())
        ran = self.run_script()
        self.assertEqual(ran.returncode, 0, ran.stderr)
        numbers = sum(tensor.numel() for tensor in self.tensors.values())
        self.assertIn(f"{len(self.tensors)} tensors, {numbers:,} numbers", ran.stdout)
        self.assertEqual(self.out.stat().st_mode, (self.folder / "in.pkl").stat().st_mode)
        config, tensors = self.read()
        # ∞ is null there and absent here, and both are read as ∞.
        self.assertEqual(config, {k: v for k, v in self.config.items() if k != "sigma_max"})
        self.assertEqual(tensors.keys(), self.tensors.keys())
        for name, tensor in self.tensors.items():
            self.assertEqual(tensors[name].dtype, torch.float32)
            self.assertTrue(torch.equal(tensors[name], tensor.float()), name)

        said = hashlib.sha256(self.out.read_bytes()).hexdigest()
        self.assertIn(said, ran.stdout)
        for _ in range(4):
            self.assertIn(said, self.run_script().stdout, "the same input gives another file")

    def test_the_worker_loads_the_converted_network(self):
        if not WORKER.exists():
            self.skipTest("the worker is not built (cargo build): its reading of the file is not tested")
        self.convert(self.pickled())
        spec = f"[teacher]\nweights = {json.dumps(str(self.out))}\n"
        checked = subprocess.run([WORKER, "check"], input=spec, capture_output=True, text=True)
        self.assertEqual(checked.returncode, 0, checked.stderr)
        # With one tensor less it names the missing one: so it does check the file.
        name = next(n for n in self.tensors if n.endswith("qkv.weight"))
        del self.tensors[name]
        self.convert(self.pickled())
        checked = subprocess.run([WORKER, "check"], input=spec, capture_output=True, text=True)
        self.assertNotEqual(checked.returncode, 0)
        self.assertIn(name, checked.stdout + checked.stderr)

    def test_snapshots_of_sid_and_bare_networks_convert(self):
        for data in (pickle.dumps({"ema": self.network()}), pickle.dumps(self.network())):
            self.convert(data)
            self.assertEqual(self.read()[1].keys(), self.tensors.keys())

    def test_pickles_of_older_versions_convert(self):
        # Text up to a line's end, so that one name can take another's place.
        data = self.pickled(protocol=3).replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
        self.assertIn(b"cbuiltins\nset\n", data)
        self.assertIn(b"cnumpy.core.multiarray\nscalar\n", data)
        self.convert(data)
        self.assertEqual(self.read()[1].keys(), self.tensors.keys())

    def test_storages_from_a_gpu_come_to_the_cpu(self):
        values = torch.arange(6.0)
        gpu = FromBytes(legacy_storage(values, cpu="cuda:0"), (2, 3), (1, 2))
        self.convert(pickle.dumps(Module("EDMPrecond", [("weight", gpu)], kwargs=dict(self.config))))
        self.assertTrue(torch.equal(self.read()[1]["weight"], values.view(3, 2).T))

    def test_numbers_of_numpy_become_plain_ones(self):
        self.convert(self.pickled(dropout=np.float64(0.25), num_blocks=np.int64(1), resample_filter=(1, np.float32(1))))
        config, _ = self.read()
        self.assertEqual((config["dropout"], config["num_blocks"], config["resample_filter"]), (0.25, 1, [1, 1]))
        self.convert(self.pickled(attributes={"unused": np.arange(3)}))
        # The network's own attributes count, also where a default was taken.
        self.convert(self.pickled(attributes={"sigma_max": 80.0, "use_fp16": True}))
        self.assertEqual((self.read()[0]["sigma_max"], self.read()[0]["use_fp16"]), (80.0, True))

    def test_source_code_in_a_pickle_is_not_executed(self):
        mark = self.folder / "executed"
        Module.source = HOSTILE_SOURCE.format(path=str(mark))
        self.addCleanup(setattr, Module, "source", "class EDMPrecond: pass")
        data = self.pickled()
        self.assertIn(b"executed", data)
        self.convert(data)
        self.assertFalse(mark.exists())
        exec(Module.source)
        self.assertTrue(mark.exists(), "the source does nothing: this test shows nothing")

    def test_a_pickle_that_calls_something_is_refused(self):
        mark = self.folder / "executed"
        call = Call(os.system, f"touch {mark}")
        for zipped in (True, False):
            inside = io.BytesIO()
            torch.save({"x": call}, inside, _use_new_zipfile_serialization=zipped)
            hidden = FromBytes(inside.getvalue(), (1,), (1,))
            self.refused(pickle.dumps({"ema": Module("EDMPrecond", [("weight", hidden)])}), "posix.system")
        self.refused(pickle.dumps({"ema": call}), "posix.system")
        self.refused(pickle.dumps({"ema": Module("EDMPrecond", [("weight", call)])}), "posix.system")
        for function in (eval, exec, getattr, __import__, torch.load, np.load):
            self.refused(pickle.dumps(Call(function, "1")), function.__name__)
        # Protocol 4 could reach into a known module by a dotted name.
        words = (b"torch._utils", b"_rebuild_tensor_v2.__call__")
        dotted = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(word)]) + word for word in words) + b"\x93."
        self.refused(dotted, "torch._utils._rebuild_tensor_v2.__call__")
        self.assertFalse(mark.exists())
        pickle.loads(pickle.dumps(call))
        self.assertTrue(mark.exists(), "the call does nothing: this test shows nothing")

    def test_tensors_that_are_no_tensors_are_refused(self):
        def network(value):
            return pickle.dumps(Module("EDMPrecond", [("weight", value)], kwargs=dict(self.config)))

        few = legacy_storage(torch.zeros(4))
        self.refused(network(FromBytes(few, (1 << 20, 1 << 20), (0, 0))), "4 numbers")
        self.refused(network(FromBytes(few, (2, 2), (100, 1))))
        self.refused(network(FromBytes(b"nothing", (2, 2), (2, 1))), "cannot be read")
        self.refused(network(torch.zeros(2, dtype=torch.float64)), "weight", "float64")
        self.refused(network("text"), "weight is a str")
        shared = Module("Linear", [("weight", torch.zeros(1))])
        twice = Module("EDMPrecond", modules=[("a", shared), ("b", shared)], kwargs=dict(self.config))
        self.refused(pickle.dumps(twice), "b is also")

    def test_what_is_no_network_is_refused_by_name(self):
        self.refused(b"not a pickle", "not a pickle")
        self.refused(self.pickled()[:500], "damaged")
        self.refused(pickle.dumps({"ema": 3}), "'ema'")
        self.refused(pickle.dumps([np.array(["text"])]), "type")
        self.refused(self.pickled(class_name="VPPrecond"), "VPPrecond", "EDMPrecond")
        self.refused(self.pickled(flavour="new"), "flavour")
        self.refused(self.pickled(dropout=float("nan")), "dropout = nan")
        self.refused(pickle.dumps(Module("EDMPrecond", kwargs=dict(self.config))), "no tensors")

    def test_what_is_wrong_on_the_command_line_is_said(self):
        ran = self.run_script()
        self.assertEqual((ran.returncode, "in.pkl" in ran.stderr), (1, True))
        data = self.pickled()
        (self.folder / "in.pkl").write_bytes(data)
        ran = self.run_script("--sha256", "00")
        self.assertEqual((ran.returncode, "expected 00" in ran.stderr, self.out.exists()), (1, True, False))
        right = convert_edm.digest(io.BytesIO(data))
        self.assertEqual(self.run_script("--sha256", right.upper()).returncode, 0)
        self.out = self.folder / "nowhere" / "out.safetensors"
        ran = self.run_script()
        self.assertEqual((ran.returncode, "there is no folder" in ran.stderr), (1, True))
        self.assertNotIn("Traceback", ran.stderr)


if __name__ == "__main__":
    unittest.main()
