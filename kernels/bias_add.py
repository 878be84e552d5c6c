"""What a convolution's output still lacks, added in one pass: bias, Mel band, residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastscore_kernels import checks, reference
from fastscore_kernels.backends import choose, provide
from fastscore_kernels.registration import batch, call, define_triton, differentiate
from torch import Tensor

_SCHEMA = "(Tensor x, Tensor bias, Tensor? band, Tensor? residual) -> Tensor"


def bias_add(
    x: Tensor,
    bias: Tensor,
    band: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x + bias + band + residual, summed in fp32 in this order and rounded once; differentiable.

    x [B, C, H, W] fp32, bf16 or fp16, contiguous or channels-last; bias [C] and band [1, C, H, 1]
    fp32 or of x's dtype; residual like x. Returns [B, C, H, W] like x. The native backend has no
    kernel of it and takes the reference: a convolution on a CPU adds its bias itself. ValueError
    names the argument that does not fit, or what a backend that is not there needs.
    """
    checks.activation("bias_add", "x", x)
    checks.parameter("bias_add", "bias", bias, (x.shape[1],), x)
    if band is not None:
        _check_band(band, x)
    if residual is not None:
        checks.activation("bias_add", "residual", residual)
        checks.alike("bias_add", "residual", residual, "x", x)
    if choose(backend, x) != "triton":
        return reference.bias_add(x, bias, band, residual)
    return call(*_OPERATORS["triton"], x, bias, band, residual)


def _check_band(band: Tensor, x: Tensor) -> None:
    checks.on_device("bias_add", "band", band, "x", x)
    expected = (1, x.shape[1], x.shape[2], 1)
    if band.shape != expected or band.dtype not in (torch.float32, x.dtype):
        raise ValueError(
            f"bias_add: band is {band.dtype} of shape {tuple(band.shape)}; expected float32 or "
            f"{x.dtype} of shape {expected}"
        )


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


# a backend's operator and its kernel
_OPERATORS: dict[str, tuple[Any, Callable]] = {}


def _register_triton() -> None:
    from fastscore_kernels.gpu import bias_add as gpu

    op = define_triton("fastscore_triton::bias_add", _SCHEMA, gpu.bias_add, _fake)
    differentiate(op, _save, _pull)
    batch(op, {0, 3}, (0,))
    _OPERATORS["triton"] = op, gpu.bias_add


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.kinds = [None if t is None else t.dtype for t in inputs]


def _pull(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    found: list[Tensor | None] = []
    # summed over what each is the same for
    for kind, wanted, dims in zip(
        ctx.kinds, ctx.needs_input_grad, ((), (0, 2, 3), (0, 3), ()), strict=True
    ):
        if kind is None or not wanted:
            found.append(None)
        elif dims:
            found.append(grad.sum(dims, keepdim=len(dims) == 2, dtype=torch.float32).to(kind))
        else:
            found.append(grad.to(kind))
    return tuple(found)


provide("triton", _register_triton)
