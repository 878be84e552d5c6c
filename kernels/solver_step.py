"""One solver step in one pass, and the counter-based noise it draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastscore_kernels import checks, cpu, noise, reference
from fastscore_kernels.backends import provide, resolve
from fastscore_kernels.registration import call, define, define_triton
from torch import Tensor

COEFFICIENTS = ("c_skip", "c_out", "weight", "keep", "pull", "pull_old", "kick")

_STEP = (
    "(Tensor x, Tensor? raw, Tensor? guidance, Tensor? denoised, Tensor? old, Tensor coefficients, "
    "Tensor? counters, int draw) -> (Tensor, Tensor)"
)
_NORMALS = "(Tensor seeds, Tensor samples, Tensor steps, int size, int draw) -> Tensor"


def solver_step(
    x: Tensor,
    coefficients: Tensor,
    *,
    raw: Tensor | None = None,
    guidance: Tensor | None = None,
    denoised: Tensor | None = None,
    old: Tensor | None = None,
    counters: Tensor | None = None,
    draw: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Denoiser assembly, guidance, one linear solver update and its noise: x' and x0 like x.

    x, denoised, old [B, ...] fp32 contiguous; raw, guidance alike in fp32, bf16 or fp16;
    coefficients [B, 7] fp32 (`COEFFICIENTS`); counters [B, 3] int64 (seed, sample, step).
        x0 = c_skip x + c_out raw + weight guidance, or ``denoised``
        x' = keep x + pull x0 + pull_old old + kick z
    with a missing tensor's term left out and z the noise of `normals`. Each product and sum is
    rounded in fp32, left to right, so all backends return the same bits, whatever the batch.
    ValueError names the argument that does not fit, or what a backend that is not there needs.
    """
    _check_state(x, coefficients, raw, guidance, denoised, old)
    if counters is not None:
        _check_integers("solver_step", "counters", counters, (len(x), 3), x)
    chosen = resolve(backend, x.device.type)
    if chosen != "reference":
        step = x, raw, guidance, denoised, old, coefficients, counters, draw
        return call(*_OPERATORS[chosen][0], *step)
    z = None
    if counters is not None:
        seeds, samples, steps = counters.unbind(1)
        z = noise.normals(seeds, samples, steps[None], x[0].numel(), draw)[0].reshape(x.shape)
    return reference.solver_step(x, raw, guidance, denoised, old, coefficients, z)


def normals(
    seeds: Tensor,
    samples: Tensor,
    steps: Tensor,
    size: int,
    draw: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Standard normals [S, B, size] fp32 for steps [S] and samples [B], all int64, not negative.

    Number j of step s and sample b is number j % 4 of Philox 4x32-10 block (j / 4, steps[s],
    samples[b], draw) under key seeds[b], by Box-Muller in float64 (Salmon et al. 2011): the same
    bits on every backend as long as samples, steps and draw are below 2^32, which is not looked
    at: that would wait for the device. ValueError names the argument that does not fit.
    """
    for name, t in (("seeds", seeds), ("samples", samples), ("steps", steps)):
        _check_integers("normals", name, t, tuple(t.shape[:1]), seeds)
    if samples.shape != seeds.shape:
        raise ValueError(
            f"normals: samples has shape {tuple(samples.shape)}; expected that of seeds, "
            f"{tuple(seeds.shape)}"
        )
    if size < 1 or len(steps) * len(seeds) * size >= checks.LIMIT:
        raise ValueError(
            f"normals: size is {size} for {len(steps)} steps and {len(seeds)} samples; expected at "
            "least 1 and fewer than 2^31 numbers in all"
        )
    chosen = resolve(backend, seeds.device.type)
    if chosen == "reference":
        return noise.normals(seeds, samples, steps, size, draw)
    return call(*_OPERATORS[chosen][1], seeds, samples, steps, size, draw)


def _check_state(
    x: Tensor,
    coefficients: Tensor,
    raw: Tensor | None,
    guidance: Tensor | None,
    denoised: Tensor | None,
    old: Tensor | None,
) -> None:
    op = "solver_step"
    if x.ndim < 2 or x.dtype != torch.float32:
        raise ValueError(f"{op}: x is {x.dtype} of shape {tuple(x.shape)}; expected fp32 [B, ...]")
    if (raw is None) == (denoised is None):
        raise ValueError(f"{op}: give raw or denoised, one of the two")
    if guidance is not None and raw is None:
        raise ValueError(f"{op}: guidance is added to raw, which is not given")
    checks.extent(op, "x", x)
    named = {"x": x, "raw": raw, "guidance": guidance, "denoised": denoised, "old": old}
    for name, t in named.items():
        if t is None:
            continue
        if t.shape != x.shape or t.device != x.device:
            raise ValueError(
                f"{op}: {name} is {tuple(t.shape)} on {t.device}; expected shape and device of x, "
                f"{tuple(x.shape)} on {x.device}"
            )
        if not t.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {t.stride()}; expected a contiguous tensor")
        if name in ("denoised", "old") and t.dtype != torch.float32:
            raise ValueError(f"{op}: {name} is {t.dtype}; expected float32")
    if raw is not None:
        checks.floating(op, "raw", raw)
        if guidance is not None:
            checks.placed(op, "guidance", guidance, "raw", raw)
    expected = (x.shape[0], len(COEFFICIENTS))
    if coefficients.shape != expected or coefficients.dtype != torch.float32:
        raise ValueError(
            f"{op}: coefficients are {coefficients.dtype} of shape {tuple(coefficients.shape)}; "
            f"expected float32 {expected}"
        )
    checks.on_device(op, "coefficients", coefficients, "x", x)
    if not coefficients.is_contiguous():
        raise ValueError(
            f"{op}: coefficients have strides {coefficients.stride()}; expected a contiguous tensor"
        )


def _check_integers(op: str, name: str, t: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if t.dtype != torch.int64 or t.shape != shape or not t.is_contiguous() or 0 in shape:
        raise ValueError(
            f"{op}: {name} is {t.dtype} of shape {tuple(t.shape)} and strides {t.stride()}; "
            f"expected contiguous int64 {shape}, not empty"
        )
    checks.on_device(op, name, t, "the rest", like)


def _fake_step(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _fake_normals(seeds: Tensor, samples: Tensor, steps: Tensor, size: int, draw: int) -> Tensor:
    return seeds.new_empty((steps.shape[0], seeds.shape[0], size), dtype=torch.float32)


# solver_step and normals of a backend, each with its kernel
_OPERATORS: dict[str, tuple[tuple[Any, Callable], tuple[Any, Callable]]] = {}


def _register_native() -> None:
    step, draw = cpu.solver_step, cpu.normals
    _OPERATORS["native"] = (
        (define("fastscore_native::solver_step", _STEP, step, _fake_step, ("CPU",)), step),
        (define("fastscore_native::normals", _NORMALS, draw, _fake_normals, ("CPU",)), draw),
    )


def _register_triton() -> None:
    from fastscore_kernels.gpu import solver_step as gpu

    step, draw = gpu.solver_step, gpu.normals
    _OPERATORS["triton"] = (
        (define_triton("fastscore_triton::solver_step", _STEP, step, _fake_step), step),
        (define_triton("fastscore_triton::normals", _NORMALS, draw, _fake_normals), draw),
    )


_register_native()
provide("triton", _register_triton)
