"""Full SiD iterations of a text-to-image U-Net with random weights in eager PyTorch and diffusers: the baseline of `iteration`, the example of
worker/distill. Losses, sizes, precision and activation checkpointing are the same.

    python scripts/bench/gpu_check_eager.py UNET_CONFIG SIDE TOKENS MICRO_BATCH ITERATIONS cpu|cuda
"""

import json
import statistics
import sys
import time

import torch
from diffusers import UNet2DConditionModel

KAPPA, BETAS, RATE, EPSILON = 1.5, (0.0, 0.999), 1e-6, 1e-8
T_INIT = 625


class Trained:
    """A network of lower precision with fp32 master weights and Adam's moments."""

    def __init__(self, network: torch.nn.Module):
        self.network = network
        self.parameters = [p.requires_grad_() for p in network.parameters()]
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.optimizer = torch.optim.Adam(self.masters, lr=RATE, betas=BETAS, eps=EPSILON, foreach=True)

    def step(self) -> None:
        for master, parameter in zip(self.masters, self.parameters):
            master.grad = torch.nan_to_num(parameter.grad.float(), 0.0, 0.0, 0.0)
            parameter.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)


def main() -> None:
    config, side, tokens, batch, iterations, device = sys.argv[1:]
    side, tokens, batch, iterations = int(side), int(tokens), int(batch), int(iterations)
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    with open(config) as file:
        config = json.load(file)
    torch.manual_seed(0)

    def network() -> UNet2DConditionModel:
        with torch.device(device):
            made = UNet2DConditionModel.from_config(config).to(kind)
        made.enable_gradient_checkpointing()
        # Gradient checkpointing is on in training mode only; there is no dropout.
        return made.train()

    teacher, generator, fake = network(), network(), network()
    for other in (generator, fake):
        other.load_state_dict(teacher.state_dict())
    teacher.requires_grad_(False)
    trained_generator, trained_fake = Trained(generator), Trained(fake)
    # On the host, where Potstill's is too in this measurement.
    average = [master.to("cpu", copy=True) for master in trained_generator.masters]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0).float().to(device)
    shape = (batch, teacher.config.in_channels, side, side)
    width = teacher.config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    xl = teacher.config.addition_embed_type == "text_time"
    pooled_width = teacher.config.projection_class_embeddings_input_dim or 0
    pooled_width -= 6 * (teacher.config.addition_time_embed_dim or 0)
    sizes = torch.tensor([[8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side]], device=device)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device)

    def condition() -> list[torch.Tensor]:
        return [noise(batch, tokens, width).to(kind), noise(batch, pooled_width).to(kind)]

    def denoise(net, x_t, t, text):
        added = {"text_embeds": text[1], "time_ids": sizes.expand(x_t.shape[0], 6)} if xl else None
        epsilon = net(x_t.to(kind), t, text[0], added_cond_kwargs=added).sample.float()
        a = alphas[t].view(-1, 1, 1, 1)
        return (x_t - (1 - a).sqrt() * epsilon) / a.sqrt()

    def guided(net, x_t, t, text):
        null = [noise(1, *part.shape[1:]).to(kind).expand_as(part) for part in text]
        both = [torch.cat(pair) for pair in zip(null, text)]
        u, c = denoise(net, torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return u + KAPPA * (c - u)

    def generate(text):
        t = torch.full((batch,), T_INIT, device=device)
        return denoise(generator, (1 - alphas[T_INIT]).sqrt() * noise(*shape), t, text)

    def noised(x):
        t, n = torch.randint(20, 980, (batch,), device=device), noise(*shape)
        a = alphas[t].view(-1, 1, 1, 1)
        return t, a, a.sqrt() * x + (1 - a).sqrt() * n

    parts = [f"{who}: {what}" for who in ("fake score", "generator") for what in ("forward", "backward", "step")]
    seconds = {part: [] for part in parts}
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    finite = True
    for iteration in range(iterations):
        clock = time.perf_counter()

        def note(part: str) -> None:
            nonlocal clock
            synchronise()
            if iteration > 0 or iterations == 1:
                seconds[part].append(time.perf_counter() - clock)
            clock = time.perf_counter()

        text = condition()
        with torch.no_grad():
            x = generate(text)
        t, a, x_t = noised(x)
        fake.requires_grad_(True)
        loss = ((a / (1 - a)) * (guided(fake, x_t, t, text) - x) ** 2).sum() / batch
        note("fake score: forward")
        loss.backward()
        finite &= bool(torch.isfinite(loss))
        note("fake score: backward")
        trained_fake.step()
        note("fake score: step")

        text = condition()
        x = generate(text)
        t, a, x_t = noised(x)
        fake.requires_grad_(False)
        f_phi, f_psi = guided(teacher, x_t, t, text), guided(fake, x_t, t, text)
        omega = 1 / (x - f_phi).abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-5).detach()
        loss = (omega * (f_phi - f_psi) * (f_psi - x)).sum() / batch
        note("generator: forward")
        loss.backward()
        finite &= bool(torch.isfinite(loss))
        note("generator: backward")
        trained_generator.step()
        with torch.no_grad():
            for mean, master in zip(average, trained_generator.masters):
                mean.lerp_(master.to("cpu"), 0.01)
        note("generator: step")
    medians = {part: statistics.median(values) for part, values in seconds.items()}
    report = {
        "parameters": sum(p.numel() for p in teacher.parameters()),
        "seconds": medians,
        "seconds_per_iteration": sum(medians.values()),
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "finite": finite,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
