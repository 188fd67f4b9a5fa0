"""The rates of a card with which others are compared: a product of two bf16 matrices of random numbers, and a copy.

python gpu_card.py cpu|cuda     prints JSON
"""

import json
import statistics
import sys
import time

import torch


def median_seconds(work, synchronize, times: int) -> float:
    seconds = []
    for index in range(times + 3):
        started = time.perf_counter()
        work()
        synchronize()
        if index >= 3:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    device = sys.argv[1]
    on_gpu = device == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    side, length = (8192, 1 << 30) if on_gpu else (128, 1 << 16)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = median_seconds(lambda: a @ b, synchronize, 20)
    x, y = (torch.ones(length, device=device) for _ in range(2))
    copy = median_seconds(lambda: y.copy_(x), synchronize, 20)
    properties = torch.cuda.get_device_properties(0) if on_gpu else None
    print(
        json.dumps(
            {
                "name": properties.name if on_gpu else "CPU",
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "memory": properties.total_memory if on_gpu else None,
                "bf16_flops": 2 * side**3 / product,
                "bytes_copied": 8 * length / copy,
            }
        )
    )


if __name__ == "__main__":
    main()
