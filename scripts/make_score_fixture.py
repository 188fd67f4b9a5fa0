#!/usr/bin/env python3
"""Write tests/fixtures/scores.safetensors: features, and their FID, precision and recall.

    pip install numpy scipy safetensors
    python scripts/make_score_fixture.py

FID is computed as the reference implementations do, with scipy.linalg.sqrtm of the product of both covariances; precision
and recall (1904.06991) by their definition, over all pairs. The tests need neither Python nor scipy.
"""

from pathlib import Path

import numpy as np
import scipy
from safetensors.numpy import save_file

OUT = Path(__file__).resolve().parent.parent / "tests/fixtures/scores.safetensors"


def fid(a: np.ndarray, b: np.ndarray) -> float:
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root))


def covered(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    inside = 0
    radii = [np.sort(np.linalg.norm(centres - c, axis=1))[k] for c in centres]
    for p in points:
        inside += any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii))
    return inside / len(points)


def main() -> None:
    draw = np.random.default_rng(20260101)
    tensors: dict[str, np.ndarray] = {}
    # The last case has more dimensions than samples, so its covariances are singular, as InceptionV3's often are.
    for name, real, fake, width in [("plain", 300, 260, 12), ("far", 150, 200, 6), ("singular", 40, 48, 64)]:
        mix = draw.normal(size=(width, width))
        a = (draw.normal(size=(real, width)) @ mix).astype(np.float32)
        b = (draw.normal(size=(fake, width)) @ mix * 0.8).astype(np.float32)
        b += (3.0 if name == "far" else 0.2) * draw.normal(size=width).astype(np.float32)
        expected = [fid(a.astype(np.float64), b.astype(np.float64)), covered(b, a, 3), covered(a, b, 3)]
        tensors |= {f"{name}.real": a, f"{name}.generated": b, f"{name}.expected": np.array(expected)}
        print(name, expected)
    save_file(tensors, OUT, {"scipy": scipy.__version__, "expected": "FID, precision, recall; k = 3"})


if __name__ == "__main__":
    main()
