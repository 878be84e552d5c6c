"""Vector-Jacobian product of tap_fuse.

Own positions take one launch. All positions take one by queries, which leaves the softmax's
normaliser in memory, and one by keys for each tap: no sum is shared, so none depends on order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fastscore_kernels.gpu.attention import LOG2_E, attend, own_position_weights, plan_attention
from fastscore_kernels.gpu.common import begin, dot
from fastscore_kernels.gpu.launch import ceil_div, launch, like, power_of_two
from torch import Tensor


@triton.jit
def own_position_backward_kernel(
    grad,
    q,
    first,
    second,
    grad_q,
    grad_first,
    grad_second,
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
    at = r * C + h * D + d
    key = r * (2 * C) + h * D + d
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    dtype = grad_q.dtype.element_ty
    if SECOND:
        query = tl.load(q + at, mask=mask, other=0.0).to(tl.float32)
        k0 = tl.load(first + key, mask=mask, other=0.0).to(tl.float32)
        k1 = tl.load(second + key, mask=mask, other=0.0).to(tl.float32)
        w0, w1 = own_position_weights(query, k0, k1, SCALE)
        v0 = tl.load(first + key + C, mask=mask, other=0.0).to(tl.float32)
        v1 = tl.load(second + key + C, mask=mask, other=0.0).to(tl.float32)
        # of two weights that sum to one: the logits' cotangents are opposite
        pull = tl.sum(g * (v0 - v1), axis=2, keep_dims=True) * (w0 * w1 * SCALE)
        tl.store(grad_q + at, (pull * (k0 - k1)).to(dtype), mask=mask)
        tl.store(grad_first + key, (pull * query).to(dtype), mask=mask)
        tl.store(grad_first + key + C, (w0 * g).to(dtype), mask=mask)
        tl.store(grad_second + key, (-pull * query).to(dtype), mask=mask)
        tl.store(grad_second + key + C, (w1 * g).to(dtype), mask=mask)
    else:
        zero = tl.zeros_like(g).to(dtype)
        tl.store(grad_q + at, zero, mask=mask)
        tl.store(grad_first + key, zero, mask=mask)
        tl.store(grad_first + key + C, g.to(dtype), mask=mask)


@triton.jit
def pull_queries(
    query,
    g,
    tap,
    normaliser,
    delta,
    acc,
    N,
    C: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add to acc [BLOCK_M, BLOCK_D] what queries receive through the keys of a tap."""
    d = tl.arange(0, BLOCK_D)
    for at in range(0, N, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        mask = (n < N)[:, None] & (d < D)[None, :]
        places = tap + n[:, None] * (2 * C) + d[None, :]
        keys = tl.load(places, mask=mask, other=0.0)
        values = tl.load(places + C, mask=mask, other=0.0)
        empty = tl.zeros((query.shape[0], BLOCK_N), tl.float32)
        logits = dot(query, tl.trans(keys), empty) * SCALE
        weights = tl.exp2(logits - normaliser[:, None])
        pull = weights * (dot(g, tl.trans(values), empty) - delta[:, None])
        # keys beyond the last are zero: what their weights are does not matter
        acc = dot(pull.to(keys.dtype), keys, acc)
    return acc


@triton.jit
def queries_backward_kernel(
    grad,
    q,
    first,
    second,
    grad_q,
    softmax,
    N,
    tiles,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Cotangent of BLOCK_M queries, and softmax [B, HEADS, 2, N] fp32 (normaliser, delta)."""
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
    g = tl.load(grad + places, mask=mask, other=0.0)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    base = b * N * 2 * C + head * D
    top, total, out = attend(
        query, first + base, top, total, out, N, 2 * C, C, D, SCALE_BITS, BLOCK_N, BLOCK_D
    )
    if SECOND:
        top, total, out = attend(
            query, second + base, top, total, out, N, 2 * C, C, D, SCALE_BITS, BLOCK_N, BLOCK_D
        )
    normaliser = top + tl.log2(total)
    delta = tl.sum(out / total[:, None] * g.to(tl.float32), axis=1)
    row = softmax + (b * HEADS + head) * 2 * N
    tl.store(row + n, normaliser, mask=n < N)
    tl.store(row + N + n, delta, mask=n < N)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    acc = pull_queries(
        query, g, first + base, normaliser, delta, acc, N, C, D, SCALE_BITS, BLOCK_N, BLOCK_D
    )
    if SECOND:
        acc = pull_queries(
            query, g, second + base, normaliser, delta, acc, N, C, D, SCALE_BITS, BLOCK_N, BLOCK_D
        )
    tl.store(grad_q + places, (acc * SCALE).to(grad_q.dtype.element_ty), mask=mask)


@triton.jit
def keys_backward_kernel(
    grad,
    q,
    tap,
    softmax,
    grad_tap,
    N,
    tiles,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Cotangents of BLOCK_N keys and values of one tap, sample and head."""
    begin(DEPENDENT)
    D: tl.constexpr = C // HEADS
    program = tl.program_id(0)
    head = (program // tiles) % HEADS
    b = (program // (tiles * HEADS)).to(tl.int64)
    n = (program % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    mask = (n < N)[:, None] & (d < D)[None, :]
    places = b * N * 2 * C + n[:, None] * (2 * C) + head * D + d[None, :]
    keys = tl.load(tap + places, mask=mask, other=0.0)
    values = tl.load(tap + places + C, mask=mask, other=0.0)
    row = softmax + (b * HEADS + head) * 2 * N
    to_keys = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    to_values = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    base = b * N * C + head * D
    for at in range(0, N, BLOCK_M):
        m = at + tl.arange(0, BLOCK_M)
        known = (m < N)[:, None] & (d < D)[None, :]
        theirs = base + m[:, None] * C + d[None, :]
        query = tl.load(q + theirs, mask=known, other=0.0)
        g = tl.load(grad + theirs, mask=known, other=0.0)
        # infinite for queries beyond the last: their weights vanish
        normaliser = tl.load(row + m, mask=m < N, other=float("inf"))
        delta = tl.load(row + N + m, mask=m < N, other=0.0)
        empty = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        logits = dot(keys, tl.trans(query), empty) * SCALE_BITS
        weights = tl.exp2(logits - normaliser[None, :])
        to_values = dot(weights.to(g.dtype), g, to_values)
        pull = weights * (dot(values, tl.trans(g), empty) - delta[None, :])
        to_keys = dot(pull.to(query.dtype), query, to_keys)
    dtype = grad_tap.dtype.element_ty
    tl.store(grad_tap + places, (to_keys * SCALE).to(dtype), mask=mask)
    tl.store(grad_tap + places + C, to_values.to(dtype), mask=mask)


def tap_fuse_backward(
    grad: Tensor, q: Tensor, first: Tensor, second: Tensor | None, heads: int, spatial: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cotangents like q, first and second (None without a second tap)."""
    last = torch.channels_last
    g, query, one = (t.contiguous(memory_format=last) for t in (grad, q, first))
    two = one if second is None else second.contiguous(memory_format=last)
    outs = [torch.empty_like(query), torch.empty_like(one)]
    outs.append(outs[1] if second is None else torch.empty_like(two))
    plan = plan_attention("tap_fuse_backward", q, heads, spatial)
    pull = _pull_all if spatial else _pull_own
    pull(g, query, one, two, outs, second is not None, heads, plan)
    to_q, to_first = like(outs[0], q), like(outs[1], first)
    return to_q, to_first, None if second is None else like(outs[2], second)


def _pull_own(
    g: Tensor,
    q: Tensor,
    first: Tensor,
    second: Tensor,
    outs: list[Tensor],
    both: bool,
    heads: int,
    plan: dict[str, int],
) -> None:
    channels, rows = q.shape[1], q.shape[0] * q.shape[2] * q.shape[3]
    launch(
        own_position_backward_kernel,
        (ceil_div(rows, plan["block_r"]),),
        g,
        q,
        first,
        second,
        *outs,
        rows,
        C=channels,
        HEADS=heads,
        SCALE=(channels // heads) ** -0.5,
        SECOND=both,
        BLOCK_R=plan["block_r"],
        BLOCK_H=power_of_two(heads),
        BLOCK_D=power_of_two(channels // heads),
        num_warps=plan["warps"],
    )


def _pull_all(
    g: Tensor,
    q: Tensor,
    first: Tensor,
    second: Tensor,
    outs: list[Tensor],
    both: bool,
    heads: int,
    plan: dict[str, int],
) -> None:
    batch, channels, positions = q.shape[0], q.shape[1], q.shape[2] * q.shape[3]
    softmax = torch.empty(batch, heads, 2, positions, dtype=torch.float32, device=q.device)
    scale = (channels // heads) ** -0.5
    common: dict[str, Any] = {
        "C": channels,
        "HEADS": heads,
        "SCALE": scale,
        "SCALE_BITS": scale * LOG2_E,
        "BLOCK_M": plan["block_m"],
        "BLOCK_N": plan["block_n"],
        "BLOCK_D": max(16, power_of_two(channels // heads)),
        "num_warps": plan["warps"],
        "num_stages": plan["stages"],
    }
    tiles = ceil_div(positions, plan["block_m"])
    given = (g, q, first, second, outs[0], softmax, positions, tiles)
    launch(queries_backward_kernel, (tiles * heads * batch,), *given, SECOND=both, **common)
    tiles = ceil_div(positions, plan["block_n"])
    for tap, out in ((first, outs[1]), (second, outs[2]))[: 1 + both]:
        given = (g, q, tap, softmax, out, positions, tiles)
        launch(keys_backward_kernel, (tiles * heads * batch,), *given, **common)


__all__ = ["tap_fuse_backward"]
