#!/usr/bin/env python3
"""Write tests/fixtures/pillow.safetensors: images, and Pillow's results for them.

    pip install pillow==13.0.0 numpy safetensors
    python scripts/make_pillow_fixture.py

Each case is an image, u8 [H, W, C]; its largest centered square, resized with Pillow's Lanczos filter; and a patch from
its center. Half of an odd margin is rounded to even, as torchvision's center_crop rounds it. The tests that read the file
need no Python.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

REPOSITORY = Path(__file__).resolve().parent.parent
# Height, width, channels, side after resizing, side of the patch.
CASES = {
    "shrunk": (96, 128, 3, 32, 45),
    "odd": (75, 50, 3, 21, 30),
    "grown": (20, 24, 3, 37, 19),
    "grey": (64, 64, 1, 16, 33),
}


def image(height: int, width: int, channels: int, seed: int) -> np.ndarray:
    """Waves with edges and some noise, so that the filter's shape matters."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    planes = [
        127 + 90 * np.sin(x / (2.0 + c) + y / 7.0) + 60 * ((x // 9 + y // 5 + c) % 2) + rng.normal(0, 15, x.shape)
        for c in range(channels)
    ]
    return np.stack(planes, -1).clip(0, 255).astype(np.uint8)


def centre(pixels: np.ndarray, side: int) -> np.ndarray:
    top, left = (round((length - side) / 2) for length in pixels.shape[:2])
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])


def resized(pixels: np.ndarray, side: int) -> np.ndarray:
    square = centre(pixels, min(pixels.shape[:2]))
    picture = Image.fromarray(square if square.shape[2] == 3 else square[:, :, 0])
    return np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS)).reshape(side, side, -1).copy()


def main() -> None:
    tensors = {}
    for seed, (name, (height, width, channels, side, patch)) in enumerate(CASES.items()):
        pixels = image(height, width, channels, seed)
        tensors[f"{name}.image"] = pixels
        tensors[f"{name}.resized"] = resized(pixels, side)
        tensors[f"{name}.patch"] = centre(pixels, patch)
    save_file(tensors, REPOSITORY / "tests/fixtures/pillow.safetensors")


if __name__ == "__main__":
    main()
