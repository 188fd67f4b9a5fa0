"""Loads an exported few-step generator with plain diffusers, and compares its images with those of `potstill sample`.

    python tests/diffusers_image.py FOLDER NOISE PICTURES PROMPT...

NOISE is the file of `potstill sample --save-noise`, PICTURES its folder. Images must agree to 1e-3 before they are rounded to
eight bits, so pixels may differ by one step.
"""

import sys

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers import scheduling_lcm
from PIL import Image
from safetensors.torch import load_file


def main() -> None:
    folder, noise_file, pictures, *prompts = sys.argv[1:]
    torch.set_num_threads(1)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    scheduler = pipeline.scheduler
    times = scheduler.config["few_step_timesteps"]
    noises = load_file(noise_file)["noise"]
    first = (1 - scheduler.alphas_cumprod[times[0]]) ** 0.5
    for index, prompt in enumerate(prompts):
        # The scheduler draws later noises itself, from a source that returns those of the file.
        later = iter(noises[index, 1:])
        scheduling_lcm.randn_tensor = lambda shape, **_: next(later).reshape(shape)
        if scheduler.config["original_inference_steps"] == len(times):
            # As users call any few-step model. The noise given is what the pipeline would draw.
            how = {"latents": noises[index, :1], "num_inference_steps": len(times)}
        else:
            how = {"latents": first * noises[index, :1], "timesteps": times}
        image = pipeline(prompt, guidance_scale=0.0, output_type="np", **how).images[0]
        ours = np.asarray(Image.open(f"{pictures}/{index:06}.png").convert("RGB"), dtype=np.float64) / 255
        # Half a step of rounding, and the tolerance of 1e-3.
        worst = np.abs(image - ours).max()
        print(f"{prompt!r}: largest difference {worst:.2e}")
        if worst > 0.5 / 255 + 1e-3:
            sys.exit(f"{prompt!r}: images differ by {worst:.2e}")


if __name__ == "__main__":
    main()
