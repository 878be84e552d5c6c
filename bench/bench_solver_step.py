"""solver_step with its noise, and normals, against eager PyTorch and torch.compile.

The eager step draws the same counter-based noise; the row "randn" draws torch.randn instead, whose
bits depend on the batch and on what was drawn before.

pytest bench/bench_solver_step.py --benchmark-only --threads 2 [--benchmark-json FILE]
"""

import pytest
import torch
from compare import compiled
from fastscore_kernels import noise, normals, reference, solver_step, traffic
from problems import BATCHES

SIZE = 80 * 64


def tensors(batch, device):
    x, raw, guidance, old = (torch.randn(batch, 1, 80, 64, device=device) for _ in range(4))
    counters = torch.stack((torch.arange(batch), torch.zeros(batch), torch.full((batch,), 7)), 1)
    return x, raw, guidance, old, torch.randn(batch, 7, device=device), counters.long().to(device)


@pytest.mark.parametrize("batch", BATCHES)
def test_solver_step(compare, device, kernel, with_compile, batch):
    x, raw, guidance, old, coefficients, counters = tensors(batch, device)
    named = {"raw": raw, "guidance": guidance, "old": old, "counters": counters}

    def eager(x, raw, guidance, old, coefficients, counters):
        seeds, samples, steps = counters.unbind(1)
        z = noise.normals(seeds, samples, steps[None], SIZE)[0].reshape(x.shape)
        return reference.solver_step(x, raw, guidance, None, old, coefficients, z)

    arguments = x, raw, guidance, old, coefficients, counters
    runs = {"eager": lambda: eager(*arguments)}
    for name, run in compiled(eager, with_compile).items():
        runs[name] = lambda run=run: run(*arguments)
    runs[kernel] = lambda: solver_step(x, coefficients, **named, backend=kernel)
    compare(f"solver_step {batch} x 1 x 80 x 64", runs, 1e-5, traffic.solver_step(batch, SIZE, 4))


@pytest.mark.parametrize("batch", BATCHES)
def test_arithmetic_alone(compare, device, kernel, with_compile, batch):
    x, raw, guidance, old, coefficients, _ = tensors(batch, device)

    def eager(x, raw, guidance, old, coefficients):
        return reference.solver_step(x, raw, guidance, None, old, coefficients, None)

    arguments = x, raw, guidance, old, coefficients
    named = {"raw": raw, "guidance": guidance, "old": old}
    runs = {"eager": lambda: eager(*arguments)}
    for name, run in compiled(eager, with_compile).items():
        runs[name] = lambda run=run: run(*arguments)
    runs[kernel] = lambda: solver_step(x, coefficients, **named, backend=kernel)
    moved = traffic.solver_step(batch, SIZE, 4)
    compare(f"solver_step without noise {batch} x 1 x 80 x 64", runs, 1e-5, moved)


@pytest.mark.parametrize("batch", BATCHES)
def test_normals(compare, device, kernel, batch):
    seeds = torch.arange(batch, device=device)
    arguments = seeds, torch.zeros_like(seeds), torch.tensor([7], device=device), SIZE
    runs = {
        "eager": lambda: noise.normals(*arguments),
        kernel: lambda: normals(*arguments, backend=kernel),
    }
    compare(f"normals 1 x {batch} x {SIZE}", runs, 0.0, None)
