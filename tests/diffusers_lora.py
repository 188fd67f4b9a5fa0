"""Loads a student's adapters with plain diffusers and PEFT into the teacher's pipeline, and compares its images with those of the
pipeline that has them in its weights.

    python tests/diffusers_lora.py TEACHER STUDENT ADAPTERS TOLERANCE PROMPT...

TEACHER is the model that was distilled, STUDENT the folder that `potstill export` wrote, ADAPTERS the file of one of its LoRA formats.
Images must agree to TOLERANCE, fused and not, at strength 1; and at 0.5 with weights to which half of B·A was added here.
"""

import sys

import torch
from diffusers import DiffusionPipeline, LCMScheduler
from safetensors.torch import load_file

SIDES = {"lora_A.weight": 0, "lora_B.weight": 1, "lora_down.weight": 0, "lora_up.weight": 1}


def images(pipeline: DiffusionPipeline, prompts: list[str], times: list[int]) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    made = []
    for index, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(index)
        call = pipeline(prompt, timesteps=times, guidance_scale=0.0, generator=generator, output_type="pt")
        made.append(call.images)
    return torch.cat(made)


def compare(what: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    worst = (found - expected).abs().max().item()
    print(f"{what}: largest difference {worst:.2e}")
    if not worst <= tolerance:
        sys.exit(f"{what}: images differ by {worst:.2e}")


def add_by_hand(pipeline: DiffusionPipeline, adapters: str, strength: float) -> None:
    """Adds strength·B·A to the U-Net's weights; a file of Potstill's has α/r in B."""
    modules = dict(pipeline.unet.named_modules())
    modules |= {name.replace(".", "_"): module for name, module in modules.items()}
    halves: dict[str, list] = {}
    for name, values in load_file(adapters).items():
        for ending, side in SIDES.items():
            if name.endswith("." + ending):
                stem = name.removesuffix("." + ending).removeprefix("unet.").removeprefix("lora_unet_")
                halves.setdefault(stem, [None, None])[side] = values.float()
    assert halves, "there are adapters"
    with torch.no_grad():
        for stem, (down, up) in halves.items():
            weight = modules[stem].weight
            weight += strength * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


def main() -> None:
    teacher, student, adapters, tolerance, *prompts = sys.argv[1:]
    torch.set_num_threads(1)
    whole = DiffusionPipeline.from_pretrained(student)
    times = whole.scheduler.config["few_step_timesteps"]
    expected = images(whole, prompts, times)

    def loaded() -> DiffusionPipeline:
        pipeline = DiffusionPipeline.from_pretrained(teacher)
        pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
        return pipeline

    bare = (images(loaded(), prompts, times) - expected).abs().max().item()
    if bare < 10 * float(tolerance):
        sys.exit(f"the adapters change images by {bare:.2e} only: nothing would be shown")
    pipeline = loaded()
    pipeline.load_lora_weights(adapters)
    compare("loaded", images(pipeline, prompts, times), expected, float(tolerance))
    pipeline.fuse_lora()
    compare("fused", images(pipeline, prompts, times), expected, float(tolerance))
    pipeline = loaded()
    add_by_hand(pipeline, adapters, 0.5)
    half = images(pipeline, prompts, times)
    pipeline = loaded()
    pipeline.load_lora_weights(adapters, adapter_name="student")
    pipeline.set_adapters("student", 0.5)
    compare("at half strength", images(pipeline, prompts, times), half, float(tolerance))


if __name__ == "__main__":
    main()
