"""Loads a student's single files with plain diffusers, and compares their images with those of the student's folder.

    python tests/diffusers_single_file.py FOLDER FILE:TOLERANCE...

FOLDER and the files are what `potstill export` wrote of one student. The files' configurations are the folder's: those that diffusers
knows by itself are of the published sizes.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers_lora import images

PROMPTS = ["a red circle", "two blue squares"]


def main() -> None:
    folder, *files = sys.argv[1:]
    torch.set_num_threads(1)
    student = DiffusionPipeline.from_pretrained(folder)
    times = student.scheduler.config["few_step_timesteps"]
    expected = images(student, PROMPTS, times)
    index = json.loads((Path(folder) / "model_index.json").read_text())
    kind = {"StableDiffusionPipeline": StableDiffusionPipeline, "StableDiffusionXLPipeline": StableDiffusionXLPipeline}
    for file, tolerance in (pair.rsplit(":", 1) for pair in files):
        pipeline = kind[index["_class_name"]].from_single_file(file, config=folder, local_files_only=True)
        found = images(pipeline, PROMPTS, times)
        worst = (found - expected).abs().max().item()
        print(f"{file}: largest difference {worst:.2e}")
        if not worst <= float(tolerance):
            sys.exit(f"{file}: images differ by {worst:.2e}")


if __name__ == "__main__":
    main()
