#!/usr/bin/env python3
"""Train the feature extractor with which the digits example measures FID, precision and recall.

Potstill's contract for a feature extractor is a TorchScript file whose forward maps

    images: float32 [N, C, H, W] in [-1, 1]  ->  (features: float32 [N, F], logits: float32 [N, classes])

Other data sets use an InceptionV3; on 8x8 digits that is meaningless, so a small classifier
is trained here (C = 1, H = W = 8, F = 64, 10 classes) and shipped with the example.

    python scripts/data/train_features.py           # train, then write features.pt and features.json
    python scripts/data/train_features.py --check   # score the shipped features.pt; fails below 97 %
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Tuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DATA = REPOSITORY / "configs/digits/digits.safetensors"
MINIMUM_ACCURACY = 0.97
HELD_OUT = 0.2
FEATURES = 64
BATCH = 64


class DigitFeatures(nn.Module):
    """Three convolutions, 64 smooth features, one linear head: 31,674 parameters.

    There is no batch norm and no dropout, so an image's features depend on that image
    alone. `shift` and `scale` standardize each feature after training, which gives the
    Fréchet distance a readable unit: real images have total variance of about 64.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(32, 48, 3, padding=1, stride=2)
        self.embed = nn.Linear(48 * 2 * 2, FEATURES)
        self.head = nn.Linear(FEATURES, 10)
        self.register_buffer("shift", torch.zeros(FEATURES))
        self.register_buffer("scale", torch.ones(FEATURES))

    def forward(self, images: Tensor) -> Tuple[Tensor, Tensor]:
        x = F.silu(self.conv1(images))
        x = F.silu(self.conv2(x))
        x = F.silu(self.conv3(x))
        x = F.silu(self.embed(x.flatten(1)))
        features = (x - self.shift) * self.scale
        return features, self.head(features)

    @torch.no_grad()
    def standardise(self, images: Tensor) -> None:
        """Give each feature mean 0 and variance 1 over `images`, and leave the logits as they were."""
        features, _ = self(images)
        self.shift.copy_(features.mean(0))
        self.scale.copy_(1.0 / features.std(0))
        self.head.bias.add_(self.head.weight @ self.shift)
        self.head.weight.div_(self.scale)


def load_data(path: Path) -> Tuple[Tensor, Tensor]:
    """Return images float32 [N, 1, 8, 8] in [-1, 1] and labels int64 [N]."""
    if not path.is_file():
        raise SystemExit(f"train_features: {path.name} is missing; scripts/data/make_digits.py writes it")
    tensors = load_file(path)
    return tensors["images"].float() / 8.0 - 1.0, tensors["labels"].long()


def split(labels: Tensor, seed: int) -> Tuple[Tensor, Tensor]:
    """Return (train, held out) indices: a seeded permutation, cut 80/20 within each class."""
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(labels)))
    train, held_out = [], []
    for digit in range(10):
        members = order[labels[order] == digit]
        cut = round(len(members) * HELD_OUT)
        held_out.append(members[:cut])
        train.append(members[cut:])
    return torch.cat(train), torch.cat(held_out)


def augment(images: Tensor) -> Tensor:
    """Rotate, scale and shift a little (sigma 6 degrees, 5 %, 0.4 pixels), then add noise."""
    n = len(images)
    angle = torch.randn(n) * math.radians(6.0)
    size = 1.0 + 0.05 * torch.randn(n)
    cos, sin = size * angle.cos(), size * angle.sin()
    move = 0.1 * torch.randn(n, 2)  # the image spans [-1, 1], so a pixel is 0.25
    matrix = torch.stack([cos, -sin, move[:, 0], sin, cos, move[:, 1]], 1).view(n, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    # Outside the image lies 0; the background is -1, hence the detour by +1.
    moved = F.grid_sample(images + 1.0, grid, align_corners=False) - 1.0
    return moved + 0.05 * torch.randn_like(moved)


def train(images: Tensor, labels: Tensor, epochs: int) -> DigitFeatures:
    """Train for a fixed number of epochs, never stopped by a held-out score; the result is in eval mode."""
    model = DigitFeatures()
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for epoch in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            loss = F.cross_entropy(model(augment(images[batch]))[1], labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1:3d}/{epochs}  loss {total / (len(images) // BATCH):.4f}", flush=True)
    model.eval()
    model.standardise(images)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose largest logit is at their label."""
    return (model(images)[1].argmax(1) == labels).double().mean().item()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Fréchet distance between Gaussians fitted to two sets of features [N, F]."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0.0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0.0)).sum()
    gap = a.mean(0) - b.mean(0)
    return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)


@torch.no_grad()
def describe(model: nn.Module, images: Tensor, seed: int) -> None:
    """Print the spread of the features and the noise floor of their Fréchet distance."""
    features = model(images)[0].double().numpy()
    values = np.linalg.eigvalsh(np.cov(features, rowvar=False))
    random, half = np.random.RandomState(seed), len(features) // 2
    orders = [random.permutation(len(features)) for _ in range(20)]
    distances = [frechet(features[order[:half]], features[order[half:]]) for order in orders]
    print(f"covariance eigenvalues {values[0]:.2e} .. {values[-1]:.2f}, trace {values.sum():.1f}")
    print(
        f"Fréchet distance between random halves of the real images: mean {np.mean(distances):.2f}, "
        f"range {min(distances):.2f} .. {max(distances):.2f} over {len(orders)} draws"
    )


def save(model: DigitFeatures, out: Path) -> None:
    """Write TorchScript to `out`, without the debug records that hold paths of the training machine."""
    with tempfile.TemporaryDirectory() as folder:
        raw = os.path.join(folder, "features.pt")
        torch.jit.trace(model, torch.zeros(2, 1, 8, 8)).save(raw)
        reader = torch._C.PyTorchFileReader(raw)
        writer = torch._C.PyTorchFileWriter(str(out))
        for name in sorted(reader.get_all_records()):
            own = name in ("version", "byteorder", ".data/serialization_id")  # the writer adds these
            if not own and not name.endswith(".debug_pkl"):
                record = reader.get_record(name)
                writer.write_record(name, record, len(record))
        writer.write_end_of_file()


def check(out: Path) -> None:
    """Evaluate a saved extractor on the split that it was trained with, and exit with an error if its accuracy is low."""
    for path in (out, out.with_suffix(".json")):
        if not path.is_file():
            raise SystemExit(f"train_features: {path.name} is missing; run this script without --check")
    report = json.loads(out.with_suffix(".json").read_text())
    images, labels = load_data(DATA)
    _, held_out = split(labels, report["seed"])
    model = torch.jit.load(str(out), map_location="cpu")
    with torch.no_grad():
        features, logits = model(images[:3])
    if features.shape != (3, FEATURES) or logits.shape != (3, 10):
        raise SystemExit(f"train_features: {out.name} gives {tuple(features.shape)}, {tuple(logits.shape)}")
    score = accuracy(model, images[held_out], labels[held_out])
    print(f"{out.name}: held-out accuracy {score:.4f} on {len(held_out)} images")
    describe(model, images, report["seed"])
    if not score >= MINIMUM_ACCURACY:
        raise SystemExit(f"train_features: held-out accuracy is below {MINIMUM_ACCURACY}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "configs/digits/features.pt")
    parser.add_argument("--check", action="store_true", help="evaluate --out instead of training it")
    arguments = parser.parse_args()
    out: Path = arguments.out
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if arguments.check:
        check(out)
        return
    if not out.parent.is_dir():
        parser.error(f"no such folder: {out.parent}")
    images, labels = load_data(DATA)
    kept, held_out = split(labels, arguments.seed)
    torch.manual_seed(arguments.seed)
    model = train(images[kept], labels[kept], arguments.epochs)
    report = {
        "held_out_accuracy": accuracy(model, images[held_out], labels[held_out]),
        "train_accuracy": accuracy(model, images[kept], labels[kept]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": arguments.seed,
        "split": f"{len(kept)} train, {len(held_out)} held out: stratified 80/20, "
        "numpy RandomState(seed).permutation, the first fifth of each class held out",
    }
    save(model, out)
    out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    describe(model, images, arguments.seed)


if __name__ == "__main__":
    main()
