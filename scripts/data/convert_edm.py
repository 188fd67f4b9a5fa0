#!/usr/bin/env python3
"""Turn a public EDM network (a pickle) into safetensors that Potstill loads, without trusting the pickle.

    .venv/bin/python scripts/data/convert_edm.py edm-cifar10-32x32-cond-vp.pkl configs/cifar10/teacher.safetensors

EDM's networks are at https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/, SiD's students in the same format at
https://huggingface.co/UT-Austin-PML/SiD. Such a pickle carries the source code of its classes, which EDM's own loader
executes. Here nothing of it is executed: objects become passive records of their state, tensors and numbers are rebuilt
by a short list of known functions, and any other request of the pickle is rejected by name.

Potstill checks that the tensors are those of the network when it loads the file.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import io
import json
import math
import os
import pickle
import re
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

# The configuration's fields that Potstill supports: constructor arguments of EDM's EDMPrecond and of its U-Nets. Those
# of the first kind are also attributes of the network, with the values in use, including defaults.
ATTRIBUTES = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max", "sigma_data")
FIELDS = {
    *ATTRIBUTES, "model_type", "augment_dim", "model_channels", "channel_mult", "channel_mult_emb", "num_blocks",
    "attn_resolutions", "dropout", "label_dropout", "embedding_type", "channel_mult_noise", "encoder_type",
    "decoder_type", "resample_filter",
}  # fmt: skip


class Refused(Exception):
    """The file is not that of an EDM network."""


# Stand-ins for the objects of a pickle


class Record:
    """An object of a class in the pickle: its name and its state, without any code."""

    def __init__(self, meta: dict) -> None:
        if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("state"), dict):
            raise Refused("an object of the pickle has no state of the known form: it was not written by EDM's code")
        self.class_name = str(meta.get("class_name"))
        self.state = meta["state"]


class Container(Record):
    """Replaces torch.nn.ModuleDict, in which EDM's U-Nets keep their blocks."""

    def __init__(self) -> None:
        self.class_name, self.state = "ModuleDict", {}

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise Refused("a torch.nn.ModuleDict of the pickle has no state of the known form")
        self.class_name, self.state = "ModuleDict", state


class AttributeDict(dict):
    """Replaces dnnlib.EasyDict, a dict whose keys are also attributes."""


class NumpyType:
    """Replaces numpy.dtype: plain numbers only, no types that hold objects."""

    def __init__(self, code: str, *_: object) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
            raise Refused(f"the pickle has numpy values of type {code!r}; an EDM network has plain numbers only")
        self.code = "<" + code

    def __setstate__(self, state: tuple) -> None:
        self.code = (">" if state[1] == ">" else "<") + self.code[1:]


class NumpyArray:
    """Replaces numpy.ndarray. No array is part of a network, so its content is ignored."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def numpy_scalar(kind: NumpyType, data: bytes) -> object:
    (value,) = np.frombuffer(data, kind.code)
    return value.item()


# Tensors


def storage_from_bytes(data: bytes) -> torch.TypedStorage:
    """A tensor's storage, which a pickle contains as a file in torch's format; from a GPU it is moved to the CPU."""
    try:
        storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # A damaged file can raise anything, and torch's advice is to trust it.
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks for {asked[1]}" if asked else f"cannot be read ({type(error).__name__})"
        raise Refused(f"a tensor's data {what}: it is not read further") from error
    if not isinstance(storage, torch.storage.TypedStorage):
        raise Refused(f"a tensor's data is a {type(storage).__name__}, not a storage")
    return storage


def tensor(storage: torch.TypedStorage, offset: int, size: tuple, stride: tuple, *_: object) -> torch.Tensor:
    flat = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
    # Strides of 0 could make a terabyte out of a few bytes; as_strided itself checks the storage's end.
    if math.prod(size) > flat.numel():
        raise Refused(f"a tensor of shape {tuple(size)} has only {flat.numel()} numbers")
    return flat.as_strided(size, stride, offset)


def parameter(data: torch.Tensor, *_: object) -> torch.Tensor:
    return data


# The functions that EDM's code pickles, with torch 1.12 to 2.11 and numpy 1 and 2. No other name is looked up.
ALLOWED = {
    ("builtins", "set"): set,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("dnnlib.util", "EasyDict"): AttributeDict,
    ("numpy", "dtype"): NumpyType,
    ("numpy", "ndarray"): NumpyArray,
    ("numpy.core.multiarray", "_reconstruct"): NumpyArray,
    ("numpy.core.multiarray", "scalar"): numpy_scalar,
    ("numpy._core.multiarray", "_reconstruct"): NumpyArray,
    ("numpy._core.multiarray", "scalar"): numpy_scalar,
    ("torch._utils", "_rebuild_parameter"): parameter,
    ("torch._utils", "_rebuild_tensor_v2"): tensor,
    ("torch.nn.modules.container", "ModuleDict"): Container,
    ("torch.storage", "_load_from_bytes"): storage_from_bytes,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Record,
}


class Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in ALLOWED:
            raise Refused(
                f"the pickle asks for {module}.{name}, which no EDM network needs: it is not read further. Take the file "
                "from where EDM or SiD publish it"
            )
        return ALLOWED[module, name]

    def persistent_load(self, pid: object) -> object:
        raise Refused("the pickle refers to objects outside itself, as files of torch.save do; convert a network's pickle")


def read(file: BinaryIO) -> Record:
    """The network in a pickle: itself, or the entry 'ema' as in EDM's and SiD's snapshots."""
    try:
        loaded = Reader(file).load()
    except Refused:
        raise
    except Exception as error:  # A damaged pickle can raise anything.
        raise Refused(
            f"it is damaged, or not a pickle of the known form ({type(error).__name__}: {error}); download it again"
        ) from error
    network = loaded.get("ema") if isinstance(loaded, dict) else loaded
    if not isinstance(network, Record):
        raise Refused("it holds no network, neither alone nor under 'ema'")
    if network.class_name != "EDMPrecond":
        raise Refused(
            f"its network is a {network.class_name}; Potstill supports EDMPrecond, the network in EDM's files named edm-*.pkl"
        )
    return network


# From records to safetensors


def members(record: Record, kind: str) -> dict:
    found = record.state.get(kind, {})
    if not isinstance(found, dict):
        raise Refused(f"a {record.class_name}'s {kind} is a {type(found).__name__}, not a dict")
    return found


def tensors(record: Record, prefix: str = "", seen: set[int] | None = None) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a module and of those within it, by the names that torch gives them."""
    seen = set() if seen is None else seen
    if id(record) in seen:
        raise Refused(f"{prefix.rstrip('.')} is also another of its modules, which is not the case in an EDM network")
    seen.add(id(record))
    found: dict[str, torch.Tensor] = {}
    for kind in ("_parameters", "_buffers"):
        for name, value in members(record, kind).items():
            if value is None:
                continue
            if not isinstance(value, torch.Tensor):
                raise Refused(f"{prefix}{name} is a {type(value).__name__}, not a tensor")
            if value.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise Refused(f"{prefix}{name} is of kind {value.dtype}, which fp32 cannot represent exactly")
            # Some networks are stored in half precision, but none computes in it here.
            found[f"{prefix}{name}"] = value.detach().to(torch.float32).contiguous().clone()
    for name, module in members(record, "_modules").items():
        if isinstance(module, Record):
            found |= tensors(module, f"{prefix}{name}.", seen)
        elif module is not None:
            raise Refused(f"{prefix}{name} is a {type(module).__name__}, not a module")
    return found


def plain(name: str, value: object) -> object:
    """A setting as a JSON value."""
    if isinstance(value, (list, tuple)):
        return [plain(name, item) for item in value]
    finite = not isinstance(value, float) or math.isfinite(value)
    if not isinstance(value, (bool, int, float, str)) or not finite:
        raise Refused(f"its network was made with {name} = {value!r}, which is not a setting of the known form")
    return value


def config(record: Record) -> dict[str, object]:
    """The constructor's arguments as they were given, and the network's own attributes."""
    arguments = record.state.get("_init_kwargs")
    if record.state.get("_init_args") or not isinstance(arguments, dict):
        raise Refused("its network does not hold its constructor's arguments (_init_kwargs)")
    unknown = sorted(str(name) for name in set(arguments) - FIELDS)
    if unknown:
        raise Refused(f"its network was made with {', '.join(unknown)}, which Potstill does not support")
    settings = arguments | {name: record.state[name] for name in ATTRIBUTES if name in record.state}
    # JSON has no infinity; without the field it is the default.
    if settings.get("sigma_max") in (None, math.inf):
        settings.pop("sigma_max", None)
    return {name: plain(name, value) for name, value in settings.items()}


def digest(file: BinaryIO) -> str:
    state = hashlib.sha256()
    while part := file.read(1 << 20):
        state.update(part)
    return state.hexdigest()


def save(weights: dict[str, torch.Tensor], settings: dict[str, object], output: Path) -> str:
    """Writes the file, completely or not at all, and returns its SHA-256."""
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".convert-") as folder:
        part = Path(folder) / "part"
        # One key only: safetensors writes several in an order that varies, and the digest would vary with it.
        save_file(weights, part, {"config": json.dumps(settings)})
        with open(part, "rb") as file:
            found = digest(file)
        # It was created readable for its owner only; like other files it gets the permissions of the user's umask.
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)
        os.replace(part, output)
    return found


def convert(file: BinaryIO, output: Path) -> str:
    """Converts an opened pickle, and returns a summary of it."""
    try:
        network = read(file)
        weights, settings = tensors(network), config(network)
    except RecursionError as error:
        raise Refused("its objects are nested deeper than any EDM network") from error
    if not weights:
        raise Refused("its network has no tensors")
    found = save(weights, settings, output)
    count = sum(t.numel() for t in weights.values())
    lines = [f"{output}: {len(weights)} tensors, {count:,} numbers", f"SHA-256 {found}"]
    return "\n".join(lines + [f"  {name} = {value}" for name, value in settings.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="the pickle")
    parser.add_argument("output", type=Path, help="the safetensors file to write")
    parser.add_argument("--sha256", metavar="HEX", help="reject an input with another digest")
    arguments = parser.parse_args()
    if not arguments.output.parent.is_dir():
        sys.exit(f"error: {arguments.output}: there is no folder {arguments.output.parent}; create it first")
    try:
        with open(arguments.input, "rb") as file:
            if arguments.sha256:
                found = digest(file)
                if found != arguments.sha256.lower():
                    raise Refused(f"its SHA-256 is {found}, expected {arguments.sha256.lower()}; download it again")
                file.seek(0)
            print(convert(file, arguments.output))
    except (OSError, SafetensorError) as error:
        sys.exit(f"error: {error}")
    except Refused as error:
        sys.exit(f"error: {arguments.input}: {error}")


if __name__ == "__main__":
    main()
