#!/usr/bin/env python3
"""Write tests/fixtures/clip_*.pt: TorchScript modules with a CLIP's signature that distinguish only colors.

    pip install torch safetensors
    python scripts/make_clip_fixture.py

An image's embedding is the excess of red, green and blue over its corner; a text's is the sum of the
colors that it names. So the score of an image is 100 when it shows the color in its prompt, and about 0 for another
one. There is one for the shapes' tokens and one for those of the tiny models. The tests that read them need no Python.
"""

import json
import tempfile
from pathlib import Path
from typing import Tuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parent.parent
# By the last token of the word. "green" is not a token: its "re", which is merged first, is that of "red".
COLOURS = {"red</w>": [1, 0, 0], "n</w>": [0, 1, 0], "blue</w>": [0, 0, 1], "yellow</w>": [1, 1, 0]}


class Colours(nn.Module):
    def __init__(self, vocabulary: dict[str, int]) -> None:
        super().__init__()
        table = torch.zeros(max(vocabulary.values()) + 1, 3, dtype=torch.half)
        for token, colour in COLOURS.items():
            if token in vocabulary:
                table[vocabulary[token]] = torch.tensor(colour)
        self.register_buffer("table", table)

    def forward(self, images: Tensor, ids: Tensor) -> Tuple[Tensor, Tensor]:
        above = (images - images[:, :, :1, :1]).mean([2, 3])
        return above.clamp_min(0.0), self.table.float()[ids].sum(1)


def save(module: nn.Module, path: Path) -> None:
    """Without debug records, which hold this machine's paths."""
    with tempfile.TemporaryDirectory() as folder:
        raw = f"{folder}/clip.pt"
        torch.jit.script(module).save(raw)
        reader = torch._C.PyTorchFileReader(raw)
        writer = torch._C.PyTorchFileWriter(str(path))
        for name in sorted(reader.get_all_records()):
            own = name in ("version", "byteorder", ".data/serialization_id")  # the writer adds these
            if not own and not name.endswith(".debug_pkl"):
                record = reader.get_record(name)
                writer.write_record(name, record, len(record))
        writer.write_end_of_file()


def main() -> None:
    with safe_open(REPOSITORY / "tests/fixtures/sd_model_sdxl.safetensors", "pt") as fixture:
        tiny = fixture.metadata()["tokenizer/vocab.json"]
    shapes = (REPOSITORY / "configs/shapes/model/tokenizer/vocab.json").read_text()
    for name, vocabulary in [("shapes", shapes), ("tiny", tiny)]:
        save(Colours(json.loads(vocabulary)), REPOSITORY / f"tests/fixtures/clip_{name}.pt")


if __name__ == "__main__":
    main()
