#!/usr/bin/env python3
"""Write the digits data set as one safetensors file.

The digits example trains on real images that are in the repository, so that
it needs no download. This script made that file and can make it again,
byte for byte:

    pip install scikit-learn numpy safetensors
    python scripts/data/make_digits.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save

REPOSITORY = Path(__file__).resolve().parent.parent.parent
COUNT = 1797
LEVELS = 16  # pixels count the set bits of a 4x4 block, so 0..16
METADATA = {
    "origin": "E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits (test set), "
    "UCI Machine Learning Repository, https://doi.org/10.24432/C50P49",
    "licence": "CC BY 4.0",
    "pixel_max": str(LEVELS),
}


def load() -> dict[str, np.ndarray]:
    """Return `images` u8 [1797, 1, 8, 8] in 0..16 and `labels` u8 [1797], as scikit-learn ships them."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit("make_digits: needs scikit-learn (pip install scikit-learn)") from error

    digits = load_digits()
    images = digits.images.astype(np.uint8)
    labels = digits.target.astype(np.uint8)
    if images.shape != (COUNT, 8, 8) or labels.shape != (COUNT,):
        raise SystemExit(f"make_digits: unexpected shapes {images.shape}, {labels.shape}")
    if not np.array_equal(images, digits.images) or images.max() != LEVELS:
        raise SystemExit(f"make_digits: pixels are not integers in 0..{LEVELS}")
    if not np.array_equal(np.unique(labels), np.arange(10)):
        raise SystemExit("make_digits: labels are not 0..9")
    return {"images": np.ascontiguousarray(images[:, None]), "labels": labels}


def ordered(content: bytes) -> bytes:
    """Sort the metadata of a safetensors file, whose order in the library's output varies."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start on a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[end:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "configs/digits/digits.safetensors")
    out: Path = parser.parse_args().out
    if not out.parent.is_dir():
        parser.error(f"no such folder: {out.parent}")
    content = ordered(save(load(), metadata=METADATA))
    out.write_bytes(content)
    print(f"{out.name}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
