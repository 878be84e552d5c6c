"""Attention over the tokens of one or two taps, everything channels-last.

Own position: two tokens a query and head, a few products, no tensor core could help. All positions:
a running softmax over tiles of keys, no logits in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastscore_kernels.gpu.attention import LOG2_E, attend, own_position_weights, plan_attention
from fastscore_kernels.gpu.common import begin
from fastscore_kernels.gpu.launch import ceil_div, launch, like, power_of_two
from fastscore_kernels.gpu.tap_fuse_backward import tap_fuse_backward
from torch import Tensor


@triton.jit
def own_position_kernel(
    q,
    first,
    second,
    out,
    rows,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    SCALE: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """BLOCK_R positions, of any sample."""
    begin(DEPENDENT)
    D: tl.constexpr = C // HEADS
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None, None]
    h = tl.arange(0, BLOCK_H)[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    mask = (r < rows) & (h < HEADS) & (d < D)
    c = h * D + d
    v0 = tl.load(first + r * (2 * C) + C + c, mask=mask, other=0.0).to(tl.float32)
    if SECOND:
        query = tl.load(q + r * C + c, mask=mask, other=0.0).to(tl.float32)
        k0 = tl.load(first + r * (2 * C) + c, mask=mask, other=0.0).to(tl.float32)
        k1 = tl.load(second + r * (2 * C) + c, mask=mask, other=0.0).to(tl.float32)
        v1 = tl.load(second + r * (2 * C) + C + c, mask=mask, other=0.0).to(tl.float32)
        w0, w1 = own_position_weights(query, k0, k1, SCALE)
        v0 = w0 * v0 + w1 * v1
    tl.store(out + r * C + c, v0.to(out.dtype.element_ty), mask=mask)


@triton.jit
def all_positions_kernel(
    q,
    first,
    second,
    out,
    N,
    tiles,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    SCALE: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """BLOCK_M queries of one sample and head."""
    begin(DEPENDENT)
    D: tl.constexpr = C // HEADS
    program = tl.program_id(0)
    head = (program // tiles) % HEADS
    b = (program // (tiles * HEADS)).to(tl.int64)
    n = (program % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    mask = (n < N)[:, None] & (d < D)[None, :]
    places = b * N * C + n[:, None] * C + head * D + d[None, :]
    query = tl.load(q + places, mask=mask, other=0.0)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    base = b * N * 2 * C + head * D
    top, total, acc = attend(
        query, first + base, top, total, acc, N, 2 * C, C, D, SCALE, BLOCK_N, BLOCK_D
    )
    if SECOND:
        top, total, acc = attend(
            query, second + base, top, total, acc, N, 2 * C, C, D, SCALE, BLOCK_N, BLOCK_D
        )
    tl.store(out + places, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)


def tap_fuse(q: Tensor, first: Tensor, second: Tensor | None, heads: int, spatial: bool) -> Tensor:
    """Attention of q [B, C, H, W] over taps [B, 2C, H, W]; like q.

    `fastscore_kernels.reference.tap_fuse` says what it computes.
    """
    batch, channels = q.shape[:2]
    positions = q.shape[2] * q.shape[3]
    last = torch.channels_last
    query, first = q.contiguous(memory_format=last), first.contiguous(memory_format=last)
    other = first if second is None else second.contiguous(memory_format=last)
    out = torch.empty_like(query)
    given = (query, first, other, out)
    common = {"C": channels, "HEADS": heads, "SECOND": second is not None}
    scale = (channels // heads) ** -0.5
    plan = plan_attention("tap_fuse", q, heads, spatial)
    if spatial:
        tiles = ceil_div(positions, plan["block_m"])
        launch(
            all_positions_kernel,
            (tiles * heads * batch,),
            *given,
            positions,
            tiles,
            SCALE=scale * LOG2_E,
            BLOCK_M=plan["block_m"],
            BLOCK_N=plan["block_n"],
            BLOCK_D=max(16, power_of_two(channels // heads)),
            num_warps=plan["warps"],
            num_stages=plan["stages"],
            **common,
        )
    else:
        launch(
            own_position_kernel,
            (ceil_div(batch * positions, plan["block_r"]),),
            *given,
            batch * positions,
            SCALE=scale,
            BLOCK_R=plan["block_r"],
            BLOCK_H=power_of_two(heads),
            BLOCK_D=power_of_two(channels // heads),
            num_warps=plan["warps"],
            **common,
        )
    return like(out, q)


__all__ = ["tap_fuse", "tap_fuse_backward"]
