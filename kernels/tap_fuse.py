"""Attention fusion of the taps of one scale, alone and as the whole path of the scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastscore_kernels import checks, cpu, reference
from fastscore_kernels.backends import choose, provide
from fastscore_kernels.registration import (
    batch,
    call,
    define,
    define_triton,
    differentiate,
    once_differentiable,
)
from torch import Tensor

_FORWARD = "(Tensor q, Tensor first, Tensor? second, int heads, bool spatial) -> Tensor"
_BACKWARD = (
    "(Tensor grad, Tensor q, Tensor first, Tensor? second, int heads, bool spatial) "
    "-> (Tensor, Tensor, Tensor)"
)


def tap_fuse(
    q: Tensor,
    first: Tensor,
    second: Tensor | None,
    heads: int,
    spatial: bool,
    backend: str | None = None,
) -> Tensor:
    """Attention of feature queries over the tokens of one or two taps; differentiable.

    q [B, C, H, W]; first, second [B, 2 C, H, W] of one dtype: a tap's keys, then its values. With
    ``spatial`` every query attends to the positions of all taps; without, to the token of its own
    position in each, so that it weighs one tap against the other. Softmax over dot products scaled
    by 1 / sqrt(C / heads) (Vaswani et al. 2017). Returns [B, C, H, W] like q. ValueError names the
    argument that does not fit, or what a backend that is not there needs.
    """
    checks.activation("tap_fuse", "q", q)
    checks.dividing("tap_fuse", "heads", heads, q.shape[1])
    for name, tap in (("first", first), ("second", second)):
        if tap is not None:
            _check_tap(name, tap, q)
    chosen = choose(backend, q)
    if chosen == "reference":
        return reference.tap_fuse(q, first, second, heads, spatial)
    return call(*_OPERATORS[chosen], q, first, second, heads, spatial)


def _check_tap(name: str, tap: Tensor, q: Tensor) -> None:
    checks.activation("tap_fuse", name, tap, 2 * q.shape[1])
    checks.placed("tap_fuse", name, tap, "q", q)
    if tap.shape[0] != q.shape[0] or tap.shape[2:] != q.shape[2:]:
        b, c, h, w = q.shape
        raise ValueError(
            f"tap_fuse: {name} has shape {tuple(tap.shape)}; expected {(b, 2 * c, h, w)}, twice "
            "the channels of q"
        )


def _fake(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q)


def _fake_backward(
    grad: Tensor, q: Tensor, first: Tensor, second: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    third = q.new_empty(0) if second is None else torch.empty_like(second)
    return torch.empty_like(q), torch.empty_like(first), third


# a backend's operator and its kernel
_OPERATORS: dict[str, tuple[Any, Callable]] = {}


def _register_native() -> None:
    name, cpus = "fastscore_native::tap_fuse", ("CPU",)
    forward = define(name, _FORWARD, cpu.tap_fuse, _fake, cpus)
    backward = define(f"{name}_backward", _BACKWARD, cpu.tap_fuse_backward, _fake_backward, cpus)
    _OPERATORS["native"] = _derive(forward, backward), cpu.tap_fuse


def _register_triton() -> None:
    from fastscore_kernels.gpu import tap_fuse as gpu

    name = "fastscore_triton::tap_fuse"
    forward = define_triton(name, _FORWARD, gpu.tap_fuse, _fake)
    backward = define_triton(f"{name}_backward", _BACKWARD, _gpu_backward, _fake_backward)
    _OPERATORS["triton"] = _derive(forward, backward), gpu.tap_fuse


def _derive(forward: Any, backward: Any) -> Any:
    def save(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.heads, ctx.spatial = inputs
        ctx.save_for_backward(*tensors)

    def pull(ctx: Any, grad: Tensor | None) -> tuple:
        if grad is None:
            return (None,) * 5
        q, first, second = ctx.saved_tensors
        layout = torch.contiguous_format if q.is_contiguous() else torch.channels_last
        grad = grad.to(q.dtype).contiguous(memory_format=layout)
        to_q, to_first, to_second = backward(grad, q, first, second, ctx.heads, ctx.spatial)
        return to_q, to_first, None if second is None else to_second, None, None

    differentiate(forward, save, pull)
    once_differentiable(backward)
    batch(forward, {0, 1, 2}, (0,))
    batch(backward, {0, 1, 2, 3}, (0, 0, 0))
    return forward


def _gpu_backward(
    grad: Tensor, q: Tensor, first: Tensor, second: Tensor | None, heads: int, spatial: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from fastscore_kernels.gpu import tap_fuse as gpu

    to_q, to_first, to_second = gpu.tap_fuse_backward(grad, q, first, second, heads, spatial)
    return to_q, to_first, q.new_empty(0) if to_second is None else to_second


_register_native()
provide("triton", _register_triton)
