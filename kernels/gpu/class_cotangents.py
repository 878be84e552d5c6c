"""The cotangents of a classifier's logits that a guided step pulls back, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastscore_kernels.gpu.common import begin
from fastscore_kernels.gpu.launch import launch, power_of_two
from torch import Tensor


@triton.jit
def class_cotangents_kernel(
    logits,
    label,
    label_stride,
    out,
    batch,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program a sample: softmax, then what is left of it to one where the label is."""
    begin(DEPENDENT)
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    known = k < K
    row = tl.load(logits + b * K + k, mask=known, other=float("-inf")).to(tl.float32)
    power = tl.exp(row - tl.max(row, axis=0))
    p = power / tl.sum(power, axis=0)
    chosen = tl.load(label + b * label_stride)
    pull = tl.where(chosen >= 0, tl.where(k == chosen, 1.0 - p, -p), 0.0)
    tl.store(out + b * K + k, p.to(out.dtype.element_ty), mask=known)
    tl.store(out + (batch + b) * K + k, pull.to(out.dtype.element_ty), mask=known)


def class_cotangents(logits: Tensor, label: Tensor) -> Tensor:
    """[2 B, K] of logits [B, K], contiguous, and label [B] int64 of any stride; of logits' type."""
    batch, classes = logits.shape
    out = torch.empty(2 * batch, classes, dtype=logits.dtype, device=logits.device)
    launch(
        class_cotangents_kernel,
        (batch,),
        logits,
        label,
        label.stride(0),
        out,
        batch,
        K=classes,
        BLOCK_K=power_of_two(classes),
        num_warps=1,
    )
    return out


__all__ = ["class_cotangents"]
