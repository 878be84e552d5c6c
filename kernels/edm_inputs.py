"""What the networks of a denoiser read of a noisy sample and its level, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastscore_kernels import checks, reference
from fastscore_kernels.backends import choose, provide
from fastscore_kernels.registration import call, define_triton
from torch import Tensor

_SCHEMA = (
    "(Tensor x, Tensor sigma, Tensor? gamma, Tensor freqs, float sigma_data, int patch, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor)"
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def edm_inputs(
    x: Tensor,
    sigma: Tensor,
    gamma: Tensor | None,
    freqs: Tensor,
    sigma_data: float,
    patch: int,
    dtype: torch.dtype,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Patches of c_in x, sinusoidal features of c_noise, and the coefficients of a denoiser's sum.

    x [B, 1, H, W], sigma [B] and freqs [F] fp32; gamma [B] fp32 or None. Returns patches
    [B, patch^2, H / patch, W / patch] of ``dtype``, channels-last; features [B, 2 F] fp32, cosines
    of c_noise freqs before sines; and [3, B] fp32: c_skip, c_out, and gamma sigma^2 c_in, zero
    without gamma (Karras et al. 2022, Table 1). Where a derivative is wanted, and on the native
    backend, which has no kernel of it, the reference runs. ValueError names the argument that does
    not fit, or what a backend that is not there needs.
    """
    _check(x, sigma, gamma, freqs, patch, dtype)
    args = (x, sigma, gamma, freqs, sigma_data, patch, dtype)
    wanted = torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in args
    )
    if choose(backend, x) != "triton" or wanted or torch._C._are_functorch_transforms_active():
        return reference.edm_inputs(*args)
    return call(*_OPERATORS["triton"], x.contiguous(), *args[1:])


def _check(
    x: Tensor,
    sigma: Tensor,
    gamma: Tensor | None,
    freqs: Tensor,
    patch: int,
    dtype: torch.dtype,
) -> None:
    checks.activation("edm_inputs", "x", x, 1)
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"edm_inputs: x is {x.dtype}; expected float32")
    height, width = x.shape[2:]
    if not isinstance(patch, int) or patch < 1 or height % patch or width % patch:
        raise ValueError(
            f"edm_inputs: patch is {patch}; expected a whole number that divides {height} and "
            f"{width}"
        )
    if dtype not in _DTYPES:
        raise ValueError(f"edm_inputs: dtype is {dtype}; expected float32, bfloat16 or float16")
    for name, t, length in (
        ("sigma", sigma, x.shape[0]),
        ("gamma", gamma, x.shape[0]),
        ("freqs", freqs, len(freqs)),
    ):
        if t is None:
            continue
        if t.shape != (length,):
            raise ValueError(f"edm_inputs: {name} has shape {tuple(t.shape)}; expected {(length,)}")
        checks.placed("edm_inputs", name, t, "x", x)


def _fake(
    x: Tensor,
    sigma: Tensor,
    gamma: Tensor | None,
    freqs: Tensor,
    sigma_data: float,
    patch: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    b, _, h, w = x.shape
    patches = x.new_empty((b, patch * patch, h // patch, w // patch), dtype=dtype)
    return (
        patches.contiguous(memory_format=torch.channels_last),
        x.new_empty((b, 2 * freqs.shape[0]), dtype=torch.float32),
        x.new_empty((3, b), dtype=torch.float32),
    )


# a backend's operator and its kernel
_OPERATORS: dict[str, tuple[Any, Callable]] = {}


def _register_triton() -> None:
    from fastscore_kernels.gpu import edm_inputs as gpu

    op = define_triton("fastscore_triton::edm_inputs", _SCHEMA, gpu.edm_inputs, _fake)
    _OPERATORS["triton"] = op, gpu.edm_inputs


provide("triton", _register_triton)
