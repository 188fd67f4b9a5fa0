"""SiD iterations of a text-to-image U-Net with random weights in PyTorch and diffusers: what gpu_check.py puts beside
Potstill's. Losses, guidance, batch, precision, recomputation, optimizer and average are those of the same run.

    python gpu_check_eager.py '{"model": "sdxl", "device": "cuda", …}'     prints a line of JSON for each iteration and
                                                                           one for all

Keys besides: tokens, micro_batch, iterations, warm_up (iterations that are not counted), bf16_weights (bf16 weights
with fp32 master copies; else fp32 weights), autocast (to bf16, of fp32 weights), recompute (gradient checkpointing),
offload_ema (the average lies in the host's memory), lora_rank (null: whole networks), and tuning: "plain", what a
straightforward program does; "blocks", also channels-last, pinned memory, cuDNN's benchmark mode and compiled
transformer blocks (diffusers' compile_repeated_blocks); "networks", with torch.compile on whole networks instead.

Adam is the fused one. Two choices save memory that Potstill does not need either, so that SDXL fits a card of 80 GB:
Adam's first moment, whose decay is 0, is one for both networks, and gradients are converted one by one.
"""

import contextlib
import json
import statistics
import sys
import time

import torch
from diffusers import UNet2DConditionModel

import gpu_models

KAPPA, BETAS, RATE, EPSILON, T_INIT = 1.5, (0.0, 0.999), 1e-6, 1e-8, 625
# What Potstill adapts, by DMD2's public code (the default of lora.targets).
TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
]


class Trained:
    """The trained parameters of a network and their optimizer. Weights of lower precision have fp32 master copies."""

    def __init__(self, network: torch.nn.Module, first_moments: list[torch.Tensor]):
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.low = self.parameters[0].dtype != torch.float32
        self.masters = [p.detach().float().clone() for p in self.parameters] if self.low else self.parameters
        self.optimizer = torch.optim.Adam(self.masters, lr=RATE, betas=BETAS, eps=EPSILON, fused=True)
        if not first_moments:
            first_moments += [torch.zeros_like(master) for master in self.masters]
        for master, first in zip(self.masters, first_moments):
            step = torch.zeros((), device=master.device)
            self.optimizer.state[master] = {"step": step, "exp_avg": first, "exp_avg_sq": torch.zeros_like(master)}

    def step(self) -> None:
        for master, parameter in zip(self.masters, self.parameters):
            gradient, parameter.grad = parameter.grad, None
            # Some blocks' biases take no part in the loss.
            master.grad = torch.zeros_like(master) if gradient is None else gradient.float().nan_to_num_(0.0, 0.0, 0.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.low:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)


class Average:
    """The generator's average: on the device, or in the host's memory."""

    def __init__(self, masters: list[torch.Tensor], offload: bool, pinned: bool):
        self.masters, self.offload, self.staging = masters, offload, None
        self.values = [master.detach().to("cpu" if offload else master.device, copy=True) for master in masters]
        if offload and pinned:
            self.staging = [torch.empty_like(value, pin_memory=True) for value in self.values]

    @torch.no_grad()
    def update(self) -> None:
        masters = self.masters
        if self.staging is not None:
            torch._foreach_copy_(self.staging, masters, non_blocking=True)
            torch.cuda.synchronize()
            masters = self.staging
        elif self.offload:
            masters = [master.to("cpu") for master in masters]
        torch._foreach_lerp_(self.values, masters, 0.01)


class Networks:
    """Teacher, generator and fake score. With adapters they share their frozen weights."""

    def __init__(self, wanted: dict, config: dict):
        device, tuned = wanted["device"], wanted["tuning"] != "plain"
        kind = torch.bfloat16 if wanted["bf16_weights"] else torch.float32
        with torch.device(device):
            self.teacher = UNet2DConditionModel.from_config(config).to(kind)
        if tuned:
            self.teacher.to(memory_format=torch.channels_last)
        weights = self.teacher.state_dict()
        made = []
        for _ in range(2):
            with torch.device("meta"):
                network = UNet2DConditionModel.from_config(config)
            share = wanted["lora_rank"] is not None
            copies = weights if share else {name: value.clone() for name, value in weights.items()}
            network.load_state_dict(copies, assign=True)
            network.requires_grad_(not share)
            if share:
                from peft import LoraConfig

                rank = wanted["lora_rank"]
                with torch.device(device):
                    network.add_adapter(
                        LoraConfig(r=rank, lora_alpha=8, init_lora_weights=True, target_modules=TARGETS)
                    )
                for parameter in network.parameters():
                    if parameter.requires_grad:
                        parameter.data = parameter.data.float()
            made.append(network)
        self.generator, self.fake = made
        self.teacher.requires_grad_(False)
        for network in (self.teacher, *made):
            if wanted["recompute"]:
                network.enable_gradient_checkpointing()
            # Gradient checkpointing is on in training mode only; there is no dropout.
            network.train()
            if wanted["tuning"] == "blocks":
                network.compile_repeated_blocks(backend=wanted["backend"])
            elif wanted["tuning"] == "networks":
                network.compile(backend=wanted["backend"])
        moments: list[torch.Tensor] = []
        self.trained_fake = Trained(self.fake, moments)
        self.trained_generator = Trained(self.generator, moments)
        self.fake_parameters = self.trained_fake.parameters
        self.average = Average(self.trained_generator.masters, wanted["offload_ema"], tuned and device == "cuda")


def main() -> None:
    wanted = json.loads(sys.argv[1])
    config, device, batch, tokens = (
        gpu_models.UNETS[wanted["model"]],
        wanted["device"],
        wanted["micro_batch"],
        wanted["tokens"],
    )
    # Dynamo compiles a block again for each width, batch and set of tensors that take a gradient.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 512
    wanted.setdefault("backend", "inductor")
    torch.backends.cudnn.benchmark = wanted["tuning"] != "plain"
    torch.manual_seed(0)
    nets = Networks(wanted, config)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0).float().to(device)
    side = config["sample_size"]
    shape = (batch, config["in_channels"], side, side)
    kind = torch.bfloat16 if wanted["bf16_weights"] else torch.float32
    null = gpu_models.inputs(config, 1, tokens, device, kind)

    def noise() -> torch.Tensor:
        return torch.randn(shape, device=device)

    def condition() -> dict:
        return gpu_models.inputs(config, batch, tokens, device, kind)

    def doubled(given: dict) -> dict:
        """The condition, after the empty one."""
        both = {"encoder_hidden_states": twice("encoder_hidden_states", given)}
        if "added_cond_kwargs" in given:
            own, empty = given["added_cond_kwargs"], null["added_cond_kwargs"]
            both["added_cond_kwargs"] = {
                key: torch.cat([empty[key].expand(batch, -1), own[key]]) for key in ("text_embeds", "time_ids")
            }
        return both

    def twice(key: str, given: dict) -> torch.Tensor:
        return torch.cat([null[key].expand(batch, *null[key].shape[1:]), given[key]])

    def denoise(network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, given: dict) -> torch.Tensor:
        extra = {key: given[key] for key in ("encoder_hidden_states", "added_cond_kwargs") if key in given}
        epsilon = network(x_t.to(kind), t, **extra).sample.float()
        a = alphas[t].view(-1, 1, 1, 1)
        return (x_t - (1 - a).sqrt() * epsilon) / a.sqrt()

    def guided(network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, given: dict) -> torch.Tensor:
        u, c = denoise(network, torch.cat([x_t, x_t]), torch.cat([t, t]), doubled(given)).chunk(2)
        return u + KAPPA * (c - u)

    def generate(given: dict) -> torch.Tensor:
        t = torch.full((batch,), T_INIT, device=device)
        return denoise(nets.generator, (1 - alphas[T_INIT]).sqrt() * noise(), t, given)

    def noised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        t = torch.randint(20, 980, (batch,), device=device)
        a = alphas[t].view(-1, 1, 1, 1)
        return t, a, a.sqrt() * x + (1 - a).sqrt() * noise()

    def precision() -> contextlib.AbstractContextManager:
        return torch.autocast(device, torch.bfloat16) if wanted["autocast"] else contextlib.nullcontext()

    def fake_phase() -> torch.Tensor:
        given = condition()
        with precision():
            with torch.no_grad():
                x = generate(given)
            t, a, x_t = noised(x)
            return ((a / (1 - a)) * (guided(nets.fake, x_t, t, given) - x) ** 2).sum() / batch

    def generator_phase() -> torch.Tensor:
        given = condition()
        with precision():
            x = generate(given)
            t, _, x_t = noised(x)
            f_phi, f_psi = guided(nets.teacher, x_t, t, given), guided(nets.fake, x_t, t, given)
            omega = 1 / (x - f_phi).abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-5).detach()
            return (omega * (f_phi - f_psi) * (f_psi - x)).sum() / batch

    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {}
    totals, finite = [], True
    for iteration in range(wanted["iterations"]):
        clock = started = time.perf_counter()

        def note(part: str) -> None:
            nonlocal clock
            synchronize()
            now = time.perf_counter()
            # The first iterations load, choose and compile kernels.
            if iteration >= wanted["warm_up"]:
                seconds.setdefault(part, []).append(now - clock)
            clock = now

        for p in nets.fake_parameters:
            p.requires_grad_(True)
        loss = fake_phase()
        note("fake score: forward")
        loss.backward()
        finite &= bool(torch.isfinite(loss))
        note("fake score: backward")
        nets.trained_fake.step()
        note("fake score: step")
        for p in nets.fake_parameters:
            p.requires_grad_(False)
        loss = generator_phase()
        note("generator: forward")
        loss.backward()
        finite &= bool(torch.isfinite(loss))
        note("generator: backward")
        nets.trained_generator.step()
        note("generator: step")
        nets.average.update()
        note("average")
        if iteration >= wanted["warm_up"]:
            totals.append(clock - started)
        print(json.dumps({"iteration": iteration, "seconds": clock - started}), flush=True)
    report = {
        "parameters": sum(p.numel() for p in nets.teacher.parameters()),
        "trained": sum(p.numel() for p in nets.trained_generator.parameters),
        "seconds": {part: statistics.median(values) for part, values in seconds.items()},
        "seconds_per_iteration": statistics.median(totals),
        "finite": finite,
    }
    if device == "cuda":
        report |= {
            "peak_allocated": torch.cuda.max_memory_allocated(),
            "peak_reserved": torch.cuda.max_memory_reserved(),
        }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
