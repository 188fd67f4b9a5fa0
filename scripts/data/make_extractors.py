#!/usr/bin/env python3
"""Make the TorchScript files that an evaluation names: `evaluation.features` and `evaluation.clip`.

    pip install torch==2.11.0 torchvision==0.26.0 torch-fidelity==0.4.0
    python scripts/data/make_extractors.py inception --weights pt_inception-2015-12-05-6726825d.pth --out inception.pt

    pip install torch==2.11.0 transformers==5.23.0
    python scripts/data/make_extractors.py clip --model FOLDER --out clip.pt

`inception` is the InceptionV3 that FID is defined on (1706.08500; TensorFlow's graph of 2015-12-05, 1,008 classes,
average pooling that leaves padding out, max pooling in the last block), from the package torch-fidelity. Its weights are
the file that pytorch-fid and torch-fidelity publish, under either name; neither package carries it. The module takes fp32
images [N, 3, H, W] in [-1, 1] of any size and returns (features [N, 2048], logits [N, 1008]).

`clip` is a CLIPModel of transformers from a folder (config.json and weights). The module takes fp32 images [N, 3, H, W]
in [-1, 1] and int64 tokens [N, tokens] and returns (image embeddings [N, D], text embeddings [N, D]).

Both work for any number of images. docs/EVALUATION.md explains their use.
"""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Tuple
from unittest import mock

import torch
from torch import Tensor, nn

# Mean and standard deviation of CLIP's images, from its own preprocessing.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
INCEPTION_SIDE = 299


class BadInput(Exception):
    """An invalid argument or file."""


def tensorflow_resize(x: Tensor, side: int) -> Tensor:
    """Bilinear without antialiasing and without half-pixel centers, as TensorFlow 1 does it: fp32 [N, C, H, W]."""
    height, width = x.size(2), x.size(3)
    steps = torch.arange(side, device=x.device).to(x.dtype)
    rows = steps * (float(height) / float(side))
    columns = steps * (float(width) / float(side))
    top, left = rows.long(), columns.long()
    below, right = (top + 1).clamp_max(height - 1), (left + 1).clamp_max(width - 1)
    down, along = (rows - top.to(x.dtype)).view(1, 1, side, 1), (columns - left.to(x.dtype)).view(1, 1, 1, side)
    upper, lower = x.index_select(2, top), x.index_select(2, below)
    a, b = upper.index_select(3, left), upper.index_select(3, right)
    c, d = lower.index_select(3, left), lower.index_select(3, right)
    first = a + (b - a) * along
    return first + (c + (d - c) * along - first) * down


class Inception(nn.Module):
    """Images in [-1, 1] → (features, logits)."""

    half_pixel: torch.jit.Final[bool]

    def __init__(self, network: nn.Module, half_pixel: bool) -> None:
        super().__init__()
        self.network = network
        self.half_pixel = half_pixel

    def forward(self, images: Tensor) -> Tuple[Tensor, Tensor]:
        # To 8 bits, as in the PNG files that the packages read; EDM's generate.py rounds in the same way.
        x = (images * 127.5 + 128.0).clamp(0.0, 255.0).floor()
        if self.half_pixel:
            # pytorch-fid: half-pixel centers, and 0 to 255 becomes -1 to 1. The network itself computes (x - 128) /
            # 128.
            x = nn.functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
            x = x * (128.0 / 127.5)
        else:
            x = tensorflow_resize(x, 299)
        features, logits = self.network(x)
        return features, logits


class Features(nn.Module):
    """Images in [-1, 1] → features alone."""

    def __init__(self, both: nn.Module) -> None:
        super().__init__()
        self.both = both

    def forward(self, images: Tensor) -> Tensor:
        return self.both(images)[0]


def inception(weights: Path, half_pixel: bool, features_only: bool) -> torch.jit.ScriptModule:
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as package
    except ImportError as error:
        raise BadInput(f"{error}: pip install torchvision==0.26.0 torch-fidelity==0.4.0") from error
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise BadInput(f"{weights}: cannot be read as PyTorch weights: {error}") from error
    try:
        # The package loads a file with pickle; here it gets the weights, which were read without executing code.
        with mock.patch.object(package.torch, "load", lambda *_args, **_kwargs: state):
            network = package.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits"], feature_extractor_weights_path=str(weights)
            )
    except (RuntimeError, TypeError, AttributeError) as error:
        raise BadInput(f"{weights}: not the weights of FID's InceptionV3: {str(error)[:500]}") from error
    # Tracing would bind the package's resize to the size of the example, so the trace does not include it, nor the
    # check for integers, which resized images are not.
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        mock.patch.object(package, "vassert", lambda *_args: None),
        mock.patch.object(package, "interpolate_bilinear_2d_like_tensorflow1x", lambda x, **_kwargs: x),
    ):
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(network, torch.zeros(2, 3, INCEPTION_SIDE, INCEPTION_SIDE), check_trace=False)
    both = Inception(traced, half_pixel)
    return torch.jit.script((Features(both) if features_only else both).eval())


class Clip(nn.Module):
    """Images in [-1, 1] and tokens → embeddings of both."""

    def __init__(self, model: nn.Module, prefix: list[int]) -> None:
        super().__init__()
        self.clip = model
        self.side = int(model.config.vision_config.image_size)
        self.positions = int(model.config.text_config.max_position_embeddings)
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1))
        self.register_buffer("prefix", torch.tensor(prefix, dtype=torch.long).view(1, -1))

    def forward(self, images: Tensor, ids: Tensor) -> Tuple[Tensor, Tensor]:
        x = nn.functional.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True)
        x = ((x + 1) / 2).clamp(0, 1)
        seen = self.clip.vision_model(pixel_values=(x - self.mean) / self.std).pooler_output
        # After the start token. Tokens beyond the length are cut off, and the end token, which is the greatest token,
        # is put last.
        prefix = self.prefix.expand(ids.shape[0], -1)
        end = ids.max(dim=1, keepdim=True).values
        ids = torch.cat([ids[:, :1], prefix, ids[:, 1:]], dim=1)[:, : self.positions]
        cut = (ids != end).all(dim=1, keepdim=True)
        ids = torch.cat([ids[:, :-1], torch.where(cut, end, ids[:, -1:])], dim=1)
        # Read at the first end token, as in the model, but without its indices, which a trace binds to the CPU.
        states = self.clip.text_model(input_ids=ids).last_hidden_state
        first = (ids == end).int().argmax(dim=1).view(-1, 1, 1).expand(-1, 1, states.shape[2])
        read = states.gather(1, first).squeeze(1)
        return self.clip.visual_projection(seen), self.clip.text_projection(read)


def clip(folder: Path, prefix: str, tokens: int, side: int) -> torch.jit.ScriptModule:
    try:
        from transformers import AutoTokenizer, CLIPModel
        from transformers.models.clip import modeling_clip
    except ImportError as error:
        raise BadInput(f"{error}: pip install transformers==5.23.0") from error
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder}: has no config.json; expected a folder with a CLIPModel of transformers")
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, attn_implementation="eager").float().eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"{folder}: cannot be loaded as a CLIPModel: {error}") from error
    ids: list[int] = []
    if prefix:
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise BadInput(f"{folder}: --prefix needs the tokenizer there, tokenizer.json or vocab.json and merges.txt")
        # Between the start and the end token.
        ids = AutoTokenizer.from_pretrained(folder, local_files_only=True)(prefix)["input_ids"][1:-1]
    end = model.config.text_config.vocab_size - 1
    positions = min(tokens + len(ids), model.config.text_config.max_position_embeddings)
    wrapped = Clip(model, ids).eval()
    # A trace would bind the causal mask that the model makes to the CPU; a buffer moves with the module.
    mask = torch.full((positions, positions), torch.finfo(torch.float).min).triu(1)
    wrapped.register_buffer("mask", mask[None, None])
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        mock.patch.object(modeling_clip, "create_causal_mask", lambda *_args, **_kwargs: wrapped.mask),
    ):
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        examples = torch.zeros(2, 3, side, side), torch.full((2, tokens), end)
        return torch.jit.trace(wrapped, examples, check_trace=False)


def save(module: torch.jit.ScriptModule, path: Path) -> None:
    """Writes under another name first, so that a file that exists is complete."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        partial = Path(folder) / path.name
        module.save(str(partial))
        partial.replace(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the TorchScript files that an evaluation names.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    of_inception = kinds.add_parser("inception", help="FID's InceptionV3, for evaluation.features")
    of_inception.add_argument("--weights", type=Path, required=True, metavar="FILE",
                              help="pt_inception-2015-12-05-6726825d.pth or weights-inception-2015-12-05-6726825d.pth")
    of_inception.add_argument("--resize", choices=["tensorflow", "pytorch"], default="tensorflow",
                              help="how images become 299x299: as TensorFlow 1, EDM and torch-fidelity do it "
                                   "(default), or as pytorch-fid does")
    of_inception.add_argument("--features-only", action="store_true",
                              help="leave the 1,008 logits out: for teachers with classes of their own")
    of_clip = kinds.add_parser("clip", help="CLIP, for evaluation.clip")
    of_clip.add_argument("--model", type=Path, required=True, metavar="DIR",
                         help="folder with a CLIPModel: config.json and weights")
    of_clip.add_argument("--prefix", default="", metavar="TEXT",
                         help="put this before each prompt, such as 'A photo depicts'; needs the tokenizer in DIR")
    of_clip.add_argument("--tokens", type=int, default=77, metavar="N",
                         help="tokens of a prompt, as the diffusion model's tokenizer pads them (default: 77)")
    of_clip.add_argument("--image-size", type=int, default=512, metavar="PIXELS",
                         help="side of the images that it is tried on (default: 512); others work as well")
    for kind in (of_inception, of_clip):
        kind.add_argument("--out", type=Path, required=True, metavar="FILE", help="file for the module")
    arguments = parser.parse_args(arguments)
    try:
        if not arguments.out.parent.is_dir():
            raise BadInput(f"--out {arguments.out}: there is no folder {arguments.out.parent}")
        if arguments.kind == "inception":
            module = inception(arguments.weights, arguments.resize == "pytorch", arguments.features_only)
        else:
            module = clip(arguments.model, arguments.prefix, arguments.tokens, arguments.image_size)
        save(module, arguments.out)
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
