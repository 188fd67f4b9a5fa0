#!/usr/bin/env python3
"""Turn a public EDM network (a pickle) into safetensors that Potstill loads, without trusting the pickle.

    .venv/bin/python scripts/convert_edm.py edm-cifar10-32x32-cond-vp.pkl configs/cifar10/teacher.safetensors

EDM's networks lie at https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/, SiD's students in the same format at
https://huggingface.co/UT-Austin-PML/SiD. Such a pickle carries the source code of its classes, which EDM's own loader executes. Here
nothing of it is executed: objects become passive records of their state, tensors are rebuilt by a short list of known
functions, and everything else that the pickle asks for is refused by name.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import io
import json
import math
import pickle
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

# The configuration's fields as Potstill knows them: constructor arguments of EDM's EDMPrecond and of its U-Nets.
FIELDS = {
    "img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max", "sigma_data", "model_type",
    "augment_dim", "model_channels", "channel_mult", "channel_mult_emb", "num_blocks", "attn_resolutions", "dropout",
    "label_dropout", "embedding_type", "channel_mult_noise", "encoder_type", "decoder_type", "resample_filter",
}  # fmt: skip


class Refused(Exception):
    """What was found is not what an EDM network consists of."""


class Record:
    """An object of a class that came with the pickle: its name and its state, and nothing that could run."""

    def __init__(self, meta: dict) -> None:
        if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("state"), dict):
            raise Refused("an object of the pickle has no state of the known form")
        self.class_name = str(meta.get("class_name"))
        self.state = meta["state"]


class AttributeDict(dict):
    """Stands in for dnnlib.EasyDict, a dict whose keys are also attributes."""


def storage_from_bytes(data: bytes) -> object:
    """A tensor's storage, which pickles carry as a file of torch's own within the file."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def parameter(data: torch.Tensor, *_: object) -> torch.Tensor:
    return data


def tensor(storage: object, offset: int, size: tuple, stride: tuple, *_: object) -> torch.Tensor:
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, collections.OrderedDict())


ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): tensor,
    ("torch._utils", "_rebuild_parameter"): parameter,
    ("torch.storage", "_load_from_bytes"): storage_from_bytes,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Record,
    ("dnnlib.util", "EasyDict"): AttributeDict,
}


class Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in ALLOWED:
            raise Refused(f"the pickle asks for {module}.{name}, which no EDM network needs: it is not read further")
        return ALLOWED[module, name]

    def persistent_load(self, pid: object) -> object:
        raise Refused("the pickle refers to objects outside itself")


def read(data: bytes) -> Record:
    """The network in a pickle: itself, or what lies under 'ema' as in EDM's and SiD's snapshots."""
    try:
        loaded = Reader(io.BytesIO(data)).load()
    except Refused:
        raise
    except Exception as error:  # A damaged pickle can raise anything.
        raise Refused(f"it is not a pickle of the known form: {type(error).__name__}: {error}") from error
    network = loaded.get("ema") if isinstance(loaded, dict) else loaded
    if not isinstance(network, Record):
        raise Refused("it holds no network, neither alone nor under 'ema'")
    if network.class_name != "EDMPrecond":
        raise Refused(f"its network is a {network.class_name}; Potstill knows EDMPrecond")
    return network


def tensors(record: Record, prefix: str = "") -> dict[str, torch.Tensor]:
    """Parameters and buffers of a module and of those within it, by the names that torch gives them."""
    found: dict[str, torch.Tensor] = {}
    for kind in ("_parameters", "_buffers"):
        for name, value in record.state.get(kind, {}).items():
            if isinstance(value, torch.Tensor):
                # Half precision is how some are stored, not how they are computed with here.
                found[prefix + name] = value.detach().to(torch.float32).contiguous().clone()
            elif value is not None:
                raise Refused(f"{prefix}{name} is a {type(value).__name__}, not a tensor")
    for name, module in record.state.get("_modules", {}).items():
        if isinstance(module, Record):
            found |= tensors(module, f"{prefix}{name}.")
        elif module is not None:
            raise Refused(f"{prefix}{name} is a {type(module).__name__}, not a module")
    return found


def config(record: Record) -> dict[str, object]:
    """The constructor's arguments, as they were given."""
    arguments = record.state.get("_init_kwargs")
    if record.state.get("_init_args") or not isinstance(arguments, dict):
        raise Refused("its network does not tell by name what it was made with (_init_kwargs)")
    unknown = sorted(set(arguments) - FIELDS)
    if unknown:
        raise Refused(f"its network was made with {', '.join(unknown)}, which Potstill does not know")
    plain = json.loads(json.dumps(arguments, default=list))
    # JSON has no infinity; without the field it is the default.
    return {name: value for name, value in plain.items() if not (isinstance(value, float) and math.isinf(value))}


def convert(data: bytes, output: Path) -> str:
    network = read(data)
    weights, settings = tensors(network), config(network)
    if not weights:
        raise Refused("its network has no tensors")
    save_file(weights, output, {"config": json.dumps(settings), "converted_by": "scripts/convert_edm.py"})
    digest = hashlib.sha256(output.read_bytes()).hexdigest()
    count = sum(t.numel() for t in weights.values())
    lines = [f"{output}: {len(weights)} tensors, {count:,} numbers", f"SHA-256 {digest}"]
    return "\n".join(lines + [f"  {name} = {value}" for name, value in settings.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="the pickle")
    parser.add_argument("output", type=Path, help="the safetensors file to write")
    parser.add_argument("--sha256", metavar="HEX", help="refuse an input with another digest")
    arguments = parser.parse_args()
    try:
        data = arguments.input.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if arguments.sha256 and digest != arguments.sha256.lower():
            raise Refused(f"its SHA-256 is {digest}, expected {arguments.sha256.lower()}")
        print(convert(data, arguments.output))
    except OSError as error:
        sys.exit(f"error: {error}")
    except Refused as error:
        sys.exit(f"error: {arguments.input}: {error}")


if __name__ == "__main__":
    main()
