"""The cotangents of a classifier's logits that a guided step pulls back, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastscore_kernels import checks, reference
from fastscore_kernels.backends import choose, provide
from fastscore_kernels.registration import call, define_triton
from torch import Tensor

_SCHEMA = "(Tensor logits, Tensor label) -> Tensor"
# kernels hold a sample's classes in the registers of one warp
_MOST = 4096


def class_cotangents(logits: Tensor, label: Tensor, backend: str | None = None) -> Tensor:
    """softmax(logits), then e_label - softmax(logits): [2 B, K] of logits [B, K] and of their type.

    They are those of logsumexp and of the label's log-probability. label [B] int64; where it is -1
    the second is zero. Softmax in fp32. Where a derivative is wanted, and on the native backend,
    which has no kernel of it, the reference runs. ValueError names the argument that does not fit,
    or what a backend that is not there needs.
    """
    checks.floating("class_cotangents", "logits", logits)
    if logits.ndim != 2 or not 0 < logits.shape[1] <= _MOST:
        raise ValueError(
            f"class_cotangents: logits has shape {tuple(logits.shape)}; expected [B, K], K in 1 .. "
            f"{_MOST}"
        )
    if label.shape != logits.shape[:1] or label.dtype != torch.int64:
        raise ValueError(
            f"class_cotangents: label is {label.dtype} of shape {tuple(label.shape)}; expected "
            f"int64 of shape {(logits.shape[0],)}"
        )
    checks.on_device("class_cotangents", "label", label, "logits", logits)
    wanted = torch.is_grad_enabled() and logits.requires_grad
    if choose(backend, logits) != "triton" or wanted or torch._C._are_functorch_transforms_active():
        return reference.class_cotangents(logits, label)
    return call(*_OPERATORS["triton"], logits.contiguous(), label)


def _fake(logits: Tensor, label: Tensor) -> Tensor:
    return logits.new_empty((2 * logits.shape[0], logits.shape[1]))


# a backend's operator and its kernel
_OPERATORS: dict[str, tuple[Any, Callable]] = {}


def _register_triton() -> None:
    from fastscore_kernels.gpu import class_cotangents as gpu

    op = define_triton("fastscore_triton::class_cotangents", _SCHEMA, gpu.class_cotangents, _fake)
    _OPERATORS["triton"] = op, gpu.class_cotangents


provide("triton", _register_triton)
