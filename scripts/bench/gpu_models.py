"""Models of Stable Diffusion's sizes with random weights, as folders in the layout of diffusers: gpu_check.py's.

    python gpu_models.py NAME FOLDER TOKENIZER cpu|cuda     writes a model; prints its size and its operations as JSON

TOKENIZER is a folder with one of few words, and text encoders have two layers: the prompts' embeddings are computed
once, and only their width counts.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

# The U-Nets of Stable Diffusion 1.5 and of SDXL base 1.0, as their config.json have them.
SD15 = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
SDXL = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "scaling_factor": 0.18215,
    "norm_num_groups": 32,
}
TINY_VAE = VAE | {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4}
UNETS = {
    "sd15": SD15,
    # As deep as SD 1.5: rounding errors grow with the depth, and its checkpoints are written in seconds.
    "narrow": SD15 | {"sample_size": 32, "block_out_channels": [128, 256, 512, 512]},
    "sdxl": SDXL,
    # For rehearsals on a CPU.
    "tiny-sd15": SD15
    | {
        "sample_size": 8,
        "block_out_channels": [8, 16, 16, 16],
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    "tiny-sdxl": SDXL
    | {
        "sample_size": 8,
        "block_out_channels": [8, 16, 16],
        "attention_head_dim": [1, 2, 2],
        "transformer_layers_per_block": [1, 1, 1],
        "cross_attention_dim": 24,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
}
SCHEDULE = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
}
PROMPTS = [
    f"a {size} {color} {shape}"
    for size in ("small", "large")
    for color in ("red", "blue")
    for shape in ("circle", "square")
]


def is_xl(unet: dict) -> bool:
    return unet.get("addition_embed_type") == "text_time"


def pooled_width(unet: dict) -> int:
    return unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_text_encoder(folder: Path, suffix: str, width: int, tokens: int, projects: bool, tokenizer: Path) -> None:
    """A CLIP text encoder of two layers with a tokenizer: tokens are bytes and what they merge to."""
    words = json.loads((tokenizer / "vocab.json").read_text())
    config = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": tokens,
        "vocab_size": len(words),
        "projection_dim": width,
        "hidden_act": "gelu",
        "bos_token_id": words["<|startoftext|>"],
        "eos_token_id": words["<|endoftext|>"],
        "layer_norm_eps": 1e-5,
    }
    shapes = {
        "embeddings.token_embedding.weight": (len(words), width),
        "embeddings.position_embedding.weight": (tokens, width),
    }
    for layer in (f"encoder.layers.{index}" for index in range(2)):
        linears = {f"self_attn.{name}_proj": (width, width) for name in "qkv"}
        linears |= {"self_attn.out_proj": (width, width), "mlp.fc1": (2 * width, width), "mlp.fc2": (width, 2 * width)}
        for name, shape in linears.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{name}.weight": (width,), f"{layer}.{name}.bias": (width,)}
    shapes |= {"final_layer_norm.weight": (width,), "final_layer_norm.bias": (width,)}
    tensors = {
        f"text_model.{name}": torch.ones(shape)
        if "norm" in name and name.endswith("weight")
        else 0.02 * torch.randn(shape)
        for name, shape in shapes.items()
    }
    if projects:
        tensors["text_projection.weight"] = 0.02 * torch.randn(width, width)
    write_json(folder / f"text_encoder{suffix}/config.json", config)
    save_file(tensors, folder / f"text_encoder{suffix}/model.safetensors")
    for name in ("vocab.json", "merges.txt"):
        (folder / f"tokenizer{suffix}").mkdir(exist_ok=True)
        (folder / f"tokenizer{suffix}" / name).write_bytes((tokenizer / name).read_bytes())
    special = {f"{kind}_token": "<|endoftext|>" for kind in ("eos", "unk", "pad")} | {"bos_token": "<|startoftext|>"}
    length = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokens}
    write_json(folder / f"tokenizer{suffix}/tokenizer_config.json", length | special)
    write_json(folder / f"tokenizer{suffix}/special_tokens_map.json", special)


def write(name: str, folder: Path, device: str, tokenizer: Path) -> dict:
    """Writes the model `name`. Weights are in the precision of the published files."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    config, tokens = UNETS[name], 16 if name.startswith("tiny") else 77
    vae = TINY_VAE if name.startswith("tiny") else VAE
    torch.manual_seed(0)
    parts = {"unet": (UNet2DConditionModel, config), "vae": (AutoencoderKL, vae)}
    parameters = 0
    for part, (kind, part_config) in parts.items():
        with torch.device(device):
            network = kind.from_config(part_config)
        if part == "unet":
            parameters = sum(p.numel() for p in network.parameters())
        write_json(folder / part / "config.json", dict(network.config))
        tensors = {key: value.half().contiguous() for key, value in network.state_dict().items()}
        save_file(tensors, folder / part / "diffusion_pytorch_model.safetensors")
        del network, tensors
    xl = is_xl(config)
    width = config["cross_attention_dim"]
    second = pooled_width(config) if xl else 0
    index = {
        "_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    write_text_encoder(folder, "", width - second, tokens, False, tokenizer)
    if xl:
        index |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
        write_text_encoder(folder, "_2", second, tokens, True, tokenizer)
    write_json(folder / "scheduler/scheduler_config.json", SCHEDULE)
    write_json(folder / "model_index.json", index)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return {"parameters": parameters, "flops": flops(config, tokens)}


def inputs(unet: dict, samples: int, tokens: int, device: str, kind: torch.dtype) -> dict:
    """Noise for a pass through a U-Net."""
    side = unet["sample_size"]

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=kind)

    given = {
        "sample": noise(samples, unet["in_channels"], side, side),
        "timestep": torch.full((samples,), 500, device=device),
        "encoder_hidden_states": noise(samples, tokens, unet["cross_attention_dim"]),
    }
    if is_xl(unet):
        sizes = torch.tensor([[8 * side, 8 * side, 0, 0, 8 * side, 8 * side]], device=device)
        given["added_cond_kwargs"] = {
            "text_embeds": noise(samples, pooled_width(unet)),
            "time_ids": sizes.expand(samples, 6),
        }
    return given


def flops(unet: dict, tokens: int) -> dict[str, int]:
    """Floating-point operations of one sample: of a forward pass, of a backward pass to all weights, and of one to the
    input alone. Counted on the meta device, where nothing is computed."""
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(unet)
    counted = {}
    for name, trained in (("trained", True), ("frozen", False)):
        network.requires_grad_(trained)
        given = inputs(unet, 1, tokens, "meta", torch.float32)
        given["sample"].requires_grad_(not trained)
        with FlopCounterMode(display=False) as counter:
            out = network(**given).sample.sum()
            counted["forward"] = counter.get_total_flops()
            out.backward()
        counted[name] = counter.get_total_flops() - counted["forward"]
    return counted


if __name__ == "__main__":
    model, folder, tokenizer, on = sys.argv[1:]
    print(json.dumps(write(model, Path(folder), on, Path(tokenizer))))
