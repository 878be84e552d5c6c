"""Argument checks that every backend shares: a ValueError before anything is launched."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

# float64 is a yardstick: the reference alone computes in it
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# elements of one tensor: kernels count them in 32-bit integers
LIMIT = 2**31


def activation(op: str, name: str, t: Tensor, channels: int | None = None) -> None:
    """Require [B, C, H, W], not empty, dense, fp32, bf16 or fp16, below 2^31 elements."""
    if t.ndim != 4:
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected [B, C, H, W]")
    if channels is not None and t.shape[1] != channels:
        raise ValueError(f"{op}: {name} has {t.shape[1]} channels; expected {channels}")
    # every call runs this: the questions first, the sentences apart
    if t.dtype not in DTYPES:
        floating(op, name, t)
    compiling = is_compiling()
    if t.numel() == 0 or (not compiling and t.numel() >= LIMIT):
        extent(op, name, t)
    # kernels look again; here the layout of a traced or batched tensor is not settled yet
    if compiling or t.is_contiguous() or torch._C._functorch.is_batchedtensor(t):
        return
    if not t.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{op}: {name} of shape {tuple(t.shape)} has strides {t.stride()}; expected a "
            "contiguous or channels-last tensor, which .contiguous() makes"
        )


def batched(t: Tensor) -> bool:
    """Whether torch.func.vmap has added a dimension to ``t``."""
    return not is_compiling() and torch._C._functorch.is_batchedtensor(t)


def floating(op: str, name: str, t: Tensor) -> None:
    """Require fp32, bf16 or fp16."""
    if t.dtype not in DTYPES:
        raise ValueError(f"{op}: {name} is {t.dtype}; expected float32, bfloat16 or float16")


def extent(op: str, name: str, t: Tensor) -> None:
    """Require at least one element and fewer than 2^31."""
    size = t.numel()
    if size == 0:
        raise ValueError(
            f"{op}: {name} of shape {tuple(t.shape)} is empty; expected at least one sample"
        )
    # a compiler would turn the bound into one on a dynamic batch
    if not is_compiling() and size >= LIMIT:
        raise ValueError(
            f"{op}: {name} has {size} elements; expected fewer than 2^31, so split the batch"
        )


def alike(op: str, name: str, t: Tensor, other: str, like: Tensor) -> None:
    """Require the shape, dtype and device of another argument."""
    if t.shape != like.shape:
        raise ValueError(
            f"{op}: {name} has shape {tuple(t.shape)}; expected that of {other}, "
            f"{tuple(like.shape)}"
        )
    placed(op, name, t, other, like)


def placed(op: str, name: str, t: Tensor, other: str, like: Tensor) -> None:
    """Require the dtype and device of another argument."""
    if t.dtype != like.dtype:
        raise ValueError(f"{op}: {name} is {t.dtype}; expected that of {other}, {like.dtype}")
    on_device(op, name, t, other, like)


def on_device(op: str, name: str, t: Tensor, other: str, like: Tensor) -> None:
    """Require the device of another argument."""
    if t.device != like.device:
        raise ValueError(
            f"{op}: {name} is on {t.device}; expected the device of {other}, {like.device}"
        )


def parameter(op: str, name: str, p: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """Require a contiguous tensor of the given shape, fp32 or of x's dtype, on x's device."""
    if p.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(p.shape)}; expected {tuple(shape)}")
    if p.dtype is not torch.float32 and p.dtype is not x.dtype:
        raise ValueError(f"{op}: {name} is {p.dtype}; expected float32 or {x.dtype}")
    if p.device != x.device:
        on_device(op, name, p, "the input", x)
    if not p.is_contiguous():
        raise ValueError(f"{op}: {name} has strides {p.stride()}; expected a contiguous tensor")


def parameters(op: str, x: Tensor, shape: tuple[int, ...], **named: Tensor) -> None:
    """Require parameters of one shape and one dtype."""
    first, kind = next(iter(named.items()))
    for name, p in named.items():
        parameter(op, name, p, shape, x)
        if p.dtype is not kind.dtype:
            placed(op, name, p, first, kind)


def dividing(op: str, name: str, count: int, channels: int) -> None:
    """Require that ``count`` groups or heads divide the channels."""
    if not isinstance(count, int) or count < 1 or channels % count:
        raise ValueError(
            f"{op}: {name} is {count}; expected a whole number that divides {channels} channels"
        )
