"""Denoiser assembly, guidance, multistep update and noise in one launch; and the noise alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastscore_kernels.gpu.common import begin
from fastscore_kernels.gpu.exact import draw_normals, product32
from fastscore_kernels.gpu.launch import ceil_div, choose, device_of, launch
from torch import Tensor


@triton.jit
def solver_step_kernel(
    x,
    raw,
    guidance,
    denoised,
    old,
    coefficients,
    counters,
    draw,
    x_next,
    x0_out,
    size,
    blocks,
    RAW: tl.constexpr,
    GUIDANCE: tl.constexpr,
    OLD: tl.constexpr,
    NOISE: tl.constexpr,
    QUADS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One stretch of 4 QUADS elements of one sample."""
    begin(DEPENDENT)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * QUADS
    j = first * 4 + tl.arange(0, 4 * QUADS)
    mask = j < size
    at = b * size + j
    row = coefficients + b * 7
    here = tl.load(x + at, mask=mask, other=0.0)
    if RAW:
        x0 = product32(tl.load(row), here)
        x0 += product32(tl.load(row + 1), tl.load(raw + at, mask=mask, other=0.0).to(tl.float32))
        if GUIDANCE:
            pull = tl.load(guidance + at, mask=mask, other=0.0).to(tl.float32)
            x0 += product32(tl.load(row + 2), pull)
    else:
        x0 = tl.load(denoised + at, mask=mask, other=0.0)
    tl.store(x0_out + at, x0, mask=mask)
    following = product32(tl.load(row + 3), here) + product32(tl.load(row + 4), x0)
    if OLD:
        following += product32(tl.load(row + 5), tl.load(old + at, mask=mask, other=0.0))
    if NOISE:
        seed = tl.load(counters + b * 3)
        sample = tl.load(counters + b * 3 + 1)
        step = tl.load(counters + b * 3 + 2)
        noise = draw_normals(seed, sample, step, draw, first, QUADS)
        following += product32(tl.load(row + 6), noise)
    tl.store(x_next + at, following, mask=mask)


@triton.jit
def normals_kernel(
    seeds,
    samples,
    steps,
    draw,
    out,
    batch,
    size,
    blocks,
    QUADS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """4 QUADS normals of one step and sample of out [S, B, size]."""
    begin(DEPENDENT)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * QUADS
    b = row % batch
    seed = tl.load(seeds + b)
    sample = tl.load(samples + b)
    step = tl.load(steps + row // batch)
    noise = draw_normals(seed, sample, step, draw, first, QUADS)
    j = first * 4 + tl.arange(0, 4 * QUADS)
    tl.store(out + row * size + j, noise, mask=j < size)


def solver_step(
    x: Tensor,
    raw: Tensor | None,
    guidance: Tensor | None,
    denoised: Tensor | None,
    old: Tensor | None,
    coefficients: Tensor,
    counters: Tensor | None,
    draw: int,
) -> tuple[Tensor, Tensor]:
    """x' and x0, both fp32 like x: `fastscore_kernels.solver_step.solver_step` says how.

    All tensors contiguous; coefficients [B, 7] fp32, counters [B, 3] int64 (seed, sample, step).
    """
    batch = x.shape[0]
    size = x.numel() // batch
    plan = _plan("solver_step", x, batch, size)
    blocks = ceil_div(size, 4 * plan["quads"])
    x_next, x0 = torch.empty_like(x), torch.empty_like(x)
    # an absent tensor's place is taken by one of the right kind that nobody reads
    given = [x if t is None else t for t in (raw, guidance, denoised, old)]
    launch(
        solver_step_kernel,
        (batch * blocks,),
        x,
        *given,
        coefficients,
        coefficients if counters is None else counters,
        draw,
        x_next,
        x0,
        size,
        blocks,
        RAW=raw is not None,
        GUIDANCE=guidance is not None,
        OLD=old is not None,
        NOISE=counters is not None,
        QUADS=plan["quads"],
        num_warps=plan["warps"],
    )
    return x_next, x0


def normals(seeds: Tensor, samples: Tensor, steps: Tensor, size: int, draw: int) -> Tensor:
    """Standard normals [S, B, size] fp32 of `fastscore_kernels.noise.normals`, to the bit.

    seeds, samples int64 [B], steps int64 [S].
    """
    batch, count = seeds.shape[0], steps.shape[0]
    out = torch.empty(count, batch, size, dtype=torch.float32, device=seeds.device)
    plan = _plan("normals", seeds, batch * count, size)
    blocks = ceil_div(size, 4 * plan["quads"])
    launch(
        normals_kernel,
        (count * batch * blocks,),
        seeds,
        samples,
        steps,
        draw,
        out,
        batch,
        size,
        blocks,
        QUADS=plan["quads"],
        num_warps=plan["warps"],
    )
    return out


def _plan(op: str, x: Tensor, rows: int, size: int) -> dict[str, int]:
    # one Philox block, four elements, a thread: small enough that a lone sample uses many cores
    shape = {"rows": int(rows), "size": int(size)}
    return choose(op, device_of(x), shape, {"quads": 128, "warps": 4})


__all__ = ["normals", "solver_step"]
