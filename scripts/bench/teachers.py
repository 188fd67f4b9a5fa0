"""Run files of the shipped teachers, without what scores a run."""

from __future__ import annotations

import json
from pathlib import Path

import prepare

CONFIGS = prepare.ROOT / "configs"
# A file of weights, or the folder of a text-to-image model whose prompts lie beside it.
TEACHERS = {"digits": CONFIGS / "digits" / "teacher.safetensors", "shapes": CONFIGS / "shapes" / "model"}


def unscored(folder: Path, teacher: Path) -> Path:
    """Writes a run file for a teacher into a folder, and returns its path."""
    config = folder / f"{teacher.stem}.toml"
    if teacher.is_dir():
        prompts = teacher.parent / "prompts.jsonl"
        text = f"[teacher]\nmodel = {json.dumps(str(teacher))}\n[prompts]\ndata = {json.dumps(str(prompts))}\n"
        text += "[generator]\nsteps = 1\n[distillation]\nalpha = 1.0\n"
    else:
        text = f"[teacher]\nweights = {json.dumps(str(teacher))}\n"
    config.write_text(text)
    return config
