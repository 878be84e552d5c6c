"""What both passes of attention share: weights, running softmax, block sizes."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from fastscore_kernels.gpu.common import dot
from fastscore_kernels.gpu.launch import ceil_div, choose, device_of, power_of_two
from torch import Tensor

LOG2_E = math.log2(math.e)


@triton.jit
def own_position_weights(q, k0, k1, SCALE: tl.constexpr):
    """Weights [BLOCK_R, BLOCK_H, 1] of both taps' tokens from q, k [BLOCK_R, BLOCK_H, BLOCK_D]."""
    l0 = tl.sum(q * k0, axis=2, keep_dims=True) * SCALE
    l1 = tl.sum(q * k1, axis=2, keep_dims=True) * SCALE
    top = tl.maximum(l0, l1)
    e0 = tl.exp(l0 - top)
    e1 = tl.exp(l1 - top)
    return e0 / (e0 + e1), e1 / (e0 + e1)


@triton.jit
def attend(
    query,
    tap,
    top,
    total,
    acc,
    N,
    ROW: tl.constexpr,
    VALUES: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Go on with a running softmax over all keys of a tap (at its head's first channel).

    A position's keys lie ROW elements apart, its values VALUES after its keys.

    query [BLOCK_M, BLOCK_D]; top, total [BLOCK_M] the largest logit, in bits, and the sum of
    weights so far; acc [BLOCK_M, BLOCK_D] the sum of weighted values.
    """
    d = tl.arange(0, BLOCK_D)
    for at in range(0, N, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        mask = (n < N)[:, None] & (d < D)[None, :]
        places = tap + n[:, None] * ROW + d[None, :]
        keys = tl.load(places, mask=mask, other=0.0)
        values = tl.load(places + VALUES, mask=mask, other=0.0)
        logits = dot(query, tl.trans(keys), tl.zeros((query.shape[0], BLOCK_N), tl.float32))
        logits = tl.where((n < N)[None, :], logits * SCALE, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))
        weights = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = dot(weights.to(values.dtype), values, acc * shrink[:, None])
        top = higher
    return top, total, acc


def plan_attention(op: str, q: Tensor, heads: int, spatial: bool) -> dict[str, int]:
    """Block sizes for queries q [B, C, H, W]."""
    batch, channels, height, width = (int(s) for s in q.shape)
    positions = height * width
    block_d = power_of_two(channels // heads)
    device = device_of(q)
    if spatial:
        block_d = max(16, block_d)
        # the fewest queries a tensor core takes, more where the processor is full anyway
        programs = batch * heads * ceil_div(positions, 64)
        # three tf32 products a dot: fp32 has registers for the smallest tiles only
        narrow = q.element_size() == 2
        full = narrow and programs >= device.multiprocessors and block_d <= 64
        block_m = 64 if full else 16
        block_n = (64 if narrow else 32) if block_d <= 64 else 16
        rule = {
            "block_m": block_m,
            "block_n": min(block_n, max(16, power_of_two(positions))),
            "warps": 4,
            "stages": 2,
        }
    else:
        block = power_of_two(heads) * block_d
        rule = {"block_r": max(1, 2048 // block), "warps": 4}
    shape = {
        "dtype": str(q.dtype).removeprefix("torch."),
        "batch": batch,
        "channels": channels,
        "positions": positions,
        "heads": heads,
    }
    return choose(f"{op}_all" if spatial else f"{op}_own", device, shape, rule)
