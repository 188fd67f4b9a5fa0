#!/usr/bin/env python3
"""Write tests/fixtures/sd_*.safetensors: results of diffusers and transformers with tiny random models.

    pip install -r requirements-test.txt
    python scripts/make_fixtures.py [--seed N] [--out DIR]

One file per family (SD 1.5, SD 2.1 with v-prediction, SDXL) holds a whole model, its inputs and its outputs: text
embeddings, U-Net output and gradients, autoencoder, a four-step image and a guided DDIM image. Others hold U-Nets of rarer
configurations, schedules, and a tokenizer. The tests that read them need no Python; POTSTILL_FIXTURES names another folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL, DDIMScheduler, LCMScheduler, PNDMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline,
    UNet2DConditionModel,
)  # fmt: skip
from diffusers.schedulers import scheduling_lcm
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PROMPTS = ["a red circle beside two blue squares", "It's the CAFÉ's  best photo, 100% !"]
NEGATIVE = ""
FEW_STEP_TIMES = [625, 468, 312, 156]
GUIDANCE = 3.0
TEXTS = [
    *PROMPTS,
    "",
    "   ",
    "we'll  SEE\twhat they've   done; I'd say 'tis 2024!",
    "naïve façade — “quoted” 🙂 漢字 ½",
    "<|startoftext|>inside<|endoftext|> after",
    "word " * 100,
]


def shaken(model: torch.nn.Module, draw: torch.Generator, scale: float = 1.0) -> torch.nn.Module:
    """Random weights everywhere: initial values of 0 or 1 would hide mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
            noise = torch.randn(parameter.shape, generator=draw) * (scale / fan_in**0.5)
            norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if norm else noise)
    return model.eval()


def tokenizer_files(folder: Path) -> None:
    """A small byte-level BPE with CLIP's conventions."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges = []
    for word in ["red", "circle", "beside", "two", "blue", "squares", "photo", "the", "best", "we", "say", "word"]:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
                vocabulary.append("".join(pair))
            parts = ["".join(pair), *parts[2:]]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(dict.fromkeys(vocabulary))}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")


def tokenizer(folder: Path, pad: str) -> CLIPTokenizer:
    tokenizer_files(folder)
    made = CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=77)
    return made


def text_encoder(draw: torch.Generator, tokens: CLIPTokenizer, projection: bool, **settings: object):
    config = CLIPTextConfig(
        vocab_size=len(tokens), bos_token_id=tokens.bos_token_id, pad_token_id=tokens.pad_token_id,
        max_position_embeddings=77, **settings,
    )  # fmt: skip
    return shaken((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), draw)


UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "norm_num_groups": 4, "layers_per_block": 1,
}  # fmt: skip
FAMILIES = {
    "sd15": {
        "unet": {
            "block_out_channels": (8, 16, 16), "cross_attention_dim": 12, "attention_head_dim": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        },
        "prediction": "epsilon",
        "text": {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "hidden_act": "quick_gelu", "eos_token_id": 2},
    },
    "sd21": {
        "unet": {
            "block_out_channels": (8, 16, 16), "cross_attention_dim": 16, "attention_head_dim": (1, 2, 4),
            "use_linear_projection": True, "upcast_attention": True, "layers_per_block": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        },
        "prediction": "v_prediction",
        "text": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                 "hidden_act": "gelu"},
    },
    "sdxl": {
        "unet": {
            "block_out_channels": (8, 16), "cross_attention_dim": 28, "attention_head_dim": (2, 4),
            "use_linear_projection": True, "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 10 + 6 * 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
        "prediction": "epsilon",
        "text": {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "hidden_act": "quick_gelu", "projection_dim": 12},
        "text_2": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                   "hidden_act": "gelu", "projection_dim": 10},
    },
}  # fmt: skip
VARIANTS = {
    "classes": {
        "block_out_channels": (8, 16), "cross_attention_dim": 12, "attention_head_dim": 2, "num_class_embeds": 5,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "center_input_sample": True,
        "resnet_time_scale_shift": "scale_shift", "time_embedding_dim": 24, "norm_eps": 1e-6,
        "down_block_padding": None, "flip_sin_to_cos": False, "freq_shift": 1,
    },
    "timestep_class": {
        "block_out_channels": (8, 16, 16), "cross_attention_dim": (12, 12, 12), "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "class_embed_type": "timestep",
        "layers_per_block": (1, 2, 1), "transformer_layers_per_block": (1, 2, 1),
        "only_cross_attention": (False, True, False), "mid_block_scale_factor": 1.4142135623730951,
        "downsample_padding": 0, "resnet_out_scale_factor": 1.25, "odd": True,
    },
    "projection_class": {
        "block_out_channels": (8, 16), "cross_attention_dim": 12, "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 7, "class_embeddings_concat": True, "mid_block_type": None,
    },
}  # fmt: skip


def tensors_of(model: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in model.state_dict().items()}


def plain(config: object) -> str:
    """A model's configuration as in its folder."""
    return config.to_json_string() if hasattr(config, "to_json_string") else json.dumps(dict(config))


def run_unet(unet, draw, states, size, prefix, **extra) -> dict[str, torch.Tensor]:
    """Output, bottleneck, and gradients along a fixed direction."""
    count = states.shape[0]
    sample = torch.randn((count, unet.config.in_channels, *size), generator=draw).requires_grad_()
    times = torch.tensor([37, 850, 312, 999][:count])
    states = states.detach().clone().requires_grad_()
    kept = {}
    place = unet.mid_block if unet.mid_block is not None else unet.down_blocks[-1]
    hook = place.register_forward_hook(lambda _, __, out: kept.update(bottleneck=out if torch.is_tensor(out) else out[0]))
    labels = extra.pop("class_labels", None)
    out = unet(sample, times, states, class_labels=labels, added_cond_kwargs=extra or None).sample
    hook.remove()
    unet.zero_grad()
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    found = {
        "input.sample": sample.detach(), "input.time": times, "input.states": states.detach(), "output.sample": out.detach(),
        "output.grad_sample": sample.grad, "output.grad_states": states.grad,
        "output.bottleneck": kept["bottleneck"].detach(),
    }  # fmt: skip
    for name, parameter in unet.named_parameters():
        found[f"output.grad_norm.{name}"] = parameter.grad.norm()
    if labels is not None:
        found["input.class_labels"] = labels
    found.update({f"input.{name}": value.detach() for name, value in extra.items()})
    return {f"{prefix}.{name}": tensor for name, tensor in found.items()}


class Noises:
    """Returns given noises where a scheduler would draw its own."""

    def __init__(self, noises: list[torch.Tensor]):
        self.noises = list(noises)

    def __call__(self, shape, **_: object) -> torch.Tensor:
        return self.noises.pop(0).reshape(shape)


def few_step(pipe, prompt: str, noises: list[torch.Tensor], times: list[int], **extra: object) -> torch.Tensor:
    """The K-step generator: predict x0, noise it anew, again. diffusers' LCM scheduler does that."""
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    real, scheduling_lcm.randn_tensor = scheduling_lcm.randn_tensor, Noises(noises[1:])
    try:
        alpha = pipe.scheduler.alphas_cumprod[times[0]]
        return pipe(
            prompt, latents=noises[0] * (1 - alpha).sqrt(), timesteps=times, num_inference_steps=len(times),
            guidance_scale=0.0, output_type="pt", **extra,
        ).images  # fmt: skip
    finally:
        scheduling_lcm.randn_tensor = real


def family(name: str, draw: torch.Generator, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    settings = FAMILIES[name]
    xl = name == "sdxl"
    tokens = tokenizer(folder / "tokenizer", "<|endoftext|>")
    # SDXL's second tokenizer pads with "!".
    tokens_2 = tokenizer(folder / "tokenizer_2", "!") if xl else None
    text = {"eos_token_id": tokens.eos_token_id} | settings["text"]
    encoder = text_encoder(draw, tokens, False, **text)
    encoder_2 = text_encoder(draw, tokens_2, True, eos_token_id=tokens.eos_token_id, **settings["text_2"]) if xl else None
    unet = shaken(UNet2DConditionModel(**UNET | settings["unet"]), draw)
    vae = shaken(
        AutoencoderKL(
            block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=0.13025 if xl else 0.18215, force_upcast=xl,
        ),
        draw,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        prediction_type=settings["prediction"], set_alpha_to_one=True,
    )  # fmt: skip
    common = {"unet": unet, "vae": vae, "scheduler": scheduler, "tokenizer": tokens, "text_encoder": encoder}
    if xl:
        pipe = StableDiffusionXLPipeline(
            **common, text_encoder_2=encoder_2, tokenizer_2=tokens_2, force_zeros_for_empty_prompt=True, add_watermarker=False
        )
    else:
        pipe = StableDiffusionPipeline(**common, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)

    out = tensors_of(unet, "unet") | tensors_of(vae, "vae") | tensors_of(encoder, "text_encoder")
    strings = {
        "unet": plain(unet.config), "vae": plain(vae.config), "text_encoder": plain(encoder.config),
        "scheduler": scheduler.to_json_string(), "model_index": json.dumps({k: list(v) if isinstance(v, tuple) else v for k, v in pipe.config.items()}),
        "prompts": json.dumps(PROMPTS), "times": json.dumps(FEW_STEP_TIMES), "guidance": json.dumps(GUIDANCE),
    }  # fmt: skip
    encoders = [("", tokens, encoder)]
    if xl:
        out |= tensors_of(encoder_2, "text_encoder_2")
        strings["text_encoder_2"] = plain(encoder_2.config)
        encoders.append(("_2", tokens_2, encoder_2))
    for suffix, own_tokens, own_encoder in encoders:
        for file in ["vocab.json", "merges.txt"]:
            strings[f"tokenizer{suffix}/{file}"] = (folder / f"tokenizer{suffix}" / file).read_text()
        strings[f"tokenizer{suffix}/special_tokens_map.json"] = json.dumps({"pad_token": own_tokens.pad_token})
        ids = own_tokens(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            said = own_encoder(ids, output_hidden_states=True)
        out[f"text{suffix}.ids"] = ids
        out[f"text{suffix}.last"] = said.last_hidden_state
        out[f"text{suffix}.penultimate"] = said.hidden_states[-2]
        out[f"text{suffix}.pooled"] = said.text_embeds if suffix else said.pooler_output

    with torch.no_grad():
        encoded = pipe.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    states, extra = encoded[0], {}
    out["states"] = states
    if xl:
        extra = {"text_embeds": encoded[2], "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16], [32.0, 24, 3, 5, 16, 16]])}
        out["pooled"] = encoded[2]
    out |= run_unet(unet, draw, states, (8, 8), "run", **extra)

    with torch.no_grad():
        image = torch.rand((2, 3, 16, 16), generator=draw) * 2 - 1
        moments = vae.encode(image).latent_dist
        latents = torch.randn((1, 4, 20, 12), generator=draw)
        out |= {"vae_run.image": image, "vae_run.mean": moments.mean, "vae_run.logvar": moments.logvar}
        out |= {"vae_run.latents": latents, "vae_run.decoded": vae.decode(latents).sample}
        vae.enable_tiling()
        out["vae_run.tiled"] = vae.decode(latents).sample
        vae.disable_tiling()
        noises = [torch.randn((1, 4, 8, 8), generator=draw) for _ in FEW_STEP_TIMES]
        out["noises"] = torch.stack(noises)
        # Both families predict a bounded image from 4 steps of guided DDIM and of the few-step generator.
        out["image.ddim"] = pipe(
            PROMPTS[0], latents=noises[0].clone(), num_inference_steps=4, guidance_scale=GUIDANCE, output_type="pt"
        ).images
        out["image.few_step"] = few_step(pipe, PROMPTS[0], noises, FEW_STEP_TIMES)
    return out, strings


def variant(name: str, draw: torch.Generator) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    settings = dict(VARIANTS[name])
    settings.pop("down_block_padding", None)
    size = (10, 6) if settings.pop("odd", False) else (8, 8)
    unet = shaken(UNet2DConditionModel(**UNET | settings), draw)
    states = torch.randn((3, 5, 12), generator=draw)
    labels = {
        "classes": torch.tensor([4, 0, 2]), "timestep_class": torch.tensor([3, 500, 90]),
        "projection_class": torch.randn((3, 7), generator=draw),
    }[name]  # fmt: skip
    found = run_unet(unet, draw, states, size, "run", class_labels=labels)
    return tensors_of(unet, "unet") | found, {"unet": plain(unet.config)}


def schedules(draw: torch.Generator) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    cases = {
        "linear": {"beta_schedule": "linear"},
        "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        "cosine": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        "zero_snr": {
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
        },
        "trained": {"trained_betas": [0.001 * (i + 1) for i in range(20)], "num_train_timesteps": 20},
        "sample": {"prediction_type": "sample"},
    }  # fmt: skip
    out, strings = {}, {}
    for name, settings in cases.items():
        scheduler = DDIMScheduler(clip_sample=False, **settings)
        strings[name] = scheduler.to_json_string()
        last = scheduler.config.num_train_timesteps - 1
        times = torch.tensor([0, last // 3, last // 2, last - 1])
        x, noise, native = (torch.randn((4, 2, 3, 3), generator=draw) for _ in range(3))
        noisy = scheduler.add_noise(x, noise, times)
        scheduler.set_timesteps(4)
        x0 = torch.cat(
            [scheduler.step(native[i : i + 1], int(t), noisy[i : i + 1]).pred_original_sample for i, t in enumerate(times)]
        )
        found = {"alphas_cumprod": scheduler.alphas_cumprod, "times": times, "x": x, "noise": noise, "x_t": noisy}
        out |= {f"{name}.{key}": value for key, value in (found | {"native": native, "x0": x0}).items()}
    # Classes differ in how they step, not in their forward process.
    strings["pndm"] = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").to_json_string()
    out["pndm.alphas_cumprod"] = out["scaled_linear.alphas_cumprod"].clone()
    return out, strings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "tests/fixtures")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.use_deterministic_algorithms(True)

    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        made = {}
        for name in FAMILIES:
            draw = torch.Generator().manual_seed(arguments.seed)
            made[f"sd_model_{name}"] = family(name, draw, Path(scratch) / name)
        for name in VARIANTS:
            made[f"sd_unet_{name}"] = variant(name, torch.Generator().manual_seed(arguments.seed + 1))
        made["sd_schedules"] = schedules(torch.Generator().manual_seed(arguments.seed + 2))
        folder = Path(scratch) / "tokens"
        tokens = tokenizer(folder, "<|endoftext|>")
        strings = {file: (folder / file).read_text() for file in ["vocab.json", "merges.txt"]}
        ids = tokens(TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        made["sd_tokenizer"] = {"ids": ids}, strings | {"texts": json.dumps(TEXTS)}
    for name, (tensors, strings) in made.items():
        path = arguments.out / f"{name}.safetensors"
        save_file({key: value.detach().clone().contiguous() for key, value in tensors.items()}, path, metadata=strings)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
