#!/usr/bin/env python3
"""Make configs/shapes: a text-to-image teacher small enough to train on one CPU core and to ship.

    pip install -r requirements.txt -r requirements-test.txt
    python scripts/data/make_shapes.py [--seed N] [--out DIR]

It renders images of twelve classes (three shapes in four colors) with prompts, trains on them a
classifier, an autoencoder, and a U-Net together with its text encoder, saves these as a model folder in
the layout of diffusers, and evaluates the saved model. Nothing is downloaded. The same seed gives the same
files on the same machine.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import os
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Callable, Tuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SHAPES = ["circle", "square", "triangle"]
COLOURS = {
    "red": (0.90, 0.16, 0.14),
    "green": (0.14, 0.74, 0.26),
    "blue": (0.20, 0.34, 0.95),
    "yellow": (0.96, 0.84, 0.14),
}
CLASSES = [(colour, shape) for colour in COLOURS for shape in SHAPES]
PHRASES = [
    "a {colour} {shape}",
    "{colour} {shape}",
    "a picture of a {colour} {shape}",
    "the {shape} is {colour}",
]
SIDE = 16
SUPERSAMPLING = 4
FEATURES = 64
TOKENS = 16
REFERENCE_IMAGES = 1200
PAIRS = 360
TRAINING_IMAGES = 12_000
TEST_IMAGES = 3_000
# The evaluation of the teacher.
DDIM_STEPS = 20
GUIDANCE = 2.0
SAMPLES = 1200
BATCH = 64


# -------------------- images and texts


def render(classes: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One image for each class, u8 [N, 3, 16, 16]: a shape of random place, size and shade on dark grey."""
    n, fine = len(classes), SIDE * SUPERSAMPLING
    radius = random.uniform(3.6, 6.0, n)
    centre = SIDE / 2 + random.uniform(-1, 1, (2, n)) * (SIDE / 2 - radius)
    grid = (np.arange(fine) + 0.5) / SUPERSAMPLING
    x = grid[None, None, :] - centre[0][:, None, None]
    y = grid[None, :, None] - centre[1][:, None, None]
    r = radius[:, None, None]
    inside = {
        "circle": x**2 + y**2 <= r**2,
        # A square and a triangle of sizes that look like the circle's; the triangle points up.
        "square": np.maximum(np.abs(x), np.abs(y)) <= 0.86 * r,
        "triangle": (y <= 0.8 * r) & (2.0 * np.abs(x) - y <= r),
    }
    of_shape = [(classes % len(SHAPES) == k)[:, None, None] for k in range(len(SHAPES))]
    mask = np.select(of_shape, [inside[name] for name in SHAPES])
    mask = mask.reshape(n, SIDE, SUPERSAMPLING, SIDE, SUPERSAMPLING).mean((2, 4))[:, None]
    colour = np.array(list(COLOURS.values()))[classes // len(SHAPES)] + random.uniform(-0.04, 0.04, (n, 3))
    colour = colour * random.uniform(0.85, 1.0, (n, 1))
    background = random.uniform(0.04, 0.16, (n, 1)) + np.zeros((n, 3))
    pixels = mask * colour[:, :, None, None] + (1 - mask) * background[:, :, None, None]
    return np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)


def draw(count: int, seed: int, purpose: int) -> Tuple[Tensor, Tensor]:
    """`count` images and their classes, each class equally often, in random order."""
    random = np.random.default_rng([seed, purpose])
    classes = random.permutation(np.arange(count) % len(CLASSES))
    return torch.from_numpy(render(classes, random)), torch.from_numpy(classes)


def scaled(images: Tensor) -> Tensor:
    """From u8 to fp32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def prompts() -> list[Tuple[str, int]]:
    """Every phrase of every class: the plain ones first."""
    return [
        (phrase.format(colour=colour, shape=shape), label)
        for phrase in PHRASES
        for label, (colour, shape) in enumerate(CLASSES)
    ]


def write_reference(path: Path, seed: int) -> None:
    images, labels = draw(REFERENCE_IMAGES, seed, 1)
    tensors = {"images": images.contiguous(), "labels": labels.to(torch.uint8)}
    save_file(tensors, path, metadata={"pixel_max": "255"})
    path.chmod(0o644)


def write_pairs(path: Path, seed: int) -> None:
    """A tar in the WebDataset layout: 000000.png, 000000.txt, and so on."""
    images, labels = draw(PAIRS, seed, 2)
    random = np.random.default_rng([seed, 3])
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, (image, label) in enumerate(zip(images, labels.tolist())):
            colour, shape = CLASSES[label]
            text = PHRASES[random.integers(len(PHRASES))].format(colour=colour, shape=shape)
            png = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(png, "PNG", optimize=True)
            for ending, content in [("png", png.getvalue()), ("txt", text.encode())]:
                member = tarfile.TarInfo(f"{index:06d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


# -------------------- training


def learn(
    what: str,
    steps: int,
    rate: float,
    parameters: list,
    loss_of: Callable[[], Tensor],
    after: Callable[[int], None] | None = None,
) -> None:
    """Adam with a short warm-up and a learning rate that falls along a cosine; prints ten lines of progress."""
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.99))

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 50) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    started, total = time.time(), 0.0
    for step in range(1, steps + 1):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if after is not None:
            after(step)
        total += loss.item()
        every = max(1, steps // 10)
        if step % every == 0:
            passed = time.time() - started
            print(f"{what}: step {step}/{steps}  loss {total / every:.5f}  {passed:.0f} s", flush=True)
            total = 0.0


def batches(count: int, draw: torch.Generator):
    """Indices of batches, without end: every image once, then again in another order."""
    while True:
        yield from torch.randperm(count, generator=draw).split(BATCH)[: count // BATCH]


class ShapeFeatures(nn.Module):
    """Four convolutions, 64 smooth features, one linear head; no batch norm, no dropout.

    `shift` and `scale` standardize each feature after training, which gives the Fréchet distance a
    readable unit: real images have a total variance of about 64.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 24, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(24, 32, 3, padding=1, stride=2)
        self.conv4 = nn.Conv2d(32, 48, 3, padding=1, stride=2)
        self.embed = nn.Linear(48 * 2 * 2, FEATURES)
        self.head = nn.Linear(FEATURES, len(CLASSES))
        self.register_buffer("shift", torch.zeros(FEATURES))
        self.register_buffer("scale", torch.ones(FEATURES))

    def forward(self, images: Tensor) -> Tuple[Tensor, Tensor]:
        x = F.silu(self.conv1(images))
        x = F.silu(self.conv2(x))
        x = F.silu(self.conv3(x))
        x = F.silu(self.conv4(x))
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


def train_classifier(images: Tensor, labels: Tensor, seed: int, steps: int) -> ShapeFeatures:
    torch.manual_seed(seed)
    model, chosen = ShapeFeatures(), batches(len(images), torch.Generator().manual_seed(seed + 1))

    def loss() -> Tensor:
        batch = next(chosen)
        noisy = images[batch] + 0.03 * torch.randn_like(images[batch])
        return F.cross_entropy(model(noisy)[1], labels[batch], label_smoothing=0.01)

    learn("classifier", steps, 3e-3, list(model.parameters()), loss)
    model.eval()
    model.standardise(images)
    return model


def save_classifier(model: ShapeFeatures, out: Path) -> None:
    """Write TorchScript to `out`, without the debug records that hold paths of the training machine."""
    with tempfile.TemporaryDirectory() as folder:
        raw = os.path.join(folder, "features.pt")
        torch.jit.trace(model, torch.zeros(2, 3, SIDE, SIDE)).save(raw)
        reader = torch._C.PyTorchFileReader(raw)
        writer = torch._C.PyTorchFileWriter(str(out))
        for name in sorted(reader.get_all_records()):
            own = name in ("version", "byteorder", ".data/serialization_id")  # the writer adds these
            if not own and not name.endswith(".debug_pkl"):
                record = reader.get_record(name)
                writer.write_record(name, record, len(record))
        writer.write_end_of_file()


def train_autoencoder(images: Tensor, seed: int, steps: int) -> AutoencoderKL:
    """From 3 x 16 x 16 to 4 x 8 x 8 and back; `scaling_factor` takes the latents to a deviation of 1."""
    torch.manual_seed(seed)
    model = AutoencoderKL(
        sample_size=SIDE,
        latent_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        force_upcast=False,
    )
    chosen = batches(len(images), torch.Generator().manual_seed(seed + 1))

    def loss() -> Tensor:
        batch = images[next(chosen)]
        posterior = model.encode(batch).latent_dist
        apart = F.mse_loss(model.decode(posterior.sample()).sample, batch)
        return apart + 3e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    learn("autoencoder", steps, 3e-3, list(model.parameters()), loss)
    model.eval().requires_grad_(False)
    # The last layer of the encoder and the first of the decoder are 1 x 1 convolutions: the shift of the latents' means
    # to 0 goes into their biases, and changes no image.
    mean = latents_of(model, images[:3000]).mean((0, 2, 3))
    model.quant_conv.bias[:4] -= mean
    model.post_quant_conv.bias += model.post_quant_conv.weight[:, :, 0, 0] @ mean
    model.register_to_config(scaling_factor=round(1.0 / latents_of(model, images[:3000]).std().item(), 5))
    return model


@torch.no_grad()
def latents_of(model: AutoencoderKL, images: Tensor) -> Tensor:
    """Means of the latents, not yet scaled."""
    return torch.cat([model.encode(batch).latent_dist.mean for batch in images.split(250)])


@torch.no_grad()
def decoded(model: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images of scaled latents."""
    parts = [model.decode(batch / model.config.scaling_factor).sample for batch in latents.split(250)]
    return torch.cat(parts).clamp(-1, 1)


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level BPE with CLIP's conventions whose tokens are the words of the prompts."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges = []
    for word in [*COLOURS, *SHAPES, "picture", "of", "the", "is"]:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
                vocabulary.append("".join(pair))
            parts = ["".join(pair), *parts[2:]]
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary = list(dict.fromkeys([*vocabulary, start, end]))
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, **special}
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {token: index for index, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(numbers) + "\n")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def tokens_of(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    found = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return found.input_ids


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
        prediction_type="epsilon", clip_sample=False, steps_offset=1, set_alpha_to_one=True,
    )  # fmt: skip


def train_unet(
    latents: Tensor, labels: Tensor, tokenizer: CLIPTokenizer, seed: int, steps: int
) -> Tuple[UNet2DConditionModel, CLIPTextModel]:
    """The U-Net and its text encoder, both as averages; one sample in ten gets the empty prompt."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(24, 32),
        norm_num_groups=8, cross_attention_dim=32, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=TOKENS, hidden_act="quick_gelu", projection_dim=32,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    print(f"U-Net: {unet.num_parameters():,} parameters; text encoder: {text.num_parameters():,}", flush=True)
    averages = [copy.deepcopy(model).eval().requires_grad_(False) for model in (unet, text)]
    ids = tokens_of(tokenizer, [prompt for prompt, _ in prompts()] + [""])
    alphas = scheduler().alphas_cumprod
    draw = torch.Generator().manual_seed(seed + 1)
    chosen = batches(len(latents), draw)

    def loss() -> Tensor:
        batch = next(chosen)
        x, n = latents[batch], len(batch)
        phrase = torch.randint(len(PHRASES), (n,), generator=draw) * len(CLASSES) + labels[batch]
        empty = torch.rand(n, generator=draw) < 0.1
        states = text(ids).last_hidden_state[phrase.masked_fill(empty, len(ids) - 1)]
        t = torch.randint(len(alphas), (n,), generator=draw)
        noise = torch.randn(x.shape, generator=draw)
        alpha = alphas[t].view(-1, 1, 1, 1)
        return F.mse_loss(unet(alpha.sqrt() * x + (1 - alpha).sqrt() * noise, t, states).sample, noise)

    @torch.no_grad()
    def average(step: int) -> None:
        decay = min(0.995, step / (step + 20))
        for model, mean in zip((unet, text), averages):
            for value, kept in zip(model.parameters(), mean.parameters()):
                kept.lerp_(value, 1 - decay)

    learn("U-Net", steps, 2e-3, [*unet.parameters(), *text.parameters()], loss, average)
    return tuple(averages)


# -------------------- saving and measuring


def save_model(folder: Path, unet: UNet2DConditionModel, vae: AutoencoderKL, text: CLIPTextModel) -> None:
    """All parts but the tokenizer, which is there already; the large parts in half precision."""
    unet.half().save_pretrained(folder / "unet")
    vae.half().save_pretrained(folder / "vae")
    text.save_pretrained(folder / "text_encoder")
    scheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)


def load_model(folder: Path):
    """The model that `save_model` wrote, in fp32."""
    plain = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", **plain)
    vae = AutoencoderKL.from_pretrained(folder / "vae", **plain)
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return unet.eval(), vae.eval(), text.eval(), tokenizer


@torch.no_grad()
def ddim(
    unet: UNet2DConditionModel, z: Tensor, states: Tensor, empty: Tensor, scale: float, steps: int
) -> Tensor:
    """Scaled latents by deterministic DDIM with guidance."""
    stepper = scheduler()
    stepper.set_timesteps(steps)
    out = []
    for x, own in zip(z.split(250), states.split(250)):
        for t in stepper.timesteps:
            if scale == 1.0:
                noise = unet(x, t, own).sample
            else:
                both = torch.cat([empty.expand_as(own), own])
                without, guided = unet(torch.cat([x, x]), t, both).sample.chunk(2)
                noise = without + scale * (guided - without)
            x = stepper.step(noise, t, x).prev_sample
        out.append(x)
    return torch.cat(out)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Fréchet distance between Gaussians fitted to two sets of features [N, F]."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0.0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0.0)).sum()
    gap = a.mean(0) - b.mean(0)
    return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)


@torch.no_grad()
def features_of(classifier: nn.Module, images: Tensor) -> Tuple[np.ndarray, Tensor]:
    """Features in fp64, and the predicted classes."""
    features, logits = zip(*(classifier(batch) for batch in images.split(500)))
    return torch.cat(features).double().numpy(), torch.cat(logits).argmax(1)


def picture(path: Path, images: Tensor, columns: int, zoom: int = 3) -> None:
    """Images [N, 3, H, W] in [-1, 1] in rows, enlarged."""
    rows = -(-len(images) // columns)
    tile = F.pad(((images + 1) * 127.5).round(), (0, 1, 0, 1), value=255.0)
    grid = tile.view(rows, columns, 3, SIDE + 1, SIDE + 1).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(rows * (SIDE + 1), columns * (SIDE + 1), 3).to(torch.uint8).numpy()
    Image.fromarray(grid.repeat(zoom, 0).repeat(zoom, 1)).save(path, "PNG", optimize=True)


def measure(out: Path, seed: int) -> dict:
    """Evaluate the saved model, on every prompt in turn."""
    unet, vae, text, tokenizer = load_model(out / "model")
    classifier = torch.jit.load(str(out / "features.pt"))
    images, labels = draw(TEST_IMAGES, seed, 4)
    test = scaled(images)
    test_features, seen = features_of(classifier, test)
    reference, _ = features_of(classifier, scaled(draw(REFERENCE_IMAGES, seed, 1)[0]))
    rebuilt = decoded(vae, latents_of(vae, test) * vae.config.scaling_factor)
    rebuilt_features, rebuilt_seen = features_of(classifier, rebuilt)
    scores = {
        "classifier": {"accuracy": (seen == labels).double().mean().item(), "images": TEST_IMAGES},
        "real_images": {"fid": frechet(reference, test_features)},
        "autoencoder": {
            "fid": frechet(reference, rebuilt_features),
            "agreement": (rebuilt_seen == labels).double().mean().item(),
            "root_mean_square_error": (rebuilt - test).square().mean().sqrt().item() / 2,
            "scaling_factor": vae.config.scaling_factor,
        },
    }
    texts = prompts()
    with torch.no_grad():
        states = text(tokens_of(tokenizer, [prompt for prompt, _ in texts] + [""])).last_hidden_state
    order = torch.arange(SAMPLES) % len(texts)
    wanted = torch.tensor([label for _, label in texts])[order]
    z = torch.randn((SAMPLES, 4, SIDE // 2, SIDE // 2), generator=torch.Generator().manual_seed(seed + 99))
    for name, scale in [("teacher", GUIDANCE), ("teacher_without_guidance", 1.0)]:
        latents = ddim(unet, z, states[order], states[-1:], scale, DDIM_STEPS)
        made = decoded(vae, latents)
        found, seen = features_of(classifier, made)
        scores[name] = {
            "sampler": f"DDIM, {DDIM_STEPS} steps", "guidance": scale, "samples": SAMPLES,
            "fid": frechet(reference, found), "agreement": (seen == wanted).double().mean().item(),
        }  # fmt: skip
        print(name, json.dumps(scores[name]), flush=True)
        if name == "teacher":
            # A class in each column, eight images of it.
            rows = torch.stack([torch.nonzero(wanted == label)[:8, 0] for label in range(len(CLASSES))])
            picture(out / "teacher.png", made[rows.T.reshape(-1)], len(CLASSES))
    parts = {"unet": unet, "vae": vae, "text_encoder": text}
    counts = {name: model.num_parameters() for name, model in parts.items()}
    return scores | {"parameters": counts, "seed": seed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the images, the weights and the batches")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent.parent / "configs/shapes")
    parser.add_argument("--classifier-steps", type=int, default=2500)
    parser.add_argument("--autoencoder-steps", type=int, default=700)
    parser.add_argument("--unet-steps", type=int, default=1800)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    out, seed = arguments.out, arguments.seed
    out.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    started = time.time()

    write_reference(out / "shapes.safetensors", seed)
    write_pairs(out / "pairs.tar", seed)
    lines = [json.dumps({"prompt": prompt, "label": label}) + "\n" for prompt, label in prompts()]
    (out / "prompts.jsonl").write_text("".join(lines))

    images, labels = draw(TRAINING_IMAGES, seed, 0)
    images = scaled(images)
    print(f"{len(images)} images rendered, {time.time() - started:.0f} s", flush=True)
    classifier = train_classifier(images, labels, 1000 * seed + 10, arguments.classifier_steps)
    save_classifier(classifier, out / "features.pt")
    vae = train_autoencoder(images, 1000 * seed + 20, arguments.autoencoder_steps)
    latents = latents_of(vae, images) * vae.config.scaling_factor
    tokenizer = write_tokenizer(out / "model/tokenizer")
    unet, text = train_unet(latents, labels, tokenizer, 1000 * seed + 30, arguments.unet_steps)
    save_model(out / "model", unet, vae, text)
    scores = measure(out, seed)
    (out / "teacher.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(json.dumps(scores, indent=2))
    print(f"{time.time() - started:.0f} s in all")


if __name__ == "__main__":
    main()
