"""A convolution's bias, a band's offset and a residual added in one launch, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastscore_kernels.gpu.common import begin
from fastscore_kernels.gpu.launch import ceil_div, choose, device_of, is_last, launch, like
from torch import Tensor


@triton.jit
def bias_add_kernel(
    x,
    bias,
    band,
    band_channel,
    band_row,
    residual,
    y,
    size,
    N,
    W,
    C: tl.constexpr,
    LAST: tl.constexpr,
    BAND: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One stretch of BLOCK elements as they lie in memory."""
    begin(DEPENDENT)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    if LAST:
        c = at % C
        n = at // C % N
    else:
        c = at // N % C
        n = at % N
    total = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    if BAND:
        offset = band + c * band_channel + n // W * band_row
        total += tl.load(offset, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        total += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=mask)


def bias_add(x: Tensor, bias: Tensor, band: Tensor | None, residual: Tensor | None) -> Tensor:
    """x [B, C, H, W] + bias [C] + band [1, C, H, 1] + residual, like x; None adds nothing."""
    size = x.numel()
    shape = {"dtype": str(x.dtype).removeprefix("torch."), "size": size}
    plan = choose("bias_add", device_of(x), shape, {"block": 1024, "warps": 4})
    y = torch.empty_like(x)
    launch(
        bias_add_kernel,
        (ceil_div(size, plan["block"]),),
        x,
        bias,
        # in place of what is not there, pointers that nobody reads
        *((bias, 0, 0) if band is None else (band, band.stride(1), band.stride(2))),
        x if residual is None else like(residual, x),
        y,
        size,
        x.shape[2] * x.shape[3],
        x.shape[3],
        C=x.shape[1],
        LAST=is_last(x),
        BAND=band is not None,
        RESIDUAL=residual is not None,
        BLOCK=plan["block"],
        num_warps=plan["warps"],
    )
    return y


__all__ = ["bias_add"]
