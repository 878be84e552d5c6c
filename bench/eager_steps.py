"""A few guided steps of a model, eager, for tools that watch a process.

    python bench/eager_steps.py [--model paper] [--batch 1] [--device cuda]

The last step alone lies between cudaProfilerStart and cudaProfilerStop: what compiles and chooses
algorithms is not watched.
"""

from __future__ import annotations

import argparse

import torch

from fastscore.measure.models import MODELS
from fastscore.measure.subjects import build
from fastscore.measure.workloads import Step

WARM_UPS = 2


def step(model: str, batch: int, device: torch.device, mode: str = "eager") -> Step:
    """The guided step, on a GPU in bf16 and by our kernels."""
    on_gpu = device.type == "cuda"
    backend, precision = ("triton", "bf16") if on_gpu else ("reference", "fp32")
    return Step(batch, backend, model, mode=mode, precision=precision, guided=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), default="paper")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    run = build(step(args.model, args.batch, device), device).run
    for _ in range(WARM_UPS):
        run()
    if device.type == "cpu":
        run()
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
